"""The data that rules read: plain numbers by site, whichever tables of the run they come from. No framework."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..measures import CODES, code_values, finite
from ..runs import Run
from ..runs.format import TABLES
from ..runs.quantiles import weighted
from .finding import NotLookedAt, NotRecorded, called, listed

Floats = npt.NDArray[np.float64]
StepKey = tuple[int, int, int]  # epoch, batch, and the number of the step in it
INSIDE = "before activation"
"""What stands under `arrival` of a row that begins before the activation of a site's own layer, as Keras has them."""
Kind = Literal["norm", "max-pool", "average-pool", "activation"]


@dataclass
class Step:
    """One function call that a site's output goes through, summed over the watched batches.

    `zeros`, `absolute` and `elements` describe the gradient at its output; predictions are for its input.

    Attributes:
        op, module, settings: the function's name, the module that called it, and its settings.
        readers: names of the functions that read its output.
        shape: of its output, `(B, C, ...)`, in the last batch.
        elements: number of elements of its output.
        zeros: number of them whose gradient is exactly zero.
        closed: elements of its input that get no gradient whatever arrives; -1 if unknown.
        expected_zeros: zeros of the gradient at its input, predicted from `closed` and the gradient at its output.
        slope: mean |derivative| of an activation; NaN for other functions.
        rms_slope: root mean square of the derivative, the factor for gradients of random signs; NaN likewise.
        saturated: elements where the derivative of a function that is flat on both sides is below 1 % of its largest
            value; -1 for other functions.
        operand: sum of magnitudes of what its reader multiplies it by, such as weights; NaN if it is no product.
        absolute: sum of |g|.
        expected_absolute: sum of |g| at an activation's input, predicted from its derivative; NaN for other functions.
        active: for each channel of an activation, the number of elements with a nonzero derivative.
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
    saturated: int = -1
    slope: float = float("nan")
    rms_slope: float = float("nan")
    operand: float = float("nan")
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
    def saturates(self) -> bool:
        """Whether the function is flat on both sides, as tanh and the sigmoid are."""
        return self.saturated >= 0

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
        """The fraction of inactive elements in channels that are not dead; 0 if all are dead."""
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
    """A site's output (the first step) and the activations, poolings and normalisations that it goes through.

    Attributes:
        call: its number among the calls of the site.
        inside: it begins before the activation that the site's own layer ends in.
        gain: ||W|| / sqrt(inputs) of the site's layer; NaN if it has no weights.
        joins: number of residual additions that its output meets.
        weight_std: root mean square of the layer's weights; NaN if it has none.
    """

    site: str
    steps: list[Step]
    gain: float
    joins: int
    call: int = 0
    weight_std: float = float("nan")
    inside: bool = False

    @property
    def pointwise(self) -> list[Step]:
        """The activations and poolings before the first normalisation or the first output with a second reader."""
        steps: list[Step] = []
        for before, step in pairwise(self.steps):
            if step.kind == "norm" or len(before.readers) > 1:
                break
            steps.append(step)
        return steps

    @property
    def all_zero(self) -> bool:
        """Whether the gradient at the site is exactly zero everywhere."""
        return self.steps[0].zeros == self.steps[0].elements

    @property
    def normalised(self) -> bool:
        """Whether a normalisation follows the site."""
        return any(step.kind == "norm" for step in self.steps)

    @property
    def followed(self) -> bool:
        """Whether any function was seen to read the output."""
        return bool(self.steps[0].readers)

    @property
    def zero_operand(self) -> bool:
        """Whether the one reader of one of the outputs multiplies it by zeros only, so that no gradient comes back."""
        return any(len(step.readers) == 1 and step.operand == 0 for step in self.steps)

    @property
    def single_reader(self) -> bool:
        """Whether one function alone reads the last output, so that its gradient comes from that function only."""
        return len(self.steps[-1].readers) == 1


@dataclass(frozen=True)
class SiteOutput:
    """One output of one call of a site in a watched batch.

    Attributes:
        number: of the output within the batch, in order of execution; outputs that are one tensor share it.
        read_by: the numbers of the site outputs that read it first; -1 is the end of the graph.
        rms: root mean square of its gradient; NaN where none arrived.
    """

    site: str
    call: int
    number: int
    read_by: tuple[int, ...]
    rms: float


class Evidence:
    """Reads the tables of a run, each on first access.

    Attributes:
        n_earlier: how many recorded batches came before the first one of `course`.

    Raises:
        NotRecorded: on access, if the table or measure was not recorded.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sites = run.sites
        self.n_earlier = 0
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self.position = {site: i for i, site in enumerate(self.sites)}

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return the rows of a table, none if it was not recorded."""
        if table not in self._rows:
            recorded = table in self.run.manifest["tables"] or table in TABLES
            self._rows[table] = self.run.table(table).to_pylist() if recorded else []
        return self._rows[table]

    @cached_property
    def watch(self) -> str:
        """What to do so that causes can be proved, for a sentence."""
        if self.framework == "jax":
            return "watching batches is not there for JAX yet"
        return "record it with diagnose=True"

    @cached_property
    def framework(self) -> str:
        """What the network ran on: "torch", "keras" (which is TensorFlow) or "jax"."""
        framework = str(self.run.manifest.get("model", {}).get("framework", "torch"))
        return "jax" if "jax" in framework else framework.partition(" ")[0]

    @cached_property
    def watched(self) -> list[dict[str, Any]]:
        """The rows of the watched batches."""
        return self.rows("diagnosis")

    @cached_property
    def outputs(self) -> dict[str, list[dict[str, Any]]]:
        """For each site, the rows of its own output in the watched batches where a gradient arrived, in batch order."""
        by_site: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.watched:
            if row["step"] == 0 and row["arrival"] == "arrived":
                by_site[row["site"]].append(row)
        return {site: by_site[site] for site in self.sites if site in by_site}

    @cached_property
    def samples(self) -> int:
        """Number of samples in the watched batches."""
        batches = {(row["epoch"], row["batch"]) for row in self.watched}
        return sum(row["size"] for row in self.rows("batches") if _batch(row) in batches)

    @cached_property
    def chains(self) -> list[OpChain]:
        """The chain of operations after each site, in order of execution."""
        if not self.watched:
            raise NotRecorded(self.watch)
        grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in self.watched:
            if row["call"] >= 0 and row["zeros"] >= 0:
                grouped[row["site"], row["call"], row["output"]].append(row)
        chains = [_chain(key[0], rows) for key, rows in grouped.items()]
        return sorted((chain for chain in chains if chain), key=lambda chain: self.position[chain.site])

    @cached_property
    def unfollowed(self) -> list[str]:
        """The sites that a gradient reached without any function having been seen to read their output."""
        followed = {chain.site for chain in self.chains if chain.followed and not chain.inside}
        return [site for site in self.outputs if site not in followed]

    def refuse_unfollowed(self) -> None:
        """Say so where some sites could not be followed.

        Raises:
            NotLookedAt: a gradient reached them, but no function was seen to read their output.
        """
        if self.unfollowed:
            raise NotLookedAt(
                f"not at {listed(self.unfollowed)}: what reads the output was not seen (custom or compiled functions)"
            )

    @cached_property
    def graphs(self) -> list[list[SiteOutput]]:
        """For each watched batch, the outputs of its sites, in order of execution."""
        batches: dict[tuple[int, int], list[SiteOutput]] = defaultdict(list)
        for row in self.watched:
            if row["step"] == 0 and row["call"] >= 0 and row.get("number", -1) >= 0:
                rms = row["norm"] / math.sqrt(max(_size(row["shape"]), 1))
                output = SiteOutput(row["site"], row["call"], row["number"], tuple(row["read_by"]), rms)
                batches[_batch(row)].append(output)
        return [sorted(outputs, key=lambda output: output.number) for outputs in batches.values()]

    @cached_property
    def zeros(self) -> dict[str, tuple[int, int]]:
        """For each site the number of zero elements of its gradient, and of all elements."""
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
            recorded = {"zero_fraction", "histogram", "diagnosis"} & set(self.run.manifest["tables"])
            raise NotRecorded("no gradient came" if recorded else "record the measure zero-fraction or histogram")
        return {site: counts[site] for site in self.sites if site in counts}

    @cached_property
    def values(self) -> dict[str, tuple[Floats, npt.NDArray[np.int64]]]:
        """For each site the finite values of its gradient and the count of each; empty without histograms."""
        rows = [row for row in self.rows("histogram") if row["phase"] == "backward"]
        rows = rows or [row for rows in self.outputs.values() for row in rows]
        counts: dict[str, npt.NDArray[np.int64]] = {}
        for row in rows:
            if row["site"] not in counts:
                counts[row["site"]] = np.zeros(CODES, np.int64)
            counts[row["site"]][np.asarray(row["codes"], np.intp)] += np.asarray(
                row["counts"], np.int64
            )  # each code once a row
        bfloat16 = {row["site"] for row in rows if row["dtype"] == "bfloat16"}
        is_finite = finite(np.arange(CODES))
        values = {}
        for site in (site for site in self.sites if site in counts):
            codes = np.flatnonzero(is_finite & (counts[site] > 0))
            values[site] = (code_values(site in bfloat16)[codes], counts[site][codes])
        return values

    @cached_property
    def formats(self) -> dict[str, str]:
        """For each site the dtype that its gradient was computed in.

        With a scaled loss, histograms hold float32: the gradient with the scale divided out. The rows of watched
        batches hold the dtype of the output itself, so they take precedence.
        """
        rows = [*self.rows("histogram"), *(row for rows in self.outputs.values() for row in rows)]
        return {row["site"]: row["dtype"] for row in rows}

    @cached_property
    def scale(self) -> float:
        """The smallest factor that the loss was multiplied by before a backward pass; 1 without loss scaling."""
        scales = [row["scale"] for row in self.rows("batches") if row["scale"]]
        return float(min(scales)) if scales else 1.0

    @cached_property
    def calls(self) -> dict[str, int]:
        """The sites that were called several times in a batch, with the number of calls."""
        table = next(
            (name for name in ("moments", "zero_fraction", "channel_norm", "histogram") if self.rows(name)), ""
        )
        last: dict[str, int] = {}
        for row in self.rows(table) if table else ():
            last[row["site"]] = max(last.get(row["site"], 0), row.get("call", 0))
        return {site: last[site] + 1 for site in self.sites if last.get(site, 0) > 0}

    @cached_property
    def norms(self) -> dict[str, dict[str, dict[StepKey, float]]]:
        """For each phase of parameters and each of them, the norms by step; of several evaluations in one, the last."""
        tables = self.run.manifest["tables"]
        table = next((table for table in _NORMS if table in tables), None)
        if table is None:
            raise NotRecorded("record the measure norm")
        return norms_of(self.rows(table), _NORMS[table])

    @cached_property
    def sizes(self) -> dict[str, float]:
        """For each site the median of nonzero |g|, or, without histograms, the root mean square of g."""
        sizes = {site: _median(values, weights) for site, (values, weights) in self.values.items()}
        if not sizes:
            sizes = {site: float(np.sqrt(np.mean(np.square(series)))) for site, series in self.course.items()}
        return {site: size for site, size in sizes.items() if np.isfinite(size) and size > 0}

    @cached_property
    def course(self) -> dict[str, Floats]:
        """For each site the root mean square of its gradient in each batch, in order; may be NaN or infinite."""
        batches: dict[str, dict[tuple[int, int], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows("moments"):
            squares = row["m2"] + row["count"] * row["mean"] ** 2
            batches[row["site"]][_backward_batch(row)].append((squares, row["count"]))
        for row in self.rows("channel_norm") if not batches else ():
            norms = np.asarray(row["values"], np.float64)
            batches[row["site"]][_backward_batch(row)].append((float(norms @ norms), len(norms)))
        for row in self.rows("histogram") if not batches else ():
            batches[row["site"]][_backward_batch(row)].append(_squares(row))
        if not batches:
            recorded = {"moments", "channel_norm", "histogram"} & set(self.run.manifest["tables"])
            raise NotRecorded(
                "no gradient came" if recorded else "record the measure moments, channel-norm or histogram"
            )
        return {
            site: _series(batches[site]) for site in self.sites if any(b is not None for b in batches.get(site, ()))
        }


def norms_of(
    rows: Iterable[dict[str, Any]], norm: Callable[[dict[str, Any]], float]
) -> dict[str, dict[str, dict[StepKey, float]]]:
    """Return the norms of parameters by phase, name and step."""
    norms: dict[str, dict[str, dict[StepKey, float]]] = {phase: {} for phase in OF_PARAMETERS}
    for row in rows:
        if row["phase"] in norms:
            norms[row["phase"]].setdefault(row["site"], {})[row["epoch"], row["batch"], row["call"]] = norm(row)
    return norms


OF_PARAMETERS = ("accumulated", "gradient", "weight", "update")
_NORMS: dict[str, Callable[[dict[str, Any]], float]] = {
    "norm": lambda row: float(row["norm"]),
    "moments": lambda row: math.sqrt(row["m2"] + row["count"] * row["mean"] ** 2),
    "channel_norm": lambda row: float(np.linalg.norm(np.asarray(row["values"], np.float64))),
}
"""How the norm of a tensor is read, from each table that knows it."""


def _backward_batch(row: dict[str, Any]) -> Any:
    """Return (epoch, batch) of a backward row; None for forward rows, which `_series` leaves out."""
    return _batch(row) if row["phase"] == "backward" else None


def _batch(row: dict[str, Any]) -> tuple[int, int]:
    return row["epoch"], row["batch"]


def _series(batches: dict[Any, list[tuple[float, int]]]) -> Floats:
    rows = [batches[key] for key in sorted(key for key in batches if key is not None)]
    totals = np.array([sum(total for total, _ in of_batch) for of_batch in rows], np.float64)
    counts = np.array([sum(count for _, count in of_batch) for of_batch in rows], np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(totals / counts)


def _squares(row: dict[str, Any]) -> tuple[float, int]:
    codes, counts = np.asarray(row["codes"], np.intp), np.asarray(row["counts"], np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        return float((np.square(code_values()[codes]) * counts).sum()), int(counts.sum())


def _median(values: Floats, weights: npt.NDArray[np.int64]) -> float:
    """Return the median of nonzero magnitudes; NaN if all are zero."""
    nonzero = values != 0
    return weighted(np.abs(values[nonzero]), weights[nonzero], [0.5])[0]


def _size(shape: Iterable[int]) -> int:
    return math.prod(int(n) for n in shape)


def _chain(site: str, rows: list[dict[str, Any]]) -> OpChain | None:
    """Sum the rows of one call of a site over batches, up to the first step in which batches differ."""
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
    last, joins = calls[-1][0], min(call[0]["joins"] for call in calls)
    std = float(last.get("weight_std", math.nan))
    return OpChain(site, steps, float(last["gain"]), joins, last["call"], std, last["arrival"] == INSIDE)


def _step(rows: list[dict[str, Any]]) -> Step:
    last = rows[-1]
    step = Step(last["op"], last["module"], json.loads(last["settings"]), json.loads(last["readers"]), ())
    step.shape = tuple(last["shape"])
    step.elements = sum(_size(row["shape"]) for row in rows)
    for name in ("zeros", "closed", "expected_zeros", "saturated"):
        counts = [row.get(name, -1) for row in rows]
        setattr(step, name, -1 if min(counts) < 0 else sum(counts))
    step.slope = float(np.mean([row["slope"] for row in rows]))
    step.rms_slope = float(np.sqrt(np.mean([row.get("rms_slope", math.nan) ** 2 for row in rows])))
    step.operand = max(float(row.get("operand", math.nan)) for row in rows)
    step.absolute, step.expected_absolute = (
        float(sum(row[name] for row in rows)) for name in ("absolute", "expected_absolute")
    )
    if len(last["active"]):
        step.active = np.sum([row["active"] for row in rows], axis=0, dtype=np.int64)
    return step
