"""Do the pixels that the map marks carry the score?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import plane
from .fill import blurred, imputed, mean_image
from .input import edges
from .null import random_maps
from .result import NO, WEAK, YES, Answer

Array = npt.NDArray[Any]
Scores = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]
STEPS = 8
N_OTHER = 3  # random orders under the two replacements that do not decide the level
CHANCE = 0.05
SOURCE = "deletion and insertion, Petsiuk et al. 2018, arXiv 1806.07421; imputation, Rong et al. 2022, arXiv 2202.00449"
DEFINITION = (
    "Do the pixels it marks carry the score? Pixels are taken away in the order of their magnitude (deletion), or "
    "brought back into a blurred photograph (insertion). Scores run from 0, all pixels replaced, to 1, none. The area "
    "under insertion less that under deletion. 'no': random orders as lumpy as the map do as well (a permutation test "
    "at 5 %). 'weak': better than those, but no better than the photograph's own edges. 'yes': better than both."
)


@dataclass(frozen=True)
class Curve:
    """The scores of one order under one replacement, at shares 0, 1/steps, ... 1 of the pixels.

    Attributes:
        deletion: with that share of the pixels replaced, the strongest first.
        insertion: with that share of the pixels kept, the strongest first; empty where it was not measured.
    """

    deletion: list[float]
    insertion: list[float]

    @property
    def gap(self) -> float:
        """Area under insertion less area under deletion; without insertion, 1 less twice the area under deletion."""
        if not self.insertion:
            return 1 - 2 * area(self.deletion)
        return area(self.insertion) - area(self.deletion)

    def to_dict(self) -> dict[str, Any]:
        """Return the curves and their areas, ready for JSON."""
        curves: dict[str, Any] = {"deletion": self.deletion, "deletion_area": area(self.deletion)}
        if self.insertion:
            curves |= {"insertion": self.insertion, "insertion_area": area(self.insertion)}
        return {**curves, "gap": self.gap}


def area(curve: list[float]) -> float:
    """Return the area under a curve over [0, 1], by the trapezoidal rule.

    >>> area([1.0, 0.5, 0.0])
    0.5
    """
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def masks(order: Array, steps: int = STEPS) -> npt.NDArray[np.bool_]:
    """Return which pixels are the strongest 1/steps, 2/steps, ... of a plane, `(steps - 1, H, W)`; ties by position.

    >>> masks(np.array([[3.0, 1.0], [2.0, 4.0]]), steps=2).astype(int).tolist()
    [[[1, 0], [0, 1]]]
    """
    rank = np.empty(order.size, int)
    rank[np.argsort(-np.ravel(order), kind="stable")] = np.arange(order.size)
    counts = np.arange(1, steps) * order.size / steps
    return rank.reshape(order.shape) < counts[:, None, None].round()


def n_images(samples: int, steps: int = STEPS) -> int:
    """How many images `answer` shows the network."""
    inner = steps - 1
    return 3 + inner * (2 * (2 + samples) + 2 * (2 + min(N_OTHER, samples)) + (2 + min(N_OTHER, samples)))


def answer(values: Array, image: Array, scores: Scores, samples: int, seed: int, steps: int = STEPS) -> Answer:
    """Take pixels away in the map's order and in others, and compare the scores.

    Args:
        values: the map, `(C, H, W)`.
        image: the input, `(C, H, W)` float32.
        scores: from images `(n, C, H, W)` to the explained score of each, `(n,)`.
        samples: how many random orders there are under blur; under the other replacements, three of them.
        seed: of the random orders and of the imputation's noise.
    """
    generator = np.random.default_rng(seed)
    own = plane(values)
    random = random_maps(own, samples, generator)
    orders = {"map": own, "edges": edges(image), **{f"random {i}": order for i, order in enumerate(random)}}
    first = dict(list(orders.items())[: 2 + N_OTHER])
    ends = scores(np.stack([image, blurred(image), mean_image(image)]))
    curves = {
        "blur": _replaced(orders, image, blurred(image), scores, (ends[0], ends[1]), steps),
        "mean": _replaced(first, image, mean_image(image), scores, (ends[0], ends[2]), steps),
        "imputation": _imputed(first, image, scores, (ends[0], ends[2]), steps, generator),
    }
    gaps = {name: curve.gap for name, curve in curves["blur"].items()}
    value, random_gaps = gaps["map"], [gap for name, gap in gaps.items() if name.startswith("random")]
    p = (1 + sum(gap >= value for gap in random_gaps)) / (1 + len(random_gaps))
    level = NO if p > CHANCE else YES if value > gaps["edges"] else WEAK
    numbers = {
        "p": p,
        "edges": gaps["edges"],
        "random": {"mean": float(np.mean(random_gaps)), "largest": max(random_gaps), "orders": len(random_gaps)},
        "score": {"whole": float(ends[0]), "blurred": float(ends[1]), "mean": float(ends[2])},
        "replacements": {name: _curves_to_dict(by_order) for name, by_order in curves.items()},
    }
    return Answer(value, numbers, level, _sentence(level, value, numbers), DEFINITION, SOURCE)


def _replaced(
    orders: Mapping[str, Array], image: Array, blank: Array, scores: Scores, ends: tuple[float, float], steps: int
) -> dict[str, Curve]:
    """Delete and insert the strongest pixels of each order; `blank` replaces what is missing."""
    curves = {}
    for name, order in orders.items():
        strong = masks(order, steps)[:, None]
        raw = scores(np.concatenate([np.where(strong, blank, image), np.where(strong, image, blank)]))
        deletion, insertion = _scaled(raw[: len(strong)], ends), _scaled(raw[len(strong) :], ends)
        curves[name] = Curve([1.0, *deletion, 0.0], [0.0, *insertion, 1.0])
    return curves


def _imputed(
    orders: Mapping[str, Array],
    image: Array,
    scores: Scores,
    ends: tuple[float, float],
    steps: int,
    generator: np.random.Generator,
) -> dict[str, Curve]:
    """Delete alone: each missing pixel is filled from its neighbours, and by the image's mean where none is left."""
    curves = {}
    for name, order in orders.items():
        raw = scores(np.stack([imputed(image, strong, generator) for strong in masks(order, steps)]))
        curves[name] = Curve([1.0, *_scaled(raw, ends), 0.0], [])
    return curves


def _scaled(raw: Array, ends: tuple[float, float]) -> list[float]:
    """Scale scores so that 0 is all pixels replaced and 1 is none. The sign of a difference stays."""
    whole, blank = ends
    span = abs(whole - blank) or 1.0
    return [float(score) for score in (raw - blank) / span]


def _curves_to_dict(curves: Mapping[str, Curve]) -> dict[str, Any]:
    random = [curve for name, curve in curves.items() if name.startswith("random")]
    mean = Curve(
        np.mean([c.deletion for c in random], 0).tolist(),
        np.mean([c.insertion for c in random], 0).tolist() if random[0].insertion else [],
    )
    return {"map": curves["map"].to_dict(), "edges": curves["edges"].to_dict(), "random": mean.to_dict()}


def _sentence(level: str, value: float, numbers: dict[str, Any]) -> str:
    gaps = f"{value:.2f}, edges {numbers['edges']:.2f}, random orders {numbers['random']['mean']:.2f}"
    if level == NO:
        return f"The pixels that the map marks carry the score no better than chance ({gaps})."
    if level == WEAK:
        return f"The pixels that the map marks carry the score, but the photograph's edges do as well ({gaps})."
    return f"The pixels that the map marks carry the score ({gaps})."
