"""Does the map stay under small noise?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import similarities
from .null import Null
from .result import NO, WEAK, YES, Answer

Array = npt.NDArray[Any]
DRAWS = 8
ITSELF = 0.5  # of its length: a map that changes by less stays more itself than not
RADIUS = 0.02  # of the image's range of values: five grey levels of 256
SOURCE = "max-sensitivity, Yeh et al. 2019, arXiv 1901.09392"
DEFINITION = (
    "Does the map stay under small noise? Max-sensitivity: the largest ||map of noisy image - map|| / ||map|| over "
    "draws of uniform noise. 'yes': the map changes by less than half of its length, and by less than two random maps "
    "differ that share half of their variance (about 1). "
    "'no': as large as between unrelated random maps (about 1.4)."
)


def noisy(image: Array, draws: int, seed: int, radius: float = RADIUS) -> npt.NDArray[np.float32]:
    """Draw images within a radius of another in every pixel, `(draws, C, H, W)`.

    Args:
        radius: a fraction of the image's range of values, largest minus smallest.
    """
    generator = np.random.default_rng(seed)
    reach = radius * float(np.ptp(image))
    return (image + generator.uniform(-reach, reach, (draws, *image.shape))).astype(np.float32)


def sensitivity(original: Array, other: Array) -> float:
    """Return how far a map lies from the original, in lengths of the original; infinite where that is zero.

    >>> sensitivity(np.array([3.0, 4.0]), np.array([3.0, 1.0]))
    0.6
    """
    a, b = (np.asarray(values, np.float64) for values in (original, other))
    distance, length = (float(np.linalg.norm(values)) for values in (b - a, a))
    return distance / length if length else float("inf") if distance else 0.0


def answer(original: Array, maps: Sequence[Array], radius: float, null: Null, seed: int) -> Answer:
    """Compare the map with those of noisy copies of its image.

    Args:
        original: the map, `(C, H, W)`.
        maps: those of the noisy copies.
        radius: of the noise, as `noisy` takes it.
        seed: of the interval of the mean.
    """
    changes = [sensitivity(original, values) for values in maps]
    alike = [similarities(original, values)["spearman"] for values in maps]
    value = max(changes)
    # random maps have the map's own length, so that between two of them the change and the cosine are one number
    unrelated, half = (float(np.sqrt(2 - 2 * cosine)) for cosine in (null.cosine.unrelated, null.cosine.half))
    level = YES if value < min(ITSELF, half) else NO if value >= unrelated else WEAK
    numbers = {
        "mean": float(np.mean(changes)),
        "interval": _interval(changes, seed),
        "spearman": float(np.mean(alike)),
        "draws": len(changes),
        "radius": radius,
        "null": {"unrelated": round(unrelated, 4), "half": round(half, 4)},
    }
    return Answer(value, numbers, level, _sentence(level, value, radius, len(changes)), DEFINITION, SOURCE)


def _interval(values: list[float], seed: int) -> list[float]:
    """Return the 95 % interval of the mean over draws, from 1,000 bootstrap samples."""
    drawn = np.random.default_rng(seed).choice(values, (1000, len(values)))
    return [float(q) for q in np.quantile(drawn.mean(1), (0.025, 0.975))]


def _sentence(level: str, value: float, radius: float, draws: int) -> str:
    change = f"it changes by up to {100 * value:.0f} % of its length in {draws} draws"
    noise = f"Under noise of {100 * radius:g} % of the image's range the map"
    if level == YES:
        return f"{noise} stays mostly itself ({change})."
    return f"{noise} becomes another one ({change})." if level == NO else f"{noise} stays in part ({change})."
