"""One process does all shards: threads read, one computes."""

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
    """Return 0 of 1.

    Raises:
        InputError: torchrun has started this process among others, which would all do the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("torchrun has started several processes, and each would do everything; add --engine torchrun")
    return 0, 1


def share(shards: Shards) -> list[int]:
    """Return all shards."""
    return list(range(len(shards)))


def run(job: Job, crew: Crew, advance: Advance) -> Outcome:
    """Do all shards that are missing."""
    missing = job.shards.missing(done_shards(job.folder))
    job = replace(job, classifier=prepared_classifier(job, job.classifier))
    return work(job, missing, advance, crew.before, crew.fresh)
