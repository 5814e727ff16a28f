"""Maps as entries: of the folders that `undertow explain` and `trust` leave, and of sweeps."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..page.explanations import card_of_folder, folders_of
from ..sweep import Sweep
from .entries import Entry, Note, Picture, Portion


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / "sweep.json").is_file()


def portions_of_maps(folder: Path) -> Iterator[Portion]:
    """Yield the maps of each photograph of a folder, with its verdicts.

    Raises:
        InputError, RunError: there are none, or they cannot be read.
    """
    if is_sweep(folder):
        sweep = Sweep(folder)
        if sweep.task != "explain":
            raise InputError(f"{printable(folder)} is a sweep of the task {sweep.task}, which holds no maps")
        missing = set(sweep.missing) | {failure.name for failure in sweep.failed}
        for index, name in enumerate(sweep.names):
            if name not in missing:
                yield Portion(f"map-{index}", partial(_of_sweep, sweep, index, name))
        return
    folders = folders_of(folder)
    if not folders:
        raise InputError(f"{printable(folder)} is no run, no sweep, and holds nothing that was explained")
    for one in folders:
        yield Portion(f"map-{one.name}", partial(_of_folder, one))


def _of_sweep(sweep: Sweep, index: int, name: str) -> Iterator[Entry]:
    for row, values in sweep.maps_of(index):
        yield Picture(f"maps/{name}/{row['rule']}/{row['class_name'] or row['target']}", index, values)


def _of_folder(folder: Path) -> Iterator[Entry]:
    card: dict[str, Any] = card_of_folder(folder)
    for one in card["maps"]:
        target = card["targets"][one["target"]]
        yield Picture(f"maps/{card['name']}/{one['key']}/{target['name'] or target['class']}", 0, one["values"])
    for key, verdict in card["verdicts"].items():
        yield Note(f"verdicts/{card['name']}/{key}", 0, verdict["sentence"])
