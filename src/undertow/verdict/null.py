"""What random maps would score: every level is read off a null distribution, none is set by taste.

A random map has the values of the map in question and, as nearly as ranks allow, its spectrum: as many strong pixels,
in lumps as large, at positions that mean nothing. Pairs of them give two thresholds for a similarity:

    unrelated   the 95th percentile over pairs that have nothing in common
    half        the median over pairs that share half of their variance: above it, maps are more the same than not

An answer is "yes" up to the first (the map changed with what was changed), "no" from the second on, "weak" between.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import correlation, cosine, plane, spearman
from .result import NO, WEAK, YES

Array = npt.NDArray[Any]
Measure = Callable[[Array, Array], float]


@dataclass(frozen=True)
class Thresholds:
    """The similarity up to which maps are unrelated, and that from which they are mostly the same."""

    unrelated: float
    half: float

    def classify(self, value: float) -> str:
        """Return a similarity's level: "yes", "weak" or "no". Of two constants, which are the same map, it is "no".

        >>> [Thresholds(0.1, 0.5).classify(v) for v in (-0.3, 0.3, 0.9)]
        ['yes', 'weak', 'no']
        """
        return NO if value >= self.half else YES if value <= self.unrelated else WEAK

    def to_dict(self) -> dict[str, float]:
        """Return both, ready for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def normal_scores(values: Array, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Replace each value by the normal deviate of its rank, which keeps the order alone; ties are broken at random.

    >>> normal_scores(np.array([5.0, -1.0, 70.0]), np.random.default_rng(0)).argsort().tolist()
    [1, 0, 2]
    """
    flat = np.ravel(values)
    order = np.lexsort((generator.random(flat.size), flat))
    deviates = np.empty(flat.size)
    deviates[order] = np.sort(generator.standard_normal(flat.size))
    return deviates.reshape(np.shape(values))


def phase_randomized(deviates: Array, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw a random field with the spectrum of another over its last two axes; all leading axes share the phases.

    Source: phase randomisation, Theiler et al. 1992, doi 10.1016/0167-2789(92)90102-S.
    """
    shape = deviates.shape[-2:]
    phases = np.fft.rfft2(generator.standard_normal(shape))
    magnitudes = np.abs(phases)
    phases = np.divide(phases, magnitudes, out=np.ones_like(phases), where=magnitudes > 0)
    phases[0, 0] = 1  # the mean stays as it is
    return np.fft.irfft2(np.fft.rfft2(deviates) * phases, s=shape)


def random_maps(values: Array, count: int, generator: np.random.Generator) -> list[Array]:
    """Draw maps with the values of another, `(..., H, W)`, and nearly its spectrum, at random positions.

    >>> drawn = random_maps(np.arange(12.0).reshape(3, 4), 1, np.random.default_rng(0))[0]
    >>> sorted(drawn.ravel()) == list(range(12))
    True
    """
    deviates = normal_scores(values, generator)
    return [_with_values(phase_randomized(deviates, generator), values) for _ in range(count)]


def _with_values(drawn: Array, values: Array) -> Array:
    """Replace the values of a random field, rank by rank, by those of a map."""
    replaced = np.empty(values.size, values.dtype)
    replaced[np.argsort(drawn, axis=None, kind="stable")] = np.sort(values, axis=None)
    return replaced.reshape(values.shape)


def pairs(values: Array, count: int, generator: np.random.Generator) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yield two unrelated random maps like `values`, then two that share half of their variance, `count` times."""
    deviates = normal_scores(values, generator)
    for _ in range(count):
        a, b, common = (phase_randomized(deviates, generator) for _ in range(3))
        a, b, half_a, half_b = (_with_values(drawn, values) for drawn in (a, b, a + common, b + common))
        yield a, b, half_a, half_b


def thresholds(
    values: Array, measures: Mapping[str, Measure], count: int, generator: np.random.Generator
) -> dict[str, Thresholds]:
    """Estimate both thresholds of each measure from `count` pairs of random maps like `values`.

    >>> lumps = np.random.default_rng(1).random((32, 32))
    >>> got = thresholds(lumps, {"spearman": spearman}, 19, np.random.default_rng(0))["spearman"]
    >>> bool(got.unrelated < 0.1), round(got.half, 1)
    (True, 0.5)
    """
    unrelated: dict[str, list[float]] = {name: [] for name in measures}
    half: dict[str, list[float]] = {name: [] for name in measures}
    for a, b, half_a, half_b in pairs(values, count, generator):
        for name, measure in measures.items():
            unrelated[name].append(measure(a, b))
            half[name].append(measure(half_a, half_b))
    return {name: _thresholds(unrelated[name], half[name]) for name in measures}


def _thresholds(unrelated: list[float], half: list[float]) -> Thresholds:
    return Thresholds(float(np.quantile(unrelated, 0.95)), float(np.median(half)))


def thresholds_against(values: Array, other: Array, count: int, generator: np.random.Generator) -> Thresholds:
    """Estimate both thresholds of Spearman's correlation with a fixed plane, from random maps like `values`."""
    deviates, fixed = normal_scores(values, generator), normal_scores(other, generator)
    drawn = [phase_randomized(deviates, generator) for _ in range(count)]
    return _thresholds([spearman(d, other) for d in drawn], [spearman(d + fixed, other) for d in drawn])


@dataclass(frozen=True)
class Null:
    """One map's thresholds: of its magnitudes by rank correlation, of its signed values by correlation and cosine."""

    spearman: Thresholds
    correlation: Thresholds
    cosine: Thresholds

    @staticmethod
    def of(values: Array, count: int, seed: int) -> "Null":
        """Estimate them from `count` pairs of random maps like `values`, `(C, H, W)`."""
        generator = np.random.default_rng(seed)
        of_magnitudes = thresholds(plane(values), {"spearman": spearman}, count, generator)
        of_signed = thresholds(np.asarray(values), {"correlation": correlation, "cosine": cosine}, count, generator)
        return Null(**of_magnitudes, **of_signed)

    def classify(self, spearman: float, correlation: float) -> str:
        """Return the level on which both measures agree, else "weak".

        The same strong pixels with other signs are not the same map, nor another one.
        """
        levels = {self.spearman.classify(spearman), self.correlation.classify(correlation)}
        return levels.pop() if len(levels) == 1 else WEAK

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return the thresholds that `classify` uses, ready for JSON."""
        return {"spearman": self.spearman.to_dict(), "correlation": self.correlation.to_dict()}
