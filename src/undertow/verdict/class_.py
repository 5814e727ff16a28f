"""Does the map depend on the class?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import similarities
from .null import Null
from .result import NO, YES, Answer

Array = npt.NDArray[Any]
N_RANDOM = 3  # random classes, beside the runner-up and the least likely
SOURCE = "Nie et al. 2018, arXiv 1805.07039; Adebayo et al. 2018, arXiv 1810.03292"
DEFINITION = (
    "Does the map depend on the class? Asked about the runner-up, the least likely class and random others, how alike "
    "are the maps: median rank correlation of magnitudes. 'no': magnitudes and signed values are as alike as random "
    "maps that share half of their variance, or more. 'yes': both are no more alike than unrelated random maps."
)


def other_classes(scores: Array, target: int, seed: int) -> dict[int, str]:
    """Choose the classes to ask about instead of the target: each with its role, the runner-up first.

    Args:
        scores: `(classes,)`.

    >>> other_classes(np.array([0.1, 3.0, 2.0, -1.0]), 1, seed=0)
    {2: 'runner-up', 3: 'least likely', 0: 'random'}
    """
    order = [int(i) for i in np.argsort(-scores, kind="stable") if i != target]
    if not order:
        return {}
    chosen = {order[0]: "runner-up", order[-1]: "least likely"}
    rest = sorted(set(order) - set(chosen))
    drawn = np.random.default_rng(seed).choice(len(rest), min(N_RANDOM, len(rest)), replace=False)
    return {**chosen, **{rest[i]: "random" for i in drawn}}


def answer(
    original: Array,
    maps: Mapping[int, Array],
    roles: Mapping[int, str],
    names: Mapping[int, str],
    target: int,
    null: Null,
    plain: Sequence[Array] = (),
) -> Answer:
    """Compare the map with those of other classes.

    Args:
        original: the map, `(C, H, W)`.
        maps: of the other classes, by id.
        roles: what each of them is, as `other_classes` gives it.
        names: of all these classes and of the target.
        plain: the plain gradient's maps of the target and then of the same others, for comparison; empty where the
            map is that gradient itself, or was given as an array.
    """
    alike = {i: similarities(original, values) for i, values in maps.items()}
    value = float(np.median([a["spearman"] for a in alike.values()]))
    signed = float(np.median([a["correlation"] for a in alike.values()]))
    level = null.classify(value, signed)
    rows = [{"class": i, "name": names[i], "role": roles[i], **alike[i]} for i in alike]
    gradient = [similarities(plain[0], values)["spearman"] for values in plain[1:]]
    numbers = {"classes": rows, "correlation": signed, "gradient": _median(gradient), "null": null.to_dict()}
    first = next(iter(alike))
    return Answer(
        value, numbers, level, _sentence(level, value, alike[first], names[first], names[target]), DEFINITION, SOURCE
    )


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _sentence(level: str, value: float, runner_up: dict[str, float], other: str, own: str) -> str:
    if level == NO:
        return (
            f"Asked about *{other}* instead of *{own}* the map is the same ({runner_up['spearman']:.2f}): "
            "it shows what the network sees, not why it chose this class."
        )
    if level == YES:
        return f"Asked about other classes than *{own}* the map is another one ({value:.2f})."
    return f"Asked about other classes than *{own}* the map changes in part ({value:.2f})."
