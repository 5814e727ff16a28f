"""Layers' outputs in one pass that is being traced: what they are, and where they have their channels."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ...errors import InputError, did_you_mean
from ...structures import map_tensors, tensors_with_paths
from ..base import Request
from ..own_passes import own_pass
from .calls import run
from .layers import named_modules
from .watching import wrapped


def layer_named(model: Any, layer: str) -> Any:
    """Return a layer by its dotted name, `@` and a call's number aside.

    Raises:
        InputError: there is none of that name, or the model is no Keras layer.
    """
    if not isinstance(model, keras.Layer):
        raise InputError(f"model is a {type(model).__name__}; layers are those of a keras.Model")
    name = layer.partition("@")[0]
    layers = {own: named.module for named in named_modules(model) for own in named.names}
    if name not in layers:
        top = ", ".join(own for own in layers if "." not in own)
        raise InputError(f"no layer {name!r}{did_you_mean(name, layers) or f'; at the top there are {top}'}")
    return layers[name]


@contextmanager
def recorded_outputs(model: Any, names: Sequence[str], outputs: dict[str, Any]) -> Iterator[None]:
    """Inside, fill a dict with the named layers' outputs in this thread; `layer@1` is that of a second call.

    All calls of a layer are recorded, whichever a name asks for. Of an output of several tensors the first of floating
    point is recorded.

    Raises:
        InputError: as `layer_named`; or a layer runs in a graph other than the one that is being traced.
    """
    calls: Counter[str] = Counter()
    thread, graph = threading.get_ident(), tf.compat.v1.get_default_graph()
    hidden: list[str] = []

    def around(name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        first = next((t for _, t in tensors_with_paths(output) if is_float(t)), None)
        if threading.get_ident() != thread or first is None:
            return output
        if first.graph is not graph:
            hidden.append(name)
            return output
        number, calls[name] = calls[name], calls[name] + 1
        outputs[f"{name}@{number}" if number else name] = first
        return output

    layers = {name: layer_named(model, name) for name in dict.fromkeys(name.partition("@")[0] for name in names)}
    with wrapped(layers, around):
        yield
    if hidden:
        raise _out_of_sight(hidden[0])


def refuse_unseen(model: Any, names: Iterable[str], captures: Sequence[Any]) -> None:
    """Refuse layers that did not run and whose weights a graph reads all the same.

    Args:
        captures: what the graph reads from outside.

    Raises:
        InputError: naming the first such layer, which a `tf.function` runs that was traced before.
    """
    read = {id(capture) for capture in captures}
    for name in names:
        if any(id(variable.handle) in read for variable in layer_named(model, name).weights):
            raise _out_of_sight(name)


def _out_of_sight(name: str) -> InputError:
    return InputError(
        f"layer {name!r} runs in a tf.function or a loop of its own, out of sight; name a layer around it"
    )


def call_number(layer: str) -> int | None:
    """Return the call that a layer's name asks for, as in `layer@1`; None for all.

    Raises:
        InputError: what stands behind the `@` is no number.
    """
    name, at, number = layer.partition("@")
    if at and not number.isdecimal():
        raise InputError(f"layer {layer!r}: behind @ stands the number of a call, as in {name}@1")
    return int(number) if at else None


def layer_outputs(request: Request, layer: str) -> list[Any]:
    """Run the model; return what each call of a layer returned, or the one call asked for; arrays where inputs are.

    Raises:
        InputError: as `layer_named`; the layer did not run, or out of sight.
    """
    number, outputs, thread = call_number(layer), list[Any](), threading.get_ident()
    are_arrays = isinstance(request.inputs[0], np.ndarray)

    def around(name: str, _: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if threading.get_ident() == thread and tf.executing_eagerly():
            outputs.append(map_tensors(output, lambda t: t.numpy() if are_arrays else tf.identity(t)))
        return output

    with own_pass(), wrapped({layer: layer_named(request.model, layer)}, around):
        run(request.model, *request.fill([tf.convert_to_tensor(x) for x in request.inputs]), request.training)
    if not outputs or (number or 0) >= len(outputs):
        raise InputError(
            f"layer {layer!r} runs {len(outputs)} time(s) for this x, those in a tf.function aside; name one that runs"
        )
    return outputs if number is None else [outputs[number]]


def from_layer(request: Request, layer: str, number: int) -> Callable[[Any], Callable[..., Any]]:
    """Return what makes of a network a function of one call of a layer, for the request's inputs.

    That function raises InputError where the layer runs in a graph of its own, such as that of a loop.
    """
    inputs = [tf.convert_to_tensor(x) for x in request.inputs]

    def of_network(network: Any) -> Callable[..., Any]:
        def run_on(output: Any) -> Any:
            count, thread = Counter[str](), threading.get_ident()
            graph = tf.compat.v1.get_default_graph()

            def around(name: str, _: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                own = call(*args, **kwargs)
                if threading.get_ident() != thread:
                    return own
                if tf.compat.v1.get_default_graph() is not graph:
                    raise _out_of_sight(layer)
                count[name] += 1
                return output if count[name] == number + 1 else own

            with wrapped({layer: layer_named(network, layer)}, around):
                return run(network, *request.fill(inputs), request.training)

        return run_on

    return of_network


def is_float(value: Any) -> bool:
    """Whether a value is a TensorFlow tensor of floating point."""
    return isinstance(value, tf.Tensor) and bool(value.dtype.is_floating)


def reached(tensor: Any, sources: Sequence[Any]) -> frozenset[int]:
    """Return which of the inputs a tensor depends on by a gradient."""
    wanted = {source.op: i for i, source in enumerate(sources) if source.dtype.is_floating}
    remaining, seen = [tensor.op], set()
    while remaining:
        op = remaining.pop()
        if op not in seen and op.type != "StopGradient":
            seen.add(op)
            remaining += [x.op for x in op.inputs]
    return frozenset(i for op, i in wanted.items() if op in seen)
