"""Writes batches into a run from a thread of its own: whole groups of them, or nothing."""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ..diagnosis import Live
from ..errors import RunError
from ..files import readable, sha256_of, sync_folder
from ..frameworks.base import Transfer
from ..frameworks.results import Observation
from ..measures import Columns, Measure
from ..runs.checksums import FOLDER as CHECKSUMS
from ..runs.checksums import write_checksums
from ..runs.format import COMMITTED, KEYS, MAX_PART_BYTES, SITE, SITE_KEYS, TABLES, appearing, write_tensor
from ..runs.parts import part_name, parts_of
from .group import BatchGroup, write

_QUEUED_HANDOVERS = 4
_HANDOVER_BYTES = 16 << 20
_GROUP_BYTES = 64 << 20
_GROUP_SECONDS = 10.0


@dataclass
class Batch:
    """All that one batch left at some sites, its arrays perhaps still on their way to the host."""

    epoch: int
    batch: int
    names: Sequence[str] | None
    size: int
    sites: Sequence[str]
    facts: dict[str, Any]
    scale: Any
    points: Sequence[Any]
    transfer: Transfer
    steps: Sequence[dict[str, Any]] = ()
    described: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass
class _Handover:
    """Batches for the thread, whether to publish them, and the event that it sets when it is done with them."""

    batches: list[Batch]
    publish: bool
    done: threading.Event


class Writer:
    """A thread with a bounded queue. Its first error stops it, and is raised by the next `check`, `put` or `close`.

    Batches are handed over several at a time: a thread that wakes for each competes with the training for the
    interpreter, and costs it several times its own work.

    Args:
        folder: of the run.
        measures: in the order in which each observation has its states.
        rank: of the process, part of the names of its files.
        group: how many batches are published together at most; fewer where the first has waited for 10 seconds, or at
            64 MiB.
        others: further tables, such as that of a diagnosis.
        sample_columns: the types of further columns of the table `samples`.
        diagnose: whether some batches are watched for a diagnosis.

    Attributes:
        committed: how many batches were published.
        live: what was put here, as evidence for a diagnosis; the thread's own until `settle` returns.
    """

    def __init__(
        self,
        folder: Path,
        measures: Sequence[Measure],
        rank: int = 0,
        group: int = 256,
        others: Sequence[str] = (),
        sample_columns: Mapping[str, str] | None = None,
    ) -> None:
        self._sample_columns = sample_columns
        self.folder, self.measures, self.rank, self.group = folder, measures, rank, group
        self._names = [*TABLES, *(measure.table for measure in measures), *others]
        self.published = _clear_uncommitted(folder, rank, self._names)
        self._digests: dict[str, str] = {}
        self._with_tensors = [n for n, measure in enumerate(measures) if "tensor" in measure.columns.values()]
        self._pending = BatchGroup(measures, sample_columns)
        self._held: list[Batch] = []
        self._unpublished = self._weight = 0
        self._since = 0.0
        self.committed = 0
        self.live = Live()
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Handover | None] = queue.Queue(_QUEUED_HANDOVERS)
        self._thread = threading.Thread(target=self._run, name="undertow-writer", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Add a batch to the next handover; waits where the thread is behind."""
        self.check()
        self._since = self._since if self._unpublished else time.monotonic()
        self._held.append(batch)
        self._unpublished += 1
        self._weight += batch.transfer.nbytes
        publish = self._unpublished >= self.group or time.monotonic() - self._since > _GROUP_SECONDS
        if publish or self._weight >= _HANDOVER_BYTES:
            self._hand_over(publish)

    def _hand_over(self, publish: bool) -> _Handover:
        handover = _Handover(self._held, publish, threading.Event())
        self._held, self._weight = [], 0
        if publish:
            self._unpublished = 0
        self._queue.put(handover)
        return handover

    def flush(self) -> None:
        """Publish all that was put here, and wait until it lies on the disk."""
        self.check()
        self._hand_over(True).done.wait()
        self.check()

    def settle(self) -> None:
        """Wait until `live` holds all that was put here; it need not lie on the disk."""
        self.check()
        self._hand_over(False).done.wait()
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
        while (handover := self._queue.get()) is not None:
            try:
                self._take(handover)
            except BaseException as error:  # whatever it was, the user's thread must hear of it
                self._error = error
                self._pending, self._digests = BatchGroup(self.measures, self._sample_columns), {}
            handover.done.set()
            handover = None  # batches must not live on while the thread waits

    def _take(self, handover: _Handover) -> None:
        while self._error is None and handover.batches:
            self._add(handover.batches.pop(0))
            if self._pending.nbytes >= _GROUP_BYTES:
                self._publish()
        if self._error is None and handover.publish:
            self._publish()

    def _add(self, batch: Batch) -> None:
        """Finish what the measures saw of a batch, and add it; the order does not depend on the backward pass's."""
        position = {name: i for i, name in enumerate(batch.sites)}
        observations = [o for o in batch.transfer.wait() if o.key.site in position]
        observations.sort(key=lambda o: (o.key.phase, position[o.key.site], o.key.call, o.repeat, o.key.output))
        names = [None] * batch.size if batch.names is None else _storable(batch.names)
        keys = {"epoch": batch.epoch, "batch": batch.batch, "rank": self.rank}
        scale = None if batch.scale is None else float(batch.scale)
        row = {**keys, **batch.facts, "size": batch.size, "scale": scale}
        points, steps = ([{**keys, **r} for r in rows] for rows in ([p.row() for p in batch.points], batch.steps))
        described = {name: _storable(values) for name, values in batch.described.items()}
        self._pending.begin(row, names, points, steps, described)
        self.live.begin(row, points, steps)
        for o in observations:
            site = (*keys.values(), o.key.site, o.key.call, o.key.output, o.key.phase, o.repeat, o.dtype)
            blocks = self._finished(o, site, batch)
            self._pending.add(site, o.size, o.first, blocks)
            tables = zip(self.measures, blocks, strict=True)
            self.live.add(dict(zip(SITE, site, strict=True)), {measure.table: block for measure, block in tables})

    def _finished(self, observation: Observation, site: tuple[Any, ...], batch: Batch) -> list[Columns]:
        """Return each measure's columns, with the names of files in the place of tensors."""
        blocks = [m.finish(state) for m, state in zip(self.measures, observation.states, strict=True)]
        for n in self._with_tensors:
            blocks[n].update(self._filed(self.measures[n], blocks[n], site, batch, observation.first))
        return blocks

    def _filed(self, measure: Measure, block: Columns, site: tuple[Any, ...], batch: Batch, first: int) -> Columns:
        """Write the tensors of a block into files and return their names in their places."""
        facts = dict(zip(SITE, site, strict=True))
        return {
            column: [
                self._file(facts, max(first, 0) + n if measure.per_sample else None, a, batch, first >= 0)
                for n, a in enumerate(block[column])
            ]
            for column, kind in measure.columns.items()
            if kind == "tensor"
        }

    def _file(self, site: Mapping[str, Any], sample: int | None, array: Any, batch: Batch, named: bool) -> str:
        """Write one tensor; the file is named after its sample or batch and its site, and after a digest of both."""
        facts = {key: site[key] for key in (*KEYS, *SITE_KEYS)}
        label, names = f"epoch{batch.epoch}-batch{batch.batch}", (batch.names or []) if named else []
        if sample is not None:
            facts |= {"sample": sample}
            label = names[sample] if sample < len(names) else f"{label}-sample{sample}"
            names = [label]
        digest = hashlib.sha256(json.dumps([facts, label]).encode()).hexdigest()[:16]
        name = f"{readable(label)}-{readable(site['site'] or 'model')}-{site['phase']}-{digest}.safetensors"
        texts = {key: str(value) for key, value in facts.items()}
        texts["names"] = json.dumps(list(names))
        path = self.folder / "tensors" / name
        self._digests[f"tensors/{name}"] = write_tensor(path, array, site["dtype"], texts)
        return name

    def _publish(self) -> None:
        """Let the parts of a group appear, the table that makes them count last, and their checksums before it."""
        if not len(self._pending):
            return
        if self._pending.nbytes > MAX_PART_BYTES // 2:
            raise ValueError(
                f"a batch of {self._pending.nbytes:,} bytes is more than a part may hold; record fewer sites"
            )
        number = next(number for number in count() if number not in self.published)
        name = f"{part_name(self.rank, number)}.parquet"
        for table, rows in self._pending.tables():
            if table == COMMITTED:
                for folder in (*(self.folder / other for other in self._names), self.folder / "tensors", self.folder):
                    sync_folder(folder)
            with appearing(self.folder / table / name) as aside:
                write(rows, aside)
                self._digests[f"{table}/{name}"] = sha256_of(aside)
                if table == COMMITTED:
                    write_checksums(self.folder, self.rank, number, self._digests)
                    sync_folder(self.folder / CHECKSUMS)
        sync_folder(self.folder / COMMITTED)
        self.committed += len(self._pending)
        self.published.add(number)
        self._pending, self._digests = BatchGroup(self.measures, self._sample_columns), {}


def _clear_uncommitted(folder: Path, rank: int, tables: Sequence[str]) -> set[int]:
    """Remove what a killed process of this rank left of a group, and return the numbers of those that count."""
    committed = {number for of, number in parts_of(folder, COMMITTED) if of == rank}
    for table, suffix in (*((table, ".parquet") for table in tables), (CHECKSUMS, ".sha256")):
        for (of, number), part in parts_of(folder, table, suffix).items():
            if of == rank and number not in committed:
                part.unlink()
        for aside in (folder / table).glob(f".part-{rank:03d}-*"):  # as earlier versions named them
            aside.unlink()
    return committed


def _storable(names: Sequence[Any]) -> Sequence[Any]:
    """Return names as Parquet can hold them: bytes of a file name that are no text become escapes; numbers stay."""
    try:
        "".join(names).encode()
    except TypeError:
        return names
    except UnicodeEncodeError:
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]
    return list(names)
