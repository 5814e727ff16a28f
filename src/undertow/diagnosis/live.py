"""What a recording has seen so far, as evidence for the rules: a few numbers for each batch, in memory."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..measures import CODES, Columns, code_values, finite
from ..runs.format import DIAGNOSIS
from .evidence import OF_PARAMETERS, Evidence, Floats, StepKey, norms_of

MAX_BATCHES = 1024
MAX_WATCHED = 8
_MAX_SUMS = 64
_MAX_NORMS = 8192
Key = tuple[int, int]


class Live:
    """Gathers what the rules read, batch by batch, and forgets what is old: 1024 batches, 8 of them that were watched.

    Attributes:
        n_batches: how many batches came.
    """

    def __init__(self) -> None:
        self.n_batches = 0
        self.course: dict[str, dict[Key, Floats]] = defaultdict(dict)
        self.zeros: dict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(2, np.int64))
        self.counts: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
        self.rows: dict[str, deque[dict[str, Any]]] = {
            "batches": deque(maxlen=MAX_BATCHES),
            "broken": deque(maxlen=MAX_BATCHES),
            "channel_sums": deque(maxlen=_MAX_SUMS),
            "norm": deque(maxlen=_MAX_NORMS),
            "steps": deque(maxlen=MAX_BATCHES),
        }
        self.watched: deque[list[dict[str, Any]]] = deque(maxlen=MAX_WATCHED)

    def begin(
        self, row: dict[str, Any], points: Iterable[Mapping[str, Any]], steps: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Begin a batch: its row in `batches`, and those in `diagnosis` (lists in a list each) and `steps`."""
        self.n_batches += 1
        self.rows["steps"] += steps
        self.rows["batches"].append(row)
        if flat := [{name: _of_one(name, value) for name, value in point.items()} for point in points]:
            self.watched.append(flat)

    def add(self, site: Mapping[str, Any], blocks: Mapping[str, Columns]) -> None:
        """Add what the measures made of one tensor: their columns, by the names of their tables."""
        squares = _squares(blocks)
        if squares is not None and not np.isfinite(squares[0]):
            self.rows["broken"].append({**site, "mean": float("nan")})
        for table in ("zero_fraction", "histogram", "channel_sums"):
            if table in blocks:
                getattr(self, f"_add_{table}")(site, blocks[table])
        if site["phase"] in OF_PARAMETERS:
            norm = blocks["norm"]["norm"][0] if "norm" in blocks else None if squares is None else math.sqrt(squares[0])
            self.rows["norm"].append({**site, "norm": math.nan if norm is None else norm})
        if squares is not None and site["phase"] == "backward":
            course, key = self.course[site["site"]], (site["epoch"], site["batch"])
            course[key] = course[key] + squares if key in course else squares
            if len(course) > MAX_BATCHES:
                del course[next(iter(course))]

    def _add_zero_fraction(self, site: Mapping[str, Any], block: Columns) -> None:
        if site["phase"] == "backward":
            self.zeros[site["site"]] += np.array([block["zeros"][0], block["total"][0]])

    def _add_histogram(self, site: Mapping[str, Any], block: Columns) -> None:
        if site["phase"] == "backward":
            of = site["site"], site["dtype"]
            if of not in self.counts:
                self.counts[of] = np.zeros(CODES, np.int64)
            self.counts[of][block["codes"][0]] += block["counts"][0]

    def _add_channel_sums(self, site: Mapping[str, Any], block: Columns) -> None:
        self.rows["channel_sums"].append({**site, **{name: column[0] for name, column in block.items()}})

    def evidence(self, run: Any) -> Evidence:
        """Return the evidence gathered so far; `run` has the `manifest` and the `sites`."""
        return _LiveEvidence(run, self)


class _LiveEvidence(Evidence):
    """Evidence out of memory: the same names, other sources."""

    def __init__(self, run: Any, live: Live) -> None:
        super().__init__(run)
        self._live = live
        self.n_earlier = max(live.n_batches - MAX_BATCHES, 0)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return the rows of a table, as far as they are kept."""
        live = self._live
        if table == "diagnosis":
            return [row for rows in live.watched for row in rows]
        if table == "moments":  # the finite ones are in `course`
            return list(live.rows["broken"])
        if table == "zero_fraction":
            zeros = {site: counts.tolist() for site, counts in live.zeros.items()}
            return [{"site": s, "phase": "backward", "zeros": n, "total": total} for s, (n, total) in zeros.items()]
        if table == "histogram":
            return [_histogram_row(*of, counts) for of, counts in live.counts.items()]
        return list(live.rows.get(table, ()))

    @cached_property
    def norms(self) -> dict[str, dict[str, dict[StepKey, float]]]:
        """As in `Evidence`."""
        return norms_of(self._live.rows["norm"], lambda row: float(row["norm"]))

    @cached_property
    def course(self) -> dict[str, Floats]:
        """For each site the root mean square of its gradient in each batch."""
        if not self._live.course:
            return super().course
        of_sites = {site: self._live.course[site] for site in self.sites if site in self._live.course}
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = {site: np.array([of_site[key] for key in sorted(of_site)]) for site, of_site in of_sites.items()}
            return {site: np.sqrt(squares[:, 0] / squares[:, 1]) for site, squares in sums.items()}


def _of_one(name: str, value: Any) -> Any:
    """Return a value of one row; columns of lists hold a list of rows."""
    return value[0] if str(DIAGNOSIS.get(name, "")).startswith("list<") else value


def _histogram_row(site: str, dtype: str, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    codes = np.flatnonzero(counts)
    row = {"site": site, "phase": "backward", "dtype": dtype, "epoch": -1, "batch": -1}
    return row | {"codes": codes, "counts": counts[codes]}


def _squares(blocks: Mapping[str, Columns]) -> Floats | None:
    """Return the sum of squares and the number of what was squared, by the first measure that knows them."""
    with np.errstate(invalid="ignore", over="ignore"):
        if "moments" in blocks:
            count, mean, m2 = (blocks["moments"][name][0] for name in ("count", "mean", "m2"))
            return np.array([m2 + count * mean * mean, count])
        if "channel_norm" in blocks:
            norms = np.asarray(blocks["channel_norm"]["values"], np.float64).ravel()
            return np.array([norms @ norms, len(norms)])
        if "histogram" in blocks:
            codes, counts = (blocks["histogram"][name][0] for name in ("codes", "counts"))
            if not finite(codes.astype(np.int64)).all():
                return np.array([np.nan, counts.sum()])
            return np.array([np.square(_VALUES[codes]) @ counts, counts.sum()])
    return None


_VALUES = code_values()
