"""Do backward directions stay distinct with depth?"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .null import Thresholds
from .result import NO, YES, Answer

Array = npt.NDArray[Any]
DIRECTIONS = 6
DEPTHS = 8
HALF = 0.5  # the cosine of two vectors that share half of their squared length
SOURCE = "cosine similarity convergence, Sixt et al. 2019, arXiv 1912.09818"
DEFINITION = (
    "Do backward directions stay distinct with depth? Random directions at the scores are sent back under the rule; "
    "the mean cosine between any two where they arrive. 1: what the upper layers said is lost. 'no': 0.5 or more, "
    "directions that share half of their squared length. 'yes': no more than the 95th percentile after random flips "
    "of the directions' signs, which a linear backward pass cannot tell from the directions themselves."
)


def mean_cosine(vectors: Array) -> float:
    """Return the mean cosine between any two of `(K, ...)` vectors, from -1 / (K - 1) to 1; zeros count as one vector.

    >>> mean_cosine(np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])).__round__(4)
    0.3333
    """
    return _mean(cosines(vectors))


def cosines(vectors: Array) -> npt.NDArray[np.float64]:
    """Return the cosine between any two of `(K, ...)` vectors, `(K, K)`."""
    flat = np.asarray(vectors, np.float64).reshape(len(vectors), -1)
    largest = np.abs(flat).max(1, keepdims=True)
    scaled = flat / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    units = np.divide(scaled, lengths, out=np.full_like(scaled, scaled.shape[1] ** -0.5), where=lengths > 0)
    return units @ units.T  # type: ignore[no-any-return]


def _mean(table: npt.NDArray[np.float64]) -> float:
    return float(table[np.triu_indices(len(table), 1)].mean())


def sign_flip_thresholds(vectors: Array, count: int, seed: int) -> Thresholds:
    """Return the thresholds of the mean cosine, the lower one by `count` random flips of the vectors' signs."""
    table, generator = cosines(vectors), np.random.default_rng(seed)
    signs = generator.choice((-1.0, 1.0), (count, len(table)))
    return Thresholds(float(np.quantile([_mean(table * np.outer(s, s)) for s in signs], 0.95)), HALF)


def answer(gradients: Mapping[str, Array], at_input: Array, samples: int, seed: int) -> Answer:
    """Measure how alike random directions become as they are sent back.

    Args:
        gradients: what arrived at each layer, `(K, ...)` for K directions, from the input up.
        at_input: what arrived at the input, or at the layer that the map ends at, `(K, ...)`.
        samples: sign flips are drawn this many times ten.
    """
    value = mean_cosine(at_input)
    null = sign_flip_thresholds(at_input, 10 * samples, seed)
    level = null.classify(value)
    depths = [{"layer": name, "cosine": mean_cosine(g)} for name, g in reversed(list(gradients.items()))]
    numbers = {"depths": depths, "directions": len(at_input), "null": null.to_dict()}
    return Answer(value, numbers, level, _sentence(level, value), DEFINITION, SOURCE)


def _sentence(level: str, value: float) -> str:
    if level == NO:
        return f"Whatever the scores ask for, nearly the same arrives at the image (cosine {value:.2f})."
    if level == YES:
        return f"Different questions to the scores arrive as different directions (cosine {value:.2f})."
    return f"Different questions to the scores arrive partly as one direction (cosine {value:.2f})."
