"""What an activation looks like in a traced graph: one operation, or the few that Keras composes it of.

A pattern is a tree of operation types. `X` is the activation's input, `C` anything that does not depend on the
network's input (a number, a learnt slope), `ZERO` the constant zero. Several operations that match one pattern are one
activation: the rule acts on it as a whole, and it counts once.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import tensorflow as tf

from ..internals import has_custom_gradient


class OpKind(enum.Enum):
    """What an operation did in the forward pass, as far as a rule is concerned."""

    RELU = "a ReLU-like activation"
    SMOOTH = "a smooth activation, rewired only with activations='all'"
    OTHER = "an elementwise activation that no rule touches"
    OPAQUE = "a user's own tf.custom_gradient"
    SWITCH = "max-pooling: which of its inputs won is all that deconvnet keeps of a photograph"


X, C, ZERO = "x", "constant", "zero"
Pattern = Any  # X, C, ZERO or a tuple of an operation's type and the patterns of its inputs

_COMMUTATIVE = frozenset(("AddV2", "Mul", "Maximum", "Minimum"))
_THRESHOLDED = ("SelectV2", ("Greater", X, C), X, ZERO)
_NEGATIVES = (("Relu", ("Neg", X)), ("Relu", ("AddV2", ("Neg", X), C)))
_HARD_SIGMOID = ("RealDiv", ("Relu6", ("AddV2", X, C)), C)
_CUBED = ("AddV2", X, ("Mul", C, ("Pow", X, C)))


def _capped(pattern: Pattern) -> Pattern:
    return ("Maximum", ("Minimum", pattern, C), ZERO)


_POSITIVES = (("Relu", X), _THRESHOLDED, _capped(("Relu", X)), _capped(_THRESHOLDED), ("Relu6", X))

# name, kind, pattern; the first that matches an operation is taken, so larger patterns stand first
ACTIVATIONS: list[tuple[str, OpKind, Pattern]] = [
    *(("Relu", OpKind.RELU, ("Sub", p, ("Mul", C, n))) for p in _POSITIVES for n in _NEGATIVES),
    ("PRelu", OpKind.RELU, ("AddV2", ("Relu", X), ("Mul", C, _NEGATIVES[0]))),
    *(("Relu", OpKind.RELU, _capped(p)) for p in (("Relu", X), _THRESHOLDED)),
    ("Clip", OpKind.RELU, _capped(X)),
    ("Clip", OpKind.RELU, ("Minimum", ("Maximum", X, ZERO), C)),
    ("Clip", OpKind.OTHER, ("Maximum", ("Minimum", X, C), C)),
    (
        "Celu",
        OpKind.SMOOTH,
        ("AddV2", ("Maximum", X, ZERO), ("Mul", C, ("Expm1", ("RealDiv", ("Minimum", X, ZERO), C)))),
    ),
    ("Elu", OpKind.SMOOTH, ("SelectV2", ("Greater", X, ZERO), ("Elu", X), ("Mul", C, ("Elu", X)))),
    ("Gelu", OpKind.SMOOTH, ("Mul", ("Mul", C, X), ("Erfc", ("Mul", ("Neg", X), C)))),
    ("Gelu", OpKind.SMOOTH, ("Mul", ("Mul", C, X), ("AddV2", C, ("Tanh", ("Mul", C, _CUBED))))),
    ("Mish", OpKind.SMOOTH, ("Mul", X, ("Tanh", ("Softplus", X)))),
    ("Silu", OpKind.SMOOTH, ("IdentityN", ("Mul", X, ("Sigmoid", ("Mul", C, X))), X, C)),
    ("HardSilu", OpKind.SMOOTH, ("Mul", X, _HARD_SIGMOID)),
    ("HardSigmoid", OpKind.OTHER, _HARD_SIGMOID),
    ("LogSigmoid", OpKind.OTHER, ("Neg", ("Softplus", ("Neg", X)))),
    ("Relu", OpKind.RELU, _THRESHOLDED),
    ("Maximum", OpKind.RELU, ("Maximum", X, ZERO)),
    *((name, OpKind.RELU, (name, X)) for name in ("Relu", "Relu6", "LeakyRelu")),
    *((name, OpKind.SMOOTH, (name, X)) for name in ("Elu", "Selu", "Softplus")),
    *((name, OpKind.OTHER, (name, X)) for name in ("Sigmoid", "Tanh", "Softsign")),
    *((name, OpKind.SWITCH, (name, X)) for name in ("MaxPool", "MaxPool3D", "MaxPoolWithArgmax")),
]
SMOOTH = frozenset(name for name, kind, _ in ACTIVATIONS if kind is OpKind.SMOOTH)
_BY_ROOT: dict[str, list[tuple[str, OpKind, Pattern]]] = {}
for _entry in ACTIVATIONS:
    _BY_ROOT.setdefault(_entry[2][0], []).append(_entry)


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation of a graph.

    Attributes:
        name, kind: of its pattern.
        x: its input.
        ops: its operations, in order of execution; the first output of the last one is the activation's.
    """

    name: str
    kind: OpKind
    x: Any
    ops: tuple[Any, ...]

    @property
    def root(self) -> Any:
        """The operation that gives the output."""
        return self.ops[-1]


def activations(ops: Sequence[Any], inputs: Sequence[Any]) -> list[Activation]:
    """Find the activations among the operations of a graph, given in the order of their creation.

    Args:
        inputs: the tensors that the network is a function of; whatever does not depend on them is a constant.
    """
    dependent = _dependent_ops(ops, inputs)
    claimed: set[Any] = set()
    matches = []
    for op in reversed(ops):  # a pattern is matched from its last operation, and claims the others
        if op not in claimed and op in dependent:
            activation = _activation(op, dependent)
            if activation is not None:
                claimed.update(activation.ops)
                matches.append(activation)
    return matches[::-1]


def _dependent_ops(ops: Sequence[Any], inputs: Sequence[Any]) -> set[Any]:
    reached = {x.op for x in inputs}
    for op in ops:
        if any(x.op in reached for x in op.inputs):
            reached.add(op)
    return reached


def _activation(op: Any, dependent: set[Any]) -> Activation | None:
    for name, kind, pattern in _BY_ROOT.get(op.type, ()):
        for x, matched in _matches(op.outputs[0], pattern, None, dependent):
            if x is not None and _is_closed(matched, x):
                return Activation(name, kind, x, matched)
    if has_custom_gradient(op):
        return Activation("CustomGradient", OpKind.OPAQUE, op.inputs[0], (op,))
    return None


def _matches(t: Any, pattern: Pattern, x: Any, dependent: set[Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield each way in which a tensor matches a pattern: what X is, and the operations in execution order."""
    if pattern == X:
        if t.op in dependent and (x is None or t is x):
            yield t, ()
    elif pattern == C:
        if t.op not in dependent:
            yield x, ()
    elif pattern == ZERO:
        value = None if t.op in dependent else static_value(t)
        if value is not None and not np.any(value):
            yield x, ()
    elif t.op.type == pattern[0] and len(t.op.inputs) == len(pattern) - 1:
        orders = permutations(pattern[1:]) if t.op.type in _COMMUTATIVE else (pattern[1:],)
        for children in orders:
            for bound, ops in _all_match(list(t.op.inputs), children, x, dependent):
                yield bound, (*ops, t.op)


def static_value(t: Any) -> Any:
    """Return the value of a constant of a graph, or of a tensor seen when it ran eagerly; None where there is none."""
    return tf.get_static_value(t if isinstance(t, tf.Tensor) else t.value)


def _all_match(
    tensors: Sequence[Any], patterns: Sequence[Pattern], x: Any, dependent: set[Any]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    if not patterns:
        yield x, ()
        return
    for bound, ops in _matches(tensors[0], patterns[0], x, dependent):
        for rebound, others in _all_match(tensors[1:], patterns[1:], bound, dependent):
            yield rebound, tuple(dict.fromkeys((*ops, *others)))


def _is_closed(ops: Sequence[Any], x: Any) -> bool:
    """Whether no other operation reads a tensor between an activation's input and its output."""
    if len(ops) == 1:
        return True
    own_ops = set(ops)
    readers = [reader for op in ops[:-1] for out in op.outputs for reader in out.consumers()]
    other_readers = [reader for reader in readers if reader not in own_ops]
    if ops[-1].type == "IdentityN":  # tf.custom_gradient leaves behind an Identity that nothing reads
        other_readers = [
            reader for reader in other_readers if reader.type != "Identity" or reader.outputs[0].consumers()
        ]
    return ops[-1].outputs[0].shape == x.shape and not other_readers
