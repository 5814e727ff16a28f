"""What an activation looks like in a jaxpr. A spelling is a Python function, and its pattern what JAX traces of it.

A pattern fits where the operations and their numbers are the same, in either order of a sum, product, maximum or
minimum; broadcasts and conversions of constants do not matter. `x` is the activation's input; `c` and `a` stand for
anything that does not depend on the network's input, such as a bound or a learnt slope. A `custom_jvp` or `custom_vjp`
around a spelling is seen through, and keeps its own derivative. So `jax.nn.relu`, `jnp.maximum(x, 0)` and a user's own
are one row.
"""

import enum
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .graph import CALLS, CUSTOM, PASSING, JaxprGraph, JaxprNode, JaxprValue, Route, body_graph, graph_of, uniform


class JaxKind(enum.Enum):
    """What operations did in the forward pass, as far as a rule is concerned."""

    RELU = "a ReLU-like activation"
    SMOOTH = "a smooth activation, rewired only with activations='all'"
    OTHER = "an elementwise activation that no rule touches"


COMMUTATIVE = frozenset(("add", "mul", "max", "min"))
Spelling = Callable[..., Any]


def _positive(x: Any) -> Any:
    return jnp.maximum(x, 0)


def _zero(x: Any, a: Any) -> Any:
    return jnp.zeros_like(x)


def _slope(x: Any, a: Any) -> Any:
    return a * x


def _chosen(compare: Any, swapped: bool, keeps: bool, other: Any) -> Spelling:
    """Return `where(x > c, x, other)` in one of its forms."""

    def spelling(x: Any, c: Any, a: Any) -> Any:
        condition = compare(c, x) if swapped else compare(x, c)
        return lax.select(condition, *((x, other(x, a)) if keeps else (other(x, a), x)))

    return spelling


def _gated(compare: Any, swapped: bool) -> Spelling:
    """Return `x * (x > c)`."""
    return lambda x, c: x * (compare(c, x) if swapped else compare(x, c)).astype(x.dtype)


def _capped(inner: Spelling) -> list[Spelling]:
    """Return a spelling with an upper bound, and with the zero once more, as a clip has."""
    return [
        lambda x, c, a: lax.max(lax.min(inner(x, c, a), a), jnp.zeros((), x.dtype)),
        lambda x, c, a: lax.min(lax.max(inner(x, c, a), jnp.zeros((), x.dtype)), a),
        lambda x, c, a: lax.min(inner(x, c, a), a),
    ]


_ABOVE, _BELOW = (lax.gt, lax.ge), (lax.lt, lax.le)
_CHOICES = [
    *((compare, False, True) for compare in _ABOVE),
    *((compare, True, False) for compare in _ABOVE),
    *((compare, False, False) for compare in _BELOW),
    *((compare, True, True) for compare in _BELOW),
]
_THRESHOLDED = [_chosen(*choice, _zero) for choice in _CHOICES]
_LEAKY = [_chosen(*choice, _slope) for choice in _CHOICES]
_GATED: list[Spelling] = [_gated(c, False) for c in _ABOVE] + [_gated(c, True) for c in _BELOW]
_NEGATIVES: list[Spelling] = [lambda x, c, a: _positive(-x), lambda x, c, a: _positive(-x + c)]


def _with_slope(positive: Spelling, negative: Spelling) -> Spelling:
    return lambda x, c, a: positive(x, c, a) - a * negative(x, c, a)


def _relu(x: Any, c: Any, a: Any) -> Any:
    return _positive(x)


_POSITIVES: list[Spelling] = [s for p in (_relu, _THRESHOLDED[0]) for s in (p, *_capped(p))]

# name, kind, spellings
ACTIVATIONS: list[tuple[str, JaxKind, Sequence[Spelling]]] = [
    ("relu", JaxKind.RELU, [_with_slope(p, n) for p in _POSITIVES for n in _NEGATIVES]),
    ("prelu", JaxKind.RELU, [lambda x, a: _positive(x) + a * _positive(-x)]),
    ("gelu", JaxKind.SMOOTH, [functools.partial(jax.nn.gelu, approximate=True)]),
    ("gelu", JaxKind.SMOOTH, [functools.partial(jax.nn.gelu, approximate=False)]),
    ("gelu", JaxKind.SMOOTH, [lambda x, a: 0.5 * x * (1 + lax.erf(x / a)),
                              lambda x, a: 0.5 * x * (1 + lax.erf(x * a))]),
    ("mish", JaxKind.SMOOTH, [jax.nn.mish]),
    ("celu", JaxKind.SMOOTH, [lambda x, a: jax.nn.celu(x, a)]),
    ("selu", JaxKind.SMOOTH, [jax.nn.selu]),
    ("elu", JaxKind.SMOOTH, [lambda x, a: jax.nn.elu(x, a)]),
    ("hard_silu", JaxKind.SMOOTH, [jax.nn.hard_silu]),
    ("silu", JaxKind.SMOOTH, [jax.nn.silu, lambda x, a: x * jax.nn.sigmoid(a * x)]),
    ("squareplus", JaxKind.SMOOTH, [jax.nn.squareplus]),
    ("log_sigmoid", JaxKind.OTHER, [jax.nn.log_sigmoid]),
    ("softplus", JaxKind.SMOOTH, [jax.nn.softplus]),
    ("hard_sigmoid", JaxKind.OTHER, [jax.nn.hard_sigmoid]),
    ("hard_tanh", JaxKind.RELU, [jax.nn.hard_tanh]),
    ("soft_sign", JaxKind.OTHER, [jax.nn.soft_sign]),
    ("leaky_relu", JaxKind.RELU, [*_LEAKY, lambda x, a: lax.max(x, a * x)]),
    ("relu6", JaxKind.RELU, _capped(_relu) + [s for t in _THRESHOLDED for s in _capped(t)]),
    ("clip", JaxKind.RELU, [lambda x, c: lax.max(lax.min(x, c), jnp.zeros((), x.dtype)),
                            lambda x, c: lax.clamp(jnp.zeros((), x.dtype), x, c)]),
    ("relu", JaxKind.RELU, [_relu, *_THRESHOLDED, *_GATED]),
    ("clip", JaxKind.OTHER, [lambda x, c, a: lax.max(lax.min(x, c), a), lambda x, c, a: lax.min(lax.max(x, c), a),
                             lambda x, c, a: lax.clamp(c, x, a)]),
    ("sigmoid", JaxKind.OTHER, [jax.nn.sigmoid]),
    ("tanh", JaxKind.OTHER, [jnp.tanh]),
]  # fmt: skip


def _written_softmax(x: Any) -> Any:
    return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)


HEADS: list[tuple[str, Sequence[Spelling]]] = [
    ("softmax", [jax.nn.softmax, _written_softmax]),
    ("log-softmax", [jax.nn.log_softmax]),
    ("log-sigmoid", [jax.nn.log_sigmoid]),
    ("sigmoid", [jax.nn.sigmoid]),
]


@dataclass(frozen=True, eq=False)
class PatternMatch:
    """Nodes that are one activation.

    Attributes:
        name, kind: the row of `ACTIVATIONS`.
        x: the activation's input.
        root: the node that makes its output.
        nodes: all of them, the root too, in the order of execution.
    """

    name: str
    kind: JaxKind
    x: JaxprValue
    root: JaxprNode
    nodes: tuple[JaxprNode, ...]


def matches(graph: JaxprGraph, way: Route) -> dict[JaxprNode, PatternMatch]:
    """Return the activations on a gradient's way, by their root; a node is part of one at most.

    An operation whose result somebody else reads too is no part of a larger activation.
    """
    uses = Counter(value for node in graph.nodes if node in way.nodes for value in node.inputs)
    uses.update(graph.outputs)
    found: dict[JaxprNode, PatternMatch] = {}
    taken: set[JaxprNode] = set()
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(graph.nodes):
        if node not in way.nodes or node in taken:
            continue
        for name, kind, pattern in _patterns_of(node):
            fit = Matcher(way, pattern).fit(node)
            if fit is None or not _is_whole(*fit, node, way, uses) or _guards_a_root(node, graph, way):
                continue
            x, parts = fit
            if not taken.isdisjoint(parts):
                continue
            ordered = tuple(sorted(parts, key=position.__getitem__))
            found[node] = PatternMatch(name, kind, x, node, ordered)
            taken |= parts
            break
    return found


def head_of_scores(scores: JaxprValue) -> tuple[str, JaxprValue]:
    """Return the last operation of what gave scores, "softmax" or the like, and its input; "" and the scores without.

    A logarithm, a copy or another dtype after it does not count, nor does a softmax over the batch.
    """
    value = scores
    while value.node is not None and value.node.name in ("log", "convert_element_type", "copy"):
        value = value.node.inputs[0]
    if value.node is None:
        return "", scores
    for name, spellings in HEADS:
        for spelling in spellings:
            pattern = _pattern(spelling, str(value.aval.dtype), 2)
            fit = Matcher(None, pattern).fit(value.node)
            if fit is not None and not any(0 in node.eqn.params.get("axes", ()) for node in fit[1]):
                return name, fit[0]
    return "", scores


class Matcher:
    """Compares a pattern with the graph behind a node.

    Args:
        way: tells what depends on the network's input; None: nothing stands for a constant.
    """

    def __init__(self, way: Route | None, pattern: JaxprGraph) -> None:
        self._live = None if way is None else way.live
        self._pattern = pattern
        self._x, *self._constants = pattern.arguments[-_n_arguments(pattern) :]
        self._bound: JaxprValue | None = None
        self._parts: set[JaxprNode] = set()
        self._owners: dict[JaxprNode, JaxprNode] = {}  # of nodes in the bodies of custom calls, the outermost call

    def fit(self, root: JaxprNode) -> tuple[JaxprValue, set[JaxprNode]] | None:
        """Return the activation's input and its nodes; None where the pattern does not fit."""
        fits = self._fits(self._pattern.outputs[0], root.outputs[0])
        return (self._bound, self._parts) if fits and self._bound is not None else None

    def _fits(self, wanted: JaxprValue, value: JaxprValue) -> bool:
        value = _operand(value)
        wanted = _behind_passing(wanted)
        if wanted is self._x:
            if self._bound is None and (self._live is None or value in self._live):
                self._bound = value
            return self._bound is value
        if wanted in self._constants:
            return self._is_constant(value)
        if wanted.node is None:
            return (number := uniform(value)) is not None and number == uniform(wanted)
        return self._operations_fit(wanted.node, value)

    def _operations_fit(self, wanted: JaxprNode, value: JaxprValue) -> bool:
        node = value.node
        while node is not None and (node.name in PASSING or node.name in CUSTOM):
            self._parts.add(self._owners.get(node, node))
            value = _operand(node.inputs[0]) if node.name in PASSING else self._output_of_body(node)
            node = value.node
        if node is None or node.name != wanted.name or len(node.inputs) != len(wanted.inputs):
            return False
        if node.name == "integer_pow" and node.eqn.params["y"] != wanted.eqn.params["y"]:
            return False
        self._parts.add(self._owners.get(node, node))
        orders = [node.inputs, node.inputs[::-1]] if node.name in COMMUTATIVE else [node.inputs]
        return any(self._all_fit(wanted.inputs, inputs) for inputs in orders)

    def _all_fit(self, wanted: Sequence[JaxprValue], values: Sequence[JaxprValue]) -> bool:
        bound, parts = self._bound, set(self._parts)
        if all(self._fits(w, v) for w, v in zip(wanted, values, strict=True)):
            return True
        self._bound, self._parts = bound, parts
        return False

    def _output_of_body(self, node: JaxprNode) -> JaxprValue:
        body = body_graph(node)
        self._owners.update(dict.fromkeys(body.nodes, self._owners.get(node, node)))
        return _operand(body.outputs[0])

    def _is_constant(self, value: JaxprValue) -> bool:
        value = _operand(value)
        if self._live is None or value in self._live:
            return False
        node = value.node
        return node is None or node not in self._owners or all(map(self._is_constant, node.inputs))


def _operand(value: JaxprValue) -> JaxprValue:
    """Return what the argument of a custom call's body stands for."""
    while value.outer is not None:
        value = value.outer
    return value


def _behind_passing(value: JaxprValue) -> JaxprValue:
    while value.node is not None and value.node.name in PASSING:
        value = value.node.inputs[0]
    return value


def _is_whole(x: JaxprValue, parts: set[JaxprNode], root: JaxprNode, way: Route, uses: Counter[JaxprValue]) -> bool:
    """Whether nobody else reads what the parts of an activation make, and its input is as its output."""
    y = root.outputs[0]
    if (x.aval.shape, x.aval.dtype) != (y.aval.shape, y.aval.dtype):
        return False
    inner = [value for node in parts if node is not root for value in node.outputs if value in way.wanted]
    within = Counter(value for node in parts if node in way.nodes for value in node.inputs)
    return all(uses[value] == within[value] for value in inner)


def _guards_a_root(root: JaxprNode, graph: JaxprGraph, way: Route) -> bool:
    """Whether a maximum with zero only keeps a variance from being negative: all that reads it ends in a root."""
    if root.name != "max":
        return False
    remaining, ends = [root.outputs[0]], []
    while remaining:
        value = remaining.pop()
        readers = [node for node in graph.nodes if node in way.nodes and value in node.inputs]
        ends += [node.name for node in readers if node.name not in (*PASSING, "add")]
        remaining += [node.outputs[0] for node in readers if node.name in (*PASSING, "add")]
    return bool(ends) and set(ends) <= {"rsqrt", "sqrt"}


def _patterns_of(node: JaxprNode) -> Sequence[tuple[str, JaxKind, JaxprGraph]]:
    """Return the patterns that may end in a node."""
    if len(node.outputs) != 1 or not jnp.issubdtype(node.outputs[0].aval.dtype, jnp.floating):
        return ()
    if node.name in PASSING:  # a plain reshape is no activation
        return ()
    value = node.outputs[0]
    while value.node is not None and value.node.name in (*CUSTOM, *PASSING):
        inner = body_graph(value.node).outputs if value.node.name in CUSTOM else value.node.inputs
        if len(inner) != 1:
            return ()
        value = inner[0]
    return () if value.node is None else _by_root(str(value.aval.dtype)).get(value.node.name, ())


@functools.cache
def _by_root(dtype: str) -> dict[str, list[tuple[str, JaxKind, JaxprGraph]]]:
    """Return the patterns in a dtype by the operation that they end in, the first row first."""
    table: dict[str, list[tuple[str, JaxKind, JaxprGraph]]] = {}
    for name, kind, spellings in ACTIVATIONS:
        for spelling in spellings:
            pattern = _pattern(spelling, dtype, 0)
            root = _behind_passing(pattern.outputs[0]).node
            assert root is not None  # a spelling does something
            table.setdefault(root.name, []).append((name, kind, pattern))
    return table


@functools.cache
def _pattern(spelling: Spelling, dtype: str, rank: int) -> JaxprGraph:
    """Trace a spelling, bodies of custom calls in the place of these."""
    x = jax.ShapeDtypeStruct((2, 3)[:rank], jnp.dtype(dtype))
    scalars = [jax.ShapeDtypeStruct((), jnp.dtype(dtype))] * (_n_required(spelling) - 1)
    traced = jax.make_jaxpr(lambda *args: spelling(*args))(x, *scalars)
    return graph_of(traced, calls=CALLS | CUSTOM)


def _n_required(spelling: Spelling) -> int:
    parameters = inspect.signature(spelling).parameters.values()
    return sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters)


def _n_arguments(pattern: JaxprGraph) -> int:
    return sum(value.known is None for value in pattern.arguments)
