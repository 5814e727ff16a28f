"""Which operations the nodes of one call are: one node each, or several where an operation is written out."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..internals import function_class, sequence_number
from ..nodes import name_of
from .expansion import can_be_expanded
from .folding import layer_behind
from .kinds import AFFINE, COPIES, ELEMENTWISE, PICKS, PROPORTIONAL, REDUCTIONS, SUMS, VIEWS, simple_kind, stem
from .notes import ForwardNotes
from .operations import GATES, NodeOperation

Edge = tuple[Any, int]
"""A node and the number of its output: a tensor."""

MATRIX_PRODUCTS = {"Mm": (0, 1), "Bmm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Mv": (0, 1), "Dot": (0, 1)}
_INVERSES = ("Rsqrt", "Reciprocal")
_SOFTMAX = ("Softmax", "SafeSoftmax")
_ACTIVATIONS = (
    *("Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish", "Relu", "LeakyRelu", "Hardtanh", "Tanh"),
)
_LONGEST = 64  # steps of one activation written out


@dataclass
class Recognized:
    """The operations on the way, and the nodes that are none that is known.

    Attributes:
        operations: those whose kind is asked for.
        fused: nodes of several operations, which `EXPANSIONS` takes apart.
        unknown: nodes that pass their gradient for want of a better rule.
        opaque: a user's own autograd functions.
    """

    operations: list[NodeOperation] = field(default_factory=list)
    fused: list[NodeOperation] = field(default_factory=list)
    unknown: list[Any] = field(default_factory=list)
    opaque: list[Any] = field(default_factory=list)


class Way:
    """The nodes between the scores and the inputs, which the backward pass that runs now will run."""

    def __init__(self, nodes: Collection[Any], weights: Mapping[Any, Collection[str]] | None = None) -> None:
        self.nodes = set(nodes)
        self.weights = weights or {}
        self.readers: Counter[Edge] = Counter(edge for node in nodes for _, edge in self.inputs(node))

    def inputs(self, node: Any) -> Iterator[tuple[int, Edge]]:
        """Yield each input that is on the way: its place, and the edge it comes by."""
        for i, edge in enumerate(node.next_functions):
            if edge[0] in self.nodes:
                yield i, edge

    @cached_property
    def of_softmax(self) -> set[Any]:
        """The nodes that the input reaches through softmaxes alone."""
        found = set[Any]()
        for node in sorted(self.nodes, key=sequence_number):
            behind = [edge[0] for _, edge in self.inputs(node)]
            is_weight = stem(node) in _SOFTMAX or "softmax" in self.weights.get(node, ()) or _of_logarithm(node, self)
            if is_weight or (behind and all(n in found for n in behind)):
                found.add(node)
        return found

    def through(self, edge: Edge, passing: Collection[str]) -> Edge:
        """Follow an edge through nodes of certain operations with one input on the way."""
        while stem(edge[0]) in passing:
            behind = [e for _, e in self.inputs(edge[0])]
            if len(behind) != 1:
                break
            edge = behind[0]
        return edge


def recognize(
    nodes: Collection[Any],
    kinds: Collection[str],
    notes: ForwardNotes,
    closes: bool = False,
    known: Mapping[Any, Collection[str]] | None = None,
) -> Recognized:
    """Return the operations among nodes on the way, scores first.

    Args:
        nodes: those that the backward pass will run.
        kinds: those that the rule has rows for.
        closes: no gradient passes a ReLU's zeros under the rule, so that its output says all of its input that counts.
        known: of nodes that stand for the inputs, by which of `WEIGHTS` they were given.
    """
    way, found, claimed = Way(nodes, known), Recognized(), set[Any]()
    folds = not {"conv", "linear"}.isdisjoint(kinds)
    alone = _relus(nodes, way) if closes else {}
    for node in sorted(nodes, key=sequence_number, reverse=True):
        if node in claimed:
            continue
        folded = layer_behind(node, way, notes) if folds else None
        operation, inner = _operation(node if folded is None else folded.layer, way, notes)
        if folded is not None and operation is not None:
            inner = {folded.layer, *folded.nodes[:-1]}
            operation = replace(operation, entry=node, inner=frozenset(inner), folded=folded)
        if operation is not None:
            claimed |= inner
            operation.relu = alone.get(node) if is_layer(operation) else None
            if operation.kind in kinds:
                found.operations.append(operation)
        elif function_class(node) is not None:
            found.opaque.append(node)
        elif _passes(node, way, kinds):
            continue
        elif can_be_expanded(node, notes.saved.read):
            given = dict(way.inputs(node))
            places = range(len(node.next_functions))
            operands = tuple(((node, i),) if i in given else () for i in places)
            weights = (
                [name for name, is_one in WEIGHTS.items() if i in given and is_one(given[i], way)] for i in places
            )
            found.fused.append(NodeOperation("fused", node, operands, notes, weights=tuple(weights)))
        else:
            found.unknown.append(node)
    return found


def is_layer(operation: NodeOperation) -> bool:
    """Whether an operation has constant weights."""
    return operation.kind in ("conv", "linear")


def _relus(nodes: Collection[Any], way: Way) -> dict[Any, Any]:
    """Return the ReLUs by the node that they alone read."""
    behind = (
        (node, way.through(edge, ("View", "UnsafeView")))
        for node in nodes
        if stem(node) == "Relu"
        for _, edge in way.inputs(node)
    )
    return {edge[0]: node for node, edge in behind if way.readers[edge] == 1}


def _passes(node: Any, way: Way, kinds: Collection[str]) -> bool:
    """Whether a node only hands on, adds or scales what it is given, so that its gradient is right under any rule."""
    name, places = stem(node), [i for i, _ in way.inputs(node)]
    if name in VIEWS or name in SUMS or name in COPIES or name in PICKS or name in ("Neg", "Abs"):
        return True
    if name in ("Maximum", "Minimum"):
        return len(places) == 2
    if name in ("GridSampler2D", "GridSampler3D", "GroupedMm"):
        return places == [0] and (name != "GroupedMm" or "linear" not in kinds)
    if name == "Lerp":  # a sum, where the share of each is constant
        return 2 not in places or places == [2]
    if name in ("Addcmul", "Addcdiv"):  # of a scale that is constant, say
        return not {1, 2} <= set(places) and (name == "Addcmul" or 2 not in places)
    if name in ("Addmm", "Baddbmm", "Addmv", "Addbmm") and len(places) > 1:  # what is added is on the way too
        return not {1, 2} <= set(places) and "linear" not in kinds
    return "Accumulate" in name or (name in (*MATRIX_PRODUCTS, "Mul", "Div", "Convolution") and len(places) == 1)


def _operation(node: Any, way: Way, notes: ForwardNotes) -> tuple[NodeOperation | None, set[Any]]:
    """Return the operation that ends in a node, and the nodes that are within it; None for no operation."""
    name, inputs = stem(node), list(way.inputs(node))
    kind = simple_kind(node)
    if kind == "attention":
        places = dict(inputs)
        return NodeOperation(kind, node, tuple(((node, i),) if i in places else () for i in range(4)), notes), set()
    if kind == "smooth" and name == "Pow" and len(inputs) == 1 and _is_linear_power(node, notes):
        return None, set()
    logarithm = _of_logarithm(node, way)
    if logarithm:
        inner = _own(logarithm, node, way)
        return NodeOperation("softmax", node, (((node, inputs[0][0]),),), notes), inner
    if kind is not None and len(inputs) == 1:
        is_proportional = name in PROPORTIONAL or name in ("Prelu", "PreluKernel")
        operation = NodeOperation(kind, node, (((node, inputs[0][0]),),), notes, is_proportional=is_proportional)
        return operation, set()
    if name in MATRIX_PRODUCTS:
        return _matrix_product(node, inputs, way, notes), set()
    if name == "Convolution" and inputs:
        on_the_way = [i for i, _ in inputs]
        if on_the_way == [0]:
            return NodeOperation("conv", node, (((node, 0),),), notes), set()
        pair = (((node, 0),), ((node, 1),))
        return (NodeOperation("matmul", node, pair, notes) if on_the_way == [0, 1] else None), set()
    if name == "Div" and [i for i, _ in inputs] == [1]:  # a constant by x
        return NodeOperation("smooth", node, (((node, 1),),), notes), set()
    if name in ("Mul", "Div") and len(inputs) == 2:
        return _written_out(node, way, notes)
    if name in ("Add", "Sub") and len(inputs) == 2:
        return NodeOperation("add", node, (((node, 0),), ((node, 1),)), notes), set()
    return None, set()


def _is_linear_power(node: Any, notes: ForwardNotes) -> bool:
    exponent = notes.saved.read(node, "exponent")
    return isinstance(exponent, int | float) and exponent == 1


def _matrix_product(node: Any, inputs: list[tuple[int, Edge]], way: Way, notes: ForwardNotes) -> NodeOperation | None:
    places = MATRIX_PRODUCTS[stem(node)]
    given = dict(inputs)
    if not given.keys() <= set(places):
        return None  # a sum with a product, both of them on the way
    if len(given) == 2:
        operands = tuple(((node, i),) for i in places)
        return NodeOperation("matmul", node, operands, notes, gate=_gate([given[i] for i in places], way))
    place = inputs[0][0]
    return NodeOperation("linear", node, (((node, place),),), notes) if place in places else None


def _gate(factors: list[Edge], way: Way) -> int | None:
    """Return which of two factors is a weight: what a softmax or sigmoid gave, else what an activation gave."""
    for is_weight in WEIGHTS.values():
        are = [is_weight(edge, way) for edge in factors]
        if are.count(True) == 1:
            return are.index(True)
    return None


def _only_softmax(edge: Edge, way: Way) -> bool:
    """Whether a factor is a function of softmaxes alone, as attention weights that heads mix."""
    return edge[0] in way.of_softmax


def _from_gate(edge: Edge, way: Way) -> bool:
    node = way.through(edge, VIEWS | COPIES | AFFINE)[0]
    name, behind = stem(node), [edge for _, edge in way.inputs(node)]
    if name in ("Hardtanh", "Clamp") and len(behind) == 1:  # relu6(x + 3) / 6
        return stem(behind[0][0]) == "Add" and len(list(way.inputs(behind[0][0]))) == 1
    return name in GATES or "gate" in way.weights.get(node, ()) or (name == "Div" and _is_softmax(node, way))


def _from_activation(edge: Edge, way: Way) -> bool:
    node = way.through(edge, VIEWS | COPIES | AFFINE)[0]
    if stem(node) == "Mul":
        return len(list(way.inputs(node))) == 2 and _activation_nodes(node, way) is not None
    return stem(node) in _ACTIVATIONS or "activation" in way.weights.get(node, ())


WEIGHTS: Mapping[str, Callable[[Edge, Way], bool]] = {
    "softmax": _only_softmax,
    "gate": _from_gate,
    "activation": _from_activation,
}
"""What makes a factor the weight of another: the first of these that is true of one of the two alone."""


def _written_out(node: Any, way: Way, notes: ForwardNotes) -> tuple[NodeOperation | None, set[Any]]:
    """Return what a product or a quotient of two operands on the way is."""
    first, second = (edge for _, edge in way.inputs(node))
    pair = (((node, 0),), ((node, 1),))
    region = _activation_nodes(node, way)
    if region is not None:
        exits, inner = region
        return NodeOperation("smooth", node, (tuple(exits),), notes, inner=frozenset(inner)), inner
    if stem(node) == "Div":
        if _is_softmax(node, way):
            numerator = way.through(first, VIEWS | COPIES)[0]
            inner = {numerator, *_between(second, numerator, way), *_between(first, numerator, way)}
            if _own(inner, node, way) != inner:
                return None, set()
            return NodeOperation("softmax", node, (((numerator, 0),),), notes, inner=frozenset(inner)), inner
        inner = _statistic_nodes(second, way)
        return (NodeOperation("spread", node, pair, notes) if inner else None), _own(inner, node, way)
    for signal, statistic in ((0, second), (1, first)):
        inner = _statistic_nodes(statistic, way, inverse=True)
        if inner:
            return NodeOperation("spread", node, (pair[signal], pair[1 - signal]), notes), _own(inner, node, way)
    return NodeOperation("product", node, pair, notes, gate=_gate([first, second], way)), set()


def _activation_nodes(node: Any, way: Way) -> tuple[list[tuple[Any, int]], set[Any]] | None:
    """Return where the one tensor enters of which a node is an elementwise function, and the nodes within; else None.

    The nearest such tensor: the latest node among the operands' is taken apart, until all of them come by one edge.
    """
    inner, frontier = {node}, {edge for _, edge in way.inputs(node)}
    for _ in range(_LONGEST):
        if len(frontier) == 1:
            break
        latest = max((edge[0] for edge in frontier), key=sequence_number)
        behind = {edge for _, edge in way.inputs(latest)}
        if stem(latest) not in ELEMENTWISE or not behind:  # one without is an input itself
            return None
        inner.add(latest)
        frontier = {edge for edge in frontier if edge[0] is not latest} | behind
    if len(frontier) != 1:
        return None
    (origin,) = frontier
    exits = [(n, i) for n in sorted(inner, key=sequence_number) for i, edge in way.inputs(n) if edge == origin]
    reads = Counter(edge for n in inner for _, edge in way.inputs(n))
    shared = any(way.readers[(n, 0)] != reads[(n, 0)] for n in inner if n is not node)
    return None if shared else (exits, inner - {node})


def _own(inner: set[Any], node: Any, way: Way) -> set[Any]:
    """Return those of some nodes that only each other and one more node read: what else is read counts for itself."""
    kept = set(inner)
    while True:
        reads = Counter(edge for n in (node, *kept) for _, edge in way.inputs(n))
        shared = {n for n in kept if way.readers[(n, 0)] != reads[(n, 0)]}
        if not shared:
            return kept
        kept -= shared


def _is_softmax(node: Any, way: Way) -> bool:
    """Whether a quotient is exp(x) by its own sum."""
    edges = [edge for _, edge in way.inputs(node)]
    if len(edges) != 2:
        return False
    top, bottom = edges
    top, bottom = way.through(top, VIEWS | COPIES), way.through(bottom, VIEWS | COPIES)
    if stem(top[0]) != "Exp" or stem(bottom[0]) != "Sum":
        return False
    return way.through(next(edge for _, edge in way.inputs(bottom[0])), VIEWS | COPIES) == top


def _of_logarithm(node: Any, way: Way) -> set[Any]:
    """Return the nodes of the logarithm of a softmax of which a node is the exponential; none for any other.

    It is a log-softmax, or x less the logarithm of the sum of its exponentials.
    """
    if stem(node) != "Exp":
        return set()
    behind = way.through(next(edge for _, edge in way.inputs(node)), VIEWS | COPIES)[0]
    if stem(behind) == "LogSoftmax":
        return {behind}
    edges = [way.through(edge, VIEWS | COPIES) for _, edge in way.inputs(behind)]
    if stem(behind) != "Sub" or len(edges) != 2 or stem(edges[1][0]) != "Logsumexp":
        return set()
    summed = way.through(next(edge for _, edge in way.inputs(edges[1][0])), VIEWS | COPIES)
    return {behind, edges[1][0]} if summed == edges[0] else set()


def _between(edge: Edge, end: Any, way: Way) -> Iterator[Any]:
    """Yield the nodes from an edge to the one at which it ends, each with one input on the way."""
    while edge[0] is not end:
        yield edge[0]
        edge = next(behind for _, behind in way.inputs(edge[0]))


def _statistic_nodes(edge: Edge, way: Way, inverse: bool = False) -> set[Any]:
    """Return the nodes between a factor and the sums or norms over an axis that it is a function of; none for others.

    Args:
        inverse: only of a factor that is one over something, as in a product.
    """
    inner, reductions, inverted, ahead = set[Any](), set[Any](), not inverse, [edge]
    while ahead:
        node = ahead.pop()[0]
        if stem(node) in REDUCTIONS:
            reductions.add(node)
            continue
        behind = [e for _, e in way.inputs(node)]
        is_known = stem(node) in ELEMENTWISE | VIEWS and (len(behind) == 1 or stem(node) in ("Add", "Sub"))
        if not is_known or not behind:
            return set()
        inverted |= stem(node) in _INVERSES or (stem(node) == "Pow" and _is_negative(node)) or stem(node) == "Div"
        inner.add(node)
        ahead += behind
    powers = {behind for n in reductions for _, (behind, _) in way.inputs(n) if stem(behind) in ("Pow", "Abs")}
    return inner | reductions | powers if inverted else set()


def _is_negative(node: Any) -> bool:
    exponent = getattr(node, "_saved_exponent", 0)
    return isinstance(exponent, int | float) and exponent < 0


def listed(nodes: Collection[Any]) -> Mapping[str, int]:
    """Count nodes by name."""
    return Counter(name_of(node) for node in nodes)
