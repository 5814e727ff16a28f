"""What scales and shifts each channel of a layer's output and belongs to the layer: a batch norm as it predicts, in any
spelling, and a bias that is added in a step of its own.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..internals import saved
from ..nodes import normalizes_by_batch
from .kinds import COPIES, stem
from .notes import ForwardNotes

_SCALES, _SHIFTS = ("Mul", "Div"), ("Add", "Sub")
_PERMUTATIONS = ("Permute", "Transpose")


@dataclass(frozen=True)
class Affine:
    """One node of them.

    Attributes:
        node: a batch norm, or a product or a sum with a constant.
        place: of the layer's output among its operands.
        constant: `(C,)`; None of a batch norm.
    """

    node: Any
    place: int = 0
    constant: Tensor | None = None

    def scale_and_shift(self) -> tuple[Any, Any]:
        """Return what a product or a sum makes of y: y·scale + shift."""
        name, constant = stem(self.node), self.constant
        assert constant is not None
        if name in _SCALES:
            return (constant if name == "Mul" else 1 / constant), 0
        sign = 1 if name == "Add" else -1
        alpha = saved(self.node, "alpha")
        return (1, sign * alpha * constant) if self.place == 0 else (sign * alpha, constant)


@dataclass(frozen=True)
class Folded:
    """A layer, and what alone reads it.

    Attributes:
        layer: the weighted node.
        nodes: behind it, the last of which is the entry of the operation.
        steps: those among the nodes that scale or shift.
        order: the axes of the entry's output are these of the layer's.
    """

    layer: Any
    nodes: tuple[Any, ...]
    steps: tuple[Affine, ...]
    order: tuple[int, ...]


def layer_behind(node: Any, way: Any, notes: ForwardNotes) -> Folded | None:
    """Return the layer whose channels a node is the last to scale or shift; None where there is none.

    Args:
        way: the `recognition.Way`.
    """
    nodes, places, current = list[Any](), list[int](), node
    if not _is_step(node):
        return None
    while stem(current) not in ("Convolution", "Addmm", "Mm"):
        behind = list(way.inputs(current))
        if len(behind) != 1 or not (_is_step(current) or stem(current) in (*COPIES, *_PERMUTATIONS)):
            return None
        place, edge = behind[0]
        if way.readers[edge] != 1:
            return None
        nodes.append(current)
        places.append(place)
        current = edge[0]
    if [i for i, _ in way.inputs(current)] != [1 if stem(current) == "Addmm" else 0]:
        return None
    order = list(range(_n_axes(current, notes)))
    channel, steps = 1 if stem(current) == "Convolution" else len(order) - 1, []
    for node, place in zip(reversed(nodes), reversed(places), strict=True):
        name = stem(node)
        if name in _PERMUTATIONS:
            order = _permuted(node, order)
        elif name.endswith("BatchNorm"):
            if order.index(channel) != 1:
                return None
            steps.append(Affine(node))
        elif name not in COPIES:
            constant = _of_channels(_constant(node, 1 - place, notes), len(order), order.index(channel))
            if constant is None or (name == "Div" and place == 1):
                return None
            steps.append(Affine(node, place, constant))
    return Folded(current, tuple(reversed(nodes)), tuple(steps), tuple(order))


def _is_step(node: Any) -> bool:
    name = stem(node)
    return name in (*_SCALES, *_SHIFTS) or (name.endswith("BatchNorm") and not normalizes_by_batch(node))


def _n_axes(layer: Any, notes: ForwardNotes) -> int:
    weight = notes.operand(layer, 1) if stem(layer) == "Convolution" else None
    return 2 if weight is None else weight.ndim


def _permuted(node: Any, order: list[int]) -> list[int]:
    n = len(order)
    if stem(node) == "Permute":
        return [order[_signed(i) % n] for i in saved(node, "dims")]
    first, second = (_signed(saved(node, name)) % n for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _signed(axis: int) -> int:
    """Return an axis, which a node may save as an unsigned number."""
    return axis - (1 << 64) if axis >= 1 << 63 else axis


def _constant(node: Any, place: int, notes: ForwardNotes) -> Any:
    if stem(node) in _SHIFTS:
        return notes.operand(node, place)
    return notes.saved.read(node, ("self", "other")[place])


def _of_channels(constant: Any, n_axes: int, channel: int) -> Tensor | None:
    """Return a constant as one number a channel; None where it is another."""
    if not isinstance(constant, Tensor) or constant.ndim < n_axes - channel:
        return None
    sizes = list(constant.shape)
    del sizes[channel - n_axes]
    return constant.detach().flatten() if all(size == 1 for size in sizes) and constant.ndim <= n_axes else None


def in_layers_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a tensor such as the entry's output with its axes as the layer has them."""
    return x.permute([order.index(i) for i in range(len(order))])


def in_entrys_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a tensor such as the layer's output with its axes as the entry has them."""
    return x.permute(order)
