"""A run as entries: per batch and site norms, zeros and quantiles as scalars, histograms, steps; findings as texts."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..diagnosis import Finding, diagnose
from ..runs import Run
from ..runs.format import KEYS
from ..runs.quantiles import groups
from .entries import CodeCounts, Entry, Note, Portion, Scalar, added

QUANTILES = (0.5, 0.9, 0.99)
_BY = [*KEYS, "site", "phase"]
Group = tuple[int, int]


class Steps:
    """Places batches on one axis: a batch's number, behind as many as each earlier epoch is known to have.

    Args:
        run: all of whose batches are looked at; epochs of which a schedule took the first batches are as long as that.
    """

    def __init__(self, run: Run) -> None:
        batches = run.table("batches")
        lengths: dict[int, int] = {}
        for epoch, batch in zip(batches["epoch"].to_pylist(), batches["batch"].to_pylist(), strict=True):
            lengths[epoch] = max(lengths.get(epoch, 0), batch + 1)
        self._starts, start = dict[int, int](), 0
        for epoch in sorted(lengths):
            self._starts[epoch], start = start, start + lengths[epoch]
        self.last = max(start - 1, 0)

    def of(self, epoch: int, batch: int) -> int:
        """Return the place of a batch."""
        return self._starts[epoch] + batch


def portions_of_run(run: Run, every: int, with_findings: bool, sparse: bool = False) -> Iterator[Portion]:
    """Yield what there is to send of a run: each part that counts, then each finding.

    Args:
        every: of batches, by their numbers within the epoch.
        with_findings: look for them, which reads the whole run.
        sparse: send histograms of the last batch of each part alone; they are what takes time.
    """
    steps = Steps(run)
    for group in run.groups:
        yield Portion("part-{}-{}".format(*group), partial(_of_group, run, group, steps, every, sparse))
    for finding in diagnose(run) if with_findings else ():
        note = note_of(finding, steps.last)
        yield Portion(f"finding-{hashlib.sha256(note.text.encode()).hexdigest()[:16]}", partial(iter, [note]))


def note_of(finding: Finding, step: int) -> Note:
    """Return a finding as a text."""
    text = f"**{finding.severity}**: {finding.sentence}\n\n{finding.remedy}\n\nSource: {finding.source}"
    return Note(f"findings/{finding.cause}", step, text)


def _of_group(run: Run, group: Group, steps: Steps, every: int, sparse: bool) -> Iterator[Entry]:
    """Yield the entries of a part, batch by batch."""
    entries: list[Entry] = []
    held = set(run.tables)
    processes = int(run.manifest["world_size"])
    for table, entries_of in _TABLES.items():
        if table not in held:
            continue
        rows = run.table(table, [group])
        for key, where in groups(run, rows, _BY):
            epoch, batch, rank, site, phase = key
            if batch % every == 0:
                name = f"{phase}/{site or 'model'}" + (f"/rank{rank}" if processes > 1 else "")
                entries += entries_of(rows.take(where), name, steps.of(epoch, batch))
    if "steps" in held:
        rows = run.table("steps", [group]).to_pylist()
        entries += (e for row in rows if row["batch"] % every == 0 for e in _of_step(row, steps))
    last = max((entry.step for entry in entries), default=0)
    kept = (entry for entry in entries if not (sparse and isinstance(entry, CodeCounts) and entry.step < last))
    yield from sorted(kept, key=lambda entry: entry.step)


def _of_norms(rows: Any, name: str, step: int) -> Iterator[Entry]:
    """The norm of all calls together."""
    yield Scalar(f"norm/{name}", step, float(np.sqrt(np.square(rows["norm"].to_numpy()).sum())))


def _of_channel_norms(rows: Any, name: str, step: int) -> Iterator[Entry]:
    norms = rows["values"].combine_chunks().flatten().to_numpy().astype(np.float64)
    yield Scalar(f"channel_norm/{name}/norm", step, float(np.sqrt(np.square(norms).sum())))
    for q, value in _quantiles_of(norms):
        yield Scalar(f"channel_norm/{name}/{q}", step, value)


def _quantiles_of(values: npt.NDArray[np.float64]) -> Iterator[tuple[str, float]]:
    values = values[np.isfinite(values)]
    if len(values):
        found = np.quantile(values, QUANTILES, method="inverted_cdf")
        yield from zip((f"p{100 * q:g}" for q in QUANTILES), map(float, found), strict=True)


def _of_zeros(rows: Any, name: str, step: int) -> Iterator[Entry]:
    zeros, total = (int(rows[column].to_numpy().sum()) for column in ("zeros", "total"))
    if total:
        yield Scalar(f"zero_fraction/{name}", step, zeros / total)


def _of_moments(rows: Any, name: str, step: int) -> Iterator[Entry]:
    count, mean, m2 = (rows[column].to_numpy().astype(np.float64) for column in ("count", "mean", "m2"))
    if n := count.sum():
        with np.errstate(invalid="ignore", over="ignore"):
            whole = (count * mean).sum() / n
            deviations = (m2 + count * np.square(mean - whole)).sum()
            yield Scalar(f"mean/{name}", step, float(whole))
            yield Scalar(f"std/{name}", step, float(np.sqrt(deviations / n)))
    yield Scalar(f"min/{name}", step, float(rows["min"].to_numpy().min()))
    yield Scalar(f"max/{name}", step, float(rows["max"].to_numpy().max()))


def _of_histograms(rows: Any, name: str, step: int) -> Iterator[Entry]:
    """The histogram of all calls together, quantiles of the magnitude, and what is not finite."""
    codes, counts = (rows[column].combine_chunks().flatten().to_numpy() for column in ("codes", "counts"))
    exact = set(rows["dtype"].to_pylist()) == {"bfloat16"}
    histogram, nonfinite = added(f"histogram/{name}", step, codes, counts, exact)
    if len(histogram.codes):
        yield histogram
        for q, value in zip(QUANTILES, histogram.quantiles(QUANTILES), strict=True):
            yield Scalar(f"magnitude/{name}/p{100 * q:g}", step, value)
    yield Scalar(f"nonfinite/{name}", step, nonfinite)


def _of_step(row: Mapping[str, Any], steps: Steps) -> Iterable[Scalar]:
    name, step = f"{row['optimizer']}.{row['group']}", steps.of(row["epoch"], row["batch"])
    return [Scalar(f"{key}/optimizer/{name}", step, row[key]) for key in ("lr", "weight_decay") if row[key] == row[key]]


_TABLES = {
    "norm": _of_norms,
    "channel_norm": _of_channel_norms,
    "zero_fraction": _of_zeros,
    "moments": _of_moments,
    "histogram": _of_histograms,
}


def identity_of(run: Run) -> str:
    """Return what tells a run from others: its name, when it began, and of which network."""
    facts = [
        run.folder.resolve().name,
        run.manifest.get("created"),
        run.manifest["model"],
        run.manifest["sites"]["select"],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
