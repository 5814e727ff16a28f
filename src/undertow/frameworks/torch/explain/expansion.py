"""Nodes of several operations in one: written out, so that a table's rows see each of them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..internals import saved
from .kinds import stem
from .notes import Read


@dataclass(frozen=True)
class Expansion:
    """A node as the operations that it is made of.

    Attributes:
        operands: what the node saved, for each of its inputs; "" of one that is only added, and so keeps its gradient.
        written_out: from the node and the operands that have a name, to the node's output less what is only added.
    """

    operands: tuple[str, ...]
    written_out: Callable[..., Tensor]


def _glu(node: Any, x: Tensor) -> Tensor:
    axis = saved(node, "dim")  # read as an unsigned number
    values, gates = x.chunk(2, axis - 2**64 if axis >= 2**63 else axis)
    gated: Tensor = values * gates.sigmoid()
    return gated


def _matrix_product(node: Any, a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = a @ b * saved(node, "alpha")
    return product


EXPANSIONS: Mapping[str, Expansion] = {
    "Glu": Expansion(("self",), _glu),
    "Addcmul": Expansion(("", "tensor1", "tensor2"), lambda n, a, b: a * b * saved(n, "value")),
    "Lerp": Expansion(("self", "end", "weight"), lambda _, a, b, share: a + share * (b - a)),
    "Addmm": Expansion(("", "mat1", "mat2"), _matrix_product),
    "Baddbmm": Expansion(("", "batch1", "batch2"), _matrix_product),
}
"""Where more than one of a node's inputs is on the way; else it is a sum, or a product with a constant."""


def can_be_expanded(node: Any, read: Read) -> bool:
    """Whether a node is in `EXPANSIONS` and saved all that it is written out of."""
    expansion = EXPANSIONS.get(stem(node))
    return expansion is not None and all(read(node, name) is not None for name in expansion.operands if name)


def write_out(node: Any, on_the_way: Collection[int], read: Read) -> tuple[dict[int, Tensor], dict[int, Any], Tensor]:
    """Compute a node's output again by the operations that it is made of.

    Args:
        node: one of `EXPANSIONS`.
        on_the_way: which of its inputs a gradient is wanted for.
        read: how to get what it saved.

    Returns:
        Those of its inputs that are factors, by their place; the nodes that stand for them; and the output less what is
        only added.
    """
    expansion = EXPANSIONS[stem(node)]
    given = {i: read(node, name).detach() for i, name in enumerate(expansion.operands) if name}
    factors = {i: x.requires_grad_() for i, x in given.items() if i in on_the_way}
    with torch.enable_grad():
        fed = {i: x.clone() for i, x in given.items()}
        return factors, {i: fed[i].grad_fn for i in factors}, expansion.written_out(node, *fed.values())
