"""Where relevance by value becomes relevance itself: the first layers, and what lies between them and the input."""

from collections.abc import Collection
from typing import Any

from ....errors import RuleError
from ..internals import sequence_number
from ..nodes import name_of
from .kinds import COPIES, PROPORTIONAL, SMOOTH, VIEWS, simple_kind, stem
from .operations import NodeOperation
from .recognition import Way, is_layer

_SCALES = frozenset(("Mul", "Div", "Neg"))


def first_layers(nodes: Collection[Any], operations: Collection[NodeOperation]) -> tuple[set[Any], set[Any]]:
    """Return the layers from whose input no other is reached, and the nodes between them and the input that scale.

    Raises:
        RuleError: the scores depend on the input by a way without a layer, or it is pooled or added before the first.
    """
    way = Way(nodes)
    layers = {operation.layer: operation for operation in operations if is_layer(operation)}
    if not layers:
        raise RuleError("there is no convolution or matrix product with constants between the input and the scores")
    reaches: dict[Any, bool] = {}
    for node in sorted(nodes, key=sequence_number):
        reaches[node] = any(behind in layers or reaches[behind] for _, (behind, _) in way.inputs(node))
    first = {layer for layer in layers if not reaches[layer]}
    between = {node for node in nodes if not reaches[node] and node not in layers}
    for node in nodes:
        if node not in between and node not in first:
            for _, (behind, _) in way.inputs(node):
                if behind in between:
                    raise RuleError(
                        f"x reaches {name_of(node)} beside the first layers, where relevance is that of a layer's "
                        "output and not of x; explain at= the output of a layer behind"
                    )
    for node in between:
        if not _hands_on(node, way):
            raise RuleError(
                f"{name_of(node)} lies between x and the first layer, where relevance is shared out already; apply it "
                "to x beforehand"
            )
    return first, {node for node in between if stem(node) in _SCALES or simple_kind(node) in ("norm", "relu", "smooth")}


def _hands_on(node: Any, way: Way) -> bool:
    """Whether relevance passes a node before the first layer element by element."""
    name = stem(node)
    if len(list(way.inputs(node))) > 1:
        return False
    known = VIEWS | COPIES | PROPORTIONAL | SMOOTH | _SCALES | {"Add", "Sub"}
    return name in known or simple_kind(node) == "pool" or name.endswith("BatchNorm")
