"""How many images go through the network at once: `--batch-size auto`, found by batches that grow."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import ModelError
from ..frameworks.base import capability, framework_of_model
from .tasks import Bench, Item
from .work import Job, first_items

SHARE = {"cpu": 0.5}
"""The part of the free memory that a batch may take: of a host, which others use too; elsewhere `OF_DEVICE`."""
OF_DEVICE = 0.8
GAIN = 0.95
"""From the default size on, a batch of twice as many must take at most this part of the time for each image."""


def fitting_batch_size(job: Job) -> int:
    """Return the largest size of a batch that fits into memory and is worth it; that of the job where nobody knows.

    Batches of 1, 2, 4, ... of the first shard's images are done, into a folder that is thrown away, until one of twice
    the size would take more memory than may be taken, or images come no sooner by it, or a shard is full.
    """
    try:
        memory = capability(framework_of_model(job.classifier.module), "memory")
    except ModelError:
        return job.batch_size
    free, grown = memory.free(job.device), memory.peak(job.device)
    items = first_items(job, job.shards.size)
    if free is None or grown is None or not items:
        return job.batch_size
    allowed = free * SHARE.get(job.device, OF_DEVICE)
    size, before = 1, float("inf")
    while True:
        seconds = _seconds_for_each(job, items[:size])
        if seconds is None or (size > job.batch_size and seconds > GAIN * before):
            return max(1, size // 2)
        if 2 * size > len(items) or 2 * grown() > allowed:
            return size
        size, before = 2 * size, seconds


def _seconds_for_each(job: Job, items: list[Item]) -> float | None:
    """Do a batch twice; return the seconds that an item took the second time, None where memory did not suffice."""
    seconds = 0.0
    for _ in range(2):
        bench = Bench(job.classifier, job.device, job.folder)
        started = time.perf_counter()
        with TemporaryDirectory() as aside, job.task.writing(bench, Path(aside)) as add:
            add(0, items)
        seconds = time.perf_counter() - started
        if bench.largest is not None:
            return None
    return seconds / len(items)
