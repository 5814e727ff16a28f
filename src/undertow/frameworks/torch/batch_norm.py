"""Batch norm on the CPU misreads some gradients of a single sample; here they are laid out so that it does not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import Node

from .internals import SharedPrehook
from .nodes import all_nodes_behind, name_of


@contextmanager
def readable_by_batch_norm(root: Node | None) -> Iterator[None]:
    """Lay out the gradients that reach batch norms behind `root`, in the backward passes run inside this context.

    Where a batch holds one sample, torch 2.13's `native_batch_norm_backward` on the CPU takes a gradient that was
    transposed, as by `flatten(2).transpose(1, 2)` between a convolutional stem and a transformer, for one that was not,
    and returns other numbers without a word. Instance norms are batch norms of one sample.
    """
    hook = SharedPrehook(_laid_out)
    for node in [] if root is None else all_nodes_behind(root):
        if name_of(node).startswith("NativeBatchNorm"):
            hook.attach(node)
    try:
        yield
    finally:
        hook.clear()


def _laid_out(g: torch.Tensor | None) -> torch.Tensor | None:
    is_misread = g is not None and g.ndim > 2 and len(g) == 1 and g.stride(0) != g.numel()
    return g.contiguous() if g is not None and is_misread else g
