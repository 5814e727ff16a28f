"""Ray's workers do the shards: one machine or a cluster. A worker that dies is started again, and its shard with it.

All of them must see the sweep's folder and the source under the same paths, as on a network disk.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ...classifier import Classifier
from ...errors import FrameworkError, RunError, UndertowError, one_line, printable
from ...installing import install_command
from ...photographs import on_device
from ...signals import handlers_kept
from ..fast import prepared_classifier
from ..folder import done_shards
from ..shards import Shards
from ..work import Advance, Job, Outcome, work
from . import Crew

_PATIENCE = 10  # seconds, for the first answer of a cluster
_RETRIES = 5  # of a shard whose worker dies
Do = Callable[[int, bool], Any]
"""Lets a worker do a shard, and returns what Ray calls a reference to its `Outcome`."""


OPTIONS: tuple[str, ...] = ("address", "processes")


def rank() -> tuple[int, int]:
    """Return 0 of 1: the driver alone holds the folder."""
    return 0, 1


def share(shards: Shards) -> list[int]:
    """Return all shards, which this driver hands out."""
    return list(range(len(shards)))


class RayWorker:
    """A process of Ray's, with a network of its own; what it is to do comes with each call, so that it can restart."""

    job: Job | None = None

    def do(self, job: Job, load: Callable[[], Classifier] | None, folder: str, shard: int, fresh: bool) -> Outcome:
        """Do one shard; the driver counts failures."""
        if self.job is None:
            os.chdir(folder)  # paths are relative to where the command was given
            classifier = job.classifier if load is None else load()
            device = on_device(classifier, job.device)
            job = replace(job, device=device, max_failures=None, classifier=classifier)
            self.job = replace(job, classifier=prepared_classifier(job, classifier))
        return work(self.job, [shard], fresh=fresh)


def run(job: Job, crew: Crew, advance: Advance) -> Outcome:
    """Do all shards that are missing, each by the next worker that is free.

    Raises:
        RunError: too many items failed, or workers died again and again.
        FrameworkError: Ray is not installed.
    """
    outcome = Outcome()
    missing = sorted(set(share(job.shards)) - set(done_shards(job.folder)))
    with _cluster(crew) as ray, _workers(ray, job, crew, len(missing)) as pool:
        waiting = iter(missing)
        busy = {do(shard, crew.fresh): (do, shard) for do, shard in zip(pool, waiting, strict=False)}
        while busy:
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            do, shard = busy.pop(ready)
            done = _result(ray, ready)
            outcome.add(done)
            advance(len(job.shards[shard]), len(done.failed))
            _refuse_too_many(job, crew.before + len(outcome.failed), outcome)
            if (following := next(waiting, None)) is not None:
                busy[do(following, False)] = (do, following)
    return outcome


def _refuse_too_many(job: Job, count: int, outcome: Outcome) -> None:
    if job.max_failures is not None and count > job.max_failures:
        raise RunError(
            f"{count} images have failed, more than {job.max_failures}; the last: {outcome.failed[-1].error}; what was "
            f"done remains in {printable(job.folder)}: the same command with a larger --max-failures goes on"
        )


def _result(ray: Any, reference: Any) -> Outcome:
    """Return what a worker did, or raise its own error.

    Raises:
        UndertowError: the worker's own.
        RunError: workers died, or failed in another way.
    """
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UndertowError):
            raise error.cause from None
        raise RunError(f"a worker of Ray failed: {one_line(error.cause or error)}; what was done remains") from error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"workers of Ray died {_RETRIES} times at a shard: {one_line(error)[:200]}; what was done remains, and the "
            "same command goes on"
        ) from error
    return outcome


@contextmanager
def _cluster(crew: Crew) -> Iterator[Any]:
    """Give Ray, connected to the cluster at `address`, or started here and ended afterwards.

    Raises:
        FrameworkError: Ray is not installed.
        RunError: there is no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise FrameworkError(f"ray is missing; run: {install_command('ray')}") from error
    address = crew.options.get("address")
    if ray.is_initialized():
        yield ray
        return
    _refuse_silent(address or "")
    where = {"address": address} if address else {"num_cpus": crew.options.get("processes"), "include_dashboard": False}
    try:
        with handlers_kept():
            ray.init(**where, log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises many kinds
        raise RunError(f"Ray cannot be started or reached at {address or 'this machine'}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Refuse HOST:PORT where nothing listens, which Ray itself would wait for, many minutes long.

    Raises:
        RunError: nothing does.
    """
    if match := re.fullmatch(r"([^/\[\]:]+):(\d{1,5})", address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=_PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise RunError(f"Ray cannot be reached at {printable(address)}: {one_line(error)}") from error


@contextmanager
def _workers(ray: Any, job: Job, crew: Crew, wanted: int) -> Iterator[list[Do]]:
    """Give workers: as many as were asked for, else one for each GPU, else for each two processors.

    Ray gives each as many threads as processors.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0)) if job.device.startswith("cuda") else 0
    count = min(crew.options.get("processes") or gpus or max(1, cpus // 2), wanted)
    needs = {"num_cpus": max(1, cpus // max(1, count)), "num_gpus": 1 if gpus else 0}
    device = "cuda" if gpus else job.device  # Ray shows each worker its own
    classifier: Any = job.classifier if crew.load is None else None
    shared = ray.put(replace(job, classifier=classifier, device=device))
    remote = ray.remote(**needs, max_restarts=-1, max_task_retries=_RETRIES)(RayWorker)
    workers = [remote.remote() for _ in range(count)]
    try:
        yield [partial(worker.do.remote, shared, crew.load, os.getcwd()) for worker in workers]
    finally:
        for worker in workers:
            ray.kill(worker)
