"""The autograd graph of a batch, reduced to the outputs of its sites: which of them read which first."""

from collections.abc import Iterable, Mapping
from typing import Any

END = -1
"""The end of the graph, as a reader: what `.backward()` was called on, or what nobody read."""


def first_readers(numbers: Mapping[Any, int], roots: Iterable[Any]) -> dict[int, list[int]]:
    """Return, for each site output, the outputs that read it by way of no other site output, nearest the loss.

    Each node is visited once, and hands on, as the bits of a whole number, which outputs it was reached from.

    Args:
        numbers: of the site outputs, by their graph nodes.
        roots: the nodes that backward passes began at.
    """
    reached: dict[Any, int] = {}
    read_by: dict[int, int] = {}
    for node in _from_the_loss((*roots, *numbers)):
        bits = reached.pop(node, 0) or 1
        if node in numbers:
            read_by[numbers[node]] = bits
            bits = 1 << (numbers[node] + 1)
        for behind, _ in node.next_functions:
            if behind is not None:
                reached[behind] = reached.get(behind, 0) | bits
    return {number: _ones(bits) for number, bits in read_by.items()}


def _ones(bits: int) -> list[int]:
    return [position + END for position in range(bits.bit_length()) if bits >> position & 1]


def _from_the_loss(roots: Iterable[Any]) -> list[Any]:
    """List all nodes so that each comes behind all that read it: the reverse of the order in which a search ends."""
    ended: list[Any] = []
    seen: set[Any] = set()
    for root in roots:
        if root is None or root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, behind = stack[-1]
            following = next((n for n, _ in behind if n is not None and n not in seen), None)
            if following is None:
                ended.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(following.next_functions)))
    return ended[::-1]
