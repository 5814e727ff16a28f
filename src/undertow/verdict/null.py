"""What random maps would score: every level is read off a null distribution, none is set by taste.

A random map has the values of the map in question and, as nearly as ranks allow, its spectrum: as many strong pixels,
in lumps as large, at places that mean nothing. From pairs of them come two marks for a similarity:

    unrelated   the 95th percentile over pairs that have nothing in common
    half        the median over pairs that share half of their variance: from there on maps are more the same than not

A similarity is *low* up to the first, *high* from the second on, *between* elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .similarity import correlation, cosine, plane, spearman

Array = npt.NDArray[Any]
Measure = Callable[[Array, Array], float]
LOW, BETWEEN, HIGH = "low", "between", "high"


@dataclass(frozen=True)
class Thresholds:
    """Where a similarity stops to be that of unrelated maps, and where it starts to be that of mostly the same."""

    unrelated: float
    half: float

    def place(self, value: float) -> str:
        """Say on which side of the marks a similarity lies; two constants are the same map.

        >>> [Thresholds(0.1, 0.5).place(v) for v in (-0.3, 0.3, 0.9)]
        ['low', 'between', 'high']
        """
        return HIGH if value >= self.half else LOW if value <= self.unrelated else BETWEEN

    def to_dict(self) -> dict[str, float]:
        """Return both, ready for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def normal_scores(values: Array, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Give each value the normal deviate of its rank, so that what follows knows the order alone; ties by chance.

    >>> normal_scores(np.array([5.0, -1.0, 70.0]), np.random.default_rng(0)).argsort().tolist()
    [1, 0, 2]
    """
    flat = np.ravel(values)
    order = np.lexsort((generator.random(flat.size), flat))
    deviates = np.empty(flat.size)
    deviates[order] = np.sort(generator.standard_normal(flat.size))
    return deviates.reshape(np.shape(values))


def phase_randomized(deviates: Array, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw a random field with the spectrum of another over its last two axes, all leading axes turned alike.

    Source: phase randomisation, Theiler et al. 1992, doi 10.1016/0167-2789(92)90102-S.
    """
    shape = deviates.shape[-2:]
    phases = np.fft.rfft2(generator.standard_normal(shape))
    size = np.abs(phases)
    phases = np.divide(phases, size, out=np.ones_like(phases), where=size > 0)
    phases[0, 0] = 1  # the mean stays as it is
    return np.fft.irfft2(np.fft.rfft2(deviates) * phases, s=shape)


def random_maps(values: Array, count: int, generator: np.random.Generator) -> list[Array]:
    """Draw maps with the values of another, `(..., H, W)`, and nearly its spectrum, at random places.

    >>> one = random_maps(np.arange(12.0).reshape(3, 4), 1, np.random.default_rng(0))[0]
    >>> sorted(one.ravel()) == list(range(12))
    True
    """
    deviates = normal_scores(values, generator)
    return [_with_values(phase_randomized(deviates, generator), values) for _ in range(count)]


def _with_values(drawn: Array, values: Array) -> Array:
    placed = np.empty(values.size, values.dtype)
    placed[np.argsort(drawn, axis=None, kind="stable")] = np.sort(values, axis=None)
    return placed.reshape(values.shape)


def pairs(values: Array, count: int, generator: np.random.Generator) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yield two unrelated random maps like `values`, then two that share half of their variance, `count` times."""
    deviates = normal_scores(values, generator)
    for _ in range(count):
        one, other, common = (phase_randomized(deviates, generator) for _ in range(3))
        one, other, first, second = (_with_values(f, values) for f in (one, other, one + common, other + common))
        yield one, other, first, second


def thresholds(
    values: Array, measures: Mapping[str, Measure], count: int, generator: np.random.Generator
) -> dict[str, Thresholds]:
    """Find both marks of each measure by `count` pairs of random maps like `values`.

    >>> lumps = np.random.default_rng(1).random((32, 32))
    >>> got = thresholds(lumps, {"spearman": spearman}, 19, np.random.default_rng(0))["spearman"]
    >>> bool(got.unrelated < 0.1), round(got.half, 1)
    (True, 0.5)
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for one, other, first, second in pairs(values, count, generator):
        for name, measure in measures.items():
            found[name].append((measure(one, other), measure(first, second)))
    return {
        name: Thresholds(float(np.quantile([u for u, _ in both], 0.95)), float(np.median([h for _, h in both])))
        for name, both in found.items()
    }


def thresholds_against(values: Array, other: Array, count: int, generator: np.random.Generator) -> Thresholds:
    """Find both marks of Spearman's correlation with a fixed plane, by random maps like `values`."""
    deviates, fixed = normal_scores(values, generator), normal_scores(other, generator)
    drawn = [phase_randomized(deviates, generator) for _ in range(count)]
    unrelated = [spearman(d, other) for d in drawn]
    half = [spearman(d + fixed, other) for d in drawn]
    return Thresholds(float(np.quantile(unrelated, 0.95)), float(np.median(half)))


@dataclass(frozen=True)
class Null:
    """The marks of one map: of its magnitudes by rank correlation, of its signed values by correlation and cosine."""

    spearman: Thresholds
    correlation: Thresholds
    cosine: Thresholds

    @staticmethod
    def of(values: Array, count: int, seed: int) -> "Null":
        """Draw them from `count` pairs of random maps like `values`, `(C, H, W)`."""
        generator = np.random.default_rng(seed)
        of_magnitudes = thresholds(plane(values), {"spearman": spearman}, count, generator)
        of_signed = thresholds(np.asarray(values), {"correlation": correlation, "cosine": cosine}, count, generator)
        return Null(**of_magnitudes, **of_signed)

    def place(self, spearman: float, correlation: float) -> str:
        """Join both: *high* and *low* where both say so, *between* elsewhere.

        The same places with other signs are not the same map, nor another one.
        """
        places = {self.spearman.place(spearman), self.correlation.place(correlation)}
        return places.pop() if len(places) == 1 else BETWEEN

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return what `place` goes by, ready for JSON."""
        return {"spearman": self.spearman.to_dict(), "correlation": self.correlation.to_dict()}
