"""One process at its shards: threads read ahead, one computes, and each shard's part appears when it is whole."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..classifier import Classifier
from ..errors import ModelError, PhotographError, RunError, UndertowWarning, one_line, printable
from ..images import without_warnings
from .folder import Failure, disk_named, done_shards, new_part, read_facts, storable, write_facts
from .shards import Shards
from .sources import Source
from .tasks import Bench, Item, Task

_AT_ONCE = (
    16  # items that a thread reads in one go, at most: to hand over each by itself takes as long as a small image
)
_SYSTEMATIC = 8  # if nothing could be computed of so many images, the network is to blame
Advance = Callable[[int, int], object]
"""Called with how many items were done, and how many of these failed."""


@dataclass
class Job:
    """All that a process needs to do some of the shards.

    Args:
        folder: of the sweep.
        source: what is swept.
        task: what is done.
        classifier: the network, on `device`.
        shards: how the source is cut.
        batch_size: how many items go through the network at once.
        workers: threads that read.
        max_failures: more than so many failures end this process; None: none do.
        draft: whether a large JPEG may be decoded at a smaller size.
        steps: by which the network is prepared.
    """

    folder: Path
    source: Source
    task: Task
    classifier: Classifier
    device: str
    shards: Shards
    batch_size: int
    workers: int = 2
    max_failures: int | None = None
    draft: bool = False
    steps: tuple[str, ...] = ()

    @property
    def batches(self) -> int:
        """How many batches there are numbers for; the last shard may use fewer."""
        return len(self.shards) * -(-self.shards.size // self.batch_size)


@dataclass
class Outcome:
    """What a process did: how many items it tried and could compute, which failed, and what was warned of.

    What could not be read was not tried.
    """

    tried: int = 0
    computed: int = 0
    failed: list[Failure] = field(default_factory=list)
    remarks: dict[str, type[Warning]] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        """Add what another process did."""
        self.tried += other.tried
        self.computed += other.computed
        self.failed += other.failed
        self.remarks |= other.remarks


def work(
    job: Job, shards: Sequence[int], advance: Advance = lambda done, failed: None, before: int = 0, fresh: bool = False
) -> Outcome:
    """Do some shards, each into its part.

    Args:
        before: how many items had failed beforehand.
        fresh: nothing was done beforehand.

    Raises:
        RunError: the disk refuses, or too many items failed; what was published remains.
        ModelError, RuleError, FrameworkError: of the network, whatever the item.
    """
    bench = Bench(job.classifier, job.device, job.folder, job.batches)
    outcome = Outcome(remarks=bench.remarks)
    with without_warnings(), _read_ahead(job, shards) as batches, _publishing(job.folder) as publish:
        for shard, of_shard in groupby(batches, key=lambda batch: batch[0]):
            started, failed = time.monotonic(), list[Failure]()
            with disk_named(job.folder), ExitStack() as part:
                aside = part.enter_context(new_part(job.folder, shard))
                with job.task.writing(bench, aside) as add:
                    for _, number, items, unread in of_shard:
                        undone = add(number, items)
                        failures = [*unread, *undone]
                        failed += failures
                        outcome.tried += len(items)
                        outcome.computed += len(items) - len(undone)
                        outcome.failed += failures
                        if undone and fresh:
                            _refuse_systematic(outcome, job.shards.items(shards))
                        advance(len(items) + len(unread), len(failures))
                        _refuse_too_many(job, before + len(outcome.failed), outcome.failed)
                done = len(job.shards[shard]) - len(failed)
                facts = (aside, shard, done, failed, time.monotonic() - started, time.time())
                publish(partial(write_facts, *facts), part.pop_all())
    if bench.largest is not None:
        remark = f"memory did not suffice for {job.batch_size} images at once; {bench.largest} were taken"
        outcome.remarks[remark] = UndertowWarning
    return outcome


@contextmanager
def _publishing(folder: Path) -> Iterator[Callable[[Callable[[], object], ExitStack], None]]:
    """Give what publishes a part on another thread, while the next one is computed; one waits at most.

    Raises:
        RunError: the disk refuses; said when the next part is published, or at the end.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="undertow-publisher") as pool:
        last: list[Future[None]] = []

        def finish(write: Callable[[], object], part: ExitStack) -> None:
            with disk_named(folder), part:
                write()

        def publish(write: Callable[[], object], part: ExitStack) -> None:
            submitted = pool.submit(finish, write, part)
            if last:
                last.pop().result()
            last.append(submitted)

        yield publish
        for future in last:
            future.result()


Batch = tuple[int, int, list[Item], list[Failure]]
"""A shard, the number of a batch in the sweep, its items, and those that could not be read."""


@contextmanager
def _read_ahead(job: Job, shards: Sequence[int]) -> Iterator[Iterator[Batch]]:
    """Give the batches of some shards in order, while threads read those that follow."""
    per_shard = job.batches // len(job.shards)
    plan = (
        (shard, shard * per_shard + n, batch)
        for shard in shards
        for n, batch in enumerate(job.shards.batches(shard, job.batch_size))
    )
    ahead = 1 + -(-2 * job.workers // job.batch_size)
    at_once = max(1, min(_AT_ONCE, job.batch_size // job.workers))
    with ThreadPoolExecutor(job.workers, thread_name_prefix="undertow-reader") as pool:

        def begin(step: tuple[int, int, range]) -> tuple[int, int, list[Future[list[Item | Failure]]]]:
            shard, number, indices = step
            starts = range(0, len(indices), at_once)
            return shard, number, [pool.submit(_read_items, job, indices[n : n + at_once]) for n in starts]

        def batches() -> Iterator[Batch]:
            reading = [begin(step) for _, step in zip(range(ahead), plan, strict=False)]
            while reading:
                shard, number, futures = reading.pop(0)
                reading += [begin(step) for _, step in zip(range(1), plan, strict=False)]
                results = [result for future in futures for result in future.result()]
                items = [result for result in results if isinstance(result, Item)]
                yield shard, number, items, [result for result in results if isinstance(result, Failure)]

        try:
            yield batches()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read_items(job: Job, indices: Sequence[int]) -> list[Item | Failure]:
    names = job.source.names
    return [read_item(job, index, names[index]) for index in indices]


def read_item(job: Job, index: int, name: str) -> Item | Failure:
    """Read an item and prepare it for the network; one that cannot be read is a failure."""
    preprocessing = job.classifier.preprocessing
    try:
        value = job.source.read(index, preprocessing.draft if job.draft else None)
        array: Any = preprocessing.array(value) if isinstance(value, Image.Image) else value
        if array is value and value.ndim == 3 and job.classifier.channels_last:
            array = np.moveaxis(value, -1, 0)  # as photographs are, which a batch puts in order
    except PhotographError as error:
        return Failure(index, storable(name), one_line(error))
    return Item(index, name, os.path.join(job.source.folder, name), array)


def first_items(job: Job, count: int) -> list[Item]:
    """Return the items of the first shard that can be read, at most so many."""
    names, items = job.source.names, list[Item]()
    for index in job.shards[0]:
        item = read_item(job, index, names[index])
        if isinstance(item, Item):
            items.append(item)
        if len(items) == count:
            break
    return items


def _refuse_systematic(outcome: Outcome, expected: int) -> None:
    """Stop where nothing could be computed of any of the first images that could be read."""
    if not outcome.computed and outcome.tried >= min(_SYSTEMATIC, expected):
        first = outcome.failed[0]
        raise ModelError(f"none of the first {outcome.tried} images could be done; {first.name}: {first.error}")


def _refuse_too_many(job: Job, count: int, failed: Sequence[Failure]) -> None:
    if job.max_failures is not None and count > job.max_failures:
        raise RunError(
            f"{count} images have failed, more than {job.max_failures}; the last: {failed[-1].error}; what was done "
            f"before remains in {printable(job.folder)}: the same command with a larger --max-failures goes on"
        )


def failures_before(folder: Path) -> int:
    """Return how many items failed in the parts that are there."""
    return sum(len(read_facts(folder, shard).failed) for shard in done_shards(folder))
