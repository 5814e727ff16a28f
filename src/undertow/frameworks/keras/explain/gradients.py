"""How a rule acts on the activations of one traced graph: each activation gets a gradient function of its own, before
the backward pass is built into the same graph.

TensorFlow asks an operation for its own gradient function before it looks up that of its type;
`tf.Graph.gradient_override_map` relies on this too, but it covers all operations of a type and must be set before the
forward pass. Here the forward pass is read first. The gradient functions count when TensorFlow calls them, so exactly
the activations between the scores and the inputs are counted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from ....errors import RuleError
from ....rules import relu
from ....tables import ActivationRule
from ...base import Request
from ...results import RewiringStats
from ..internals import called_graph, forget_colocation, gradient_function, recomputes, set_gradient_function
from .patterns import SMOOTH, Activation, OpKind, activations

relu.register(tf.Tensor, tf.nn.relu)

WANTED = {"relu-like": frozenset((OpKind.RELU,)), "all": frozenset((OpKind.RELU, OpKind.SMOOTH))}
FUNCTION_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
HIDDEN = {
    **dict.fromkeys(
        ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"),
        "a loop or a branch keeps its body in a graph of its own; unroll it (RNN layers: unroll=True)",
    ),
    **dict.fromkeys(
        ("PyFunc", "EagerPyFunc", "PyFuncStateless"),
        "tf.py_function runs Python that no graph shows; write it with TensorFlow operations",
    ),
    "recompute_grad": "tf.recompute_grad and keras.RematScope run a part of the network once more, out of sight, for "
    "its gradient; leave them out",
}


class Rewiring:
    """A rule on the activations of one graph, and the counts of what it met between the scores and the inputs.

    Args:
        request: for its choice of activations, and its names in messages.
        rule: that acts: the request's own, or one that serves several.
        mark: a part of the names of operations whose activation follows the rule already (`swap.MARK`).
    """

    def __init__(self, request: Request, rule: ActivationRule, mark: str | None = None) -> None:
        self.request = request
        self.rule = rule
        self.stats = RewiringStats()
        self.missed: list[str] = []
        self._mark = mark
        self._counted: set[Any] = set()
        self._changed_ops: list[Any] = []

    def attach(self, ops: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Give each activation, called function and hidden computation its own gradient function.

        Args:
            ops: of the forward pass, in the order of their creation.
            inputs: the tensors that the network is a function of.
        """
        for op in ops:
            if op.type in HIDDEN:
                self._set_gradient(op, self._refuse(op.type, HIDDEN[op.type]))
            elif op.type in FUNCTION_CALLS and _has_work(op):
                self._set_gradient(op, self._differentiate_call)
        for activation in activations(ops, inputs):
            self._attach_to(activation)

    def finish(self) -> None:
        """Check the counts of a finished backward pass, and detach.

        Raises:
            RuleError: an activation was missed, or there was nothing to rewire.
        """
        self.detach()
        if self.missed:
            listed = ", ".join(self.missed[:5]) + (", ..." if len(self.missed) > 5 else "")
            raise RuleError(
                f"through={self.request.through!r} sees layers alone and missed {len(self.missed)} activation call(s): "
                f"{listed}; through='graph' sees them all"
            )
        if not self.stats.rewired:
            raise RuleError(self._nothing_rewired())

    def detach(self) -> None:
        """Remove the gradient functions, which refer to rule and model."""
        for op in self._changed_ops:
            set_gradient_function(op, None)

    def _attach_to(self, activation: Activation) -> None:
        root, own = activation.root, {op: gradient_function(op) for op in activation.ops}
        if self._mark is not None and self._mark in root.name:
            if activation.kind is OpKind.OPAQUE:
                self._set_gradient(root, self._counting(own[root], self._count_rewired))
        elif activation.kind is OpKind.OPAQUE and recomputes(root):
            self._set_gradient(root, self._refuse(root.name, HIDDEN["recompute_grad"]))
        elif activation.kind not in WANTED[self.request.activations]:
            self._set_gradient(root, self._counting(own[root], lambda: self._count_left_alone(activation)))
        elif self._mark is not None:
            self._set_gradient(root, self._counting(own[root], lambda: self.missed.append(root.name)))
        else:
            self._rewire(activation, own)

    def _set_gradient(self, op: Any, gradient: Any) -> None:
        set_gradient_function(op, gradient)
        self._changed_ops.append(op)

    def _rewire(self, activation: Activation, own: dict[Any, Any]) -> None:
        """Apply the rule at the last operation; the others pass its result through to the activation's input."""
        path = _path_to_input(activation)
        root, root_index = path[0]

        def gradient(op: Any, g: Any, *others: Any) -> Any:
            self._count_once(op, self._count_rewired)
            ruled = apply_rule(self.rule, g, lambda h: _local(activation, own, h, others))
            return _for_one_input(op, root_index, ruled)

        self._set_gradient(root, gradient)
        for op, index in path[1:]:
            self._set_gradient(op, _pass_through(index))

    def _count_once(self, op: Any, count: Callable[[], None]) -> None:
        """Count an operation once, however many targets there are."""
        if op not in self._counted:
            self._counted.add(op)
            count()

    def _counting(self, own: Any, count: Callable[[], None]) -> Any:
        def gradient(op: Any, *gs: Any) -> Any:
            self._count_once(op, count)
            return own(op, *gs)

        return gradient

    def _count_rewired(self) -> None:
        self.stats.rewired += 1

    def _count_left_alone(self, activation: Activation) -> None:
        if activation.kind is OpKind.SWITCH:
            self.stats.switches += 1
            return
        counts = self.stats.opaque if activation.kind is OpKind.OPAQUE else self.stats.skipped
        counts[activation.name] = counts.get(activation.name, 0) + 1

    def _refuse(self, name: str, reason: str) -> Any:
        def gradient(op: Any, *gs: Any) -> Any:
            raise RuleError(f"rule {self.request.rule_name!r} cannot see into {name}: {reason}")

        return gradient

    def _differentiate_call(self, call: Any, *gs: Any) -> Any:
        """Differentiate a call of a nested `tf.function` or a SavedModel: a copy of its body in this graph."""
        inputs, outputs, ops = inlined(call)
        self.attach(ops, inputs)
        pairs = [(y, g) for y, g in zip(outputs, gs, strict=True) if g is not None and y.dtype.is_floating]
        wanted = [x for x in inputs if x.dtype.is_floating]
        gradients = iter(tf.gradients([y for y, _ in pairs], wanted, [g for _, g in pairs]) if pairs and wanted else ())
        return [next(gradients, None) if x.dtype.is_floating else None for x in inputs]

    def _nothing_rewired(self) -> str:
        left_alone = {**self.stats.skipped, **self.stats.opaque}
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(left_alone.items())) or "none"
        smooth = self.request.activations != "all" and any(name in SMOOTH for name in left_alone)
        remedies = ["activations='all' takes the smooth ones too"] if smooth else []
        remedies += ["no rule reaches into a tf.custom_gradient"] if self.stats.opaque else []
        remedies += ["rule='gradient' needs none"]
        return (
            f"rule {self.request.rule_name!r} found no activation to rewire between the input and the scores "
            f"(met: {listed}); {'; '.join(remedies)}"
        )


def _has_work(call: Any) -> bool:
    """Whether a called function holds what a rule must see; another keeps its own gradient, which may be XLA's alone.

    Keras runs grouped convolutions so, whose gradient TensorFlow has on no CPU.
    """
    body = called_graph(call)
    if body is None:
        return True
    ops = body.get_operations()
    inside = any(op.type in HIDDEN or (op.type in FUNCTION_CALLS and _has_work(op)) for op in ops)
    return inside or bool(activations(ops, body.inputs))


def _pass_through(index: int) -> Any:
    return lambda op, g, *_: _for_one_input(op, index, g)


def _for_one_input(op: Any, index: int, g: Any) -> Any:
    """Return the gradients of an operation's inputs: `g` for one of them and None for the others."""
    return [g if i == index else None for i in range(len(op.inputs))] if len(op.inputs) > 1 else g


def _path_to_input(activation: Activation) -> list[tuple[Any, int]]:
    """Return operations from the activation's output to its input, each with the index of the input that leads on."""

    def paths_from(op: Any) -> Iterator[list[tuple[Any, int]]]:
        for index, tensor in enumerate(op.inputs):
            if tensor is activation.x:
                yield [(op, index)]
        for index, tensor in enumerate(op.inputs):
            if tensor.op in activation.ops:
                for rest in paths_from(tensor.op):
                    yield [(op, index), *rest]

    return next(paths_from(activation.root))


def _local(activation: Activation, own: dict[Any, Any], h: Any, others: Sequence[Any]) -> Any:
    """Return the activation's own gradient, `f'(x) * h`, by the chain rule over its operations."""
    gradients_at: dict[Any, Any] = {activation.root.outputs[0].ref(): h}
    for op in reversed(activation.ops):
        g = gradients_at.get(op.outputs[0].ref())
        if g is None:
            continue
        gradients = own[op](op, g, *(others if op is activation.root else ()))
        gradients = gradients if isinstance(gradients, tuple | list) else [gradients]
        for tensor, gradient in zip(op.inputs, gradients, strict=True):
            if gradient is not None:
                ref = tensor.ref()
                gradients_at[ref] = gradients_at[ref] + gradient if ref in gradients_at else gradient
    return gradients_at[activation.x.ref()]


def apply_rule(rule: ActivationRule, g: Any, local: Callable[[Any], Any]) -> Any:
    """Return `rule(g, local)`.

    Raises:
        RuleError: the rule gave no tensor of the shape and dtype of `g`, or gave `local` none.
    """

    def checked_local(h: Any) -> Any:
        return local(_checked_gradient(rule, "gave local", h, g))

    return _checked_gradient(rule, "returned", rule(g, checked_local), g)


def _checked_gradient(rule: ActivationRule, did: str, new: Any, g: Any) -> Any:
    if isinstance(new, tf.Tensor) and new.shape == g.shape and new.dtype == g.dtype:
        return new
    description = f"{tuple(new.shape)} {new.dtype.name}" if isinstance(new, tf.Tensor) else f"a {type(new).__name__}"
    name = getattr(rule, "__name__", type(rule).__name__)
    raise RuleError(f"rule {name!r} {did} {description} where the gradient is {tuple(g.shape)} {g.dtype.name}")


def inlined(call: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Copy a called function's body into the current graph; return its inputs, its outputs and its operations."""
    body = called_graph(call)
    if body is None:
        name = call.get_attr("f").name
        raise RuleError(f"cannot see into the call {call.name!r}: no graph has its function {name!r}; call its body")
    entries = [tf.identity(x) if x.dtype.is_floating else x for x in call.inputs]
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    definition = body.as_graph_def()
    forget_colocation(definition)
    outputs = tf.graph_util.import_graph_def(
        definition,
        input_map={x.name: entry for x, entry in zip(body.inputs, entries, strict=True)},
        return_elements=[y.name for y in body.outputs],
        name="inlined",
    )
    return entries, list(outputs), graph.get_operations()[before:]
