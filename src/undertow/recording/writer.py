"""Writes batches into a run from a thread of its own: whole groups of them, or nothing."""

import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..files import readable
from ..measures import Measure
from ..run import (
    COMMITTED,
    DIAGNOSIS,
    KEYS,
    SAMPLE_KEYS,
    SITE_KEYS,
    TABLES,
    appearing,
    arrow,
    schema,
    settle,
    write_tensor,
)

_WAITING = 4
_COLUMN = (list, np.ndarray)
_HELD_BYTES = 16 << 20
_AT_MOST_BYTES = 64 << 20
_AT_MOST_SECONDS = 10.0


@dataclass
class Batch:
    """All that one batch left at some sites, its arrays perhaps still on their way to the host."""

    epoch: int
    batch: int
    names: Sequence[str] | None
    sites: Sequence[str]
    facts: dict[str, Any]
    scale: Any
    points: Sequence[Any]
    landing: Any


@dataclass
class _Bunch:
    """Batches for the thread, whether to publish them, and when it is done with them."""

    batches: list[Batch]
    publish: bool
    done: threading.Event


def columns_of(measure: Measure) -> dict[str, str]:
    """Return the columns of a measure's table, with their types."""
    keys = {**KEYS, **(SAMPLE_KEYS if measure.per_sample else {}), **SITE_KEYS, "dtype": "string"}
    return {**keys, **measure.columns}


class Writer:
    """A thread with a bounded queue. Its first error stops it, and is raised by the next `check`, `put` or `close`.

    Batches are handed over in bunches: a thread that wakes for each competes with the training for the interpreter, and
    costs it several times its own work.

    Args:
        folder: of the run.
        measures: in the order in which each reading has its states.
        rank: of the process, part of the names of its files.
        group: how many batches are published together at most; fewer where the first has waited for 10 seconds, or at
            64 MiB.
        diagnose: whether some batches are watched for a diagnosis.
    """

    def __init__(
        self, folder: Path, measures: Sequence[Measure], rank: int = 0, group: int = 64, diagnose: bool = False
    ) -> None:
        self.folder, self.measures, self.rank, self.group = folder, measures, rank, group
        self._schemas = {name: schema(columns) for name, columns in TABLES.items()}
        self._schemas |= {measure.table: schema(columns_of(measure)) for measure in measures}
        self._schemas |= {"diagnosis": schema(KEYS | DIAGNOSIS)} if diagnose else {}
        self._number = _clear_uncommitted(folder, rank, list(self._schemas))
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._held: list[Batch] = []
        self._unpublished = self._weight = 0
        self._since = 0.0
        self._batches = self._bytes = 0
        self.committed = 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Bunch | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="undertow-writer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Keep a batch for the next bunch; waits where the thread is behind."""
        self.check()
        self._since = self._since if self._unpublished else time.monotonic()
        self._held.append(batch)
        self._unpublished += 1
        self._weight += batch.landing.nbytes
        publish = self._unpublished >= self.group or time.monotonic() - self._since > _AT_MOST_SECONDS
        if publish or self._weight >= _HELD_BYTES:
            self._hand_over(publish)

    def _hand_over(self, publish: bool) -> _Bunch:
        bunch = _Bunch(self._held, publish, threading.Event())
        self._held, self._weight = [], 0
        if publish:
            self._unpublished = 0
        self._queue.put(bunch)
        return bunch

    def flush(self) -> None:
        """Publish all that was put here, and wait until it lies on the disk."""
        self.check()
        self._hand_over(True).done.wait()
        self.check()

    def close(self) -> None:
        """Publish what is left and end the thread.

        Raises:
            RunError: something could not be written.
        """
        if self._thread.is_alive():
            self._hand_over(True)
            self._queue.put(None)
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread.

        Raises:
            RunError: something could not be written; what was published before is whole.
        """
        if self._error is not None:
            reason = " ".join(str(self._error).split()) or type(self._error).__name__
            raise RunError(
                f"recording into {self.folder} has stopped: {reason}; the {self.committed} batches "
                "published since it began are whole, and recording again with the same settings goes on from them"
            ) from self._error

    def _run(self) -> None:
        _give_way()
        while (bunch := self._queue.get()) is not None:
            try:
                self._take(bunch)
            except BaseException as error:  # whatever it was, the user's thread must hear of it
                self._error = error
                self._rows.clear()
            bunch.done.set()
            bunch = None  # batches must not live on while the thread waits

    def _take(self, bunch: _Bunch) -> None:
        while self._error is None and bunch.batches:
            self._add(bunch.batches.pop(0))
            if self._bytes >= _AT_MOST_BYTES:
                self._publish()
        if self._error is None and bunch.publish:
            self._publish()

    def _add(self, batch: Batch) -> None:
        """Finish the measures of a batch and keep their columns until the group is published.

        Their order does not depend on the backward pass's.
        """
        place = {name: i for i, name in enumerate(batch.sites)}
        readings = [reading for reading in batch.landing.wait() if reading.site in place]
        readings.sort(key=lambda r: (r.phase, place[r.site], r.call, r.repeat, r.output))
        size = len(batch.names) if batch.names is not None else max((reading.size for reading in readings), default=0)
        keys = {"epoch": batch.epoch, "batch": batch.batch, "rank": self.rank}
        scale = None if batch.scale is None else float(batch.scale)
        self._rows["batches"].append({**keys, **batch.facts, "size": size, "scale": scale})
        names = [None] * size if batch.names is None else _storable(batch.names)
        samples = {"sample": np.arange(size, dtype=np.int32), "name": names}
        self._rows["samples"].append({**keys, **samples})
        for reading in readings:
            site = {name: getattr(reading, name) for name in (*SITE_KEYS, "dtype")}
            matching = size == reading.size  # else the first axis is not that of the samples
            called = {"sample": np.arange(reading.size), "name": names if matching else [None] * reading.size}
            for measure, state in zip(self.measures, reading.states, strict=True):
                block = {**keys, **(called if measure.per_sample else {}), **site, **measure.finish(state)}
                self._rows[measure.table].append(self._stored(measure, block, batch))
        self._rows["diagnosis"] += [{**keys, **point.row()} for point in batch.points]
        self._batches += 1

    def _stored(self, measure: Measure, block: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """Write the tensors of a block into files and put their names in their places."""
        for column, kind in measure.columns.items():
            if kind == "tensor":
                block[column] = [self._file(block, place, a, batch) for place, a in enumerate(block[column])]
            else:
                self._bytes += _nbytes(block[column], kind)
        return block

    def _file(self, block: Mapping[str, Any], place: int, array: Any, batch: Batch) -> str:
        """Write one tensor; the file is named after its sample or batch and its site, and after a digest of both."""
        facts = {key: block[key] for key in (*KEYS, *SITE_KEYS)}
        label, named = f"epoch{batch.epoch}-batch{batch.batch}", batch.names or []
        if "sample" in block:
            facts |= {"sample": place}
            label = named[place] if place < len(named) else f"{label}-sample{place}"
            named = [label]
        digest = hashlib.sha256(json.dumps([facts, label]).encode()).hexdigest()[:16]
        name = f"{readable(label)}-{readable(block['site'] or 'model')}-{block['phase']}-{digest}.safetensors"
        texts = {key: str(value) for key, value in facts.items()}
        write_tensor(self.folder / "tensors" / name, array, block["dtype"], {**texts, "names": json.dumps(list(named))})
        return name

    def _publish(self) -> None:
        """Let the parts of a group appear, the table that makes them count last."""
        if not self._batches:
            return
        name = f"part-{self.rank:03d}-{self._number:06d}.parquet"
        for table in sorted(self._schemas, key=lambda table: table == COMMITTED):
            if table == COMMITTED:
                for folder in (*{self.folder / other for other in self._schemas}, self.folder / "tensors", self.folder):
                    settle(folder)
            if blocks := self._rows.pop(table, None):
                with appearing(self.folder / table / name) as aside:
                    _write(_table(self._schemas[table], blocks), aside)
        settle(self.folder / COMMITTED)
        self.committed += self._batches
        self._batches = self._bytes = 0
        self._number += 1


def _give_way() -> None:
    """Let this thread run where the training leaves a processor free: where it does not, all of its threads would wait.

    Linux alone knows a priority of one thread. Whoever waits for this one, for its lock or its queue, leaves one free.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _clear_uncommitted(folder: Path, rank: int, tables: Sequence[str]) -> int:
    """Remove what a killed process of this rank left of a group, and return the number of the next one."""
    committed = {part.name for part in (folder / COMMITTED).glob(f"part-{rank:03d}-*.parquet")}
    for table in tables:
        for part in (folder / table).glob(f"part-{rank:03d}-*.parquet"):
            if part.name not in committed:
                part.unlink()
        for aside in (folder / table).glob(f".part-{rank:03d}-*"):
            aside.unlink()
    return 1 + max((int(name.split("-")[2].split(".")[0]) for name in committed), default=-1)


def _table(schema: Any, blocks: Sequence[Mapping[str, Any]]) -> Any:
    """Join blocks of columns, in which one value alone stands for all rows of its block: in all blocks or in none.

    Texts become numbers of a dictionary, so that none is looked at once for each row.
    """
    pa = arrow()
    columns = {name for name, value in blocks[0].items() if isinstance(value, _COLUMN)}
    some = next(iter(columns), None)
    lengths = np.array([1 if some is None else len(block[some]) for block in blocks])
    rows = pa.array(np.repeat(np.arange(len(blocks)), lengths))
    arrays = {}
    for entry in schema:
        values = [block[entry.name] for block in blocks]
        if entry.name not in columns:
            arrays[entry.name] = _encoded(pa, values, entry.type).take(rows)
        elif pa.types.is_list(entry.type):
            arrays[entry.name] = _lists(pa, entry.type, values)
        else:
            arrays[entry.name] = _column(pa, entry.type, values)
    return pa.table(arrays)


def _write(table: Any, path: Path) -> None:
    """Write a part: keys and texts as dictionaries, measured numbers by planes of bytes, sorted codes by differences.

    Dictionaries and statistics of measured numbers, of which none returns, would take as long as all the rest; those of
    numbers that are keys let a reader pass over parts. LZ4 takes half of zstd's time for 7 % more on the disk. Arrow's
    own memory pools give theirs back to the system each time, and to get it again takes longer than to compress.
    """
    pa = arrow()
    items = {f"{e.name}.list.element": e.type.value_type for e in table.schema if pa.types.is_list(e.type)}
    keys = [e.name for e in table.schema if not pa.types.is_list(e.type)]
    pa.parquet.write_table(
        table,
        path,
        compression="lz4",
        use_dictionary=keys,
        write_statistics=[name for name in keys if pa.types.is_integer(table.schema.field(name).type)],
        use_byte_stream_split=[name for name, kind in items.items() if pa.types.is_floating(kind)],
        column_encoding={name: "DELTA_BINARY_PACKED" for name, kind in items.items() if pa.types.is_integer(kind)}
        or None,
        store_schema=False,  # to readers, a text is a text
        memory_pool=pa.system_memory_pool(),
    )


def _encoded(pa: Any, values: Sequence[Any], kind: Any) -> Any:
    array = pa.array(values, kind)
    return array.dictionary_encode() if pa.types.is_string(kind) else array


def _column(pa: Any, kind: Any, columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], np.ndarray):
        return pa.array(np.concatenate(columns), kind)
    distinct = {id(column): column for column in columns}
    joined = _encoded(pa, [one for column in distinct.values() for one in column], kind)
    if len(distinct) == len(columns):
        return joined
    starts = dict(zip(distinct, np.cumsum([0, *map(len, distinct.values())]).tolist(), strict=False))
    places = [np.arange(starts[id(column)], starts[id(column)] + len(column)) for column in columns]
    return joined.take(pa.array(np.concatenate(places)))  # all sites of a batch share its names


def _lists(pa: Any, kind: Any, columns: Sequence[Any]) -> Any:
    """Join lists: of each block a table (rows, length), or one array for each row."""
    pieces = [p for v in columns for p in ([v] if _is_table(v) else [np.asarray(one)[None] for one in v])]
    sizes = np.repeat([piece.shape[1] for piece in pieces], [len(piece) for piece in pieces])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    joined: Any = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else []
    return pa.ListArray.from_arrays(offsets, pa.array(joined, kind.value_type), type=kind)


def _nbytes(values: Any, kind: str) -> int:
    if isinstance(values, np.ndarray):
        return values.nbytes
    return sum(np.asarray(one).nbytes for one in values) if kind.startswith("list<") else 8 * len(values)


def _is_table(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2


def _storable(names: Sequence[str]) -> Sequence[str]:
    """Return names as Parquet can hold them: bytes of a file name that are no text become escapes."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]
    return list(names)
