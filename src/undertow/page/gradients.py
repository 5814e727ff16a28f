"""A run as plain data for a page: quantiles, zeros, histograms and channel norms of each site, and their course."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..diagnosis import coincidences, contrast, diagnose
from ..errors import InputError
from ..measures import finite
from ..runs import Run, compare, same_class
from ..runs.quantiles import OF, default_of, groups
from .packing import PackedArrays

Q = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_BATCHES = 2000
"""Of a longer run every n-th batch is shown in the course, and the page says so."""
MAX_COLUMNS = 200
"""Of the histograms over time; batches beside one another are added."""
_OCTAVES = 256  # of float32, by its exponent


def section(runs: list[Run], arrays: PackedArrays) -> dict[str, Any]:
    """Return runs as the page's script reads them.

    Raises:
        InputError: a run holds nothing that quantiles can be of.
        RunError: a file of a run is damaged.
    """
    of = default_of(runs)
    return {
        "q": list(Q),
        "of": of,
        "measure": OF[of].replace("_", "-"),
        "runs": [run_data(run, of, arrays) for run in runs],
        "contrast": _contrast(runs) if len(runs) > 1 else [],
    }


def _contrast(runs: list[Run]) -> list[str]:
    """Return what sets runs apart, and why, in sentences, as `undertow compare` prints them."""
    names = [run.folder.resolve().name for run in runs]
    agreements = [(name, same_class(runs[0], run)) for run, name in zip(runs[1:], names[1:], strict=True)]
    same = [f"{names[0]} and {name}: {agreement}" for name, agreement in agreements if agreement]
    try:
        rows = compare(runs, Q)
    except InputError:  # nothing was recorded yet that can be compared
        return same
    return [*same, *coincidences(runs, rows), *contrast(runs)]


def run_data(run: Run, of: str, arrays: PackedArrays) -> dict[str, Any]:
    """Return one run: of each site (and phase, which `label` tells) the quantiles, and all else that was recorded."""
    batches = _batches(run)
    layers = []
    if batches and OF[of] in run.manifest["tables"]:
        summaries = {(s.site, s.phase): s for s in run.quantiles(Q, of=of)}
        courses = dict(_courses(run, of, batches))
        histograms = dict(_histograms(run, batches)) if "histogram" in run.manifest["tables"] else {}
        channels = dict(_channels(run))
        for key, summary in summaries.items():
            layers.append({
                "label": summary.label, "site": summary.site, "phase": summary.phase,
                "quantiles": list(summary.values), "count": summary.count, "nonfinite": summary.nonfinite,
                "zeros": summary.zeros / summary.count if summary.count and of == "magnitude" else None,
                "course": arrays.floats(courses[key]),
                "histogram": None if key not in histograms else _packed(histograms[key], arrays),
                "channels": None if key not in channels else arrays.floats(channels[key]),
            })  # fmt: skip
    shown = batches[:: _every(batches)]
    return {
        "name": run.folder.resolve().name,
        "finished": run.finished,
        "batches": len(batches),
        "every": _every(batches),
        "course": [f"{epoch}.{batch}" for epoch, batch in shown],
        "layers": layers,
        "findings": _findings(run),
    }


def _batches(run: Run) -> list[tuple[int, int]]:
    """Return the batches (epoch, batch) in the order of time."""
    table = run.table("batches")
    return sorted(set(zip(table["epoch"].to_pylist(), table["batch"].to_pylist(), strict=True)))


def _every(batches: list[tuple[int, int]]) -> int:
    return max(1, -(-len(batches) // MAX_BATCHES))


def _findings(run: Run) -> dict[str, Any]:
    findings = diagnose(run)
    return {"list": [finding.to_dict() for finding in findings], "checked": findings.checked}


def _courses(run: Run, of: str, batches: list[tuple[int, int]]) -> Iterator[tuple[tuple[str, str], npt.NDArray[Any]]]:
    """Yield for each site and phase the quantiles in each shown batch, `(batches, len(Q))`; NaN where there is none."""
    column = {key: i for i, key in enumerate(batches[:: _every(batches)])}
    courses: dict[tuple[str, str], npt.NDArray[Any]] = {}
    for one in run.quantiles(Q, of=of, by=("epoch", "batch")):
        course = courses.setdefault((one.site, one.phase), np.full((len(column), len(Q)), np.nan))
        if (at := column.get((one.by["epoch"], one.by["batch"]))) is not None:
            course[at] = one.values
    yield from courses.items()


@dataclass(frozen=True)
class _Octaves:
    """How many values of one site lie in each octave, from 2**exponent up to twice that, in each of some columns.

    Attributes:
        negative, positive: `(columns, 256)`; the octave of place i begins at 2**(i - 127), the first holds all below.
        zeros: `(columns,)`.
    """

    negative: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]
    zeros: npt.NDArray[np.int64]


def _histograms(run: Run, batches: list[tuple[int, int]]) -> Iterator[tuple[tuple[str, str], _Octaves]]:
    """Yield the histograms of each site and phase over time, in at most MAX_COLUMNS columns of equally many batches."""
    together = -(-len(batches) // MAX_COLUMNS)
    column_of = {key: i // together for i, key in enumerate(batches)}
    n_columns = -(-len(batches) // together)
    table = run.table("histogram")
    keys = zip(table["epoch"].to_pylist(), table["batch"].to_pylist(), strict=True)
    columns = np.array([column_of[key] for key in keys], np.int64)
    for (site, phase), rows in groups(run, table, ["site", "phase"]):
        taken = table.select(["codes", "counts"]).take(rows)
        codes = taken["codes"].combine_chunks()
        flat, counts = (
            codes.flatten().to_numpy().astype(np.int64),
            taken["counts"].combine_chunks().flatten().to_numpy(),
        )
        column = np.repeat(columns[rows], codes.value_lengths().to_numpy())
        keep = finite(flat)
        flat, counts, column = flat[keep], counts[keep], column[keep]
        is_zero = flat & 0x7FFF == 0
        cells = column * 2 * _OCTAVES + (flat >> 7)  # a code is a sign, eight bits of exponent, seven of mantissa
        dense = np.zeros(n_columns * 2 * _OCTAVES, np.int64)
        np.add.at(dense, cells[~is_zero], counts[~is_zero])
        zeros = np.zeros(n_columns, np.int64)
        np.add.at(zeros, column[is_zero], counts[is_zero])
        positive, negative = dense.reshape(n_columns, 2, _OCTAVES).transpose(1, 0, 2)
        yield (site, phase), _Octaves(negative, positive, zeros)


def _packed(octaves: _Octaves, arrays: PackedArrays) -> dict[str, Any]:
    """Return the whole histogram as counts, and its course as shares of the fullest cell, in 255 steps."""
    over_time = octaves.negative + octaves.positive
    used = np.flatnonzero(over_time.sum(0))
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (127, 127)
    window = over_time[:, low:high]
    totals = np.maximum(window.sum(1) + octaves.zeros, 1)[:, None]
    shares = window / totals
    top = float(shares.max()) if shares.size else 0.0
    return {
        "low": low - 127,
        "negative": octaves.negative[:, low:high].sum(0).tolist(),
        "positive": octaves.positive[:, low:high].sum(0).tolist(),
        "zeros": int(octaves.zeros.sum()),
        "top": top,
        "course": arrays.small(np.round(255 * shares / (top or 1.0))),
    }


def _channels(run: Run) -> Iterator[tuple[tuple[str, str], npt.NDArray[np.float64]]]:
    """Yield for each site and phase each channel's mean norm over all rows; nothing where rows differ in channels."""
    if "channel_norm" not in run.manifest["tables"]:
        return
    table = run.table("channel_norm")
    for (site, phase), rows in groups(run, table, ["site", "phase"]):
        values = table["values"].take(rows).combine_chunks()
        lengths = set(values.value_lengths().to_pylist())
        if len(lengths) == 1 and lengths != {0}:
            yield (site, phase), values.flatten().to_numpy().reshape(len(rows), -1).astype(np.float64).mean(0)
