"""What `undertow explain` prints of a photograph: its classes, and what each rule did."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..rules import ATTENTION, TABLES
from .photographs import input_line
from .printing import print_line, print_table

if TYPE_CHECKING:
    from ..attribution.photograph import ExplainedPhotograph
    from ..classifier import Classifier


def print_explained(explained: "ExplainedPhotograph", classifier: "Classifier", panel: Path) -> None:
    """Print what was explained, and where its panel is."""
    from rich.console import Console

    heading = "score" if explained.predictions[0].probability is None else "probability"
    rows = []
    for prediction in explained.predictions:
        value = prediction.score if prediction.probability is None else prediction.probability
        rows.append((prediction.class_id, prediction.name, f"{value:.3f}"))
    print_table(
        ("class", "name", heading), rows, title=explained.path.name, title_style="bold", right=("class", heading)
    )
    console = Console()
    for line in _lines(explained, classifier, panel):
        print_line(console, line)


def _lines(explained: "ExplainedPhotograph", classifier: "Classifier", panel: Path) -> Iterator[str]:
    from ..frameworks.base import AS_IS

    width = _width(explained)
    names = ", ".join(f"{class_id} {name}" for class_id, name, _ in explained.targets)
    head = next(iter(explained.maps.values())).head
    yield f"explained: {names}" + (f", the score {head}" if head != AS_IS else "")
    yield f"  {input_line(classifier)}"
    for rule, attribution in explained.maps.items():
        what = "operations rewired" if rule in TABLES else "activations rewired"
        what = "attention layers read" if rule in ATTENTION else what
        yield f"  {rule:<{width}}{attribution.rewired:>4} {what}   {explained.seconds[rule]:.2f} s"
    yield from _likeness_lines(explained)
    for note in explained.notes:
        yield f"  note: {note}"
    for rule, verdict in explained.verdicts.items():
        yield f"  {rule:<{width}}{verdict['sentence']}"
    yield f"  -> {panel}"
    yield ""


def _width(explained: "ExplainedPhotograph") -> int:
    """Return the width of the column of rules."""
    return max(10, *(len(rule) + 1 for rule in explained.maps))


def _likeness_lines(explained: "ExplainedPhotograph") -> Iterator[str]:
    """Say how alike the maps of several classes are."""
    from itertools import combinations

    from ..attribution.photograph import likeness

    ids = [class_id for class_id, _, _ in explained.targets]
    if len(ids) > 1:
        yield "  does the map change with the class? correlation: 1 the same map, 0 unrelated, -1 opposite"
    for rule, attribution in explained.maps.items():
        rows = likeness(attribution)
        if rows is not None:
            pairs = combinations(range(len(ids)), 2)
            yield f"  {rule:<{_width(explained)}}" + "   ".join(
                f"{ids[i]}, {ids[j]}: {rows[i][j]:.2f}" for i, j in pairs
            )
