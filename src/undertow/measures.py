"""What is kept of the tensor at a site: something small that merges.

A measure is a class with four short methods around a **state**, a flat dict of arrays:

    init()         the state of nothing
    reduce(x)      the state of one array (B, C, ...), made where the array is, without waiting for a device
    merge(s, t)    the state of what either has seen; any split, merged in any order, gives the same
    finish(s)      the columns of its table: one row, or with `per_sample` one row for each sample

Most measures here are a `StatsMeasure`: they pick their state from the `Stats` of an array, whose numbers are computed
once for all measures that need them. A new measure is one class and one row of `MEASURES`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, singledispatch
from typing import Any, ClassVar, final

import numpy as np
import numpy.typing as npt

from .errors import InputError, did_you_mean

State = dict[str, Any]
Columns = dict[str, Any]

CODES = 1 << 16
_INFINITE = 0x7F80  # the truncated code of infinity; without its sign, a larger one is not a number


class Stats:
    """Statistics of an array `(B, C, ...)`, each computed when it is first asked for; this class is NumPy's.

    Args:
        x: the array, arranged so that its samples come first and its channels second.
        original: the same as the framework gave it, whatever its axes; None is `x`.
        samples: the axis of `original` that holds the samples; None where no axis does.

    A framework registers a subclass for its own tensors with `stats`; its numbers stay on the tensor's device.

    >>> stats(np.array([[1.0, 2.0, 6.0]])).moments
    array([ 3., 14.,  1.,  6.])
    """

    def __init__(self, x: Any, original: Any = None, samples: int | None = 0) -> None:
        self.x = x
        self.original = x if original is None else original
        self.samples = samples

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.x.shape)

    @cached_property
    def norms(self) -> Any:
        """The ℓ2 norm over all axes behind the second, float32 `(B, C)`."""
        squares = np.square(np.asarray(self.x, np.float64))
        return np.sqrt(squares.sum(axis=tuple(range(2, self.x.ndim)))).astype(np.float32)

    @cached_property
    def norm(self) -> Any:
        """The ℓ2 norm of the whole, float64 without an axis."""
        with np.errstate(over="ignore"):
            return np.asarray(np.sqrt(np.square(np.asarray(self.x, np.float64)).sum()))

    @cached_property
    def zeros(self) -> Any:
        """How many elements are zero, of either sign, int64 without an axis."""
        return np.asarray(self.size - np.count_nonzero(self.x != 0), np.int64)

    @cached_property
    def moments(self) -> Any:
        """Mean, sum of squared deviations from it, smallest and largest element, float64 `(4,)`.

        The mean of nothing is 0, its smallest element inf and its largest -inf. NaN spreads to all four.
        """
        if self.size == 0:
            return np.array([0.0, 0.0, np.inf, -np.inf])
        with np.errstate(invalid="ignore", over="ignore"):
            wide = np.asarray(self.x, np.float64)
            mean = wide.mean()
            return np.array([mean, np.square(wide - mean).sum(), wide.min(), wide.max()])

    @cached_property
    def channel_sums(self) -> Any:
        """The sums, and the sums of magnitudes, over all axes but the second, float64 `(2, C)`."""
        axes = (0, *range(2, self.x.ndim))
        wide = np.asarray(self.x, np.float64)
        return np.stack([wide.sum(axes), np.abs(wide).sum(axes)])

    @cached_property
    def histogram(self) -> tuple[Any, Any]:
        """How often each code occurs, the top 16 bits of an element's float32 pattern.

        A code is a truncated bfloat16: the sign, 8 bits of exponent and 7 of mantissa. Zero is 0 or 0x8000. The codes
        that may occur, uint16 `(n,)`, rising, and their counts, int64 `(n,)`.
        """
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(self.x, np.float32).reshape(-1)
        codes = flat.view(np.uint32) >> np.uint32(16)
        return sparse(np.bincount(codes.astype(np.intp), minlength=CODES))

    def copy(self, by_sample: bool) -> Any:
        """Return a copy of the original that nothing else writes to; `by_sample`, its samples come first."""
        return np.array(self.samples_first if by_sample else self.original)

    @property
    def samples_first(self) -> Any:
        """The original with the axis of its samples in front, or an axis of length 1 where no axis holds them."""
        return self.original[None] if self.samples is None else np.moveaxis(self.original, self.samples, 0)


@singledispatch
def stats(x: Any, original: Any = None, samples: int | None = 0) -> Stats:
    """Return the statistics of an array `(B, C, ...)`, NumPy's or a framework's own; `original` as in `Stats`.

    >>> stats(np.array([[[3.0, 4.0], [0.0, -2.0]]])).norms
    array([[5., 2.]], dtype=float32)
    """
    return Stats(x, original, samples)


def sparse(counters: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """Return the codes of the counters `(65536,)` that are not zero, and these."""
    codes = np.flatnonzero(counters != 0)  # five times as fast on booleans as on the counters
    return codes.astype(np.uint16), counters[codes]


class Measure(ABC):
    """What all measures are. `name` is what people write, `table` the folder and `columns` the types on disk."""

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    per_sample: bool = False

    @property
    def table(self) -> str:
        """The name of its table in a run."""
        return self.name.replace("-", "_")

    def to_dict(self) -> dict[str, Any]:
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

    def update(self, state: State, x: Any, start: int = 0) -> State:
        """Return the state of what `state` has seen and `x`."""
        return self.merge(state, self.reduce(x, start))


class StatsMeasure(Measure):
    """A measure whose state is picked from the statistics of an array."""

    @abstractmethod
    def pick(self, statistics: Stats, start: int = 0) -> State:
        """Return the state of the array that these are the statistics of."""

    @final
    def reduce(self, x: Any, start: int = 0) -> State:
        """Return the state of one array `(B, C, ...)` whose first sample is the `start`-th of its batch."""
        return self.pick(stats(x), start)


def reduce_all(measures: Sequence[Measure], x: Any, original: Any = None, samples: int | None = 0) -> list[State]:
    """Return each measure's state of one array `(B, C, ...)`; what several need is computed once.

    `original` and `samples` are as in `Stats`.
    """
    statistics = stats(x, original, samples)
    return [m.pick(statistics) if isinstance(m, StatsMeasure) else m.reduce(x) for m in measures]


@final
class ChannelNorm(StatsMeasure):
    """The l2 norm over space for each sample and channel: `(B, C, ...)` to float32 `(B, C)`.

    Where there is no space, as behind a linear layer `(B, F)`, that is the magnitude of each feature.

    >>> measure = ChannelNorm()
    >>> measure.finish(measure.reduce(np.array([[[3.0, 4.0]], [[0.0, 1.0]]])))["values"]
    array([[5.],
           [1.]], dtype=float32)
    """

    name = "channel-norm"
    columns: ClassVar[Mapping[str, str]] = {"values": "list<float32>"}
    per_sample = True

    def init(self) -> State:
        return {"sample": np.zeros(0, np.int64), "values": np.zeros((0, 0), np.float32)}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"sample": np.arange(start, start + len(statistics.x)), "values": statistics.norms}

    def merge(self, a: State, b: State) -> State:
        return _joined(a, b)

    def finish(self, state: State) -> Columns:
        return {"values": _in_order(state)}


@final
class Norm(StatsMeasure):
    """The ℓ2 norm of the whole array, in float64: what trainers log of each parameter's gradient.

    >>> measure = Norm()
    >>> measure.finish(measure.reduce(np.array([[3.0, 0.0], [0.0, -4.0]])))
    {'norm': [5.0]}
    """

    name = "norm"
    columns: ClassVar[Mapping[str, str]] = {"norm": "float64"}

    def init(self) -> State:
        return {"norm": np.zeros(())}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"norm": statistics.norm}

    def merge(self, a: State, b: State) -> State:
        return {"norm": np.asarray(np.hypot(a["norm"], b["norm"]))}

    def finish(self, state: State) -> Columns:
        return {"norm": [float(state["norm"])]}


@final
class ZeroFraction(StatsMeasure):
    """How many elements are zero, of how many. Exact, and merges exactly.

    >>> measure = ZeroFraction()
    >>> measure.finish(measure.reduce(np.array([[0.0, 2.0, -0.0, 0.0]])))
    {'zeros': [3], 'total': [4]}
    """

    name = "zero-fraction"
    columns: ClassVar[Mapping[str, str]] = {"zeros": "int64", "total": "int64"}

    def init(self) -> State:
        return {"zeros": np.zeros((), np.int64), "total": np.zeros((), np.int64)}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"zeros": statistics.zeros, "total": np.asarray(statistics.size, np.int64)}

    def merge(self, a: State, b: State) -> State:
        return {key: a[key] + b[key] for key in a}

    def finish(self, state: State) -> Columns:
        return {key: [int(value)] for key, value in state.items()}


@final
class Moments(StatsMeasure):
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

    def init(self) -> State:
        return self.reduce(np.zeros((0, 0)))

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"count": np.asarray(statistics.size, np.int64), "moments": statistics.moments}

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
        columns = ([int(state["count"])], *([value] for value in state["moments"].tolist()))
        return dict(zip(self.columns, columns, strict=True))


@final
class ChannelSums(StatsMeasure):
    """The sum and the sum of magnitudes of each channel, over samples and space: `(B, C, ...)` to two float64 `(C,)`.

    Of a gradient, the sum is the gradient of the channel's bias; beside the sum of magnitudes it tells whether the
    elements agree in sign. Merging adds, so the order matters to the last bits.

    >>> measure = ChannelSums()
    >>> measure.finish(measure.reduce(np.array([[1.0, 2.0], [-4.0, 1.0]])))
    {'sums': [array([-3.,  3.])], 'absolutes': [array([5., 3.])]}
    """

    name = "channel-sums"
    columns: ClassVar[Mapping[str, str]] = {"sums": "list<float64>", "absolutes": "list<float64>"}

    def init(self) -> State:
        return {"sums": np.zeros((2, 0))}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"sums": statistics.channel_sums}

    def merge(self, a: State, b: State) -> State:
        if a["sums"].size == 0 or b["sums"].size == 0:
            return b if a["sums"].size == 0 else a
        return {"sums": a["sums"] + b["sums"]}

    def finish(self, state: State) -> Columns:
        return {"sums": [state["sums"][0]], "absolutes": [state["sums"][1]]}


@final
class Histogram(StatsMeasure):
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

    def init(self) -> State:
        return {"codes": np.zeros(0, np.uint16), "counts": np.zeros(0, np.int64)}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return dict(zip(("codes", "counts"), statistics.histogram, strict=True))

    def merge(self, a: State, b: State) -> State:
        counters = np.zeros(CODES, np.int64)
        for state in (a, b):
            counters[state["codes"]] += state["counts"]
        return dict(zip(("codes", "counts"), sparse(counters), strict=True))

    def finish(self, state: State) -> Columns:
        nonzero = state["counts"] != 0
        return {name: [state[name][nonzero]] for name in self.columns}


@final
class Keep(StatsMeasure):
    """The tensor itself, in its own dtype and with its own axes: a file for each batch and site, or sample and site.

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

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "by": self.by}

    def init(self) -> State:
        return {"sample": np.zeros(0, np.int64), "values": np.zeros((0, 0), np.float32)}

    def pick(self, statistics: Stats, start: int = 0) -> State:
        return {"sample": np.arange(start, start + len(statistics.x)), "values": statistics.copy(self.per_sample)}

    def merge(self, a: State, b: State) -> State:
        return _joined(a, b)

    def finish(self, state: State) -> Columns:
        values = _in_order(state)
        return {"file": list(values) if self.per_sample else [values]}


MEASURES: dict[str, type[Measure]] = {
    m.name: m for m in (Norm, ChannelNorm, ZeroFraction, Moments, ChannelSums, Histogram, Keep)
}


def resolve(measures: "str | Measure | Iterable[str | Measure]") -> tuple[Measure, ...]:
    """Return measures from their names, as in "channel-norm" or "keep:sample", or as they are.

    Raises:
        InputError: a name that is not known, the same measure twice, or none at all.

    >>> [measure.table for measure in resolve(["channel-norm", "keep"])]
    ['channel_norm', 'kept']
    """
    words = [measures] if isinstance(measures, str | Measure) else list(measures)
    resolved = tuple(word if isinstance(word, Measure) else _named(word) for word in words)
    if not resolved:
        raise InputError(f"no measure was asked for; name some of {', '.join(MEASURES)}")
    if len({measure.table for measure in resolved}) < len(resolved):
        raise InputError(f"a measure was asked for twice: {', '.join(measure.name for measure in resolved)}")
    return resolved


def _named(word: Any) -> Measure:
    name, _, option = str(word).replace("_", "-").partition(":")
    if name not in MEASURES:
        raise InputError(f"unknown measure {word!r}{did_you_mean(name, MEASURES)} (known: {', '.join(MEASURES)})")
    if not option:
        return MEASURES[name]()
    if name != "keep":
        raise InputError(f"measure {name!r} has no options, so {word!r} is not understood; write {name!r}")
    return Keep(by=option)


def code_values(exact: bool = False) -> npt.NDArray[np.float64]:
    """Return the value that stands for each code, float64 `(65536,)`: the middle of its cell, or its lower edge.

    The lower edge, in magnitude, is the very value where it was a bfloat16 (`exact`); the middle is within 2**-8 of
    all that a normal cell holds, relatively. Zeros stand for themselves.

    >>> code_values()[0x3F80], code_values(exact=True)[0x3F80]
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
