"""Batches that are published together: gathered column by column, written as one Parquet part of each table.

What the measures of an observation share is stored once, as one row, and repeated for its samples by Arrow.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..measures import Columns, Measure
from ..runs.format import COMMITTED, DIAGNOSIS, KEYS, SITE, STEPS, TABLES, arrow, columns_of, schema

_NEVER_NULL = frozenset(SITE) | {"sample"}


class BatchGroup:
    """The rows of several batches.

    Args:
        measures: in the order in which each observation has its columns.
        sample_columns: the types of further columns of the table `samples`.

    Attributes:
        nbytes: how much memory the lists of numbers in them take.
    """

    def __init__(self, measures: Sequence[Measure], sample_columns: Mapping[str, str] | None = None) -> None:
        self._measures = measures
        self._sample_columns = dict(sample_columns or {})
        self._described: dict[str, list[Any]] = {name: [] for name in self._sample_columns}
        self._batches: list[dict[str, Any]] = []
        self._points: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._samples: list[Sequence[str | None]] = []
        self._sites: list[tuple[Any, ...]] = []
        self._sizes: list[tuple[int, int, int]] = []  # of an observation, as `_sampled` takes it
        self._named = 0
        self._columns: list[dict[str, list[Any]]] = [{name: [] for name in measure.columns} for measure in measures]
        self._lists = [{name for name, kind in m.columns.items() if kind.startswith("list<")} for m in measures]
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def begin(
        self,
        row: dict[str, Any],
        names: Sequence[str | None],
        points: Sequence[dict[str, Any]],
        steps: Sequence[dict[str, Any]] = (),
        described: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Begin a batch: its row in `batches`, a name or None for each sample, its rows in `diagnosis` and `steps`.

        `described` has a value for each sample in each of the further columns; none is null.
        """
        for name, column in self._described.items():
            column += (described or {}).get(name, [None] * len(names))
        self._batches.append(row)
        self._points += points
        self._steps += steps
        self._named += len(self._samples[-1]) if self._samples else 0
        self._samples.append(names)

    def add(self, site: tuple[Any, ...], size: int, first: int, blocks: Sequence[Columns]) -> None:
        """Add an observation of the batch.

        Args:
            site: the values of `SITE`.
            size: how many rows a measure of samples has of it.
            first: the place of the first of them among the batch's samples; -1 where they are none of them.
            blocks: the columns that each measure finished.
        """
        self._sites.append(site)
        named = first >= 0 and first + size <= len(self._samples[-1])
        self._sizes.append((size, max(first, 0), self._named + first if named else -1))
        for columns, lists, block in zip(self._columns, self._lists, blocks, strict=True):
            for name, column in columns.items():
                rows = block[name]
                if name in lists:
                    rows = [np.asarray(row) for row in _rows(rows)]
                    self.nbytes += sum([row.nbytes for row in rows])
                column += rows

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Make the tables that have rows; `batches`, which makes the others count, comes last."""
        batches = _columns(TABLES[COMMITTED], self._batches)
        keys = {name: batches[name] for name in KEYS}
        starts = np.cumsum([0, *map(len, self._samples)])
        sizes = [(len(names), 0, int(start)) for names, start in zip(self._samples, starts, strict=False)]
        described = _joined(self._sample_columns, self._described)
        yield "samples", _table(TABLES["samples"] | self._sample_columns, self._sampled(keys, sizes) | described)
        if self._points:
            kinds = KEYS | DIAGNOSIS
            points = {name: [*chain(*(_rows(point[name]) for point in self._points))] for name in kinds}
            yield "diagnosis", _table(kinds, _joined(kinds, points))
        if self._steps:
            yield "steps", _table(KEYS | STEPS, _columns(KEYS | STEPS, self._steps))
        if self._sites:
            yield from self._of_measures()
        yield COMMITTED, _table(TABLES[COMMITTED], batches)

    def _of_measures(self) -> Iterator[tuple[str, Any]]:
        columns = zip(*self._sites, strict=True)
        sites = {entry.name: _array(entry.type, values) for entry, values in zip(schema(SITE), columns, strict=True)}
        sampled: dict[str, Any] = {}
        for measure, finished in zip(self._measures, self._columns, strict=True):
            if measure.per_sample and not sampled:
                sampled = self._sampled(sites, self._sizes)
            own = _joined(measure.columns, finished)
            yield measure.table, _table(columns_of(measure), (sampled if measure.per_sample else sites) | own)

    def _sampled(self, columns: Mapping[str, Any], observed: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        """Repeat columns for the samples, and add their positions and names.

        Args:
            columns: one row for each of `observed`.
            observed: how many samples there are, the place of the first in its batch, and that of its name among the
                names of all batches, or -1 without names.
        """
        pa = arrow()
        sizes, places, firsts = np.array(observed, np.int64).reshape(-1, 3).T
        rows = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        names = self._names.take(pa.array(firsts[rows] + within, mask=(firsts < 0)[rows]))
        index = pa.array(rows)
        repeated = {name: column.take(index) for name, column in columns.items()}
        return repeated | {"sample": pa.array(places[rows] + within, pa.int32()), "name": names}

    @cached_property
    def _names(self) -> Any:
        """The names of all samples of all batches."""
        return _array(arrow().string(), [*chain(*self._samples)])


def write(table: Any, path: Path) -> None:
    """Write a part: texts as dictionaries, measured numbers by planes of bytes, sorted codes by differences.

    Measured numbers hardly ever repeat, so dictionaries and statistics of them would double the time for nothing;
    statistics of keys let a reader skip parts. LZ4 takes half of zstd's time for files 7 % larger. Arrow's own memory
    pools return their memory to the system after each part, and getting it back takes longer than compressing.
    """
    pa = arrow()
    items = {f"{e.name}.list.element": e.type.value_type for e in table.schema if pa.types.is_list(e.type)}
    pa.parquet.write_table(
        table,
        path,
        compression="lz4",
        use_dictionary=[e.name for e in table.schema if pa.types.is_dictionary(e.type)],
        write_statistics=[e.name for e in table.schema if pa.types.is_integer(e.type)],
        use_byte_stream_split=[name for name, kind in items.items() if pa.types.is_floating(kind)],
        column_encoding={name: "DELTA_BINARY_PACKED" for name, kind in items.items() if pa.types.is_integer(kind)}
        or None,
        write_batch_size=1 << 16,
        data_page_size=1 << 18,
        store_schema=False,  # readers see texts, not dictionaries
        memory_pool=pa.system_memory_pool(),
    )


def _table(kinds: Mapping[str, str], columns: Mapping[str, Any]) -> Any:
    """Put columns in order. Those never null are declared so, which saves a third of the time to write them."""
    pa = arrow()
    fields = [pa.field(name, columns[name].type, nullable=name not in _NEVER_NULL) for name in kinds]
    return pa.table([columns[name] for name in kinds], schema=pa.schema(fields))


def _rows(column: Any) -> Any:
    """Return the rows of a column; a table `(rows, length)` of lists counts as one."""
    if isinstance(column, np.ndarray):
        return [column] if column.ndim == 2 else column
    return column if isinstance(column, list) else [column]


def _joined(kinds: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    is_list = arrow().types.is_list
    return {e.name: (_lists if is_list(e.type) else _array)(e.type, columns[e.name]) for e in schema(kinds)}


def _columns(kinds: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {entry.name: _array(entry.type, [row[entry.name] for row in rows]) for entry in schema(kinds)}


def _array(kind: Any, values: Sequence[Any]) -> Any:
    """Return an Arrow array; texts become a dictionary."""
    array = arrow().array(values, kind)
    return array.dictionary_encode() if arrow().types.is_string(kind) else array


def _lists(kind: Any, rows: Sequence[Any]) -> Any:
    """Join rows, each a list of numbers, or a table (rows, length) of several."""
    pa = arrow()
    pieces = [np.atleast_2d(row) for row in rows]
    sizes = np.repeat([piece.shape[1] for piece in pieces], [len(piece) for piece in pieces])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    joined: Any = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else []
    return pa.ListArray.from_arrays(offsets, pa.array(joined, kind.value_type), type=kind)
