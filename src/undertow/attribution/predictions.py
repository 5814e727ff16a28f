"""What a network predicts for a photograph: its likeliest classes, with probabilities only where it has any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

N_PREDICTIONS = 5
TOLERANCE = 2e-3  # of a sum of probabilities, which float16 rounds


@dataclass(frozen=True)
class Prediction:
    """One class that a network predicts.

    Attributes:
        class_id, name: of the class.
        score: what the network returned.
        probability: None where the scores are no probabilities and do not stand for any.
    """

    class_id: int
    name: str
    score: float
    probability: float | None

    def __str__(self) -> str:
        """Return the name with its probability, else with its score."""
        return (
            f"{self.name} {self.probability:.2f}" if self.probability is not None else f"{self.name} ({self.score:.4g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction, ready for JSON."""
        probability = None if self.probability is None else round(self.probability, 6)
        return {"class": self.class_id, "name": self.name, "score": self.score, "probability": probability}


def probabilities_of(scores: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Return the probabilities that scores `(classes,)` stand for, float64; None where that cannot be told.

    Scores that add up to one are probabilities already, logarithms of such are raised, and any others are taken for
    logits. A single score, and scores that all lie from 0 to 1 and add up to something else, as those of a sigmoid for
    each label, stand for no distribution over the classes.

    >>> probabilities_of(np.array([0.25, 0.75])).tolist()
    [0.25, 0.75]
    >>> probabilities_of(np.log([0.25, 0.75])).round(6).tolist()
    [0.25, 0.75]
    >>> probabilities_of(np.array([2.0, 2.0])).tolist()
    [0.5, 0.5]
    >>> probabilities_of(np.array([0.46])) is None
    True
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return None
    if (scores >= 0).all() and abs(scores.sum() - 1) < TOLERANCE:
        return scores
    if ((scores >= 0) & (scores <= 1)).all():
        return None
    exponentials = np.exp(scores - scores.max())  # of logarithms that add up to one this gives them back
    return np.asarray(exponentials / exponentials.sum())


def likeliest(scores: npt.NDArray[Any], names: Sequence[str], exclusive: bool | None = None) -> list[Prediction]:
    """Return the five classes of the highest scores `(classes,)`, highest first.

    Args:
        exclusive: whether the scores are logits of classes of which one is right; None: by `probabilities_of`.
    """
    probabilities = probabilities_of(scores) if exclusive is None else None
    if exclusive and len(scores) > 1:
        exponentials = np.exp(scores - scores.max())
        probabilities = exponentials / exponentials.sum()
    best = np.argsort(-scores, kind="stable")[:N_PREDICTIONS].tolist()
    return [
        Prediction(i, names[i], float(scores[i]), None if probabilities is None else float(probabilities[i]))
        for i in best
    ]
