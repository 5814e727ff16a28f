"""Reads a Keras network that runs eagerly. For one batch, each layer's `call` is wrapped, and its output goes through
an identity whose backward pass reads the gradient.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ....errors import InputError
from ....measures import Measure, reduce_all
from ...own_passes import in_own_pass
from ...results import HostObservations, Observation, TensorKey
from ..calls import output_of
from ..internals import copy_logits
from ..layers import named_modules
from ..watching import map_tensors, wrapped
from .op_recorder import EagerRecorder


def visits(model: Any, example: Any) -> dict[str, list[Any]]:
    """Run the network on an example; return the output shapes of each layer that was called, in order."""
    visited: dict[str, list[Any]] = {}

    def around(name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        shapes: list[Any] = []

        def add_shape(_: str, tensor: Any) -> Any:
            shapes.append(tuple(tensor.shape))
            return tensor

        map_tensors(output, "", add_shape)
        visited.setdefault(name, []).append(shapes[0] if len(shapes) == 1 else tuple(shapes))
        return output

    inputs = example if isinstance(example, tuple) else (example,)
    with wrapped({named.name: named.module for named in named_modules(model)}, around):
        output_of(model, [tf.convert_to_tensor(x) for x in inputs])
    return visited


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return 0, 1


def layouts(model: Any, given: Mapping[str, str]) -> None:
    """Return nothing: Keras layers have their samples first, and say where their channels are.

    Raises:
        InputError: axes are given.
    """
    if given:
        raise InputError("axes= is not there for Keras: its layers say where their samples and channels are")


def new_probe(
    modules: Mapping[str, Any],
    measures: Sequence[Measure],
    phases: frozenset[str],
    scaler: Any,
    watched: Any,
    layouts: Any = None,
    n_samples: int | None = None,
) -> "LayerProbe":
    """Return a probe of layers; `watched` is the whole network where the batch is watched for a diagnosis."""
    return LayerProbe(modules, measures, phases, scaler, watched)


@dataclass
class LayerProbe:
    """Reads the sites of one batch; layers are wrapped from `__enter__` to `__exit__`.

    Attributes:
        watched: the whole network, where this batch is also watched for a diagnosis.
        observations: in order of arrival.
        order: the sites in the order in which they first gave an output.
        arrived: the sites that a gradient has reached.
        views: always empty; TensorFlow has no in-place operations on views.
        unscaled: an output was float16, and there is no scaler.
        scale: the scale of the `LossScaleOptimizer` at the first gradient; None without one.
        n_samples, inputs, unread: nothing; every layer has its samples first.
    """

    modules: Mapping[str, Any]
    measures: Sequence[Measure]
    phases: frozenset[str]
    scaler: Any = None
    watched: Any = None
    observations: list[Observation] = field(default_factory=list)
    order: dict[str, None] = field(default_factory=dict)
    arrived: set[str] = field(default_factory=set)
    views: set[str] = field(default_factory=set)
    unscaled: bool = False
    scale: float | None = None
    n_samples: int | None = None
    inputs: set[int] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls: dict[str, int] = defaultdict(int)
        self._repeats: dict[TensorKey, int] = defaultdict(int)
        self._stack = ExitStack()
        self._thread = 0
        self._traced_layer: str | None = None
        self._came: set[tuple[str, int, str]] = set()
        unwatched = self.watched is None
        self._op_recorder = None if unwatched else EagerRecorder(self.watched, self._unscaled, channels_second)

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            if self._op_recorder is not None:  # first, so that it sees what layers return before any hook
                stack.enter_context(self._op_recorder)
            stack.enter_context(wrapped(self.modules, self._read_output))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread = 0
        self._stack.close()
        if self._traced_layer is not None and kind is None:
            raise InputError(
                f"layer {self._traced_layer!r} ran in a traced graph (tf.function, fit, predict), where batches cannot "
                "be told apart; pass undertow.keras.GradientRecorder to fit, or run it eagerly: "
                "compile(run_eagerly=True), or tf.config.run_functions_eagerly(True)"
            )

    def diagnosis_points(self, names: Sequence[str]) -> list[Any]:
        """Return what was seen for a diagnosis of the named sites; nothing where this batch was not watched."""
        return [] if self._op_recorder is None else self._op_recorder.close(names, self._came)

    def transfer(self, points: Sequence[Any], others: Sequence[Observation] = ()) -> HostObservations:
        """Return what was observed, here and by others, which is on the host already."""
        return HostObservations([*self.observations, *others])

    def _read_output(self, name: str, layer: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if threading.get_ident() != self._thread or in_own_pass():
            return output
        with nullcontext() if self._op_recorder is None else self._op_recorder.paused():
            return self._read(name, layer, output)

    def _read(self, name: str, layer: Any, output: Any) -> Any:
        call = self._calls[name]
        self._calls[name] += 1
        self.order[name] = None
        return map_tensors(output, "", lambda position, tensor: self._read_tensor(name, call, position, layer, tensor))

    def _read_tensor(self, name: str, call: int, position: str, layer: Any, tensor: Any) -> Any:
        if not hasattr(tensor, "numpy"):  # Keras and TensorFlow would wrap an error raised here; `__exit__` raises it
            self._traced_layer = name if self._traced_layer is None else self._traced_layer
            return tensor
        if "forward" in self.phases:
            self._observe(TensorKey(name, call, position, "forward"), layer, tensor)
        if "backward" not in self.phases:
            return tensor
        self.unscaled |= tensor.dtype == tf.float16 and self.scaler is None
        passed = _with_gradient_hook(
            tensor, partial(self._read_gradient, TensorKey(name, call, position, "backward"), layer)
        )
        copy_logits(tensor, passed)
        if self._op_recorder is not None:
            self._op_recorder.begin(name, call, position, layer, tensor, passed)
        return passed

    def _read_gradient(self, key: TensorKey, layer: Any, gradient: Any) -> None:
        if not self._thread:  # the batch is over
            return
        self.arrived.add(key.site)
        self._came.add((key.site, key.call, key.output))
        self._observe(key, layer, self._unscaled(gradient))

    def _unscaled(self, gradient: Any) -> Any:
        """Divide by the loss scale, in float32 or float64."""
        scale = getattr(self.scaler, "dynamic_scale", None)
        if scale is None:
            return gradient
        if self.scale is None:
            self.scale = float(scale)
        wide = gradient if gradient.dtype == tf.float64 else tf.cast(gradient, tf.float32)
        return wide / self.scale

    def _observe(self, key: TensorKey, layer: Any, tensor: Any) -> None:
        original = as_array(tensor)
        x = channels_second(layer, original)
        repeat = self._repeats[key]
        self._repeats[key] += 1
        states = reduce_all(self.measures, x, original, 0 if original.ndim else None)
        self.observations.append(Observation(key, repeat, str(x.dtype), len(x), states))


def _with_gradient_hook(tensor: Any, arrived: Callable[[Any], None]) -> Any:
    """Return a tensor of the same values, and call `arrived` with each gradient that reaches it."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def identity(x: Any) -> Any:
        def backward(g: Any) -> Any:
            arrived(tf.convert_to_tensor(g))
            return g

        return tf.identity(x), backward

    return identity(tensor)


def as_array(tensor: Any) -> npt.NDArray[Any]:
    """Return a tensor's values; bfloat16, which NumPy lacks, becomes float32."""
    return np.asarray(tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor)


def channels_second(layer: Any, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View a layer's output, or its gradient, as `(B, C, ...)`: samples, then channels or features, then space."""
    if x.ndim < 2:
        return x.reshape(-1, 1)
    first = getattr(layer, "data_format", None) or keras.config.image_data_format()
    return x if first == "channels_first" else np.moveaxis(x, -1, 1)
