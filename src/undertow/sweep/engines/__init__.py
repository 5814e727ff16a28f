"""Who does which shards: `local` this process, `torchrun` every process its own, `ray` the workers of a cluster."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...classifier import Classifier
from ...errors import InputError, did_you_mean
from ..work import Advance, Job, Outcome

ENGINES = ("local", "torchrun", "ray")


@dataclass
class Crew:
    """What an engine needs to know beyond the job.

    Args:
        before: how many items had failed when it began.
        fresh: nothing was done when it began.
        load: loads the classifier anew in another process; None: it is sent there.
        options: of the engine, in the words of the command.
    """

    before: int = 0
    fresh: bool = False
    load: Callable[[], Classifier] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def engine_named(name: str) -> Any:
    """Import an engine: a file with `OPTIONS`, `rank()`, `share(shards)` and `run(job, crew, advance)`.

    Raises:
        InputError: there is no such engine.

    >>> engine_named("local").rank()
    (0, 1)
    """
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}{did_you_mean(str(name), ENGINES)} (known: {', '.join(ENGINES)})")
    return importlib.import_module(f".{name}", __name__)


def run(name: str, job: Job, crew: Crew, advance: Advance) -> Outcome:
    """Let an engine do what is missing."""
    outcome: Outcome = engine_named(name).run(job, crew, advance)
    return outcome
