"""The parts of a run's tables: which there are, which count, and how one is read without trusting it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_bytes
from .format import COMMITTED, MAX_PART_BYTES, SITE, arrow, damage_named, known_columns, refuse_changed, schema

_PART = re.compile(r"part-(\d{3,6})-(\d{6,12})")
_MAX_ROW_GROUPS = 10_000
_NULLABLE = frozenset(("name", "scale"))
_PHASES = {"backward", "forward", "accumulated", "gradient", "weight", "update"}


def parts_of(folder: Path, table: str, suffix: str = ".parquet") -> dict[tuple[int, int], Path]:
    """Return the parts of a table by rank and number, in that order, whether they count or not.

    Raises:
        RunError: the table's folder is a link.
    """
    with damage_named(folder / table):
        if (folder / table).is_symlink():
            raise ValueError("is a link")
        paths = (folder / table).iterdir() if (folder / table).is_dir() else ()
        named = [(_PART.fullmatch(path.stem), path) for path in paths if path.suffix == suffix]
    return dict(sorted(((int(match[1]), int(match[2])), path) for match, path in named if match))


def part_name(rank: int, number: int) -> str:
    """Return the name of a part, without what follows the dot.

    >>> part_name(0, 12)
    'part-000-000012'
    """
    return f"part-{rank:03d}-{number:06d}"


def read_part(path: Path, table: str, columns: Mapping[str, str], sha256: str | None = None) -> Any:
    """Read one part as a `pyarrow.Table` with the columns that the manifest names.

    What it unpacks to is bounded by what it declares, before any of it is unpacked.

    Raises:
        RunError: the file is missing, damaged, of another table, too large, or not the one with this SHA-256.
    """
    pa = arrow()
    with damage_named(path):
        raw = read_bytes(path, MAX_PART_BYTES)
        refuse_changed(raw, sha256)
        texts = [name for name, kind in columns.items() if kind in ("string", "tensor")]
        file = pa.parquet.ParquetFile(pa.BufferReader(raw), read_dictionary=texts, pre_buffer=False)
        _refuse_large(file.metadata)
        read = file.read(use_threads=False)
        _refuse_long_texts(read, texts)
        rows = read.cast(schema(columns))
        rows.validate(full=True)
        _refuse_nonsense(rows, table)
    return rows


def _refuse_large(metadata: Any) -> None:
    """Raise ValueError where the rows that a part declares would take more memory than any part may."""
    if metadata.num_row_groups > _MAX_ROW_GROUPS:
        raise ValueError(f"has {metadata.num_row_groups:,} row groups, more than a recording writes")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    declared = sum(max(8 * column.num_values, column.total_uncompressed_size) for column in columns)
    if min((c.num_values for c in columns), default=0) < 0 or not 0 <= metadata.num_rows * 8 <= declared:
        raise ValueError("declares numbers of rows that do not agree")
    if declared > MAX_PART_BYTES:
        raise ValueError(f"declares {declared:,} bytes of rows, over {MAX_PART_BYTES:,}")


def _refuse_long_texts(table: Any, names: list[str]) -> None:
    """Raise ValueError where texts, each kept once so far, would take too much memory written out."""
    total = 0
    for chunk in (chunk for name in names if name in table.column_names for chunk in table[name].chunks):
        if hasattr(chunk, "dictionary") and len(chunk):
            longest = max((len(text) for text in chunk.dictionary.to_pylist() if text is not None), default=0)
            total += longest * len(chunk)
    if total > MAX_PART_BYTES:
        raise ValueError(f"has texts of {total:,} characters, over {MAX_PART_BYTES:,}")


def _refuse_nonsense(rows: Any, table: str) -> None:
    """Raise ValueError where a table that the library reads itself holds what no recording writes."""
    known = known_columns().get(table, SITE)
    for name in known:
        if name not in rows.column_names or name in _NULLABLE:
            continue
        column = rows[name]
        if column.null_count or any(chunk.values.null_count for chunk in column.chunks if hasattr(chunk, "values")):
            raise ValueError(f"has no value in a row of {name!r}")
    if "phase" in known and "phase" in rows.column_names and not set(rows["phase"].unique().to_pylist()) <= _PHASES:
        raise ValueError("has a phase that there is not")
    if {"codes", "counts"} <= set(known):
        lengths = [arrow().compute.list_value_length(rows[name]) for name in ("codes", "counts")]
        if not lengths[0].equals(lengths[1]):
            raise ValueError("has codes without counts")


def batch_counts(rows: Any) -> dict[tuple[int, int], int]:
    """Return how many rows there are of each batch, by epoch and number, in the order in which they first occur."""
    counts = rows.group_by(["epoch", "batch"], use_threads=False).aggregate([([], "count_all")]).to_pydict()
    return dict(zip(zip(counts["epoch"], counts["batch"], strict=True), counts["count_all"], strict=True))


def batches_of(path: Path, sha256: str | None = None) -> Any:
    """Read a part of the table that makes others count; its rank is that of the file's name.

    Raises:
        RunError: as `read_part` does.
    """
    rows = read_part(path, COMMITTED, known_columns()[COMMITTED], sha256)
    with damage_named(path):
        rank = int(path.name.split("-")[1])
        if np.any(rows["rank"].to_numpy() != rank):
            raise ValueError(f"has rows of another process than {rank}")
    return rows
