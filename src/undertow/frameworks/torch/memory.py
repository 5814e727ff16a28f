"""The memory of a device: what is free, and how much is taken at the peak."""

from collections.abc import Callable

import torch

from ... import memory as of_host


def free(device: str) -> int | None:
    """Return how many bytes can still be allocated on a device; None where that is not known."""
    kind = torch.device(device).type
    if kind == "cuda":
        of_others, _ = torch.cuda.mem_get_info(device)
        return int(of_others) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return of_host.free() if kind == "cpu" else None


def peak(device: str) -> Callable[[], int] | None:
    """Begin to measure; what is returned tells how many bytes more were allocated since, at most. None: not known."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: max(0, torch.cuda.max_memory_allocated(device) - before)
    return of_host.peak() if kind == "cpu" else None
