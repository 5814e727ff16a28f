"""The same quantiles of several runs, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..errors import InputError
from ..run import Run
from .quantiles import STEPS, SiteQuantiles, quantiles


@dataclass(frozen=True)
class Comparison:
    """One site of several runs.

    Attributes:
        place: 0 for the first site, in order of execution.
        phase: "backward" or "forward".
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


def compare(
    runs: Sequence[Run],
    q: Sequence[float] = STEPS,
    *,
    of: str | None = None,
    per_sample: bool = False,
) -> list[Comparison]:
    """Put the sites of several runs beside one another: by name where all have the same names, else by their order.

    Args:
        runs: two or more.
        q, of, per_sample: as `quantiles` has them.

    Raises:
        InputError: fewer than two runs, or as `quantiles` does.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run(s) were given to compare; give two or more")
    of = of or ("magnitude" if all("histogram" in run.manifest["tables"] for run in runs) else "channel_norm")
    asked = (*q, 0.05, 0.95)
    found = [quantiles(run, asked, of=of, per_sample=per_sample) for run in runs]
    rows = []
    for phase in dict.fromkeys(one.phase for row in found for one in row):
        for place, group in enumerate(_paired([[one for one in row if one.phase == phase] for row in found])):
            rows.append(_comparison(place, phase, group, len(q)))
    return rows


def _paired(columns: list[list[SiteQuantiles]]) -> list[tuple[SiteQuantiles | None, ...]]:
    names = [one.site for one in columns[0]]
    if all(sorted(one.site for one in column) == sorted(names) for column in columns):
        known = [{one.site: one for one in column} for column in columns]
        return [tuple(by_name[name] for by_name in known) for name in names]
    return list(zip_longest(*columns))


def _comparison(place: int, phase: str, group: tuple[SiteQuantiles | None, ...], most: int) -> Comparison:
    def shortened(one: SiteQuantiles) -> SiteQuantiles:
        return SiteQuantiles(**{**vars(one), "q": one.q[:most], "values": one.values[:most]})

    plain = tuple(None if one is None else shortened(one) for one in group)
    nothing = (math.nan,) * most
    first = nothing if plain[0] is None else plain[0].values
    ratios = tuple(
        nothing if one is None else tuple(_ratio(a, b) for a, b in zip(one.values, first, strict=True)) for one in plain
    )
    spreads = tuple(math.nan if one is None else _ratio(one.values[-1], one.values[-2]) for one in group)
    return Comparison(place, phase, tuple(None if one is None else one.site for one in group), plain, ratios, spreads)


def _ratio(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)
    return a / b
