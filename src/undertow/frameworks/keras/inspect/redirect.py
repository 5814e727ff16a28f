"""Gradients changed at layers' outputs while a context is open: each output goes through an identity of its own."""

import fnmatch
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, final

import keras
import numpy as np
import tensorflow as tf

from ....errors import InputError, RuleError, did_you_mean
from ....structures import map_tensors
from ...keras_layers import named_layers
from ...own_passes import in_own_pass
from ..calls import refuse_other_backends
from ..internals import copy_logits
from ..outputs import is_float
from ..watching import wrapped

Change = Callable[[Any], Any]


@final
class RedirectedLayers:
    """The sites of one `redirect`; layers are wrapped from `__enter__` to `__exit__`; see `undertow.redirect`.

    Attributes:
        changed: how many gradients each site's function was given, by the site's name.
    """

    def __init__(self, model: Any, sites: Mapping[str, Change]) -> None:
        refuse_other_backends()
        self._layers, self._changes = _matched_layers(model, sites)
        self.changed: Counter[str] = Counter(dict.fromkeys(self._layers, 0))
        self._stack = ExitStack()
        self._thread = 0
        self._ran: set[str] = set()
        self._traced = ""

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._stack.enter_context(wrapped(self._layers, self._around))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        self._thread = 0
        if kind is not None:
            return
        if self._traced:
            raise RuleError(
                f"layer {self._traced!r} ran in a traced graph (tf.function, fit, predict), which would keep the "
                "change; run it eagerly: compile(run_eagerly=True), or tf.config.run_functions_eagerly(True)"
            )
        if self._ran and not self.changed.total():
            names = ", ".join(map(repr, self.changed))
            raise RuleError(f"no gradient came back through {names}: call tape.gradient inside the with")

    def _around(self, name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if threading.get_ident() != self._thread or in_own_pass():
            return output
        if not tf.executing_eagerly():  # Keras and TensorFlow would wrap an error raised here; `__exit__` raises it
            self._traced = name
            return output
        self._ran.add(name)
        return map_tensors(output, lambda tensor: self._redirected(name, tensor) if is_float(tensor) else tensor)

    def _redirected(self, name: str, tensor: Any) -> Any:
        passed = _with_backward(tensor, partial(self._change, name))
        copy_logits(tensor, passed)
        return passed

    def _change(self, name: str, g: Any) -> Any:
        if not self._thread:  # the context is over
            return g
        self.changed[name] += 1
        for change in self._changes[name]:
            g = _fitting(change(g), g, name)
        return g


def _with_backward(tensor: Any, change: Change) -> Any:
    """Return a tensor of the same values, whose gradient is what a function makes of it."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def identity(x: Any) -> Any:
        return tf.identity(x), lambda g: change(tf.convert_to_tensor(g))

    return identity(tensor)


def _matched_layers(model: Any, sites: Mapping[str, Change]) -> tuple[dict[str, Any], dict[str, list[Change]]]:
    """Return the layers that the keys match and their functions, by name, in the order of the keys.

    Raises:
        InputError: the model is no Keras layer; there is no key, or one matches no layer or has no function.
    """
    if not isinstance(model, keras.Layer):
        raise InputError(f"model is a {type(model).__name__}; redirect works at the layers of a keras.Model")
    if not isinstance(sites, Mapping) or not sites:
        raise InputError('sites is empty or no mapping; pass {"block2": function}')
    layers = {"": model, **dict(named_layers(model))}
    first = {id(layer): name for name, layer in reversed(layers.items())}
    matched: dict[str, Any] = {}
    changes: dict[str, list[Change]] = {}
    for key, change in sites.items():
        if not callable(change):
            raise InputError(f"the value for {key!r} is a {type(change).__name__}, not a function of the gradient")
        names = [key] if key in layers else [n for n in layers if n and fnmatch.fnmatchcase(n, str(key))]
        if not names:
            top = ", ".join(name for name in layers if name and "." not in name)
            hint = did_you_mean(str(key), layers) or f"; at the top there are {top}"
            raise InputError(f"no layer matches {key!r}{hint}")
        for name in dict.fromkeys(first[id(layers[name])] for name in names):
            matched[name] = layers[name]
            changes.setdefault(name, []).append(change)
    return matched, changes


def _fitting(new: Any, g: Any, name: str) -> Any:
    if isinstance(new, tf.Tensor) and (new.shape, new.dtype) == (g.shape, g.dtype):
        return new
    given = f"{tuple(new.shape)} {new.dtype.name}" if isinstance(new, tf.Tensor) else f"a {type(new).__name__}"
    wanted = f"{tuple(g.shape)} {g.dtype.name}"
    raise InputError(f"the function for {name!r} returned {given} where the gradient is {wanted}")


def redirected(model: Any, sites: Mapping[str, Change]) -> RedirectedLayers:
    """Return the context in which each site's function changes the gradient there; see `undertow.redirect`."""
    return RedirectedLayers(model, sites)


def zero(g: Any) -> Any:
    """Return zeros like `g`, even where it is NaN."""
    return tf.zeros_like(g)


def clip(g: Any, norm: float) -> Any:
    """Return `g`, `(B, ...)`, each sample shortened to an ℓ2 norm of at most `norm`."""
    rows = tf.reshape(g, (g.shape[0] if g.shape.rank else 1, -1))
    wide = rows if rows.dtype == tf.float64 else tf.cast(rows, tf.float32)  # squares overflow in float16
    lengths = tf.norm(wide, axis=1, keepdims=True)
    return tf.reshape(tf.cast(wide * tf.minimum(norm / lengths, 1), g.dtype), g.shape)


def noisy(std: float, seed: int) -> Change:
    """Return a function that adds normal noise; it has its own generator."""
    generator = np.random.default_rng(seed)

    def noise(g: Any) -> Any:
        return g + tf.cast(std * generator.standard_normal(g.shape), g.dtype)

    return noise
