"""What is kept of the tensor at a site: something small that merges.

A measure is a class with five short methods around a **state**, a flat dict of arrays:

    init()         the state of nothing
    reduce(x)      the state of one array (B, C, ...), made where the array is, without waiting for a device
    update(s, x)   the state of what `s` has seen and `x`
    merge(s, t)    the state of what either has seen; any split, merged in any order, gives the same
    finish(s)      the columns of its table: one row, or with `per_sample` one row for each sample

`reduce` touches arrays through arithmetic, or through the functions below that a framework registers kernels for
(`norms`, `zeros`, `moments`, `sums`, `counts`, `copied`). A new measure is one class and one row of `MEASURES`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt

from .errors import InputError, near

State = dict[str, Any]
Columns = dict[str, Any]

CODES = 1 << 16
_INFINITE = 0x7F80  # the truncated code of infinity; what is above it, without its sign, is not a number


@singledispatch
def norms(x: Any) -> Any:
    """Return the l2 norm over all axes behind the second: `(B, C, ...)` to float32 `(B, C)`.

    >>> norms(np.array([[[3.0, 4.0], [0.0, -2.0]]]))
    array([[5., 2.]], dtype=float32)
    """
    squares = np.square(np.asarray(x, np.float64))
    return np.sqrt(squares.sum(axis=tuple(range(2, x.ndim)))).astype(np.float32)


@singledispatch
def zeros(x: Any) -> Any:
    """Return how many elements are zero, of either sign, as an int64 array of no axis.

    >>> int(zeros(np.array([0.0, -0.0, 1e-40])))
    2
    """
    return np.asarray(x.size - np.count_nonzero(x != 0), np.int64)


@singledispatch
def moments(x: Any) -> Any:
    """Return mean, sum of squared deviations from it, smallest and largest element, as float64 `(4,)`.

    The mean of nothing is 0, its smallest element inf and its largest -inf. NaN spreads to all four.

    >>> moments(np.array([1.0, 2.0, 6.0]))
    array([ 3., 14.,  1.,  6.])
    """
    if x.size == 0:
        return np.array([0.0, 0.0, np.inf, -np.inf])
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.asarray(x, np.float64)
        mean = wide.mean()
        return np.array([mean, np.square(wide - mean).sum(), wide.min(), wide.max()])


@singledispatch
def sums(x: Any) -> Any:
    """Return the sums, and the sums of magnitudes, over all axes but the second: `(B, C, ...)` to float64 `(2, C)`.

    >>> sums(np.array([[[1.0, -3.0]], [[0.0, 1.0]]]))
    array([[-1.],
           [ 5.]])
    """
    axes = (0, *range(2, x.ndim))
    wide = np.asarray(x, np.float64)
    return np.stack([wide.sum(axes), np.abs(wide).sum(axes)])


@singledispatch
def counts(x: Any) -> tuple[Any, Any]:
    """Count each element under its code, the top 16 bits of its float32 pattern.

    A code is a truncated bfloat16: the sign, 8 bits of exponent and 7 of mantissa. Zero is 0 or 0x8000.

    Returns:
        The codes that may occur, uint16 `(n,)`, rising, and how often each does, int64 `(n,)`.

    >>> codes, often = counts(np.array([0.0, 1.0, 1.001, -2.0]))
    >>> {hex(code): int(count) for code, count in zip(codes, often)}
    {'0x0': 1, '0x3f80': 2, '0xc000': 1}
    """
    with np.errstate(over="ignore"):
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    codes = flat.view(np.uint32) >> np.uint32(16)
    return listed(np.bincount(codes.astype(np.intp), minlength=CODES))


@singledispatch
def copied(x: Any) -> Any:
    """Return a copy that nothing else writes to."""
    return np.array(x)


def listed(counters: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """Return the codes of the counters `(65536,)` that are not zero, and these."""
    codes = np.flatnonzero(counters != 0)  # five times as fast as of the numbers
    return codes.astype(np.uint16), counters[codes]


class Measure(ABC):
    """What all measures are. `name` is what people write, `table` the folder and `columns` the types on disk.

    `reads` names the functions above through which alone `reduce` reads an array, besides its shape: the state can then
    be made of what a walk found, after the array is gone. Empty where it does anything else.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    reads: ClassVar[tuple[str, ...]] = ()
    per_sample: bool = False

    @property
    def table(self) -> str:
        """The name of its table in a run."""
        return self.name.replace("-", "_")

    def settings(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {"name": self.name}

    @abstractmethod
    def init(self) -> State:
        """Return the state of nothing."""

    @abstractmethod
    def reduce(self, x: Any, start: int = 0) -> State:
        """Return the state of one array `(B, C, ...)` whose first sample is the `start`-th of its batch."""

    @abstractmethod
    def merge(self, a: State, b: State) -> State:
        """Return the state of what either has seen."""

    @abstractmethod
    def finish(self, state: State) -> Columns:
        """Return the columns: for each row a number, a text, or a one-dimensional array where the type is a list."""

    def finished(self, x: Any) -> Columns:
        """Return the columns of one array `(B, C, ...)`, as `finish(reduce(x))` does, which takes longer for some."""
        return self.finish(self.reduce(x))

    def update(self, state: State, x: Any, start: int = 0) -> State:
        """Return the state of what `state` has seen and `x`."""
        return self.merge(state, self.reduce(x, start))


@final
class ChannelNorm(Measure):
    """The l2 norm over space for each sample and channel: `(B, C, ...)` to float32 `(B, C)`.

    Where there is no space, as behind a linear layer `(B, F)`, that is the magnitude of each feature.

    >>> measure = ChannelNorm()
    >>> measure.finish(measure.reduce(np.array([[[3.0, 4.0]], [[0.0, 1.0]]])))["values"]
    array([[5.],
           [1.]], dtype=float32)
    """

    name = "channel-norm"
    columns: ClassVar[Mapping[str, str]] = {"values": "list<float32>"}
    reads = ("norms",)
    per_sample = True

    def init(self) -> State:
        return {"sample": np.zeros(0, np.int64), "values": np.zeros((0, 0), np.float32)}

    def reduce(self, x: Any, start: int = 0) -> State:
        return {"sample": np.arange(start, start + len(x)), "values": norms(x)}

    def merge(self, a: State, b: State) -> State:
        return _joined(a, b)

    def finish(self, state: State) -> Columns:
        return {"values": _in_order(state)}

    def finished(self, x: Any) -> Columns:
        return {"values": norms(x)}


@final
class ZeroFraction(Measure):
    """How many elements are zero, of how many. Exact, and merges exactly.

    >>> measure = ZeroFraction()
    >>> measure.finish(measure.reduce(np.array([[0.0, 2.0, -0.0, 0.0]])))
    {'zeros': [3], 'total': [4]}
    """

    name = "zero-fraction"
    columns: ClassVar[Mapping[str, str]] = {"zeros": "int64", "total": "int64"}
    reads = ("zeros",)

    def init(self) -> State:
        return {"zeros": np.zeros((), np.int64), "total": np.zeros((), np.int64)}

    def reduce(self, x: Any, start: int = 0) -> State:
        return {"zeros": zeros(x), "total": np.asarray(_size(x), np.int64)}

    def merge(self, a: State, b: State) -> State:
        return {key: a[key] + b[key] for key in a}

    def finish(self, state: State) -> Columns:
        return {key: [int(value)] for key, value in state.items()}

    def finished(self, x: Any) -> Columns:
        return {"zeros": [int(zeros(x))], "total": [_size(x)]}


@final
class Moments(Measure):
    """Count, mean, sum of squared deviations from the mean, smallest and largest element, in float64.

    The variance is `m2 / count`. One NaN or infinity makes the mean NaN or infinite: it is seen, not hidden.
    Merging is Chan, Golub and LeVeque's, which stays accurate where the mean is large beside the spread.

    Source: Chan, Golub and LeVeque 1979, Stanford STAN-CS-79-773.

    >>> measure = Moments()
    >>> state = measure.update(measure.reduce(np.array([[1.0, 2.0]])), np.array([[6.0]]))
    >>> measure.finish(state)
    {'count': [3], 'mean': [3.0], 'm2': [14.0], 'min': [1.0], 'max': [6.0]}
    """

    name = "moments"
    columns: ClassVar[Mapping[str, str]] = {"count": "int64"} | dict.fromkeys(("mean", "m2", "min", "max"), "float64")
    reads = ("moments",)

    def init(self) -> State:
        return self.reduce(np.zeros((0, 0)))

    def reduce(self, x: Any, start: int = 0) -> State:
        return {"count": np.asarray(_size(x), np.int64), "moments": moments(x)}

    def merge(self, a: State, b: State) -> State:
        n, m = int(a["count"]), int(b["count"])
        if n == 0 or m == 0:
            return b if n == 0 else a
        (mean, m2, low, high), (other, other_m2, other_low, other_high) = a["moments"], b["moments"]
        with np.errstate(invalid="ignore", over="ignore"):
            apart = other - mean
            joined = [
                (n * mean + m * other) / (n + m),
                m2 + other_m2 + apart * apart * n * m / (n + m),
                np.minimum(low, other_low),
                np.maximum(high, other_high),
            ]
        return {"count": np.asarray(n + m, np.int64), "moments": np.array(joined)}

    def finish(self, state: State) -> Columns:
        return self._columns(int(state["count"]), state["moments"])

    def finished(self, x: Any) -> Columns:
        return self._columns(_size(x), moments(x))

    def _columns(self, count: int, moments: Any) -> Columns:
        return dict(zip(self.columns, ([count], *([value] for value in moments.tolist())), strict=True))


@final
class ChannelSums(Measure):
    """The sum and the sum of magnitudes of each channel, over samples and space: `(B, C, ...)` to two float64 `(C,)`.

    Of a gradient, the sum is the gradient of the channel's bias; beside the sum of magnitudes it tells whether the
    elements agree in sign. Merging adds, so the order matters to the last bits.

    >>> measure = ChannelSums()
    >>> measure.finish(measure.reduce(np.array([[1.0, 2.0], [-4.0, 1.0]])))
    {'sums': [array([-3.,  3.])], 'absolutes': [array([5., 3.])]}
    """

    name = "channel-sums"
    columns: ClassVar[Mapping[str, str]] = {"sums": "list<float64>", "absolutes": "list<float64>"}
    reads = ("sums",)

    def init(self) -> State:
        return {"sums": np.zeros((2, 0))}

    def reduce(self, x: Any, start: int = 0) -> State:
        return {"sums": sums(x)}

    def merge(self, a: State, b: State) -> State:
        if a["sums"].size == 0 or b["sums"].size == 0:
            return b if a["sums"].size == 0 else a
        return {"sums": a["sums"] + b["sums"]}

    def finish(self, state: State) -> Columns:
        return {"sums": [state["sums"][0]], "absolutes": [state["sums"][1]]}


@final
class Histogram(Measure):
    """How often each truncated bfloat16 code occurs: 65,536 counters, kept sparse on disk.

    They cover every float32, keep the sign, give zero, infinity and NaN cells of their own and need no range. Any
    quantile read from them is within 2**-8 of an exact one, relatively, down to 2**-126; for bfloat16 it is exact.
    float64 is rounded to float32 first, which sends magnitudes over 3.4e38 to infinity. Magnitudes below 2**-133
    share the cells of zero. Merging adds whole numbers, to the same bits in any order.

    >>> measure = Histogram()
    >>> measure.finish(measure.reduce(np.array([[0.0, 1.0, 1.001, -2.0]])))
    {'codes': [array([    0, 16256, 49152], dtype=uint16)], 'counts': [array([1, 2, 1])]}
    """

    name = "histogram"
    columns: ClassVar[Mapping[str, str]] = {"codes": "list<uint16>", "counts": "list<int64>"}
    reads = ("counts",)

    def init(self) -> State:
        return {"codes": np.zeros(0, np.uint16), "counts": np.zeros(0, np.int64)}

    def reduce(self, x: Any, start: int = 0) -> State:
        return dict(zip(("codes", "counts"), counts(x), strict=True))

    def merge(self, a: State, b: State) -> State:
        counters = np.zeros(CODES, np.int64)
        for state in (a, b):
            counters[state["codes"]] += state["counts"]
        return dict(zip(("codes", "counts"), listed(counters), strict=True))

    def finish(self, state: State) -> Columns:
        there = state["counts"] != 0
        return {name: [state[name][there]] for name in self.columns}


@final
class Keep(Measure):
    """The tensor itself, in its own dtype: a file for each batch and site, or for each sample and site.

    Args:
        by: "batch" or "sample".

    Raises:
        InputError: `by` is neither.
    """

    name = "keep"
    columns: ClassVar[Mapping[str, str]] = {"file": "tensor"}

    def __init__(self, by: str = "batch") -> None:
        if by not in ("batch", "sample"):
            raise InputError(f"keep writes a file for each 'batch' or 'sample', not for each {by!r}")
        self.by = by
        self.per_sample = by == "sample"

    @property
    def table(self) -> str:
        return "kept"

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "by": self.by}

    def init(self) -> State:
        return {"sample": np.zeros(0, np.int64), "values": np.zeros((0, 0), np.float32)}

    def reduce(self, x: Any, start: int = 0) -> State:
        return {"sample": np.arange(start, start + len(x)), "values": copied(x)}

    def merge(self, a: State, b: State) -> State:
        return _joined(a, b)

    def finish(self, state: State) -> Columns:
        values = _in_order(state)
        return {"file": list(values) if self.per_sample else [values]}


MEASURES: dict[str, type[Measure]] = {
    m.name: m for m in (ChannelNorm, ZeroFraction, Moments, ChannelSums, Histogram, Keep)
}


def resolve(measures: "str | Measure | Iterable[str | Measure]") -> tuple[Measure, ...]:
    """Return measures from their names, as in "channel-norm" or "keep:sample", or as they are.

    Raises:
        InputError: a name that is not known, the same measure twice, or none at all.

    >>> [measure.table for measure in resolve(["channel-norm", "keep"])]
    ['channel_norm', 'kept']
    """
    listed = [measures] if isinstance(measures, str | Measure) else list(measures)
    found = tuple(one if isinstance(one, Measure) else _named(one) for one in listed)
    if not found:
        raise InputError(f"no measure was asked for; name some of {', '.join(MEASURES)}")
    if len({measure.table for measure in found}) < len(found):
        raise InputError(f"a measure was asked for twice: {', '.join(measure.name for measure in found)}")
    return found


def _named(word: Any) -> Measure:
    name, _, option = str(word).replace("_", "-").partition(":")
    if name not in MEASURES:
        raise InputError(f"unknown measure {word!r}{near(name, MEASURES)} (known: {', '.join(MEASURES)})")
    if not option:
        return MEASURES[name]()
    if name != "keep":
        raise InputError(f"measure {name!r} has no options, so {word!r} is not understood; write {name!r}")
    return Keep(by=option)


def edges(exact: bool = False) -> npt.NDArray[np.float64]:
    """Return the value that stands for each code, float64 `(65536,)`: the middle of its cell, or its lower edge.

    The lower edge, in magnitude, is the very value where it was a bfloat16 (`exact`); the middle is within 2**-8 of
    all that a normal cell holds, relatively. Zeros stand for themselves.

    >>> edges()[0x3F80], edges(exact=True)[0x3F80]
    (np.float64(1.00390625), np.float64(1.0))
    """
    patterns = np.arange(CODES, dtype=np.uint32) << 16
    zero = patterns << 1 == 0
    if not exact:
        patterns = np.where(zero, patterns, patterns | 0x8000)
    with np.errstate(invalid="ignore"):  # among them are the patterns of NaN
        return patterns.astype(np.uint32).view(np.float32).astype(np.float64)


def finite(codes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which codes stand for finite values."""
    return (np.asarray(codes) & 0x7FFF) < _INFINITE


def _joined(a: State, b: State) -> State:
    """Join what two states hold of several samples each; their order is settled by `finish`."""
    if len(a["sample"]) == 0 or len(b["sample"]) == 0:
        return b if len(a["sample"]) == 0 else a
    return {key: np.concatenate([a[key], b[key]]) for key in a}


def _in_order(state: State) -> Any:
    """Return the values in the order of their samples."""
    sample, values = state["sample"], state["values"]
    return values if (sample[1:] >= sample[:-1]).all() else values[np.argsort(sample, kind="stable")]


def _size(x: Any) -> int:
    """Return the number of elements, for any framework's array."""
    return math.prod(x.shape)
