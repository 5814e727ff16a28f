"""One photograph explained: the classifier's predictions, every rule's map, and the folder that keeps both."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import images
from ..classifier import Classifier
from ..display import ShownFields
from ..errors import ModelError, UndertowWarning
from ..files import readable
from ..frameworks.base import as_numpy, capability, framework_of_model
from ..photographs import PHOTOGRAPH, provenance, result_folder, versions, write_image
from ..show import heatmap
from ..show.panel import PanelRow, panel
from .explain import explain_rules
from .predictions import Prediction, likeliest
from .result import Attribution

ALIKE = 0.9  # correlation from which maps of different classes are said to be nearly the same


@dataclass(frozen=True, repr=False)
class ExplainedPhotograph(ShownFields):
    """The predictions and maps of one photograph.

    Attributes:
        path: where the photograph is.
        view: `(H, W, 3)` uint8, the photograph as the network's input shows it.
        predictions: the five likeliest classes, most likely first.
        targets: the explained classes as (id, name, score as the network returned it).
        maps: an attribution for each rule, of `(1, K, 3, H, W)` values.
        notes: what belongs beside the maps, lest an artefact be taken for an insight.
        seconds: wall time for each rule; the first one's is that of a forward pass that serves them all.
        device: where it ran.
        verdicts: of `undertow.trust` on each rule's map of the first target, as plain data; empty if not asked for.
    """

    path: Path
    view: npt.NDArray[np.uint8]
    predictions: list[Prediction]
    targets: list[tuple[int, str, float]]
    maps: dict[str, Attribution]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)


def explain_photograph(
    classifier: Classifier,
    path: Path,
    *,
    rules: Sequence[str],
    target: Any = "top:1",
    device: str = "cpu",
    **options: Any,
) -> ExplainedPhotograph:
    """Explain one photograph under several rules.

    Args:
        classifier: whose module is on `device`.
        target: "top:K", or a list of class ids.
        options: through, activations, estimator and head, as `explain` takes them.

    Raises:
        PhotographError, ModelError, TargetError, RuleError: as `images.read` and `explain` say.
    """
    photograph = images.read(path)
    x = classifier.prepare(photograph, device)
    explainer = capability(framework_of_model(classifier.module), "explain")
    returned = explainer.scores(classifier.module, x, classifier.output)[0]
    options["output"] = classifier.output
    predictions = _predictions(classifier, returned)
    targets = target if isinstance(target, str) else [list(target)]
    maps, seconds = {}, {}
    with collected() as remarks:
        started = time.perf_counter()
        explained = explain_rules(classifier.module, x, rules, target=targets, **options)
        for rule, attribution in zip(rules, explained, strict=True):
            maps[rule], now = attribution, time.perf_counter()
            seconds[rule], started = round(now - started, 4), now
    ids = as_numpy(maps[rules[0]].targets)[0].tolist()
    return ExplainedPhotograph(
        path=path,
        view=classifier.preprocessing.view(photograph),
        predictions=predictions,
        targets=[(i, classifier.classes[i], float(returned[i])) for i in ids],
        maps=maps,
        notes=[*notes(maps), *remarks, *_likeness_notes(maps)],
        seconds=seconds,
        device=device,
    )


@contextmanager
def collected() -> Iterator[list[str]]:
    """Give a list that holds, once the context is left, what was warned of a result; other warnings are passed on."""
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UndertowWarning)
        yield remarks
    for w in caught:
        if not issubclass(w.category, UndertowWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        elif str(w.message) not in remarks:
            remarks.append(str(w.message))


def _predictions(classifier: Classifier, scores: npt.NDArray[Any]) -> list[Prediction]:
    if len(scores) != len(classifier.classes):
        raise ModelError(
            f"{classifier.reference} gives {len(scores)} scores but has {len(classifier.classes)} class names"
        )
    return likeliest(scores, classifier.classes)


def write(
    explained: ExplainedPhotograph, classifier: Classifier, folder: Path, ground: str = "white", ending: str = "png"
) -> dict[str, Any]:
    """Write the panel, each map as pictures and as safetensors, and `result.json` last; return the latter's content.

    Args:
        ground: of the panel: "white", "dark" or "transparent".
        ending: of the panel: "png", "pdf" or "svg".

    Files of the same names are replaced. A folder that has a `result.json` is complete.
    """
    with result_folder(folder, "result.json") as result:
        files = [f"panel.{ending}", PHOTOGRAPH]
        write_image(draw_panel(explained, classifier, ground), folder / files[0])
        write_image(explained.view, folder / PHOTOGRAPH)
        for rule, attribution in explained.maps.items():
            files.append(attribution.save(folder / f"{readable(rule)}.safetensors").name)
            for k, (class_id, _, _) in enumerate(explained.targets):
                suffix = f"-{class_id}" if len(explained.targets) > 1 else ""
                values = _in_colour(attribution, k, classifier)
                files += _write_pictures(explained.view, values, folder, f"{readable(rule)}{suffix}")
        result |= {**_result(explained, classifier), "files": files}
    return result


def _in_colour(attribution: Attribution, k: int, classifier: Classifier) -> npt.NDArray[Any]:
    """Return the map of the k-th target, its channels in the order of a picture's: `(3, H, W)`."""
    values = attribution.map(0, k)
    return values[::-1] if classifier.preprocessing.order == "BGR" else values


def _write_pictures(view: npt.NDArray[np.uint8], values: npt.NDArray[Any], folder: Path, stem: str) -> list[str]:
    from PIL import Image

    pictures = {style: heatmap.draw(values, style) for style in ("magnitude", "signed", "colour")}
    pictures["overlay"] = Image.fromarray(heatmap.overlay(view, values))
    for style, picture in pictures.items():
        write_image(picture, folder / f"{stem}-{style}.png")
    return [f"{stem}-{style}.png" for style in pictures]


def draw_panel(explained: ExplainedPhotograph, classifier: Classifier, ground: str = "white") -> Any:
    """Draw one photograph's panel, a row for each target and rule."""
    rows = [
        PanelRow(f"{class_id} {name}", [(_heading(a), _in_colour(a, k, classifier)) for a in explained.maps.values()])
        for k, (class_id, name, _) in enumerate(explained.targets)
    ]
    title = f"{explained.path.name}   {classifier.reference} ({classifier.weights}) sees {explained.predictions[0]}"
    return panel(explained.view, title, rows, [*explained.notes, *_sentences(explained)], ground=ground)


def _sentences(explained: ExplainedPhotograph) -> list[str]:
    """Return each verdict's sentence, to be printed next to the maps."""
    target = explained.targets[0][1]
    return [f"May it be believed? {rule}, {target}: {v['sentence']}" for rule, v in explained.verdicts.items()]


def _heading(attribution: Attribution) -> str:
    how = "" if attribution.estimator == "gradient" else f" {attribution.estimator}"
    at = f" at {attribution.at[0]}" if attribution.at else ""
    rewired = f" ({attribution.rewired} rewired)" if attribution.rewired else ""
    return f"{attribution.rule}{how}{at}{rewired}"


def mean_correlation(maps: Sequence[npt.NDArray[Any]]) -> float:
    """Return the mean correlation between maps of different photographs; near 1, a map hardly depends on its own.

    >>> mean_correlation([np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 4.0]), np.array([2.0, 1.0, 0.0])])
    -0.3333333333333333
    """
    table = np.corrcoef([np.asarray(values, np.float64).ravel() for values in maps])
    return float(table[np.triu_indices(len(maps), 1)].mean())


def likeness(attribution: Attribution) -> list[list[float]] | None:
    """Return how alike the maps of one photograph's targets are, each row rounded; None for a single target."""
    if attribution.scores.shape[1] < 2:
        return None
    return [[round(value, 3) for value in row] for row in attribution.likeness()[0].tolist()]


def _likeness_notes(maps: Mapping[str, Attribution]) -> list[str]:
    """Say of which rules the maps of all classes are nearly the same."""
    remarks = []
    for rule, attribution in maps.items():
        rows = likeness(attribution)
        if rows is not None and (least := min(map(min, rows))) >= ALIKE:
            what = f"the maps of these classes are nearly the same (correlation {least:.2f})"
            remarks.append(f"{rule}: {what}: they show what the network sees, not why it chose one class.")
    return remarks


def notes(maps: dict[str, Attribution]) -> list[str]:
    """Return what is to be known of these maps, lest an artefact be taken for an insight."""
    remarks = []
    deconvnet = maps.get("deconvnet")
    if deconvnet is not None and not deconvnet.switches:
        remarks.append(
            "deconvnet: this network has no max-pooling, whose switches are what that rule keeps of a photograph. "
            "Its map is nearly the same for every photograph and says little about this one."
        )
    return remarks


def _result(explained: ExplainedPhotograph, classifier: Classifier) -> dict[str, Any]:
    return {
        **provenance(explained.path, classifier),
        "predictions": [prediction.to_dict() for prediction in explained.predictions],
        "targets": _targets(explained),
        "rules": {
            name: {**a.to_dict(), "likeness": likeness(a), "seconds": explained.seconds[name]}
            for name, a in explained.maps.items()
        },
        "notes": explained.notes,
        "verdicts": explained.verdicts,
        "device": explained.device,
        "versions": versions(),
    }


def _targets(explained: ExplainedPhotograph) -> list[dict[str, Any]]:
    """Return the explained classes with the score that the network returned and the one that was explained."""
    before = as_numpy(next(iter(explained.maps.values())).scores)[0].tolist()
    return [
        {"class": i, "name": name, "score": score, "explained_score": value}
        for (i, name, score), value in zip(explained.targets, before, strict=True)
    ]
