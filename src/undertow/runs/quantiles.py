"""Quantiles of what a run recorded, from its histograms or its channel norms."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..display import Part, Pictures, Rows, ShownItem, ShownTable, counted
from ..errors import InputError, RunError, did_you_mean, printable
from ..measures import CODES, code_values, finite
from .format import KEYS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF = {"magnitude": "histogram", "value": "histogram", "channel_norm": "channel_norm", "norm": "norm"}
OF |= {"rms": "moments", "zero_fraction": "zero_fraction"}
"""What quantiles can be of, and the table that each is read from."""
DEFAULTS = ("magnitude", "channel_norm", "norm", "rms", "zero_fraction")
STEPS = tuple(step / 100 for step in range(5, 100, 5))
"""5, 10, ... 95 %."""
DRAWN = 8
"""Sites of which a chart is drawn on the last line of a notebook's cell."""
BY = ("site", "call", "output", "repeat", "epoch", "batch")


class Recorded(Protocol):
    """What is read of a run."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def sites(self) -> list[str]:
        """The names of the modules, in order of execution."""

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters, in the order of definition."""

    def table(self, name: str) -> Any:
        """Return a table as a `pyarrow.Table`."""


@dataclass(frozen=True, repr=False)
class SiteQuantiles(ShownItem):
    """The quantiles of one site.

    Attributes:
        site: dotted name.
        phase: "backward" or "forward"; of a parameter "gradient", "accumulated", "weight" or "update".
        of: what they are quantiles of, a key of `OF`.
        q: fractions in [0, 1].
        values: for each, the smallest recorded value that at least this fraction of them do not exceed; NaN where
            there is none. In units of the objective per unit of the site's output ("backward"), or of the output.
        count: how many finite values there were.
        zeros: how many of them were zero.
        nonfinite: how many NaN and infinite values were left out.
        by: further columns that tell this group from others, such as {"epoch": 3}.
    """

    site: str
    phase: str
    of: str
    q: tuple[float, ...]
    values: tuple[float, ...]
    count: int
    zeros: int
    nonfinite: int
    by: dict[str, Any]

    @property
    def label(self) -> str:
        """The site, with the phase where that is not the gradient at a module's output."""
        return self.site if self.phase == "backward" else f"{self.site} {self.phase}"

    def to_dict(self) -> dict[str, Any]:
        """Return one flat row: the quantiles under names such as "p50" and "p2.5"."""
        named = {f"p{100 * q:.10g}": value for q, value in zip(self.q, self.values, strict=True)}
        counts = {"count": self.count, "zeros": self.zeros, "nonfinite": self.nonfinite}
        return {"site": self.site, "phase": self.phase, **self.by, "of": self.of, **counts, **named}

    def _shown(self) -> Iterator[Part]:
        pairs = [(f"{100 * q:g} %", f"{value:.4g}") for q, value in zip(self.q, self.values, strict=True)]
        by = "".join(f", {name} {value}" for name, value in self.by.items())
        some = " ".join(f"{q} {value}," for q, value in pairs[:5]) + (" ..." if len(pairs) > 5 else "")
        yield f"SiteQuantiles of {self.of} at {self.label}{by}: {some.rstrip(',')} ({counted(self.count, 'value')})"
        yield f"{self.zeros:,} of them zero; {self.nonfinite:,} NaN or infinite left out"
        yield ShownTable(("quantile", self.of), pairs, len(pairs))


class Quantiles(Rows[SiteQuantiles]):
    """The quantiles of each site: a list that shows itself as a table and a chart."""

    def plot(
        self, path: str | Path | None = None, title: str = "", *, panels: str | None = None, ground: str = "white"
    ) -> "Figure":
        """Draw them, as `undertow quantiles --plot` does.

        Args:
            path: also write it there, as PNG, SVG or PDF; replaced atomically.
            title: at the top of the figure.
            panels: "quantile", a panel each with a bar for each site; "layer", a panel for each site with its curve;
                None takes the former for up to six quantiles.
            ground: "white", "dark" or "transparent".

        Raises:
            InputError: nothing to draw, another ending or ground.
            FrameworkError: matplotlib is missing.
        """
        from ..show.plots import drawn_or_saved, quantile_panels

        return drawn_or_saved(quantile_panels({"": self}, title, panels=panels), path, ground)

    def _shown(self) -> Iterator[Part]:
        if not self:
            yield "Quantiles of no site: nothing was recorded"
            return
        first = self[0]
        some = _some(first.q)
        phases = ", ".join(dict.fromkeys(row.phase for row in self))
        yield f"Quantiles of {first.of} at {counted(len(self), 'site')}, {phases}"
        keys = tuple(first.by)
        rows = ((r.label, *(str(r.by[key]) for key in keys), *_row(r, some)) for r in self)
        headings = ("site", *keys, *(f"{100 * first.q[i]:g} %" for i in some), "zeros", "values")
        yield ShownTable(headings, rows, len(self))
        note = f"the first {DRAWN} sites; .plot() draws all" if len(self) > DRAWN else ""
        yield Pictures(lambda: [("", charted({"": self[:DRAWN]}))], note)


def charted(groups: Any) -> Any:
    """Return quantile curves as a picture for a cell."""
    from ..show.plots import as_image, quantile_panels

    return as_image(quantile_panels(groups), 80)


def _some(q: Sequence[float]) -> list[int]:
    """Return the positions of at most five of the fractions: the ends, the median and those half way.

    >>> _some(STEPS)
    [0, 4, 9, 14, 18]
    """
    return sorted({round(i * (len(q) - 1) / 4) for i in range(5)})


def _row(row: SiteQuantiles, some: Sequence[int]) -> list[str]:
    zeros = f"{100 * row.zeros / row.count:.1f} %" if row.count else "-"
    return [*(f"{row.values[i]:.4g}" for i in some), zeros, f"{row.count:,}"]


def quantiles(
    run: Recorded,
    q: Sequence[float] = STEPS,
    *,
    of: str | None = None,
    by: str | Sequence[str] = "site",
    per_sample: bool = False,
) -> Quantiles:
    """Return the quantiles of each site, in order of execution; phases are never mixed. A list with `.plot()`.

    A quantile is a value that occurred, never one between two (NumPy's method "inverted_cdf"). Those of a histogram
    are within 2**-8 of it, relatively, and exact where bfloat16 was recorded; those of channel norms are exact.

    Args:
        run: a run with any of the measures that `OF` names.
        q: fractions in [0, 1].
        of: "magnitude" or "value" of each element (histogram), "channel_norm", "norm" or "rms" (root mean square, from
            moments) of the whole tensor, or its "zero_fraction"; None takes the first of magnitude, channel_norm, norm,
            rms and zero_fraction that the run holds.
        by: "site", or also "call", "output", "repeat", "epoch", "batch", in a list: each combination apart.
        per_sample: undo the mean of a mean-reduced loss: gradients times the size of their batch, so that they are
            those of each sample's own objective, whatever the batch size. Outputs are left alone.

    Raises:
        InputError: `q`, `of` or `by` cannot be used, or the run does not hold what they need.
    """
    fractions = tuple(float(fraction) for fraction in q)
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise InputError(f"quantiles {fractions} must be fractions from 0 to 1, as in [0.5, 0.9]")
    of = (of or default_of([run])).replace("-", "_")
    if of not in OF:
        raise InputError(f"quantiles of {of!r} are unknown{did_you_mean(of, OF)} (known: {', '.join(OF)})")
    if OF[of] not in run.manifest["tables"]:
        raise InputError(f"{run.folder} holds no {OF[of]}, which quantiles of {of!r} need; record that measure")
    columns = ["site", *([by] if isinstance(by, str) else by)]
    if unknown := set(columns) - set(BY):
        raise InputError(f"quantiles by {unknown.pop()!r} are unknown (known: {', '.join(BY)})")
    columns = list(dict.fromkeys(["site", "phase", *columns]))
    table = run.table(OF[of])
    factors = _factors(run, table, per_sample)
    read = _READERS.get(OF[of], _reader_of_tensors)(table, of)
    return Quantiles(
        _summary(key, columns, of, fractions, *read(rows, factors[rows])) for key, rows in groups(run, table, columns)
    )


def default_of(runs: Sequence[Recorded]) -> str:
    """Return what quantiles are of where nobody says: the first that all runs hold, or else the first of all."""
    held = (of for of in DEFAULTS if all(OF[of] in run.manifest["tables"] for run in runs))
    return next(held, DEFAULTS[0])


def weighted(values: npt.NDArray[Any], weights: npt.NDArray[np.int64], q: Sequence[float]) -> list[float]:
    """Return the smallest values whose cumulated weight reaches each fraction of the whole; NaN of nothing.

    >>> weighted(np.array([3.0, 1.0, 2.0]), np.array([1, 2, 1]), [0.0, 0.5, 0.75, 1.0])
    [1.0, 1.0, 2.0, 3.0]
    """
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    if not len(reached) or not reached[-1]:
        return [float("nan")] * len(q)
    # a product such as 0.7 * 10 may exceed the whole number it stands for by rounding; NumPy compares likewise
    weight = np.maximum(np.ceil(np.asarray(q) * reached[-1] - 1e-9), 1)
    return [float(value) for value in values[order][np.searchsorted(reached, weight)]]


def _summary(
    key: tuple[Any, ...],
    columns: list[str],
    of: str,
    q: tuple[float, ...],
    values: npt.NDArray[Any],
    weights: npt.NDArray[np.int64],
    nonfinite: int,
) -> SiteQuantiles:
    named = dict(zip(columns, key, strict=True))
    site, phase = named.pop("site"), named.pop("phase")
    counts = int(weights.sum()), int(weights[values == 0].sum()), nonfinite
    return SiteQuantiles(site, phase, of, q, tuple(weighted(values, weights, q)), *counts, named)


def groups(run: Recorded, table: Any, columns: list[str]) -> Iterator[tuple[tuple[Any, ...], npt.NDArray[np.intp]]]:
    """Yield the rows of each combination of columns, in the order of the run's sites."""
    position = {name: i for i, name in enumerate([*run.sites, *run.parameters])}
    ids = np.zeros(table.num_rows, np.int64)
    levels: list[list[Any]] = []
    for column in columns:
        encoded = table[column].combine_chunks().dictionary_encode()
        values = encoded.dictionary.to_pylist()
        order = (
            sorted(values, key=lambda v: (position.get(v, len(position)), v)) if column == "site" else sorted(values)
        )
        rank = np.array([order.index(value) for value in values], np.int64)
        ids = ids * max(len(order), 1) + (rank[encoded.indices.to_numpy()] if len(rank) else 0)
        levels.append(order)
    sorting = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[sorting], prepend=-1))
    for rows in np.split(sorting, starts[1:]) if len(sorting) else []:
        key = []
        rest = int(ids[rows[0]])
        for order in reversed(levels):
            rest, at = divmod(rest, len(order))
            key.append(order[at])
        yield tuple(reversed(key)), rows


def _factors(run: Recorded, table: Any, per_sample: bool) -> npt.NDArray[np.float64]:
    """Return by what each row's values are multiplied."""
    factors = np.ones(table.num_rows)
    if not per_sample or run.manifest["loss_reduction"] != "mean":
        return factors
    batches = run.table("batches")
    sizes = dict(zip(zip(*_lists(batches, KEYS), strict=True), batches["size"].to_pylist(), strict=True))
    rows = zip(*_lists(table, ("phase", *KEYS)), strict=True)
    try:
        factors = np.array([sizes[tuple(key)] if phase == "backward" else 1 for phase, *key in rows], np.float64)
    except KeyError as error:
        raise RunError(f"{printable(run.folder)} has rows of batch {error}, which its table batches lacks") from error
    if not factors.all():
        raise InputError(
            f"{run.folder} does not say how many samples each batch had, which per_sample needs; "
            "record with samples= or axes="
        )
    return factors


def _lists(table: Any, columns: Iterable[str]) -> list[list[Any]]:
    return [table[column].to_pylist() for column in columns]


# Reads the values, their weights, and how many were not finite, of some rows of a table, times a factor for each row.
_Reader = Callable[[npt.NDArray[np.intp], npt.NDArray[np.float64]], tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]]


def _reader_of_tensors(table: Any, of: str) -> _Reader:
    """Read a table of which each tensor has one number."""

    def column(name: str) -> npt.NDArray[np.float64]:
        return np.asarray(table[name].to_numpy(), np.float64)

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if of == "zero_fraction":
            numbers = column("zeros") / column("total")
        elif of == "rms":
            numbers = np.sqrt(column("m2") / column("count") + np.square(column("mean")))
        else:
            numbers = column("norm")

    def read(
        rows: npt.NDArray[np.intp], factors: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
        values = numbers[rows] if of == "zero_fraction" else numbers[rows] * factors
        return _finite_of(values)

    return read


def _reader_of_channel_norms(table: Any, of: str) -> _Reader:
    """Read a table of channel norms."""
    norms = _Lists(table["values"])

    def read(
        rows: npt.NDArray[np.intp], factors: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
        return _finite_of(norms.of(rows).astype(np.float64) * np.repeat(factors, norms.lengths[rows]))

    return read


def _finite_of(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    keep = np.isfinite(values)
    return values[keep], np.ones(int(keep.sum()), np.int64), int((~keep).sum())


def _reader_of_codes(table: Any, of: str) -> _Reader:
    """Read a table of histograms."""
    codes, counts = _Lists(table["codes"]), _Lists(table["counts"])
    exact = np.array([dtype == "bfloat16" for dtype in table["dtype"].to_pylist()])
    values_of = {is_exact: code_values(is_exact) for is_exact in (False, True)}

    def read(
        rows: npt.NDArray[np.intp], factors: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
        values, weights, nonfinite = [], [], 0
        for is_exact, factor in sorted(set(zip(exact[rows].tolist(), factors.tolist(), strict=True))):
            chosen = rows[(exact[rows] == is_exact) & (factors == factor)]
            occurring, weight = _added(codes.of(chosen).astype(np.intp), counts.of(chosen))
            keep = finite(occurring)
            nonfinite += int(weight[~keep].sum())
            numbers = values_of[is_exact][occurring[keep]] * factor
            values.append(np.abs(numbers) if of == "magnitude" else numbers)
            weights.append(weight[keep])
        return np.concatenate(values), np.concatenate(weights), nonfinite

    return read


def _added(
    codes: npt.NDArray[np.intp], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """Add the counts of equal codes where that leaves fewer to sort; a single batch has too few for it to pay."""
    if len(codes) < CODES:
        return codes, counts
    dense = np.zeros(CODES, np.int64)
    np.add.at(dense, codes, counts)
    occurring = np.flatnonzero(dense)
    return occurring, dense[occurring]


class _Lists:
    """A column of lists of which rows are taken many times; Arrow's own `take` costs as much as a whole batch's read.

    Attributes:
        lengths: of each row's list.
    """

    def __init__(self, column: Any) -> None:
        whole = column.combine_chunks()
        self.lengths: npt.NDArray[np.int64] = whole.value_lengths().to_numpy().astype(np.int64)
        self._flat = whole.flatten().to_numpy()
        self._ends = np.cumsum(self.lengths)

    def of(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """Return the lists of some rows behind one another."""
        ends = self._ends[rows]
        starts = ends - self.lengths[rows]
        if len(rows) == 1:
            return np.asarray(self._flat[starts[0] : ends[0]])
        return np.concatenate([self._flat[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])


_READERS = {"histogram": _reader_of_codes, "channel_norm": _reader_of_channel_norms}
