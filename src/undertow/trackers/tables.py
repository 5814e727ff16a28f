"""Plain files: CSV that any program reads, and NPZ for NumPy. Both are written whole each time."""

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from ..files import published
from .base import Tracker
from .entries import CodeCounts, Entry, Note, Picture, Scalar

_HEADINGS = {
    "scalars": ("tag", "step", "value"),
    "histograms": ("tag", "step", "lower", "upper", "count"),
    "findings": ("tag", "step", "text"),
}


class Csv(Tracker):
    """`scalars.csv`, `histograms.csv` with a row for each bucket that is not empty, `findings.csv`."""

    whole: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in _HEADINGS}

    def send(self, entry: Entry) -> None:
        """Take one entry.

        Raises:
            InputError: a map.
        """
        key = entry.tag, entry.step
        match entry:
            case Scalar():
                self._rows["scalars"].append((*key, repr(float(entry.value))))
            case CodeCounts():
                edges, counts = entry.buckets()
                rows = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
                self._rows["histograms"] += [(*key, repr(low), repr(high), n) for low, high, n in rows if n]
            case Note():
                self._rows["findings"].append((*key, entry.text))
            case Picture():
                raise InputError("maps are no table; send them to npz, tensorboard, wandb or mlflow")

    def flush(self) -> None:
        """Do nothing: files are written at the end."""

    def close(self) -> None:
        """Write the files, each whole or not at all."""
        for name, rows in self._rows.items():
            text = io.StringIO(newline="")
            writer = csv.writer(text)
            writer.writerows([_HEADINGS[name], *rows])
            with published(self._folder / f"{name}.csv") as aside:
                aside.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))


class Npz(Tracker):
    """`undertow.npz`: of each tag `TAG:steps` and `TAG:values`; of a histogram `:codes`, `:counts` and `:starts`."""

    whole: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: dict[str, list[int]] = defaultdict(list)
        self._columns: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))

    def send(self, entry: Entry) -> None:
        """Take one entry."""
        self._steps[entry.tag].append(entry.step)
        columns = self._columns[entry.tag]
        match entry:
            case Scalar():
                columns["values"].append(entry.value)
            case CodeCounts():
                columns["starts"].append(sum(map(len, columns["codes"])))
                columns["codes"].append(entry.codes)
                columns["counts"].append(entry.counts)
            case Picture():
                columns["values"].append(entry.values)
            case Note():
                columns["texts"].append(entry.text)

    def flush(self) -> None:
        """Do nothing: the file is written at the end."""

    def close(self) -> None:
        """Write the file, whole or not at all."""
        arrays: dict[str, Any] = {}
        for tag, columns in self._columns.items():
            arrays[f"{tag}:steps"] = np.array(self._steps[tag], np.int64)
            for name, parts in columns.items():
                arrays[f"{tag}:{name}"] = np.concatenate(parts) if name in ("codes", "counts") else np.array(parts)
        with published(self._folder / "undertow.npz") as aside, open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)
