"""A folder of photographs through one classifier, recorded: each image's own gradients, in batches, resumable."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import images
from ..errors import InputError, PhotographError, TargetError
from ..frameworks.base import backend_of_model
from ..models import Classifier, find_class
from ..run import Run
from .record import record

_OFTEN = 8
OBJECTIVES = ("predicted", "label", "loss")
Loaded = tuple[str, npt.NDArray[np.float32] | PhotographError]


@dataclass
class Recorded:
    """What came of a folder.

    Attributes:
        photographs: how many were recorded by this call.
        before: how many batches were on the disk already.
        failed: names and reasons of those that could not be read.
    """

    photographs: int = 0
    before: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def record_photographs(
    classifier: Classifier,
    source: str | Path,
    folder: str | Path,
    *,
    sites: str = "conv",
    measures: Sequence[str] = ("channel-norm",),
    phase: str = "backward",
    objective: str = "predicted",
    limit: int | None = None,
    batch_size: int | None = None,
    diagnose: bool | int = False,
    workers: int = 2,
    device: str = "cpu",
    advance: Callable[[int], object] = lambda _: None,
) -> Recorded:
    """Record the gradients of every photograph of a folder; goes on with its own unfinished run.

    The network is in eval mode and the objective is summed over the batch, so each photograph's gradients are its
    own, whatever the batch size.

    Args:
        source: a folder, or one photograph. Names are relative to it.
        folder: of the run.
        sites, measures, phase: as `undertow.record` has them.
        objective: "predicted" (the highest score), "label" (the score of the class that the photograph's own folder
            is named after, by name or number), or "loss" (the cross-entropy of that class).
        limit: how many photographs at most, in order of name.
        batch_size: None is 4 on a CPU, where larger batches only cost memory, and 32 elsewhere.
        diagnose: as `undertow.record` has it, but True is 8: batches are small, and nobody waits for a training step.
        advance: called with the number of photographs done, read or not.

    Raises:
        InputError: nothing to record, or an argument that cannot be used.
        PhotographError: there is no such folder, or not one photograph in it can be read.
        TargetError: a folder is not named after a class, where the objective needs it.
        RunError: the run's folder holds something else.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is unknown (known: {', '.join(OBJECTIVES)})")
    batch_size = batch_size or (4 if device == "cpu" else 32)
    root = Path(source)
    if not root.exists():
        raise PhotographError(f"{root} does not exist; check the name")
    paths = images.find([root])[:limit]
    names = [str(path.relative_to(root)) if root.is_dir() else path.name for path in paths]
    labels = None if objective == "predicted" else [_label(classifier, path) for path in paths]
    backend = backend_of_model(classifier.module)
    told = {"photographs": len(names), "names_sha256": _digest(names), "batch_size": batch_size, "objective": objective}
    done = Recorded()
    with ExitStack() as stack:
        run_objective = stack.enter_context(backend.objective(classifier.module, objective))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        recording = stack.enter_context(
            record(
                folder,
                classifier.module,
                sites=sites,
                measures=measures,
                phase=phase,
                loss_reduction="sum",
                objective=objective,
                reference=classifier.reference,
                source=told,
                diagnose=_OFTEN if diagnose is True else diagnose,
            )
        )
        batches = [range(len(paths))[start : start + batch_size] for start in range(0, len(paths), batch_size)]
        there = set(Run(folder).table("batches")["batch"].to_pylist())
        waiting = [number for number in range(len(batches)) if number not in there]
        done.before = len(batches) - len(waiting)
        advance(sum(len(batches[number]) for number in there))
        todo = [[(names[i], paths[i]) for i in batches[number]] for number in waiting]
        for number, loaded in zip(waiting, _ahead(pool, classifier, todo), strict=True):
            good = [(name, array) for name, array in loaded if not isinstance(array, PhotographError)]
            done.failed += [(name, str(array)) for name, array in loaded if isinstance(array, PhotographError)]
            if good:
                wanted = None if labels is None else [labels[names.index(name)] for name, _ in good]
                x = backend.batch([array for _, array in good], device)
                with recording.batch(samples=[name for name, _ in good], batch=number):
                    run_objective(x, wanted)
                done.photographs += len(good)
            advance(len(loaded))
        if not done.photographs and not done.before:
            raise PhotographError(f"none of {len(names)} photographs could be read; the first: {done.failed[0][1]}")
    return done


def _ahead(
    pool: ThreadPoolExecutor, classifier: Classifier, batches: Sequence[Sequence[tuple[str, Path]]]
) -> Iterator[list[Loaded]]:
    """Yield each batch's arrays; while one is in use the next is being read."""

    def begin(batch: Sequence[tuple[str, Path]]) -> list[Future[Loaded]]:
        return [pool.submit(_read, classifier, name, path) for name, path in batch]

    reading = [begin(batch) for batch in batches[:1]]
    for place in range(len(batches)):
        reading += [begin(batch) for batch in batches[place + 1 : place + 2]]
        yield [future.result() for future in reading.pop(0)]


def _read(classifier: Classifier, name: str, path: Path) -> Loaded:
    try:
        return name, classifier.preprocessing.array(images.read(path))
    except PhotographError as error:
        return name, error


def _label(classifier: Classifier, path: Path) -> int:
    try:
        return find_class(classifier, path.resolve().parent.name)
    except TargetError as error:
        raise TargetError(f"{path} lies in no folder named after a class: {error}") from error


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def as_facts(done: Recorded, folder: Path) -> dict[str, Any]:
    """Return what came of it, ready for JSON."""
    failed = [{"photograph": name, "error": error} for name, error in done.failed]
    return {"run": str(folder), "photographs": done.photographs, "batches_before": done.before, "failed": failed}
