"""What a tracker is sent: scalars, histograms with the very cells that were counted, pictures, texts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..measures import code_values, finite
from ..show import heatmap


@dataclass(frozen=True)
class Scalar:
    """One number."""

    tag: str
    step: int
    value: float


@dataclass(frozen=True)
class CodeCounts:
    """A histogram as the measure of that name counted it: codes of finite values, and how often each occurred.

    Attributes:
        codes: uint16 `(n,)`, rising.
        counts: int64 `(n,)`.
        exact: the values were bfloat16, which codes hold without loss.
    """

    tag: str
    step: int
    codes: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.int64]
    exact: bool = False

    def buckets(self, at_most: int | None = None) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return edges `(m + 1,)` and counts `(m,)`: the cells of the codes, and an empty bucket in each gap.

        Positive cells hold their lower edge, negative ones their upper edge. No count is ever divided: for fewer
        buckets, whole cells are joined, 2, 4, 8, ... neighbours at a time.

        Args:
            at_most: so many buckets; None keeps each cell apart.

        >>> one = CodeCounts("", 0, np.array([0x3F80, 0x3F81], np.uint16), np.array([5, 2]))
        >>> one.buckets()
        (array([1.       , 1.0078125, 1.015625 ]), array([5, 2]))
        >>> one.buckets(1)
        (array([1.      , 1.015625]), array([7]))
        """
        cells = _cells(self.codes)
        for joined in range(17):
            keys, where = np.unique(cells >> joined, return_inverse=True)
            summed = np.zeros(len(keys), np.int64)
            np.add.at(summed, where, self.counts)
            gaps = np.diff(keys) > 1
            if at_most is None or len(keys) + gaps.sum() <= at_most:
                break
        ends = np.unique(np.concatenate([keys, keys + 1]))
        counts = np.zeros(max(len(ends) - 1, 0), np.int64)
        counts[np.searchsorted(ends, keys)] = summed
        return _lower_edges(ends << joined), counts

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """What stands for the values in each cell; exact where they were bfloat16."""
        return _VALUES[self.exact][self.codes.astype(np.int64)]

    def quantiles(self, q: Iterable[float]) -> list[float]:
        """Return quantiles of the magnitude, as `undertow.runs.quantiles` has them."""
        from ..runs.quantiles import weighted

        return weighted(np.abs(self.values), self.counts, list(q))


@dataclass(frozen=True)
class Picture:
    """A map `(C, H, W)`."""

    tag: str
    step: int
    values: npt.NDArray[Any]

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """Its magnitude as `undertow explain` draws it, `(H, W, 3)`."""
        return np.asarray(heatmap.draw(self.values, "magnitude").convert("RGB"))


@dataclass(frozen=True)
class Note:
    """A text, in Markdown."""

    tag: str
    step: int
    text: str


Entry = Scalar | CodeCounts | Picture | Note


@dataclass(frozen=True)
class Portion:
    """Entries that are sent together, once: those of a part of a run, a finding, the maps of a photograph."""

    name: str
    entries: Callable[[], Iterable[Entry]]


def added(
    tag: str, step: int, codes: npt.NDArray[Any], counts: npt.NDArray[np.int64], exact: bool
) -> tuple[CodeCounts, int]:
    """Add histograms that lie behind one another; return their sum, of finite values, and how many were not finite."""
    occurring, where = np.unique(codes, return_inverse=True)
    summed = np.zeros(len(occurring), np.int64)
    np.add.at(summed, where, counts)
    keep = finite(occurring)
    return CodeCounts(tag, step, occurring[keep].astype(np.uint16), summed[keep], exact), int(summed[~keep].sum())


_VALUES = {exact: code_values(exact) for exact in (False, True)}


def _cells(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Return the place of each code among all cells from the lowest value to the highest; that of zero is 0."""
    magnitude = codes.astype(np.int64) & 0x7FFF
    return np.where(codes >> 15 == 0, magnitude, -magnitude - 1)


def _lower_edges(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the lower edges of cells; above the largest float32 it is 2**128."""
    magnitude = np.minimum(np.abs(cells), 0x7F80).astype(np.uint32)
    edges = (magnitude << 16).view(np.float32).astype(np.float64)
    return np.where(cells < 0, -1.0, 1.0) * np.where(magnitude == 0x7F80, 2.0**128, edges)
