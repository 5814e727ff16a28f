"""A sweep prepares its network once, and every process that goes on with it does the same: what was chosen is kept."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..attribution.preparing import prepared_for
from ..classifier import Classifier
from ..errors import InputError, ModelError
from ..frameworks.base import as_numpy, capability, framework_of_model
from ..runs.format import damage_named
from .folder import done_shards, read_json, write_json
from .tasks import Bench, ExplainTask
from .work import Job, first_items

FILE = "prepared.json"
FEWEST = 200
"""Batches of a sweep from which on it is measured whether a prepared network is quicker: it takes as long as 20."""


def chosen_steps(job: Job) -> tuple[str, ...]:
    """Return the steps by which this sweep's network is prepared; they are chosen by the process that comes first.

    Only maps are made with a prepared network: what layers within it compute is something else.
    """
    if not isinstance(job.task, ExplainTask):
        return ()
    with suppress(FileNotFoundError):
        return read_steps(job.folder)
    if job.batches < FEWEST or done_shards(job.folder):
        return ()
    try:
        framework = capability(framework_of_model(job.classifier.module), "prepare")
    except ModelError:
        return ()
    items = first_items(job, job.batch_size)
    if not items:
        return ()
    bench = Bench(job.classifier, job.device, job.folder)
    task = job.task

    def maps(module: Any) -> list[npt.NDArray[Any]]:
        of = Bench(replace(job.classifier, module=module), job.device, job.folder)
        return [as_numpy(attribution.values) for attribution in task.explained(of, items).values()]

    prepared = prepared_for(job.classifier.module, bench.batch(items), maps)
    assert set(prepared.steps) <= set(framework.STEPS)
    facts = {"steps": prepared.steps, "trials": [str(trial) for trial in prepared.trials]}
    with suppress(FileExistsError):  # another process was quicker: its choice counts
        write_json(job.folder / FILE, json.loads(json.dumps(facts)), new=True)
    return read_steps(job.folder)


def read_steps(folder: Path) -> tuple[str, ...]:
    """Return the steps that were chosen.

    Raises:
        FileNotFoundError: nothing was chosen.
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(path)
    with damage_named(path):
        return tuple(str(step) for step in read_json(path)["steps"])


def prepared_classifier(job: Job, classifier: Classifier) -> Classifier:
    """Return a classifier whose network is prepared by the steps of a job."""
    items = first_items(job, job.batch_size)
    if not job.steps or not items:
        return classifier
    framework = capability(framework_of_model(classifier.module), "prepare")
    if unknown := set(job.steps) - set(framework.STEPS):
        raise InputError(f"{job.folder / FILE} names a step that there is not: {unknown.pop()!r}")
    example = Bench(classifier, job.device, job.folder).batch(items)
    return replace(classifier, module=framework.prepared(classifier.module, job.steps, example))
