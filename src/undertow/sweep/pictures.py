"""Pictures of a sweep's maps, drawn from what it keeps: the panel and the heatmaps that `undertow explain` writes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..attribution.photograph import ExplainedPhotograph, notes, write
from ..attribution.predictions import likeliest
from ..attribution.result import Attribution
from ..classifier import Classifier
from ..errors import UndertowError
from ..files import readable
from ..frameworks.base import capability, framework_of_model
from .reader import Sweep
from .sources import Source

FOLDER = "pictures"


def draw(
    sweep: Sweep,
    source: Source,
    classifier: Classifier,
    device: str,
    indices: Iterable[int],
    advance: Callable[[int, int], object] = lambda done, failed: None,
) -> None:
    """Draw some images of a sweep of the task `explain`, each into a folder of its own; those that are there remain.

    What failed in the sweep, and what is no photograph, has no pictures.
    """
    failed, names = {failure.index for failure in sweep.failed}, source.names
    for index in indices:
        folder = sweep.folder / FOLDER / picture_name(index, names[index])
        if index not in failed and not (folder / "result.json").exists():
            photograph = _photograph(source, index)
            if photograph is not None:
                write(_explained(sweep, index, photograph, classifier, device), classifier, folder)
        advance(1, 0)


def picture_name(index: int, name: str) -> str:
    """Return the name of the folder of an image's pictures.

    >>> picture_name(3, "cats/tom.jpg")
    '000003-cats_tom'
    """
    return f"{index:06d}-{readable(str(Path(name).with_suffix('')))}"


def _photograph(source: Source, index: int) -> Image.Image | None:
    try:
        value = source.read(index)
    except UndertowError:  # it has vanished since
        return None
    return value if isinstance(value, Image.Image) else None


def _explained(
    sweep: Sweep, index: int, photograph: Image.Image, classifier: Classifier, device: str
) -> ExplainedPhotograph:
    """Put together what `explain_photograph` would have returned."""
    explainer = capability(framework_of_model(classifier.module), "explain")
    returned = explainer.scores(classifier.module, classifier.prepare(photograph, device), classifier.output)[0]
    rows: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    for row, values in sweep.maps_of(index):
        rows.setdefault(row["rule"], []).append((row, values))
    maps = {rule: _attribution(sweep, of_rule) for rule, of_rule in rows.items()}
    first = next(iter(rows.values()))
    return ExplainedPhotograph(
        path=Path(sweep.names[index]),
        view=classifier.preprocessing.view(photograph),
        predictions=likeliest(returned, classifier.classes),
        targets=[(row["target"], row["class_name"], float(returned[row["target"]])) for row, _ in first],
        maps=maps,
        notes=notes(maps),
        seconds=dict.fromkeys(maps, 0.0),
        device=device,
    )


def _attribution(sweep: Sweep, rows: list[tuple[dict[str, Any], Any]]) -> Attribution:
    """Return the maps of one image under one rule as `explain` did: a batch of one, an axis of targets."""
    settings, facts = sweep.manifest["settings"], rows[0][0]
    values = np.stack([values for _, values in rows])[None]
    return Attribution(
        values=values,
        targets=np.array([[row["target"] for row, _ in rows]]),
        scores=np.array([[row["score"] for row, _ in rows]]),
        rule=facts["rule"],
        through=settings.get("through", "graph"),
        activations=settings.get("activations", "relu-like"),
        estimator=settings.get("estimator", "gradient"),
        rewired=facts["rewired"],
        switches=facts["switches"],
        head=facts["head"],
        channels_last=values.shape[-1] == 3 and values.shape[2] != 3,
    )
