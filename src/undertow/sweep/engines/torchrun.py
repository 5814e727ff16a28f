"""Each of torchrun's processes does its own shards: every n-th. Nothing passes between them but the folder."""

import os
from dataclasses import replace

from ...errors import InputError
from ..fast import prepared_classifier
from ..folder import done_shards
from ..shards import Shards
from ..work import Advance, Job, Outcome, work
from . import Crew

OPTIONS: tuple[str, ...] = ()


def rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun says.

    Raises:
        InputError: it was not started by torchrun.
    """
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise InputError(
            "--engine torchrun needs torchrun: torchrun --nproc-per-node 2 -m undertow explain ... --engine torchrun"
        ) from error


def share(shards: Shards) -> list[int]:
    """Return this rank's shards."""
    number, world_size = rank()
    return list(range(number, len(shards), world_size))


def run(job: Job, crew: Crew, advance: Advance) -> Outcome:
    """Do what is missing of this rank's shards."""
    done = set(done_shards(job.folder))
    missing = [shard for shard in share(job.shards) if shard not in done]
    job = replace(job, classifier=prepared_classifier(job, job.classifier))
    return work(job, missing, advance, crew.before, crew.fresh)
