"""Layers' calls watched: from then until the context ends, each call of a layer goes through a function."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import tensorflow as tf

Around = Callable[[str, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_lock = threading.RLock()


class _WatchedCall:
    """What stands in the place of a layer's `call`: each function around the one before it, the call itself innermost.

    Contexts of several threads may overlap and end in any order.
    """

    def __init__(self, layer: Any) -> None:
        self.own = vars(layer).get("call")  # set on this layer by somebody else; a layer's class has it else
        self._call = layer.call
        self.around: dict[object, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        for around in tuple(self.around.values()):
            call = partial(_call_through, around, call)
        return call(*args, **kwargs)


def _call_through(around: Callable[..., Any], call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return around(call, args, kwargs)


@contextmanager
def wrapped(layers: Mapping[str, Any], around: Around) -> Iterator[None]:
    """Inside, let each layer's calls return `around(name, layer, call, args, kwargs)`, on every thread."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            key = object()
            _add(layer, key, partial(around, name, layer))
            stack.callback(_remove, layer, key)
        yield


def _add(layer: Any, key: object, around: Callable[..., Any]) -> None:
    with _lock:
        current = vars(layer).get("call")
        if not isinstance(current, _WatchedCall):
            current = vars(layer)["call"] = _WatchedCall(layer)  # past Keras, which would track it as state
        current.around[key] = around


def _remove(layer: Any, key: object) -> None:
    with _lock:
        watched = vars(layer)["call"]
        del watched.around[key]
        if watched.around:
            return
        if watched.own is None:
            del vars(layer)["call"]
        else:
            vars(layer)["call"] = watched.own


def map_tensors(output: Any, key: str, replace: Callable[[str, Any], Any]) -> Any:
    """Return an output with each float tensor replaced by `replace(key, tensor)`; keys are as `TensorKey.output`."""
    if isinstance(output, tf.Tensor):
        return replace(key, output) if output.dtype.is_floating else output
    if isinstance(output, Mapping):
        kind: Any = type(output)
        return kind((name, map_tensors(value, _nested_key(key, name), replace)) for name, value in output.items())
    if isinstance(output, tuple | list):
        items = [map_tensors(value, _nested_key(key, i), replace) for i, value in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


def _nested_key(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


_gradient = tf.GradientTape.gradient
_gradient_watchers: list[Callable[..., Any]] = []


@contextmanager
def gradients_watched(around: Callable[..., Any]) -> Iterator[None]:
    """Inside, let each `tape.gradient(...)` return `around(tape.gradient, ...)`, on every thread."""
    with _lock:
        _gradient_watchers.append(around)
        tf.GradientTape.gradient = _watched_gradient
    try:
        yield
    finally:
        with _lock:
            _gradient_watchers.remove(around)
            if not _gradient_watchers:
                tf.GradientTape.gradient = _gradient


def _watched_gradient(tape: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
    call: Callable[..., Any] = partial(_gradient, tape)
    for around in tuple(_gradient_watchers):
        call = partial(around, call)
    return call(target, sources, *args, **kwargs)
