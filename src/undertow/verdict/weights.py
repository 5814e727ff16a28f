"""Does the map depend on the trained weights?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import similarities
from .null import Null
from .result import NO, YES, Answer

Array = npt.NDArray[Any]
STEPS = 8
SOURCE = "Adebayo et al. 2018, arXiv 1810.03292"
DEFINITION = (
    "Does the map depend on the trained weights? Layers of a copy are initialised anew, from the top down; how alike "
    "the map stays: rank correlation of magnitudes, the mean over the steps of that cascade. 'no': magnitudes and "
    "signed values stay as alike as random maps that share half of their variance, or more. 'yes': both are no more "
    "alike than unrelated random maps."
)


def cascade(layers: Sequence[str], steps: int = STEPS) -> list[list[str]]:
    """Choose what to initialise anew at each step: the last layer alone, then ever more from the top, then all.

    Args:
        layers: in order of execution.

    >>> cascade(["a", "b", "c", "d"], steps=3)
    [['d'], ['d', 'c'], ['d', 'c', 'b', 'a']]
    """
    counts = np.unique(np.geomspace(1, max(len(layers), 1), min(steps, len(layers))).round().astype(int))
    downward = list(reversed(layers))
    return [downward[:count] for count in counts]


def answer(
    original: Array,
    cascaded: Sequence[tuple[str, int, Array]],
    single: Sequence[tuple[str, int, Array]],
    layers: int,
    null: Null,
) -> Answer:
    """Compare the map with those of copies in which layers were initialised anew.

    Args:
        original: the map, `(C, H, W)`.
        cascaded: for each step the lowest layer that was initialised anew, how many were, and the map.
        single: for each layer that alone was initialised anew its name, its number from the top, and the map.
        layers: how many layers with weights there are.
    """
    by_step = [{"layer": name, "reinitialized": n, **similarities(original, values)} for name, n, values in cascaded]
    by_layer = [{"layer": name, "from_top": n, **similarities(original, values)} for name, n, values in single]
    value = float(np.mean([row["spearman"] for row in by_step]))
    signed = float(np.mean([row["correlation"] for row in by_step]))
    level = null.classify(value, signed)
    numbers = {
        "top": by_step[0]["spearman"],
        "all": by_step[-1]["spearman"],
        "correlation": signed,
        "layers": layers,
        "cascade": by_step,
        "single": by_layer,
        "null": null.to_dict(),
    }
    return Answer(value, numbers, level, _sentence(level, numbers), DEFINITION, SOURCE)


def _sentence(level: str, numbers: dict[str, Any]) -> str:
    with_top, with_all = numbers["top"], numbers["all"]
    similarity = f"{with_top:.2f} with the last layer random, {with_all:.2f} with all"
    if level == NO:
        lost = "changes only with the lower ones" if with_all < with_top / 2 else "stays the same"
        return f"What the upper layers learned hardly matters to the map: it {lost} ({similarity})."
    if level == YES:
        return f"The map goes with the trained weights ({similarity})."
    return f"The map depends on the trained weights in part ({similarity})."
