"""Which operations the nodes of one call are: one node each, or several where an operation is written out."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..internals import function_class, saved, sequence_number
from ..nodes import name_of
from .kinds import COPIES, ELEMENTWISE, PROPORTIONAL, REDUCTIONS, SUMS, VIEWS, simple_kind, stem
from .notes import ForwardNotes
from .operations import GATES, NodeOperation

Edge = tuple[Any, int]
"""A node and the number of its output: a tensor."""

MATRIX_PRODUCTS = {"Mm": (0, 1), "Bmm": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Mv": (0, 1), "Dot": (0, 1)}
_INVERSES = ("Rsqrt", "Reciprocal")
_ACTIVATIONS = ("Gelu", "Silu", "Mish", "Elu", "Celu", "Softplus", "Hardswish", "Relu", "Tanh")
_LONGEST = 64  # steps of one activation written out


@dataclass
class Recognized:
    """The operations on the way, and the nodes that are none that is known.

    Attributes:
        operations: those whose kind is asked for.
        unknown: nodes that pass their gradient for want of a better rule.
        opaque: a user's own autograd functions.
    """

    operations: list[NodeOperation] = field(default_factory=list)
    unknown: list[Any] = field(default_factory=list)
    opaque: list[Any] = field(default_factory=list)


class Way:
    """The nodes between the scores and the inputs, which the backward pass that runs now will run."""

    def __init__(self, nodes: Collection[Any]) -> None:
        self.nodes = set(nodes)
        self.readers: Counter[Edge] = Counter(edge for node in nodes for _, edge in self.inputs(node))

    def inputs(self, node: Any) -> Iterator[tuple[int, Edge]]:
        """Yield each input that is on the way: its place, and the edge it comes by."""
        for i, edge in enumerate(node.next_functions):
            if edge[0] in self.nodes:
                yield i, edge

    def through(self, edge: Edge, passing: Collection[str]) -> Edge:
        """Follow an edge through nodes of certain operations with one input on the way."""
        while stem(edge[0]) in passing:
            behind = [e for _, e in self.inputs(edge[0])]
            if len(behind) != 1:
                break
            edge = behind[0]
        return edge


def recognize(
    nodes: Collection[Any], kinds: Collection[str], notes: ForwardNotes | None, closes: bool = False
) -> Recognized:
    """Return the operations among nodes on the way, scores first.

    Args:
        nodes: those that the backward pass will run.
        kinds: those that the rule has rows for.
        closes: no gradient passes a ReLU's zeros under the rule, so that its output says all of its input that counts.
    """
    way, found, claimed = Way(nodes), Recognized(), set[Any]()
    folds = not {"conv", "linear"}.isdisjoint(kinds)
    alone = _relus(nodes, way) if closes else {}
    for node in sorted(nodes, key=sequence_number, reverse=True):
        if node in claimed:
            continue
        layer = _layer_behind(node, way) if folds else None
        operation, inner = _operation(node if layer is None else layer, way, notes)
        if layer is not None and operation is not None:
            operation, inner = replace(operation, entry=node, inner=frozenset((layer,))), {layer}
        if operation is not None:
            claimed |= inner
            operation.relu = alone.get(node) if is_layer(operation) else None
            if operation.kind in kinds:
                found.operations.append(operation)
        elif function_class(node) is not None:
            found.opaque.append(node)
        elif not _passes(node, way):
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


def _layer_behind(node: Any, way: Way) -> Any:
    """Return the layer that a batch norm in eval mode alone reads; None where there is none."""
    if not stem(node).endswith("BatchNorm") or saved(node, "training"):
        return None
    layer = next((behind for _, (behind, _) in way.inputs(node)), None)
    if layer is None or stem(layer) not in ("Convolution", "Addmm", "Mm") or way.readers[(layer, 0)] != 1:
        return None
    if [i for i, _ in way.inputs(layer)] != [1 if stem(layer) == "Addmm" else 0]:
        return None
    is_grouped = stem(layer) == "Convolution" and saved(layer, "transposed") and saved(layer, "groups") > 1
    return None if is_grouped else layer


def _passes(node: Any, way: Way) -> bool:
    """Whether a node only hands on, adds or scales what it is given, so that its gradient is right under any rule."""
    name = stem(node)
    if name in VIEWS or name in SUMS or name in COPIES or name in ("Neg", "Abs") or "Accumulate" in name:
        return True
    return name in (*MATRIX_PRODUCTS, "Mul", "Div", "Convolution") and len(list(way.inputs(node))) == 1


def _operation(node: Any, way: Way, notes: ForwardNotes | None) -> tuple[NodeOperation | None, set[Any]]:
    """Return the operation that ends in a node, and the nodes that are within it; None for no operation."""
    name, inputs = stem(node), list(way.inputs(node))
    kind = simple_kind(node)
    if kind == "attention":
        places = dict(inputs)
        return NodeOperation(kind, node, tuple(((node, i),) if i in places else () for i in range(4)), notes), set()
    if kind == "smooth" and name == "Pow" and len(inputs) == 1 and _is_linear_power(node):
        return None, set()
    if kind is not None and len(inputs) == 1:
        is_proportional = name in PROPORTIONAL or name in ("Prelu", "PreluKernel")
        operation = NodeOperation(kind, node, (((node, inputs[0][0]),),), notes, is_proportional=is_proportional)
        return operation, set()
    if name in MATRIX_PRODUCTS:
        return _matrix_product(node, inputs, way, notes), set()
    if name == "Convolution" and inputs:
        if [i for i, _ in inputs] == [0]:
            return NodeOperation("conv", node, (((node, 0),),), notes), set()
        operands = tuple(((node, i),) if i in dict(inputs) else () for i in (0, 1))
        return NodeOperation("matmul", node, operands, notes), set()
    if name in ("Mul", "Div") and len(inputs) == 2:
        return _written_out(node, way, notes)
    if name in ("Add", "Sub") and len(inputs) == 2:
        return NodeOperation("add", node, (((node, 0),), ((node, 1),)), notes), set()
    return None, set()


def _is_linear_power(node: Any) -> bool:
    return getattr(node, "_saved_exponent", None) == 1


def _matrix_product(
    node: Any, inputs: list[tuple[int, Edge]], way: Way, notes: ForwardNotes | None
) -> NodeOperation | None:
    places = MATRIX_PRODUCTS[stem(node)]
    given = dict(inputs)
    if not given.keys() <= set(places):
        return None  # a sum with a product, both of them on the way
    if len(given) == 2:
        operands = tuple(((node, i),) for i in places)
        return NodeOperation("matmul", node, operands, notes, gate=_gate([given[i] for i in places], way))
    return NodeOperation("linear", node, (((node, inputs[0][0]),),), notes) if places[0] in given else None


def _gate(factors: list[Edge], way: Way) -> int | None:
    """Return which of two factors is a weight: what a softmax or sigmoid gave, else what an activation gave."""
    for names in (GATES, _ACTIVATIONS):
        are = [_comes_from(edge, names, way) for edge in factors]
        if are.count(True) == 1:
            return are.index(True)
    return None


def _comes_from(edge: Edge, names: Collection[str], way: Way) -> bool:
    edge = way.through(edge, VIEWS | COPIES)
    name = stem(edge[0])
    if "Softmax" in names and name == "Div":
        return _is_softmax(edge[0], way)
    if "Silu" in names and name == "Mul":
        return len(list(way.inputs(edge[0]))) == 2 and _activation_nodes(edge[0], way) is not None
    return name in names


def _written_out(node: Any, way: Way, notes: ForwardNotes | None) -> tuple[NodeOperation | None, set[Any]]:
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
            return NodeOperation("softmax", node, (((numerator, 0),),), notes, inner=frozenset(inner)), inner
        inner = _statistic_nodes(second, way)
        return (NodeOperation("spread", node, pair, notes) if inner else None), inner
    for signal, statistic in ((0, second), (1, first)):
        inner = _statistic_nodes(statistic, way, inverse=True)
        if inner:
            return NodeOperation("spread", node, (pair[signal], pair[1 - signal]), notes), inner
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
        if stem(latest) not in ELEMENTWISE:
            return None
        inner.add(latest)
        frontier = {edge for edge in frontier if edge[0] is not latest} | {edge for _, edge in way.inputs(latest)}
    if len(frontier) != 1:
        return None
    (origin,) = frontier
    exits = [(n, i) for n in sorted(inner, key=sequence_number) for i, edge in way.inputs(n) if edge == origin]
    reads = Counter(edge for n in inner for _, edge in way.inputs(n))
    shared = any(way.readers[(n, 0)] != reads[(n, 0)] for n in inner if n is not node)
    return None if shared else (exits, inner - {node})


def _is_softmax(node: Any, way: Way) -> bool:
    """Whether a quotient is exp(x) by its own sum."""
    (_, top), (_, bottom) = way.inputs(node)
    top, bottom = way.through(top, VIEWS | COPIES), way.through(bottom, VIEWS | COPIES)
    if stem(top[0]) != "Exp" or stem(bottom[0]) != "Sum":
        return False
    return way.through(next(edge for _, edge in way.inputs(bottom[0])), VIEWS | COPIES) == top


def _between(edge: Edge, end: Any, way: Way) -> Iterator[Any]:
    """Yield the nodes from an edge to the one at which it ends, each with one input on the way."""
    while edge[0] is not end:
        yield edge[0]
        edge = next(behind for _, behind in way.inputs(edge[0]))


def _statistic_nodes(edge: Edge, way: Way, inverse: bool = False) -> set[Any]:
    """Return the nodes between a factor and the sum or norm over an axis that it is a function of; none for any other.

    Args:
        inverse: only of a factor that is one over something, as in a product.
    """
    inner, inverted = set[Any](), not inverse
    while stem(edge[0]) not in REDUCTIONS:
        node = edge[0]
        behind = [e for _, e in way.inputs(node)]
        if stem(node) not in ELEMENTWISE | VIEWS or len(behind) != 1:
            return set()
        inverted |= stem(node) in _INVERSES or (stem(node) == "Pow" and _is_negative(node)) or stem(node) == "Div"
        inner.add(node)
        edge = behind[0]
    powers = {behind for _, (behind, _) in way.inputs(edge[0]) if stem(behind) in ("Pow", "Abs")}
    return inner | {edge[0]} | powers if inverted else set()


def _is_negative(node: Any) -> bool:
    exponent = getattr(node, "_saved_exponent", 0)
    return isinstance(exponent, int | float) and exponent < 0


def listed(nodes: Collection[Any]) -> Mapping[str, int]:
    """Count nodes by name."""
    return Counter(name_of(node) for node in nodes)
