"""The verb: send a run, explained photographs or a sweep to an experiment tracker."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError, printable
from ..runs import Run
from ..runs.manifest import NAME
from .entries import Portion
from .of_maps import portions_of_maps
from .of_run import identity_of, portions_of_run
from .sending import PROJECT, Sending, Sent


def export(
    what: Run | str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    every: int = 1,
    project: str = PROJECT,
    follow: bool = False,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Sent:
    """Send a run, or maps, to an experiment tracker. What was sent before is not sent again.

    Of a run go: norms, zero fractions, moments and quantiles of each site and phase as scalars; histograms, with the
    very cells that were counted; rates of the optimizers; findings as texts. Of explained photographs and of a sweep:
    maps as images, and verdicts as texts. Steps are numbers of batches, those of earlier epochs before them.

    Args:
        what: a run or its folder, a folder of `undertow explain` or `trust`, or one of a sweep.
        to: "tensorboard", "wandb", "mlflow", "csv" or "npz".
        out: the tracker's folder, made where there is none; of mlflow also an address such as "http://host:5000".
            None is `WHAT-TO` beside it, or for mlflow what MLFLOW_TRACKING_URI says.
        every: of a run, every so many batches.
        project: of W&B, and the experiment of MLflow. Where this process has a W&B run already, it goes into that one.
        follow: go on until the run is finished, for one that is being recorded.
        progress: called with how many parts were sent, and how many there are.

    Raises:
        InputError: there is no such tracker, or nothing that it takes.
        RunError: `out` holds something else, or a file is damaged.
        FrameworkError: the tracker's package is missing.

    >>> import pathlib, tempfile, torch, undertow as ut
    >>> folder, net = tempfile.mkdtemp(), torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> with ut.record(folder, net, sites="linear", measures=["norm", "histogram"]) as recording, recording.batch():
    ...     net(torch.ones(4, 3)).sum().backward()
    >>> sent = export(folder, "csv", folder + "-csv")
    >>> sent.entries, sorted(path.name for path in pathlib.Path(sent.out).glob("*.csv"))
    (6, ['findings.csv', 'histograms.csv', 'scalars.csv'])
    """
    if not isinstance(every, int) or every < 1:
        raise InputError(f"every={every!r} must be a whole number of batches, at least 1")
    folder = what.folder if isinstance(what, Run) else Path(what)
    if not folder.is_dir():
        raise InputError(
            f"{printable(folder)} is no folder; give that of a run, of explained photographs or of a sweep"
        )
    is_run = (folder / NAME).is_file()  # as is, once it is finished, a sweep that records
    identity = identity_of(Run(folder)) if is_run else _identity_of_maps(folder)
    sending = Sending(folder, identity, to, None if out is None else str(out), project)
    try:
        for portions in _rounds(folder, is_run, every, follow):
            done = 0

            def told(count: int = len(portions)) -> None:
                nonlocal done
                done += 1
                progress(done, count)

            sending.send(portions, told)
    finally:
        sent = sending.close()
    return sent


def _rounds(folder: Path, is_run: bool, every: int, follow: bool) -> Iterator[list[Portion]]:
    """Yield all portions that there are; again and again until the run is finished, where it is followed."""
    if not is_run:
        yield list(portions_of_maps(folder))
        return
    while True:
        run = Run(folder)
        last = run.finished or not follow
        yield list(portions_of_run(run, every, with_findings=last))
        if last:
            return
        time.sleep(2)


def _identity_of_maps(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
