"""Verdicts on the maps of one photograph, for each rule and estimator; and the files that keep them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import images
from ..classifier import Classifier
from ..display import ShownFields
from ..errors import FrameworkError
from ..files import published, readable
from ..photographs import PHOTOGRAPH, provenance, result_folder, write_image
from ..show import verdict as show
from ..show.plots import save
from .evaluation import Cost
from .result import Verdict
from .trust import trust


@dataclass(frozen=True, repr=False)
class JudgedPhotograph(ShownFields):
    """The verdicts on one photograph's maps.

    Attributes:
        path: the photograph's file.
        view: `(H, W, 3)` uint8, the photograph as the network's input shows it.
        verdicts: one for each rule and estimator, by `label`.
    """

    path: Path
    view: npt.NDArray[np.uint8]
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def label(rule: str, estimator: str) -> str:
    """Name a rule and an estimator in one word.

    >>> label("guided", "gradient"), label("guided", "smoothgrad:25")
    ('guided', 'guided smoothgrad:25')
    """
    return rule if estimator == "gradient" else f"{rule} {estimator}"


def pairs_of(rules: Sequence[str], estimators: Sequence[str]) -> list[tuple[str, str]]:
    """Pair every rule with every estimator."""
    return [(rule, estimator) for estimator in estimators for rule in rules]


def cost_of(classifier: Classifier, path: Path, pairs: Sequence[tuple[str, str]], device: str, samples: int) -> Cost:
    """Return what `trust_photograph` with the same arguments will take.

    Raises:
        PhotographError, InputError, ModelError: as `trust_photograph`.
    """
    x = classifier.prepare(path, device)
    costs = [
        trust.cost(classifier.module, x, rule=r, estimator=e, samples=samples, output=classifier.output)
        for r, e in pairs
    ]
    return Cost(sum(c.forward for c in costs), sum(c.backward for c in costs), sum(c.seconds for c in costs))


def trust_photograph(
    classifier: Classifier,
    path: Path,
    *,
    pairs: Sequence[tuple[str, str]],
    device: str = "cpu",
    **options: Any,
) -> JudgedPhotograph:
    """Judge the maps of one photograph.

    Args:
        classifier: whose module is on `device`.
        pairs: of rule and estimator, as `pairs_of` gives them.
        options: target, seed, samples and advance, as `undertow.trust` takes them.

    Raises:
        PhotographError, ModelError, TargetError, RuleError, InputError: as `images.read` and `undertow.trust` say.
    """
    photograph = images.read(path)
    verdicts = verdicts_of(classifier, classifier.prepare(photograph, device), pairs, **options)
    return JudgedPhotograph(path, classifier.preprocessing.view(photograph), verdicts)


def verdicts_of(classifier: Classifier, x: Any, pairs: Sequence[tuple[str, str]], **options: Any) -> dict[str, Verdict]:
    """Judge the maps of a batch of one; arguments as of `trust_photograph`."""
    options |= {"names": classifier.classes, "output": classifier.output}
    return {label(r, e): trust(classifier.module, x, rule=r, estimator=e, **options) for r, e in pairs}


def map_file(label: str) -> str:
    """Name the file that keeps the map of a rule and estimator, `(C, H, W)`.

    >>> map_file("guided smoothgrad:25")
    'map-guided_smoothgrad-25.npy'
    """
    return f"map-{readable(label.replace(':', '-'))}.npy"


def write(
    judged: JudgedPhotograph, classifier: Classifier, folder: Path, ending: str = "png", ground: str = "white"
) -> dict[str, Any]:
    """Write the photograph, each map, a picture of each verdict, and `verdict.json` last; return the latter's content.

    Args:
        ending: of the pictures: "png", "svg" or "pdf".
        ground: "white", "dark" or "transparent".

    Files of the same names are replaced. Where matplotlib is missing there are no pictures, and a note says so.
    """
    with result_folder(folder, "verdict.json") as result:
        files, notes = [write_image(judged.view, folder / PHOTOGRAPH).name], []
        for name, verdict in judged.verdicts.items():
            path = folder / f"verdict-{readable(name.replace(':', '-'))}.{ending}"
            assert verdict.values is not None  # a fresh verdict holds its map
            with published(folder / map_file(name)) as aside, aside.open("wb") as file:
                np.save(file, verdict.values, allow_pickle=False)
            files.append(map_file(name))
            try:
                figure = show.figure(judged.view, verdict.values, verdict.to_dict())
                files.append(save(figure, path, ground=ground).name)
            except FrameworkError as error:
                notes = [str(error)]
        verdicts = {name: verdict.to_dict() for name, verdict in judged.verdicts.items()}
        result |= {**provenance(judged.path, classifier), "verdicts": verdicts, "notes": notes, "files": files}
    return result
