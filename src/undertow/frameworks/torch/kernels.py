"""What the measures are made of, on a PyTorch tensor wherever it lies, without waiting for a device.

Float32 in the host's memory is walked by our own C (`_walk.c`), where that could be built: once for norms, zeros,
moments and sums together, under `walking`.
"""

import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ... import measures

try:
    from ... import _walk
except ImportError:  # it was installed without a C compiler
    _walk = None  # type: ignore[assignment]

_FEATURES_LAST: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder),
)


def arranged(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """View a module's output, or its gradient, as `(B, C, ...)`: samples, then channels or features, then space."""
    if x.layout != torch.strided:
        x = x.to_dense()
    if isinstance(module, nn.modules.conv._ConvNd):
        return x.unsqueeze(0) if x.ndim == module.weight.ndim - 1 else x  # a single sample has no batch axis
    if x.ndim < 2:
        return x.reshape(-1, 1)
    return x.movedim(-1, 1) if isinstance(module, _FEATURES_LAST) else x


def flat(x: torch.Tensor) -> torch.Tensor:
    """Return the elements in the order in which they lie in memory, where they are dense: no copy then."""
    order = sorted(range(x.ndim), key=lambda axis: (-x.stride()[axis], axis))
    return x.permute(order).reshape(-1)


def _float(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


_thread = threading.local()


class _Walk:
    """What one walk over a tensor `(B, C, ...)` finds, made when the first measure asks."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @cached_property
    def found(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], tuple[float, float, float, float, int]]:
        """Norms `(B, C)`; each row's sum, sum of magnitudes and of squares `(B, C, 3)`; and of the whole tensor the
        sum, the sum of squares, the smallest element, the largest, and the number of zeros."""
        norms, sums = np.empty(self.x.shape[:2], np.float32), np.empty((*self.x.shape[:2], 3))
        return norms, sums, _walk.reduce(self.x.numpy(), norms, sums, _threads(self.x))


class walking:
    """A context in which the measures of `x` in this thread share a walk; `x` must not change meanwhile."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __enter__(self) -> None:
        _thread.walk = _Walk(self.x) if self.x.ndim > 2 and _walkable(self.x) else None

    def __exit__(self, *_: object) -> None:
        _thread.walk = None


def _threads(x: torch.Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() >> 15))


def _walkable(x: torch.Tensor) -> bool:
    ours = _walk is not None and x.is_cpu and x.dtype == torch.float32
    return ours and x.is_contiguous() and x.numel() > 0


def _walked(x: torch.Tensor) -> Any:
    walk = getattr(_thread, "walk", None)
    return walk.found if walk is not None and walk.x is x else None


@measures.norms.register(torch.Tensor)
def _norms(x: torch.Tensor) -> Any:
    if walked := _walked(x):
        return walked[0]
    if x.ndim == 2:
        return x.abs().float()
    if x.numel() == 0:
        return x.new_zeros(x.shape[:2], dtype=torch.float32)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)), dtype=wide).float()


def counted_true(mask: torch.Tensor) -> Any:
    """Count what is true, on the mask's device; NumPy does it many times faster than torch sums booleans."""
    if mask.device.type != "cpu":
        return mask.sum()
    return np.asarray(np.count_nonzero(mask.numpy()), np.int64)


@measures.zeros.register(torch.Tensor)
def _zeros(x: torch.Tensor) -> Any:
    if walked := _walked(x):
        return np.asarray(walked[2][4], np.int64)
    if x.device.type != "cpu":
        return (x == 0).sum()
    dense = _float(flat(x)).numpy()
    return np.asarray(dense.size - np.count_nonzero(dense != 0), np.int64)


@measures.moments.register(torch.Tensor)
def _moments(x: torch.Tensor) -> Any:
    if walked := _walked(x):
        total, squares, low, high, _ = walked[2]
        mean = total / x.numel()
        m2 = squares - mean * total
        if not m2 < _CANCELLED * squares:  # else too few digits are left of it
            return np.array([mean, m2, low, high])
    dense = _float(flat(x))
    if dense.numel() == 0:
        return torch.tensor([0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)
    low, high = torch.aminmax(dense)
    mean, m2 = _mean_and_deviations(dense)
    return torch.stack([mean, m2, low.double(), high.double()])


_ROW = 4096
_CANCELLED = 1e-4  # of the sum of squares; what a walk rounds is some 1e-13 of it


def _mean_and_deviations(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum rows in the tensor's precision and the rows' sums in float64; deviations are from a first mean."""
    n = dense.numel()
    mean = _total(dense, _sums) / n
    squares = _total(dense, _squares)
    if dense.device.type != "cpu" or bool(squares < 16 * n * mean * mean):  # elsewhere, to ask would be to wait
        shifted = dense - mean.to(dense.dtype)
        rest = _total(shifted, _sums) / n
        return mean.to(dense.dtype).double() + rest, (_total(shifted, _squares) - n * rest * rest).clamp(min=0)
    return mean, (squares - n * mean * mean).clamp(min=0)


def _sums(rows: torch.Tensor) -> Any:
    return rows.sum(1)


def _squares(rows: torch.Tensor) -> Any:
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _total(dense: torch.Tensor, of: Any) -> Any:
    whole = dense.numel() // _ROW * _ROW
    total = of(dense[:whole].view(-1, _ROW)).double().sum()
    return total + of(dense[whole:].view(1, -1)).double().sum() if whole < dense.numel() else total


@measures.sums.register(torch.Tensor)
def _channel_sums(x: torch.Tensor) -> Any:
    if walked := _walked(x):
        return walked[1][..., :2].sum(0).T
    wide = _float(x).flatten(2) if x.ndim > 2 else _float(x).unsqueeze(2)
    return torch.stack([wide.sum(2).double().sum(0), torch.linalg.vector_norm(wide, 1, dim=2).double().sum(0)])


@measures.counts.register(torch.Tensor)
def _counts(x: torch.Tensor) -> Any:
    dense = flat(x) if x.dtype == torch.bfloat16 else flat(x).float()
    if x.device.type == "cpu":
        return _counted(dense)
    # bincount would wait for the device, to learn the largest code
    codes = dense.view(torch.int16)
    if dense.dtype == torch.float32:
        codes = codes[1::2]  # little-endian: the upper half comes second
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(codes.shape)
    found = torch.zeros(measures.CODES, dtype=torch.int64, device=x.device)
    return found.scatter_add_(0, codes.long() & 0xFFFF, ones)


_CHUNK = 1 << 20


def _counted(dense: torch.Tensor) -> Any:
    """Count codes on the CPU: torch counts 32-bit ones faster than NumPy does, but shifts no unsigned ones."""
    if _walkable(dense):
        counts = np.zeros(measures.CODES, np.int64)
        tables = _room("tables", (min(torch.get_num_threads(), 8), 4, measures.CODES))  # 1 MiB for each thread
        _walk.count(dense.numpy(), tables[: _threads(dense)], counts)
        return counts
    found = torch.zeros(measures.CODES, dtype=torch.int64)
    room = _room("codes", (_CHUNK,))
    for chunk in dense.split(_CHUNK):
        codes = room[: len(chunk)]
        if chunk.dtype == torch.bfloat16:
            codes[:] = chunk.view(torch.int16).numpy().view(np.uint16)
        else:
            np.right_shift(chunk.numpy().view(np.uint32), np.uint32(16), out=codes)
        found += torch.bincount(torch.from_numpy(codes.view(np.int32)), minlength=measures.CODES)
    return found


def _room(name: str, shape: tuple[int, ...]) -> Any:
    """Return this thread's array of that name, zero at first: fresh memory would cost as much as the work."""
    room = getattr(_thread, name, None)
    if room is None or room.shape != shape:
        room = np.zeros(shape, np.uint32)
        setattr(_thread, name, room)
    return room


@measures.copied.register(torch.Tensor)
def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
