"""Every private name of Keras and TensorFlow that undertow uses, once, with its reason.

`tests/frameworks/keras/test_internals.py` asks the installed packages for each of them, so that an upgrade which takes
one away fails there.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tensorflow.python.eager.backprop import _gradient_function
from tensorflow.python.framework import op_callbacks, ops
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph
from tensorflow.python.ops import custom_gradient


def all_layers(model: Any) -> list[Any]:
    """Return a model or layer and every layer within it, once each; in public a model lists its children alone."""
    return list(model._flatten_layers())


def set_trainable(layer: Any, trainable: bool) -> None:
    """Set a layer's own flag; the public property sets it for all layers and variables within as well."""
    layer._trainable = trainable


def copy_logits(source: Any, target: Any) -> None:
    """Let a tensor stand for another before Keras's losses, which go on from the logits that a softmax's output has."""
    if hasattr(source, "_keras_logits"):
        target._keras_logits = source._keras_logits


def logits_behind(scores: Any) -> Any:
    """Return the scores before an eager softmax or sigmoid of Keras, which keeps them with its output."""
    return getattr(scores, "_keras_logits", scores)


def call_with(function: Any, tensors: Sequence[Any], values: Mapping[int, Any]) -> Any:
    """Call a concrete function with other variables in the places of some; in public its captures change for all calls.

    Args:
        values: by the id of a variable's handle, the handle of the variable to read in its place.
    """
    captures = [values.get(id(capture), capture) for capture in function.captured_inputs]
    return function._call_flat(list(tensors), captures)


def gradient_function(op: Any) -> Any:
    """Return the gradient function that TensorFlow has for an operation."""
    return ops.get_gradient_function(op)


def set_gradient_function(op: Any, gradient: Any) -> None:
    """Give one operation a gradient function of its own, or with None take it off; in public only a type has one."""
    op._gradient_function = gradient


def has_custom_gradient(op: Any) -> bool:
    """Whether an operation is the mark that a `tf.custom_gradient` leaves in a graph."""
    return op.type == "IdentityN" and "_gradient_op_type" in op.node_def.attr


def recomputes(op: Any) -> bool:
    """Whether a custom gradient is that of `tf.recompute_grad`: the stack tells whose code made what it hands on."""
    frames = op.inputs[0].op.traceback or ()
    return any(frame.name == "inner" and frame.filename.endswith("custom_gradient.py") for frame in frames)


def called_graph(call: Any) -> Any:
    """Return the graph of the function that an operation calls; None where its graph and those around it lack it."""
    return _graph_of_function(call, call.get_attr("f").name)


def called_graphs(op: Any) -> list[Any]:
    """Return the graphs of all functions that an operation calls: of a call, a loop, a branch; of others none."""
    attributes = op.node_def.attr.values()
    names = [a.func.name for a in attributes if a.HasField("func")] + [f.name for a in attributes for f in a.list.func]
    return [graph for graph in (_graph_of_function(op, name) for name in names) if graph is not None]


def _graph_of_function(op: Any, name: str) -> Any:
    graph = op.graph
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            return function.graph if hasattr(function, "graph") else function_def_to_graph(function.definition)
        graph = getattr(graph, "outer_graph", None)
    return None


def forget_colocation(definition: Any) -> None:
    """Take from a graph's definition what ties nodes to operations of the graph that it was called from."""
    for node in definition.node:
        node.attr.pop("_class", None)


@contextmanager
def operations_seen(see: Callable[..., None]) -> Iterator[None]:
    """Inside, call `see(type, inputs, attributes, outputs, op_name, graph)` for each operation of this thread.

    An operation that runs eagerly has no graph. The public way to it, `tf.debugging.experimental`, writes to the disk.
    """
    op_callbacks.add_op_callback(see)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(see)


def custom_gradient_around() -> str:
    """Return the name of the `tf.custom_gradient` whose function runs eagerly, the outermost; "" outside of one."""
    name, frame = "", sys._getframe(1)
    while frame is not None:
        if frame.f_code is custom_gradient._eager_mode_decorator.__code__:
            name = str(getattr(frame.f_locals["f"], "__name__", "function"))
        frame = frame.f_back  # type: ignore[assignment]
    return name


def carries_gradient(kind: str) -> bool:
    """Whether operations of a type have a gradient; in public it takes a tape and a value."""
    try:
        return ops._gradient_registry.lookup(kind) is not None
    except LookupError:
        return True  # of a function, which has one of its own


def gradients_of_operation(
    kind: str, attributes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], gradients: Sequence[Any]
) -> list[Any]:
    """Return the gradients at the inputs of an operation that ran eagerly, from those at its outputs."""
    tensors = list(inputs), list(outputs), list(gradients)
    found = _gradient_function(kind, tuple(attributes), len(inputs), *tensors, (), "")
    return list(found) if isinstance(found, tuple | list) else [found]
