"""The same quantiles of several runs, side by side."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..display import Part, Pictures, Rows, ShownItem, ShownTable, counted, number
from ..errors import InputError
from .quantiles import DRAWN, STEPS, SiteQuantiles, charted, default_of, quantiles
from .reader import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Comparison(ShownItem):
    """One site of several runs.

    Attributes:
        place: 0 for the first site, in order of execution.
        phase: as `SiteQuantiles` has it.
        sites: the name in each run, None where a run has no site in this place.
        quantiles: of each run, None likewise.
        ratios: for each run, each quantile divided by that of the first run; NaN where there is nothing to divide.
        spreads: of each run, the 95 % quantile divided by the 5 % one; inf where the latter is zero.
    """

    place: int
    phase: str
    sites: tuple[str | None, ...]
    quantiles: tuple[SiteQuantiles | None, ...]
    ratios: tuple[tuple[float, ...], ...]
    spreads: tuple[float, ...]

    @property
    def same(self) -> tuple[bool, ...]:
        """For each run, whether its quantiles are those of the first run, to the last bit."""
        first = self.quantiles[0]
        return tuple(first is not None and s is not None and s.values == first.values for s in self.quantiles)

    @property
    def label(self) -> str:
        """The site's name, or its names where the runs have several."""
        return " | ".join(dict.fromkeys(site or "-" for site in self.sites))

    def _shown(self) -> Iterator[Part]:
        yield f"Comparison of {counted(len(self.sites), 'run')} at {self.label}, {self.phase}"
        known = next((site for site in self.quantiles if site is not None), None)
        if known is None:
            return
        runs = range(len(self.sites))
        headings = ["quantile", *(f"run {i}" for i in runs), *(f"run {i} / run 0" for i in runs[1:])]
        rows = (
            [f"{100 * q:g} %", *("-" if s is None else f"{s.values[n]:.4g}" for s in self.quantiles)]
            + [number(self.ratios[i][n]) for i in runs[1:]]
            for n, q in enumerate(known.q)
        )
        yield ShownTable(headings, rows, len(known.q))


class Comparisons(Rows[Comparison]):
    """Several runs site by site: a list that shows itself as a table and a chart.

    Attributes:
        runs: what each run is called: its folder.
    """

    def __init__(self, rows: Iterable[Comparison] = (), runs: Sequence[str] = ()) -> None:
        super().__init__(rows)
        self.runs = tuple(runs)

    def _like(self, items: list[Comparison]) -> Self:
        return type(self)(items, self.runs)

    def plot(
        self, path: str | Path | None = None, title: str = "", *, panels: str | None = None, ground: str = "white"
    ) -> "Figure":
        """Draw the runs side by side, as `undertow compare --plot` does.

        Args:
            path, title, panels, ground: as `Quantiles.plot` has them.

        Raises:
            InputError, FrameworkError: as `Quantiles.plot`.
        """
        from ..show.plots import drawn_or_saved, quantile_panels

        return drawn_or_saved(quantile_panels(self._groups(), title, panels=panels), path, ground)

    def _groups(self) -> dict[str, list[SiteQuantiles]]:
        """Return the quantiles of each run, by its name; a number tells runs of one name apart."""
        of_runs = [[row.quantiles[i] for row in self] for i in range(len(self[0].sites) if self else 0)]
        named = [self.runs[i] if i < len(self.runs) else f"run {i}" for i in range(len(of_runs))]
        labels = [name if named.count(name) == 1 else f"{name} #{i}" for i, name in enumerate(named)]
        return {label: [s for s in rows if s is not None] for label, rows in zip(labels, of_runs, strict=True)}

    def _shown(self) -> Iterator[Part]:
        yield f"Comparisons of {counted(len(self.runs), 'run')} at {counted(len(self), 'site')}"
        yield from (f"run {i}: {run}" for i, run in enumerate(self.runs[:8]))
        runs = range(len(self[0].sites) if self else 0)
        headings = ["site", *(f"median, run {i}" for i in runs), *(f"run {i} / run 0" for i in runs[1:])]
        headings += [f"p95 / p5, run {i}" for i in runs]
        yield ShownTable(headings, (_medians(row) for row in self), len(self))
        if self:
            note = f"the first {DRAWN} sites; .plot() draws all" if len(self) > DRAWN else ""
            yield Pictures(lambda: [("", charted(self[:DRAWN]._groups()))], note)


def _medians(row: Comparison) -> list[str]:
    """Return a site's middle quantile in each run, its ratio to the first run's, and the spreads."""
    middle = [None if s is None else len(s.q) // 2 for s in row.quantiles]
    values = ["-" if s is None else f"{s.values[len(s.q) // 2]:.4g}" for s in row.quantiles]
    ratios = ["-" if n is None else number(r[n]) for r, n in zip(row.ratios[1:], middle[1:], strict=True)]
    return [row.label, *values, *ratios, *map(number, row.spreads)]


def compare(
    runs: Sequence[Run | str | os.PathLike[str]],
    q: Sequence[float] = STEPS,
    *,
    of: str | None = None,
    per_sample: bool = False,
) -> Comparisons:
    """Put the sites of several runs beside one another: by name where all have the same names, else by their order.

    A list with `.plot()`.

    Args:
        runs: two or more, or their folders' paths.
        q, of, per_sample: as `quantiles` has them.

    Raises:
        InputError: fewer than two runs, or as `quantiles` does.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run(s) were given to compare; give two or more")
    opened = [Run.of(run) for run in runs]
    of = of or default_of(opened)
    fractions = (*q, 0.05, 0.95)
    by_run = [quantiles(run, fractions, of=of, per_sample=per_sample) for run in opened]
    rows = []
    for phase in dict.fromkeys(site.phase for sites in by_run for site in sites):
        columns = [[site for site in sites if site.phase == phase] for sites in by_run]
        rows += [_comparison(i, phase, group, len(q)) for i, group in enumerate(_paired(columns))]
    return Comparisons(rows, [str(run.folder) for run in opened])


@dataclass(frozen=True)
class SameClass:
    """For how many of the photographs that two runs share both networks saw the same class."""

    same: int
    photographs: int

    def __str__(self) -> str:
        others = self.photographs - self.same
        rest = f"; the gradients of the other {others} are of different classes" if others else ""
        return f"both networks saw the same class in {self.same} of {self.photographs} photographs{rest}"


def same_class(run: Run, other: Run) -> SameClass | None:
    """Say for how many photographs two networks saw the same class, by its name where classes have one.

    None where the gradients are not of the class that the network saw, or no photograph is in both runs.
    """
    classes = [_classes(one) for one in (run, other)]
    shared = classes[0].keys() & classes[1].keys()
    if not shared:
        return None
    return SameClass(sum(classes[0][name] == classes[1][name] for name in shared), len(shared))


def _classes(run: Run) -> dict[str, str]:
    """Return the name of the class that the network saw in each photograph."""
    if run.manifest.get("objective") != "predicted" or "class_name" not in run.manifest["tables"].get("samples", {}):
        return {}
    table = run.table("samples")
    rows = zip(table["name"].to_pylist(), table["class_name"].to_pylist(), strict=True)
    return {name: seen for name, seen in rows if name is not None and seen is not None}


def _paired(columns: list[list[SiteQuantiles]]) -> list[tuple[SiteQuantiles | None, ...]]:
    names = [site.site for site in columns[0]]
    if all(sorted(site.site for site in column) == sorted(names) for column in columns):
        by_name = [{site.site: site for site in column} for column in columns]
        return [tuple(sites[name] for sites in by_name) for name in names]
    return list(zip_longest(*columns))


def _comparison(place: int, phase: str, group: tuple[SiteQuantiles | None, ...], n_asked: int) -> Comparison:
    """Compare one site of several runs; the last two quantiles of each, 5 and 95 %, give the spread."""
    asked = tuple(None if s is None else replace(s, q=s.q[:n_asked], values=s.values[:n_asked]) for s in group)
    nothing = (math.nan,) * n_asked
    first = nothing if asked[0] is None else asked[0].values
    ratios = tuple(
        nothing if s is None else tuple(_ratio(a, b) for a, b in zip(s.values, first, strict=True)) for s in asked
    )
    spreads = tuple(math.nan if s is None else _ratio(s.values[-1], s.values[-2]) for s in group)
    return Comparison(place, phase, tuple(None if s is None else s.site for s in group), asked, ratios, spreads)


def _ratio(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)
    return a / b
