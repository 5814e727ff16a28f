"""A folder of photographs through one classifier, recorded: each image's own gradients, in batches, resumable."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import images
from ..classifier import Classifier, find_class
from ..display import ShownFields
from ..errors import InputError, PhotographError, TargetError
from ..frameworks.base import capability, framework_of_model
from ..runs.format import CLASSES
from ..scales import describe
from ..sites import selection
from .record import record

_WATCH_EVERY = 8
OBJECTIVES = ("predicted", "label", "loss")
Loaded = tuple[str, npt.NDArray[np.float32] | PhotographError]


@dataclass(repr=False)
class RecordedPhotographs(ShownFields):
    """What came of a folder.

    Attributes:
        photographs: how many were recorded by this call.
        before: how many batches were on the disk already.
        failed: names and reasons of those that could not be read.
    """

    photographs: int = 0
    before: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Return what came of it, ready for JSON."""
        failed = [{"photograph": name, "error": error} for name, error in self.failed]
        return {"run": str(folder), "photographs": self.photographs, "batches_before": self.before, "failed": failed}


def record_photographs(
    classifier: Classifier,
    source: str | Path,
    folder: str | Path,
    *,
    objective: str = "predicted",
    limit: int | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: str = "cpu",
    advance: Callable[[int], object] = lambda _: None,
    diagnose: bool | int = False,
    measures: Sequence[str] = ("channel-norm",),
    **options: Any,
) -> RecordedPhotographs:
    """Record the gradients of every photograph of a folder; goes on with its own unfinished run.

    The network is in eval mode and the objective is summed over the batch, so each photograph's gradients are its
    own, whatever the batch size. The table `samples` has the class that each was asked about, and its score.

    Args:
        source: a folder, or one photograph. Names are relative to it.
        folder: of the run.
        objective: "predicted" (the highest score), "label" (the score of the class that the photograph's own folder
            is named after, by name or number), or "loss" (the cross-entropy of that class).
        limit: how many photographs at most, in order of name.
        batch_size: None is 4 on a CPU, where larger batches only cost memory, and 32 elsewhere.
        workers: threads that read photographs ahead.
        device: where the classifier's module is.
        advance: called with the number of photographs done, read or not.
        diagnose: as `undertow.record` has it, but True is 8: batches are small, and nobody waits for a training step.
        options: sites, measures and phase, as `undertow.record` has them.

    Raises:
        InputError: nothing to record, or an argument that cannot be used.
        PhotographError: there is no such folder, or not one photograph in it can be read.
        TargetError: a folder is not named after a class, where the objective needs it.
        RunError: the run's folder holds something else.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is unknown (known: {', '.join(OBJECTIVES)})")
    photographs = _listed(Path(source), limit)
    labels = {} if objective == "predicted" else {name: label_of(classifier, path) for name, path in photographs}
    batch_size = batch_size or (4 if device == "cpu" else 32)
    batches = [photographs[start : start + batch_size] for start in range(0, len(photographs), batch_size)]
    source_facts = _identity(photographs) | {"batch_size": batch_size, "objective": objective}
    source_facts |= {"input": describe(classifier.preprocessing), "input_from": classifier.preprocessing_from}
    options |= {"objective": objective, "reference": classifier.reference, "source": source_facts}
    options |= {"loss_reduction": "sum", "diagnose": _WATCH_EVERY if diagnose is True else diagnose}
    recorder = capability(framework_of_model(classifier.module), "record")
    result = RecordedPhotographs()
    recording = record(folder, classifier.module, measures=measures, **options)
    if recording.learning.parameters:
        raise InputError(
            "the weights are frozen while photographs are recorded; record parameters with undertow.record"
        )
    recording.sample_columns = dict(CLASSES)
    with recorder.objective(classifier.module, objective) as run_objective, recording:
        before = {number for _, number in recording.done}
        result.before = len(before)
        advance(sum(len(batches[number]) for number in before))
        remaining = {number: batch for number, batch in enumerate(batches) if number not in before}
        for number, names, x in _loaded(classifier, remaining, device, workers, result, advance):
            with recording.batch(samples=names, batch=number):
                ids, scores = run_objective(x, [labels[name] for name in names] if labels else None)
                named = class_names(classifier, ids)
                recording.describe({"class": ids, "class_name": named, "score": scores})
            result.photographs += len(names)
        if not result.photographs and not result.before:
            first = result.failed[0][1]
            raise PhotographError(f"none of {len(photographs)} photographs could be read; the first: {first}")
    return result


def _loaded(
    classifier: Classifier,
    batches: Mapping[int, Sequence[tuple[str, Path]]],
    device: str,
    workers: int,
    result: RecordedPhotographs,
    advance: Callable[[int], object],
) -> Iterator[tuple[int, list[str], Any]]:
    """Yield number, names and tensor of each batch of which a photograph could be read; add the others to `result`."""
    arrays = capability(framework_of_model(classifier.module), "arrays")
    with _read_ahead(classifier, list(batches.values()), workers) as files:
        for number, photographs in zip(batches, files, strict=True):
            read = {name: array for name, array in photographs if not isinstance(array, PhotographError)}
            result.failed += [(name, str(array)) for name, array in photographs if isinstance(array, PhotographError)]
            if read:
                yield number, list(read), arrays.batch(list(read.values()), device)
            advance(len(photographs))


def _listed(root: Path, limit: int | None) -> list[tuple[str, Path]]:
    """Return the names, relative to the folder, and paths of its photographs, or of one photograph."""
    if not root.exists():
        raise PhotographError(f"{root} does not exist; check the name")
    paths = images.find([root])[:limit]
    return [(str(path.relative_to(root)) if root.is_dir() else path.name, path) for path in paths]


def class_names(classifier: Classifier, ids: Sequence[int]) -> list[str]:
    """Return the names of classes; the number of one that has no name."""
    return [classifier.classes[i] if i < len(classifier.classes) else str(i) for i in ids]


def kept_bytes(classifier: Classifier, sites: str, phase: str, device: str = "cpu") -> int:
    """Return how many bytes the measure "keep" takes for each photograph, by the shapes of one pass, in float32."""
    recorder = capability(framework_of_model(classifier.module), "record")
    shapes = recorder.visits(classifier.module, classifier.prepare(Image.new("RGB", (64, 64)), device))
    chosen = selection(sites).chosen(recorder.named_modules(classifier.module), list(shapes))
    elements = sum(_elements(shape) for name in chosen for shape in shapes.get(name, ()))
    return 4 * elements * (2 if phase == "both" else 1)


def _elements(shape: Sequence[Any]) -> int:
    """Return the number of elements of a shape, or of several."""
    if all(isinstance(side, int) for side in shape):
        return math.prod(shape)
    return sum(_elements(one) for one in shape)


def _identity(photographs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Return what tells these photographs from others: going on with a run needs the same."""
    names = "\0".join(name for name, _ in photographs).encode(errors="surrogateescape")
    return {"photographs": len(photographs), "names_sha256": hashlib.sha256(names).hexdigest()}


@contextmanager
def _read_ahead(
    classifier: Classifier, batches: Sequence[Sequence[tuple[str, Path]]], workers: int
) -> Iterator[Iterator[list[Loaded]]]:
    """Give an iterator over each batch's arrays; while one is in use the next is being read."""
    with ThreadPoolExecutor(workers) as pool:

        def begin(batch: Sequence[tuple[str, Path]]) -> list[Future[Loaded]]:
            return [pool.submit(_read, classifier, name, path) for name, path in batch]

        def loaded() -> Iterator[list[Loaded]]:
            reading = [begin(batch) for batch in batches[:1]]
            for i in range(len(batches)):
                reading += [begin(batch) for batch in batches[i + 1 : i + 2]]
                yield [future.result() for future in reading.pop(0)]

        try:
            yield loaded()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(classifier: Classifier, name: str, path: Path) -> Loaded:
    try:
        return name, classifier.preprocessing.array(images.read(path))
    except PhotographError as error:
        return name, error


def label_of(classifier: Classifier, path: str | Path) -> int:
    """Return the class that a photograph's own folder is named after.

    Raises:
        TargetError: it is named after none.
    """
    try:
        return find_class(classifier, Path(path).resolve().parent.name)
    except TargetError as error:
        raise TargetError(f"{path} lies in no folder named after a class: {error}") from error
