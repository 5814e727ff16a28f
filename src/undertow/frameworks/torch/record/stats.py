"""The statistics of a PyTorch tensor, wherever it lies; on a GPU nothing here waits for the device."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....measures import CODES, Stats, sparse, stats
from .axes import arranged as arranged


class TorchStats(Stats):
    """The statistics of a tensor `(B, C, ...)`, on its device.

    Sums over the axes behind the second are taken in the tensor's precision, float32 at least, and added up in float64.
    Norm, mean and squared deviations of a float64 tensor are torch's own sums over the whole.
    """

    x: Tensor

    @cached_property
    def norms(self) -> Any:
        """As in `Stats`; float32 `(B, C)`."""
        return self._wide_norms.float()

    @cached_property
    def norm(self) -> Any:
        """As in `Stats`; float64 without an axis."""
        if self.x.dtype == torch.float64 or self.size <= _PIECE:
            return torch.linalg.vector_norm(self.x, dtype=self._dtype).double()
        return self._wide_norms.double().square().sum().sqrt()

    @cached_property
    def zeros(self) -> Any:
        """As in `Stats`."""
        return count_true(self.x.logical_not())

    @cached_property
    def moments(self) -> Any:
        """As in `Stats`."""
        if self.size == 0:
            return torch.tensor([0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)
        values = [*self._mean_and_m2(), *torch.aminmax(self.x)]
        return np.array([float(v) for v in values]) if self._on_cpu else torch.stack([v.double() for v in values])

    def _mean_and_m2(self) -> tuple[Any, Any]:
        """Mean and sum of squared deviations, those from a first mean where the mean is large beside them."""
        if self.x.dtype == torch.float64:
            exact = self.x.mean()
            return exact, (self.x - exact).square().sum()
        n, mean, squares = self.size, self._sums.sum() / self.size, self._wide_norms.double().square().sum()
        if self._on_cpu:  # elsewhere, to compare would be to wait
            first, total = float(mean), float(squares)
            if not total < 16 * n * first * first:
                return first, max(total - n * first * first, 0.0)
        rounded = mean.to(self._dtype)
        shifted = TorchStats(self._wide - rounded)
        rest = shifted._sums.sum() / n
        m2 = shifted._wide_norms.double().square().sum() - n * rest * rest
        return rounded.double() + rest, m2.clamp(min=0)

    @cached_property
    def channel_sums(self) -> Any:
        """As in `Stats`."""
        return torch.stack([self._sums.sum(0), self._norms(1).double().sum(0)])

    @cached_property
    def histogram(self) -> tuple[Any, Any]:
        """As in `Stats`; on a GPU all codes, whose counters may be zero."""
        dense = in_order_of_memory(self.x)
        dense = dense if dense.dtype == torch.bfloat16 else dense.float()
        if self._on_cpu:
            return sparse(_count_codes(dense).numpy())
        # bincount would wait for the device, to learn the largest code
        codes = dense.view(torch.int16)
        if dense.dtype == torch.float32:
            codes = codes[1::2]  # little-endian: the upper half comes second
        ones = torch.ones((), dtype=torch.int64, device=codes.device).expand(codes.shape)
        counters = torch.zeros(CODES, dtype=torch.int64, device=codes.device)
        return _ALL_CODES, counters.scatter_add_(0, codes.long() & 0xFFFF, ones)

    def copy(self, by_sample: bool) -> Any:
        """As in `Stats`."""
        return (self.samples_first if by_sample else self.original).clone(memory_format=torch.contiguous_format)

    @property
    def samples_first(self) -> Any:
        """As in `Stats`."""
        return self.original[None] if self.samples is None else self.original.movedim(self.samples, 0)

    @property
    def _on_cpu(self) -> bool:
        return self.x.device.type == "cpu"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def _wide(self) -> Tensor:
        return self.x.to(self._dtype)

    @cached_property
    def _rows(self) -> Tensor:
        """The tensor as `(B, C, space)`."""
        return self.x.flatten(2) if self.x.ndim > 2 else self.x.unsqueeze(2)

    @cached_property
    def _sums(self) -> Tensor:
        """Sums over space, float64 `(B, C)`."""
        return self._rows.sum(2, dtype=self._dtype).double()

    @cached_property
    def _wide_norms(self) -> Tensor:
        return self._norms(2)

    def _norms(self, order: int) -> Tensor:
        """Norms over space, `(B, C)`, by way of pieces: over many elements `vector_norm` loses digits."""
        pieces = [torch.linalg.vector_norm(p, order, dim=2, dtype=self._dtype) for p in self._rows.split(_PIECE, dim=2)]
        whole: Tensor = pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces), order, dim=0)
        return whole


stats.register(Tensor, TorchStats)


def in_order_of_memory(x: Tensor) -> Tensor:
    """Return the elements in the order in which they lie in memory: no copy where they are dense."""
    axes = sorted(range(x.ndim), key=lambda axis: (-x.stride()[axis], axis))
    return x.permute(axes).reshape(-1)


def count_true(mask: Tensor) -> Any:
    """Count what is true, on the mask's device; NumPy does it many times faster than torch sums booleans."""
    if mask.device.type != "cpu":
        return mask.sum()
    return np.asarray(np.count_nonzero(mask.numpy()), np.int64)


_PIECE = 4096
_ALL_CODES = np.arange(CODES, dtype=np.uint16)
_CHUNK = 1 << 20


def _count_codes(dense: Tensor) -> Tensor:
    """Count codes on the CPU: torch counts 32-bit ones faster than NumPy does, but shifts no unsigned ones."""
    counters = torch.zeros(CODES, dtype=torch.int64)
    buffer = np.empty(min(_CHUNK, dense.numel()), np.uint32)
    for chunk in dense.split(_CHUNK):
        codes = buffer[: len(chunk)]
        if chunk.dtype == torch.bfloat16:
            codes[:] = chunk.view(torch.int16).numpy().view(np.uint16)
        else:
            np.right_shift(chunk.numpy().view(np.uint32), np.uint32(16), out=codes)
        counters += torch.bincount(torch.from_numpy(codes.view(np.int32)), minlength=CODES)
    return counters
