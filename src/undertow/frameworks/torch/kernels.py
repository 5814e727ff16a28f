"""What the measures are made of, on a PyTorch tensor wherever it lies, without waiting for a device.

Float32 in the host's memory is walked by our own C (`_walk.c`), where that could be built: once for norms, zeros,
moments and sums together. What is found waits in a `Walked`, which the measures take for the tensor.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
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


_CONVOLUTION = nn.modules.conv._ConvNd
_FLOAT32, _STRIDED = torch.float32, torch.strided


def arranged(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """View a module's output, or its gradient, as `(B, C, ...)`: samples, then channels or features, then space."""
    x = x if x.layout is _STRIDED else x.to_dense()
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()  # NumPy refuses what is not in memory as it is
    if isinstance(module, _CONVOLUTION):
        return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x  # a single sample has no batch axis
    if x.ndim < 2:
        return x.reshape(-1, 1)
    return x.movedim(-1, 1) if isinstance(module, _FEATURES_LAST) else x


def flat(x: torch.Tensor) -> torch.Tensor:
    """Return the elements in the order in which they lie in memory, where they are dense: no copy then."""
    order = sorted(range(x.ndim), key=lambda axis: (-x.stride()[axis], axis))
    return x.permute(order).reshape(-1)


def _float(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


_NOTHING: Any = (b"", 0, None)


class Walked:
    """What a walk over a tensor `(B, C, ...)` found: measures are made of it when the tensor is gone.

    Args:
        samples, channels, space: the tensor's shape, with all axes of space as one.
        reduced: norms, moments, zeros, and sums where these were wanted; None where nothing of it was.
        counted: codes and counts, where they were wanted.
    """

    def __init__(self, samples: int, channels: int, space: int, reduced: Any, counted: Any) -> None:
        self.shape = (samples, channels, space)
        self.norms: Any
        self.norms, *self.moments, self.zeros, self.sums = reduced or _NOTHING
        self.codes: tuple[Any, Any] = counted or (b"", b"")

    def __len__(self) -> int:
        return self.shape[0]


_COUNTS = frozenset({"counts"})


def walk(module: nn.Module | None, x: torch.Tensor, wanted: frozenset[str], threads: int) -> tuple[Any, ...] | None:
    """Walk over a module's output or its gradient, where our C can; the rest is for `Walked`."""
    if _walk is None or x.dtype is not _FLOAT32 or not x.is_cpu or x.layout is not _STRIDED:
        return None
    values = (x if module is None else arranged(module, x)).numpy()
    if not 0 < values.size < 1 << 32 or not values.flags.c_contiguous:
        return None
    samples, channels, reduced, counted = *values.shape[:2], None, None
    threads = max(1, min(threads, values.size >> 15))
    if wanted != _COUNTS:
        reduced = _walk.reduce(values, samples * channels, "sums" in wanted, threads)
    if "counts" in wanted:
        counted = _walk.count(values, _tables(min(threads, 8)))
    return samples, channels, values.size // (samples * channels), reduced, counted


_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10


def hooking(wanted: frozenset[str], threads: int, taken: list[Any], otherwise: Callable[..., Any]) -> Any:
    """Return what hooks need to walk over gradients, and append `(facts, found, None)` each; None where they cannot.

    `otherwise` is called with facts, module, None and the gradient where one alone cannot.
    """
    if _walk is None or _EXCHANGE is None or not wanted:
        return None
    sums = -1 if wanted == _COUNTS else int("sums" in wanted)
    return taken, otherwise, torch.Tensor, _EXCHANGE, sums, _tables if "counts" in wanted else None, threads


@functools.lru_cache(256)
def _form(module: type[nn.Module]) -> tuple[bool, int]:
    """Return whether a module is a convolution, and up to how many axes its channels come second."""
    return issubclass(module, _CONVOLUTION), 2 if issubclass(module, _FEATURES_LAST) else 64


def hook(how: Any, facts: Any, module: nn.Module) -> Any:
    """Return a hook for the gradient of a module's output, as `hooking` says.

    All of it is C: in Python, to find out what a gradient is takes a third of the walk.
    """
    kind: Any = type(module)
    convolution, most = _form(kind)
    return _walk.hook(how, facts, module, len(module.kernel_size) + 1 if convolution else 0, most)  # type: ignore[arg-type]


def held(found: tuple[Any, ...]) -> int:
    """Return how many bytes what `walk` returned takes."""
    *_, reduced, counted = found
    of_rows = len(reduced[0]) + len(reduced[-1] or b"") if reduced else 0
    return of_rows + (len(counted[0]) + len(counted[1]) if counted else 0)


def walked(x: torch.Tensor, wanted: frozenset[str]) -> Walked | None:
    """Return what a walk over a tensor `(B, C, ...)` finds, where our C can walk over it."""
    found = walk(None, x, wanted, torch.get_num_threads())
    return None if found is None else Walked(*found)


_thread = threading.local()


def _tables(threads: int) -> Any:
    """Return this thread's counters, 1 MiB for each that counts: fresh memory would cost as much as counting."""
    tables = getattr(_thread, "tables", None)
    if tables is None or len(tables) < threads:
        tables = _thread.tables = np.zeros((threads, measures.CODES, 4), np.uint32)
    return tables[:threads]


@measures.norms.register(Walked)
def _walked_norms(x: Walked) -> Any:
    return np.frombuffer(x.norms, np.float32).reshape(x.shape[:2])


@measures.moments.register(Walked)
def _walked_moments(x: Walked) -> Any:
    return np.array(x.moments)


@measures.zeros.register(Walked)
def _walked_zeros(x: Walked) -> Any:
    return np.asarray(x.zeros, np.int64)


@measures.sums.register(Walked)
def _walked_sums(x: Walked) -> Any:
    return np.frombuffer(x.sums).reshape(*x.shape[:2], 2).sum(0).T


@measures.counts.register(Walked)
def _walked_counts(x: Walked) -> Any:
    codes, counts = x.codes
    return np.frombuffer(codes, np.uint16), np.frombuffer(counts, np.int64)


@measures.norms.register(torch.Tensor)
def _norms(x: torch.Tensor) -> Any:
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
    if x.device.type != "cpu":
        return (x == 0).sum()
    dense = _float(flat(x)).numpy()
    return np.asarray(dense.size - np.count_nonzero(dense != 0), np.int64)


@measures.moments.register(torch.Tensor)
def _moments(x: torch.Tensor) -> Any:
    dense = _float(flat(x))
    if dense.numel() == 0:
        return torch.tensor([0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64)
    low, high = torch.aminmax(dense)
    mean, m2 = _mean_and_deviations(dense)
    return torch.stack([mean, m2, low.double(), high.double()])


_ROW = 4096


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
    wide = _float(x).flatten(2) if x.ndim > 2 else _float(x).unsqueeze(2)
    return torch.stack([wide.sum(2).double().sum(0), torch.linalg.vector_norm(wide, 1, dim=2).double().sum(0)])


_ALL_CODES = np.arange(measures.CODES, dtype=np.uint16)


@measures.counts.register(torch.Tensor)
def _counts(x: torch.Tensor) -> Any:
    dense = flat(x) if x.dtype == torch.bfloat16 else flat(x).float()
    if (walk := walked(dense.unsqueeze(0), _COUNTS)) is not None:
        return _walked_counts(walk)
    if x.device.type == "cpu":
        return measures.listed(_counted(dense).numpy())
    # bincount would wait for the device, to learn the largest code
    codes = dense.view(torch.int16)
    if dense.dtype == torch.float32:
        codes = codes[1::2]  # little-endian: the upper half comes second
    ones = torch.ones((), dtype=torch.int64, device=x.device).expand(codes.shape)
    found = torch.zeros(measures.CODES, dtype=torch.int64, device=x.device)
    return _ALL_CODES, found.scatter_add_(0, codes.long() & 0xFFFF, ones)


_CHUNK = 1 << 20


def _counted(dense: torch.Tensor) -> torch.Tensor:
    """Count codes on the CPU: torch counts 32-bit ones faster than NumPy does, but shifts no unsigned ones."""
    found = torch.zeros(measures.CODES, dtype=torch.int64)
    room = np.empty(min(_CHUNK, dense.numel()), np.uint32)
    for chunk in dense.split(_CHUNK):
        codes = room[: len(chunk)]
        if chunk.dtype == torch.bfloat16:
            codes[:] = chunk.view(torch.int16).numpy().view(np.uint16)
        else:
            np.right_shift(chunk.numpy().view(np.uint32), np.uint32(16), out=codes)
        found += torch.bincount(torch.from_numpy(codes.view(np.int32)), minlength=measures.CODES)
    return found


@measures.copied.register(torch.Tensor)
def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
