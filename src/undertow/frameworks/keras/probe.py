"""Reads a Keras network while it runs eagerly: a layer's `call` is wrapped for one batch, its output passed on through
an identity whose backward takes the gradient that arrives.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ...errors import InputError
from ...measures import Measure
from ..inside import Reading
from .calls import output_of
from .layers import identity as identity
from .layers import parts as parts

Taken = Callable[[str, Any, Any], Any]


def visits(model: Any, example: Any) -> dict[str, list[Any]]:
    """Run the network on an example; return the shapes of the outputs of each layer that was called, in order."""
    seen: dict[str, list[Any]] = {}

    def after(name: str, layer: Any, output: Any) -> Any:
        shapes: list[Any] = []

        def note(_: str, tensor: Any) -> Any:
            shapes.append(tuple(tensor.shape))
            return tensor

        _each(output, "", note)
        seen.setdefault(name, []).append(shapes[0] if len(shapes) == 1 else tuple(shapes))
        return output

    inputs = example if isinstance(example, tuple) else (example,)
    with wrapped({part.name: part.module for part in parts(model)}, after):
        output_of(model, [tf.convert_to_tensor(x) for x in inputs])
    return seen


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return 0, 1


@contextmanager
def wrapped(layers: Mapping[str, Any], after: Taken) -> Iterator[None]:
    """Let `after(name, layer, output)` see, and replace, what each layer's calls return, inside the context alone."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(_put, layer, vars(layer).get("call"))
            _put(layer, partial(_called, name, layer, layer.call, after))
        yield


def _called(name: str, layer: Any, call: Callable[..., Any], after: Taken, /, *args: Any, **kwargs: Any) -> Any:
    return after(name, layer, call(*args, **kwargs))


def _put(layer: Any, call: Any) -> None:
    """Set or remove a layer's own `call`, past Keras, which would track it as state."""
    if call is None:
        vars(layer).pop("call", None)
    else:
        vars(layer)["call"] = call


def _each(output: Any, key: str, act: Callable[[str, Any], Any]) -> Any:
    """Return an output with each tensor of floating point replaced; keys are "" for one alone, "0", "1.hidden"."""
    if isinstance(output, tf.Tensor):
        return act(key, output) if output.dtype.is_floating else output
    if isinstance(output, Mapping):
        made: Any = type(output)
        return made((name, _each(value, _joined(key, name), act)) for name, value in output.items())
    if isinstance(output, tuple | list):
        items = [_each(value, _joined(key, place), act) for place, value in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


@dataclass
class Probe:
    """Reads the sites of one batch between `with` and its end; layers are wrapped only in between.

    Attributes:
        readings: in order of arrival.
        order: the sites in the order in which they first gave an output.
        arrived: the sites at which a gradient has come.
        views: none; TensorFlow has no in-place operations on them.
        unscaled: an output was float16, and there is no scaler.
        scale: of the `LossScaleOptimizer` when the first gradient came; None without one.
    """

    modules: Mapping[str, Any]
    measures: Sequence[Measure]
    phases: frozenset[str]
    scaler: Any = None
    watched: Any = None
    readings: list[Reading] = field(default_factory=list)
    order: dict[str, None] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    views: set[str] = field(default_factory=set)
    unscaled: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.watched is not None:
            raise InputError("diagnose watches PyTorch networks alone; record a Keras network without it")
        self._calls: dict[str, int] = defaultdict(int)
        self._repeats: dict[tuple[str, int, str], int] = defaultdict(int)
        self._stack = ExitStack()
        self._thread = 0
        self._traced: str | None = None

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._stack.enter_context(wrapped(self.modules, self._take))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread = 0
        self._stack.close()
        if self._traced is not None and kind is None:
            raise InputError(
                f"layer {self._traced!r} ran in a traced graph (tf.function, fit, predict), where no batch can be told "
                "from another; run it eagerly: compile(run_eagerly=True), or tf.config.run_functions_eagerly(True)"
            )

    def points(self, names: Sequence[str]) -> list[Any]:
        """Return what was seen for a diagnosis: nothing, as yet."""
        return []

    def _take(self, name: str, layer: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return output
        call = self._calls[name]
        self._calls[name] += 1
        self.order[name] = None
        return _each(output, "", lambda key, tensor: self._met(name, call, key, layer, tensor))

    def _met(self, name: str, call: int, key: str, layer: Any, tensor: Any) -> Any:
        if not hasattr(tensor, "numpy"):  # an error raised here would come out wrapped in Keras's and TensorFlow's
            self._traced = name if self._traced is None else self._traced
            return tensor
        if "forward" in self.phases:
            self._read(name, call, key, "forward", 0, layer, tensor)
        if "backward" not in self.phases:
            return tensor
        self.unscaled |= tensor.dtype == tf.float16 and self.scaler is None
        passed = _passed_on(tensor, partial(self._arrived, name, call, key, layer))
        if hasattr(tensor, "_keras_logits"):  # Keras's losses go on from these, past the softmax
            passed._keras_logits = tensor._keras_logits
        return passed

    def _arrived(self, name: str, call: int, key: str, layer: Any, gradient: Any) -> None:
        if not self._thread:  # the batch is over
            return
        repeat = self._repeats[name, call, key]
        self._repeats[name, call, key] += 1
        self.arrived.add(name)
        self._read(name, call, key, "backward", repeat, layer, self._unscaled(gradient))

    def _unscaled(self, gradient: Any) -> Any:
        """Divide by the scale of the loss, in float32 at least."""
        scale = getattr(self.scaler, "dynamic_scale", None)
        if scale is None:
            return gradient
        if self.scale is None:
            self.scale = float(scale)
        wide = gradient if gradient.dtype == tf.float64 else tf.cast(gradient, tf.float32)
        return wide / self.scale

    def _read(self, name: str, call: int, key: str, phase: str, repeat: int, layer: Any, tensor: Any) -> None:
        x = arranged(layer, tensor)
        columns = tuple([measure.finished(x) for measure in self.measures])
        self.readings.append(Reading(name, call, key, phase, repeat, str(x.dtype), len(x), columns))


def _passed_on(tensor: Any, arrived: Callable[[Any], None]) -> Any:
    """Return a tensor of the same values, and tell of each gradient that comes back to it."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def passed(inside: Any) -> Any:
        def backward(g: Any) -> Any:
            arrived(tf.convert_to_tensor(g))
            return g

        return tf.identity(inside), backward

    return passed(tensor)


def arranged(layer: Any, tensor: Any) -> npt.NDArray[Any]:
    """Return a layer's output, or its gradient, as `(B, C, ...)`: samples, then channels or features, then space.

    bfloat16, which NumPy lacks, becomes float32.
    """
    x = np.asarray(tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor)
    if x.ndim < 2:
        return x.reshape(-1, 1)
    first = getattr(layer, "data_format", None) or keras.config.image_data_format()
    return x if first == "channels_first" else np.moveaxis(x, -1, 1)


class Landing:
    """Small results on their way to the host: those of TensorFlow are there already."""

    def __init__(self, probe: Probe, points: Sequence[Any]) -> None:
        self._readings = probe.readings
        held = [rows for reading in self._readings for columns in reading.columns for rows in columns.values()]
        arrays = [array for rows in held for array in (rows if isinstance(rows, list) else [rows])]
        self.nbytes = sum(getattr(array, "nbytes", 8) for array in arrays)

    def wait(self) -> list[Reading]:
        """Wait for nothing."""
        return self._readings
