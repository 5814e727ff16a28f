"""What a run says that a diagnosis can use: plain figures by site, whichever tables they come from. No framework."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..analysis.quantiles import weighted
from ..measures import CODES, edges, finite
from ..run import Run
from .finding import NotRecorded, called

Floats = npt.NDArray[np.float64]
Kind = Literal["norm", "max-pool", "average-pool", "activation"]
WATCH = "record it with diagnose=True"


@dataclass
class Step:
    """One function that a site's output went through, summed over the watched batches.

    Gradients are counted at its output (`zeros`, `absolute`, of `elements`), predictions at its input.

    Attributes:
        op, module, settings: the function's name, where it was called, and its settings.
        readers: how many functions read its output.
        shape: of its output, `(B, C, ...)`, in the last batch.
        closed: elements of its input to which its forward pass lets no gradient through; -1 where that is unknown.
        expected_zeros: zeros of the gradient at its input, as predicted from `closed` and what came to its output.
        expected_absolute: sum of magnitudes at an activation's input, as predicted from its derivative and what came.
        slope: mean |derivative| of an activation; NaN of others.
        active: of an activation's channels, how many elements were open.
    """

    op: str
    module: str
    settings: dict[str, Any]
    readers: list[str]
    shape: tuple[int, ...]
    elements: int = 0
    zeros: int = 0
    closed: int = 0
    expected_zeros: int = 0
    slope: float = float("nan")
    absolute: float = 0.0
    expected_absolute: float = float("nan")
    active: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def kind(self) -> Kind:
        """What the function does, from its name; what is no normalisation and no pooling is an activation."""
        if self.op.endswith("_norm"):
            return "norm"
        return "max-pool" if "max_pool" in self.op else "average-pool" if "avg_pool" in self.op else "activation"

    @property
    def zero_share(self) -> float:
        """The fraction of the gradient at its output that is exactly zero, in [0, 1]."""
        return self.zeros / self.elements

    @property
    def mean_magnitude(self) -> float:
        """The mean of |g| at its output."""
        return self.absolute / self.elements

    @property
    def closed_where_alive(self) -> float:
        """The share that an activation closed in channels that were ever open; 0 where none was."""
        alive = self.active[self.active > 0]
        per_channel = self.elements / len(self.active) if len(self.active) else 0.0
        return float(1 - alive.sum() / (per_channel * len(alive))) if len(alive) else 0.0

    def __str__(self) -> str:
        """Return what a sentence calls it: the function, its kernel if it has one, and the module that called it."""
        kernel = self.settings.get("kernel_size")
        size = " of " + " x ".join(map(str, kernel)) if kernel else ""
        return f"{self.op}{size}{f' in {called(self.module)}' if self.module else ''}"


@dataclass
class OpChain:
    """A site's output (the first step) and what it went through up to its next reader."""

    site: str
    steps: list[Step]
    gain: float
    joins: int

    @property
    def pointwise(self) -> list[Step]:
        """The activations and poolings that come before a normalisation or a second reader."""
        steps: list[Step] = []
        for before, step in pairwise(self.steps):
            if step.kind == "norm" or len(before.readers) > 1:
                break
            steps.append(step)
        return steps

    @property
    def all_zero(self) -> bool:
        """Whether nothing at all arrives, so that there is nothing to be split."""
        return self.steps[0].zeros == self.steps[0].elements

    @property
    def normalised(self) -> bool:
        return any(step.kind == "norm" for step in self.steps)

    @property
    def single_reader(self) -> bool:
        """Whether one function reads its end, so that what reaches it comes from there alone."""
        return len(self.steps[-1].readers) == 1


class Evidence:
    """Reads a run, each part when it is first asked for.

    Raises:
        NotRecorded: what is asked for was not recorded.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sites = run.sites
        self.position = {site: i for i, site in enumerate(self.sites)}

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return the rows of a table, none where it was not recorded."""
        return list(self.run.table(table).to_pylist()) if table in self.run.manifest["tables"] else []

    @cached_property
    def watched(self) -> list[dict[str, Any]]:
        """The rows of the watched batches."""
        return self.rows("diagnosis")

    @cached_property
    def outputs(self) -> dict[str, list[dict[str, Any]]]:
        """For each site, its rows of the watched batches to which a gradient came, in the order of the batches."""
        by_site: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.watched:
            if row["step"] == 0 and row["arrival"] == "arrived":
                by_site[row["site"]].append(row)
        return {site: by_site[site] for site in self.sites if site in by_site}

    @cached_property
    def samples(self) -> int:
        """How many samples the watched batches held."""
        batches = {(row["epoch"], row["batch"]) for row in self.watched}
        return sum(row["size"] for row in self.run.table("batches").to_pylist() if _batch(row) in batches)

    @cached_property
    def chains(self) -> list[OpChain]:
        """What each site's output went through, in order of execution."""
        if not self.watched:
            raise NotRecorded(WATCH)
        grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in self.watched:
            if row["call"] >= 0 and row["zeros"] >= 0:
                grouped[row["site"], row["call"], row["output"]].append(row)
        chains = [_chain(key[0], rows) for key, rows in grouped.items()]
        return sorted((chain for chain in chains if chain), key=lambda chain: self.position[chain.site])

    @cached_property
    def zeros(self) -> dict[str, tuple[int, int]]:
        """For each site how many elements of its gradients were zero, of how many."""
        counts: dict[str, tuple[int, int]] = {}
        for row in self.rows("zero_fraction"):
            if row["phase"] == "backward":
                before = counts.get(row["site"], (0, 0))
                counts[row["site"]] = (before[0] + row["zeros"], before[1] + row["total"])
        for site, rows in self.outputs.items():
            counts.setdefault(site, (sum(r["zeros"] for r in rows), sum(_size(r["shape"]) for r in rows)))
        for site, (values, weights) in self.values.items():
            counts.setdefault(site, (int(weights[values == 0].sum()), int(weights.sum())))
        if not counts:
            raise NotRecorded("record the measure zero-fraction or histogram")
        return {site: counts[site] for site in self.sites if site in counts}

    @cached_property
    def values(self) -> dict[str, tuple[Floats, npt.NDArray[np.int64]]]:
        """For each site the finite values of its gradients and how often each came; empty without histograms."""
        rows = [row for row in self.rows("histogram") if row["phase"] == "backward"]
        rows = rows or [row for rows in self.outputs.values() for row in rows]
        counts: dict[str, npt.NDArray[np.int64]] = {}
        for row in rows:
            of_site = counts.setdefault(row["site"], np.zeros(CODES, np.int64))
            np.add.at(of_site, np.asarray(row["codes"], np.intp), np.asarray(row["counts"], np.int64))
        bfloat16 = {row["site"] for row in rows if row["dtype"] == "bfloat16"}
        is_finite = finite(np.arange(CODES))
        values = {}
        for site in (site for site in self.sites if site in counts):
            codes = np.flatnonzero(is_finite & (counts[site] > 0))
            values[site] = (edges(site in bfloat16)[codes], counts[site][codes])
        return values

    @cached_property
    def formats(self) -> dict[str, str]:
        """For each site the number format that its gradient was computed in.

        Where a loss was scaled, histograms are of what the scale was divided out of, in float32; a watched batch also
        knows the format of the output itself.
        """
        rows = [*self.rows("histogram"), *(row for rows in self.outputs.values() for row in rows)]
        return {row["site"]: row["dtype"] for row in rows}

    @cached_property
    def scale(self) -> float:
        """By what the loss was multiplied before the backward pass, and the gradients divided afterwards."""
        scales = [row["scale"] for row in self.run.table("batches").to_pylist() if row["scale"]]
        return float(min(scales)) if scales else 1.0

    @cached_property
    def sizes(self) -> dict[str, float]:
        """For each site how large its gradient is: the median of |g| where g is not zero, or the root mean square."""
        sizes = {site: _median(values, weights) for site, (values, weights) in self.values.items()}
        if not sizes:
            sizes = {site: float(np.sqrt(np.mean(np.square(series)))) for site, series in self.course.items()}
        return {site: size for site, size in sizes.items() if np.isfinite(size) and size > 0}

    @cached_property
    def course(self) -> dict[str, Floats]:
        """For each site the root mean square of its gradient in each batch, in order; NaN and infinity included."""
        batches: dict[str, dict[tuple[int, int], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows("moments"):
            squares = row["m2"] + row["count"] * row["mean"] ** 2
            batches[row["site"]][_backward_batch(row)].append((squares, row["count"]))
        for row in self.rows("channel_norm") if not batches else ():
            norms = np.asarray(row["values"], np.float64)
            batches[row["site"]][_backward_batch(row)].append((float(np.square(norms).sum()), len(norms)))
        for row in self.rows("histogram") if not batches else ():
            batches[row["site"]][_backward_batch(row)].append(_squares(row))
        if not batches:
            raise NotRecorded("record the measure moments, channel-norm or histogram")
        return {
            site: _series(batches[site]) for site in self.sites if any(b is not None for b in batches.get(site, ()))
        }


def _backward_batch(row: dict[str, Any]) -> Any:
    """Return the batch of a backward row; None for the others, which no series has."""
    return _batch(row) if row["phase"] == "backward" else None


def _batch(row: dict[str, Any]) -> tuple[int, int]:
    return row["epoch"], row["batch"]


def _series(batches: dict[Any, list[tuple[float, int]]]) -> Floats:
    sums = [np.sum(batches[key], axis=0) for key in sorted(key for key in batches if key is not None)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(np.array([total / count for total, count in sums], np.float64))


def _squares(row: dict[str, Any]) -> tuple[float, int]:
    codes, counts = np.asarray(row["codes"], np.intp), np.asarray(row["counts"], np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        return float((np.square(edges()[codes]) * counts).sum()), int(counts.sum())


def _median(values: Floats, weights: npt.NDArray[np.int64]) -> float:
    """Return the median of the magnitudes that are not zero; NaN where all are."""
    nonzero = values != 0
    return weighted(np.abs(values[nonzero]), weights[nonzero], [0.5])[0]


def _size(shape: Iterable[int]) -> int:
    return int(np.prod(list(shape), dtype=np.int64))


def _chain(site: str, rows: list[dict[str, Any]]) -> OpChain | None:
    """Sum the rows of a site's calls over batches, as far as all went through the same functions."""
    by_batch: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_batch[_batch(row)].append(row)
    calls = [sorted(steps, key=lambda row: row["step"]) for steps in by_batch.values()]
    calls = [steps for steps in calls if steps[0]["step"] == 0]
    if not calls:
        return None
    length = 0
    for length, same_step in enumerate(zip(*calls, strict=False), 1):
        if len({(row["step"], row["op"], row["module"]) for row in same_step}) > 1:
            length -= 1
            break
    steps = [_step([call[i] for call in calls]) for i in range(length)]
    return OpChain(site, steps, float(calls[-1][0]["gain"]), min(call[0]["joins"] for call in calls))


def _step(rows: list[dict[str, Any]]) -> Step:
    last = rows[-1]
    step = Step(last["op"], last["module"], json.loads(last["settings"]), json.loads(last["readers"]), ())
    step.shape = tuple(last["shape"])
    step.elements = sum(_size(row["shape"]) for row in rows)
    for name in ("zeros", "closed", "expected_zeros"):
        counts = [row[name] for row in rows]
        setattr(step, name, -1 if min(counts) < 0 else sum(counts))
    step.slope = float(np.mean([row["slope"] for row in rows]))
    step.absolute, step.expected_absolute = (
        float(sum(row[name] for row in rows)) for name in ("absolute", "expected_absolute")
    )
    if last["active"]:
        step.active = np.sum([row["active"] for row in rows], axis=0, dtype=np.int64)
    return step
