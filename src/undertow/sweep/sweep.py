"""The verbs: one task over a data set, in shards, on an engine; resumable at any moment."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..attribution.explain import ids_of_names
from ..classifier import Classifier
from ..errors import InputError, RunError, did_you_mean, printable
from ..files import clear_asides
from ..frameworks.base import capability, framework_of_model
from ..images import Preprocessing
from ..photographs import on_device, versions
from ..recording.lock import locked, refuse_links
from ..rules import resolve
from ..scales import describe
from ..signals import unwound_by_sigterm
from ..tables import ActivationRule, Rule
from .engines import ENGINES, Crew, engine_named, run
from .fast import chosen_steps
from .fitting import fitting_batch_size
from .folder import NAME, NAMES, PARTS, done_shards, names_digest, read_manifest, write_manifest
from .merge import merge_runs
from .pictures import draw
from .reader import Sweep
from .shards import Shards
from .sources import DatasetItems, source_of
from .tasks import ExplainTask, RecordTask, Task, TrustTask
from .work import Advance, Job, failures_before

SHARD_SIZE = 64


def explain(
    source: Any,
    model: Any,
    out: str | os.PathLike[str],
    *,
    rule: str | ActivationRule | Rule | Sequence[str | ActivationRule | Rule] = "guided",
    target: Any = "top:1",
    pictures: int | None = 0,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Sweep:
    """Explain every image of a data set, into a folder of maps; goes on with what is there.

    Args:
        source: a folder, a list (`.txt`), a column (`data.parquet:image`), tar files, several paths, or a torch
            `Dataset`; see `undertow.sweep.sources`.
        model: a `Classifier` of `ut.load`; or, for a data set of arrays that are ready for it, a network.
        out: the sweep's folder.
        rule: one or several, as `undertow.explain` has them.
        target: "top:K", a class by number or name, or several.
        pictures: of how many images, the first ones, pictures are drawn too; None: of all.
        options: through, activations, estimator, head, baseline, noise and inner_batch, as `undertow.explain` has them.
        how: engine, batch_size, workers, shard_size, max_failures, device, draft, advance; see `sweep`.

    Returns:
        What the folder holds now.

    Raises:
        InputError, PhotographError: nothing to sweep, or an argument that cannot be used.
        RunError: the folder holds something else, or too many images failed.
        ModelError, RuleError, TargetError: as `undertow.explain`.

    >>> import tempfile, torch, undertow as ut
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> images = [torch.ones(3, 2, 2), torch.zeros(3, 2, 2)]
    >>> sweep = ut.sweep.explain(images, net.eval(), tempfile.mkdtemp(), rule="gradient")
    >>> sweep.map("1").shape, ut.Sweep(sweep.folder).names
    ((3, 2, 2), ['0', '1'])
    """
    classifier = classifier_of(model)
    target = ids_of_names(target, classifier)
    target = target if isinstance(target, str) else tuple(target if isinstance(target, list | tuple) else [target])
    rules = tuple(dict.fromkeys(rule if isinstance(rule, list | tuple) else [rule]))
    names = [resolve(each)[0] for each in rules]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two rules have the name {twice!r}, by which their maps are kept; give one another name")
    at = source_of(source)
    swept = sweep(at, classifier, out, ExplainTask(rules, target, dict(options or {})), **how)
    if pictures != 0:
        engine = how.get("engine", "local")
        mine = [i for shard in engine_named(engine).share(swept.shards) for i in swept.shards[shard]]
        indices = mine if pictures is None else [i for i in mine if i < pictures]
        how.get("begin", lambda done, count: None)(0, len(indices))
        device = _device(classifier, how.get("device", "auto"), engine)
        draw(swept, at, classifier, device, indices, how.get("advance", lambda done, failed: None))
    return swept


def trust(
    source: Any,
    model: Any,
    out: str | os.PathLike[str],
    *,
    rule: str | Sequence[str] = "guided",
    estimator: str | Sequence[str] = "gradient",
    target: str | int | None = None,
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Sweep:
    """Ask of every image's map whether it deserves belief; `sweep.table()` has a row for each answer.

    Arguments, results and errors as of `explain`; `options` are seed and samples, as `undertow.trust` has them.
    """
    classifier = classifier_of(model)
    class_id = ids_of_names(target, classifier)
    rules, estimators = ((words,) if isinstance(words, str) else tuple(words) for words in (rule, estimator))
    return sweep(source, classifier, out, TrustTask(rules, estimators, class_id, dict(options or {})), **how)


def record(
    source: Any,
    model: Any,
    out: str | os.PathLike[str],
    *,
    objective: str = "predicted",
    options: Mapping[str, Any] | None = None,
    **how: Any,
) -> Sweep:
    """Record every image's own gradients; once all is there, the folder is a run, which `ut.Run` reads.

    Arguments, results and errors as of `explain`; `options` are sites, measures, phase and diagnose, as
    `undertow.record` has them, and `objective` as `undertow.recording.photographs` has it.
    """
    classifier = classifier_of(model)
    task = RecordTask(objective, dict(options or {}), {"input": describe(classifier.preprocessing)})
    return sweep(source, classifier, out, task, **how)


def sweep(
    source: Any,
    classifier: Classifier,
    out: str | os.PathLike[str],
    task: Task,
    *,
    engine: str = "local",
    batch_size: int | str | None = None,
    workers: int | None = None,
    shard_size: int | None = None,
    max_failures: int | None = None,
    device: str = "auto",
    draft: bool = False,
    limit: int | None = None,
    fast: str = "auto",
    advance: Advance = lambda done, failed: None,
    begin: Callable[[int, int], object] = lambda done, count: None,
    load: Callable[[], Classifier] | None = None,
    **options: Any,
) -> Sweep:
    """Do a task for every item of a source.

    Args:
        engine: "local", "torchrun" or "ray".
        batch_size: how many images go through the network at once. None: as it was begun, else 8 on a CPU
            and 32 elsewhere. "auto": as it was begun, else as many as fit into half of the free memory, of a GPU four
            fifths, as batches of 1, 2, 4, ... show; more than 8 and 32 where images come sooner by it, and at most a
            shard. The first process chooses, and the manifest says what. Where memory lacks all the same, batches are
            halved from there on. Results do not depend on it but for rounding.
        workers: threads that read; None: as many as there are processors, from 2 to 8, and one for a data set.
        shard_size: how many items are done, published and, where the process is killed, lost together. None: as it
            was begun, else 64.
        max_failures: more than so many that fail end the sweep; None is a tenth of all, and at least 10.
        device: "auto", "cpu", "cuda", ...
        draft: decode JPEGs at a half, a quarter or an eighth of their size where that is no smaller than the network's
            input is resized to. Quicker, and not the same to the last bit.
        limit: at most so many items, the first ones.
        fast: "auto": of `explain` with at least 200 batches the network is prepared, as by `undertow.prepare` in
            float32, where that is measured to be quicker on the first batch; all processes go by the first one's
            choice, which `Sweep.prepared` tells. "off": it is used as it is.
        advance: called with how many items were done, and how many of these failed.
        begin: called before the first, with how many of this process's items are done already, and how many it has.
        load: loads the classifier anew, in another process; else it is sent there.
        options: of the engine: `address` and `processes` of Ray.
    """
    folder = Path(out)
    at = source_of(source)
    names = at.names if limit is None else at.names[:limit]
    is_auto = batch_size == "auto"
    given = None if isinstance(batch_size, str) and is_auto else batch_size
    for option, value in (("shard_size", shard_size), ("batch_size", given), ("workers", workers)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{option}={value!r} must be a whole number of at least 1")
    if fast not in ("auto", "off"):
        raise InputError(f"fast={fast!r} is neither 'auto' nor 'off'")
    engine_file = engine_named(engine)
    if unknown := [word for word in options if word not in engine_file.OPTIONS]:
        raise InputError(_about_option(unknown[0], engine))
    rank, _ = engine_file.rank()
    device = _device(classifier, device, engine)
    begun = read_manifest(folder) if (folder / NAME).exists() else {"settings": {}}
    size = given or begun["settings"].get("batch_size") or (8 if device == "cpu" else 32)
    shards = Shards(len(names), shard_size or begun.get("shard_size", SHARD_SIZE))
    one_reader = isinstance(at, DatasetItems)
    job = Job(
        folder,
        at,
        task,
        classifier,
        device,
        shards,
        batch_size=int(size),
        workers=workers or (1 if one_reader else max(2, min(8, os.cpu_count() or 2))),
        max_failures=max(10, len(names) // 10) if max_failures is None else max_failures,
        draft=draft,
    )
    with _opened(folder, rank), unwound_by_sigterm():
        if is_auto and not begun["settings"]:
            job.batch_size = fitting_batch_size(job)
        manifest = write_manifest(folder, _manifest(job, names, fast), names, ("batch_size",) if is_auto else ())
        job.batch_size = manifest["settings"]["batch_size"]
        done = done_shards(folder)
        share = engine_file.share(shards)
        begin(shards.items(set(done) & set(share)), shards.items(share))
        if fast == "auto":
            job.steps = chosen_steps(job)
        crew = Crew(failures_before(folder), not done, load, dict(options))
        outcome = run(engine, job, crew, advance)
        if task.name == "record" and not shards.missing(done_shards(folder)):
            merge_runs(folder, shards)
    for remark, category in outcome.remarks.items():
        warnings.warn(remark, category, stacklevel=3)
    return Sweep(folder)


def _about_option(word: str, engine: str) -> str:
    """Say that an option is of another engine, or that there is none of this name."""
    others = [name for name in ENGINES if word in engine_named(name).OPTIONS]
    if others:
        return f"{word} is an option of the engine {others[0]}, not of {engine}; leave it out, or choose that engine"
    known = {*inspect.signature(sweep).parameters} - {"source", "classifier", "out", "task", "options"}
    return f"a sweep has no option {word!r}{did_you_mean(word, known)} (known: {', '.join(sorted(known))})"


def classifier_of(model: Any) -> Classifier:
    """Return a classifier as it is; a network becomes one without names of classes.

    >>> import torch
    >>> classifier_of(torch.nn.Linear(2, 2).eval()).reference
    'Linear'
    """
    if isinstance(model, Classifier):
        return model
    if not callable(model):
        raise InputError(f"model is a {type(model).__name__}, which cannot be called; pass a Classifier or a network")
    identity = capability(framework_of_model(model), "record").identity(model)
    digest = identity["weights_sha256"] or ""
    return Classifier(type(model).__name__, model, Preprocessing(), (), "given in Python", digest)


def _manifest(job: Job, names: Sequence[str], fast: str) -> dict[str, Any]:
    """Return what tells this sweep from others; that of a photograph's preprocessing and of versions goes with it."""
    classifier = job.classifier
    model = {
        "reference": classifier.reference,
        "weights": classifier.weights,
        "weights_sha256": classifier.weights_sha256,
        "preprocessing": {**classifier.preprocessing.to_dict(), "draft": job.draft},
        "output": classifier.output,
    }
    source = {"kind": job.source.kind, "count": len(names), "names_sha256": names_digest(names)}
    return {
        "task": job.task.name,
        "settings": {**job.task.settings(), "batch_size": job.batch_size, "fast": fast},
        "source": source,
        "shard_size": job.shards.size,
        "model": model,
        "where": job.source.where,
        "versions": versions(),
    }


def _device(classifier: Classifier, name: str, engine: str) -> str:
    """Move the network to its device; of several processes on a machine each takes a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    if engine == "torchrun" and local is not None and name in ("auto", "cuda"):
        arrays = capability(framework_of_model(classifier.module), "arrays")
        if arrays.device(name) == "cuda":
            name = f"cuda:{local}"
    return on_device(classifier, name)


@contextmanager
def _opened(folder: Path, rank: int) -> Iterator[None]:
    """Take the folder of a sweep, and clear what killed processes left half written.

    Raises:
        RunError: another process is at it, or it holds something else, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RunError(f"cannot write into {printable(folder)}: {error.strerror}; choose another --out") from error
    if files and NAME not in files and files != [NAMES]:
        raise RunError(f"{printable(folder)} holds {printable(files[0])} and is no sweep; choose another --out")
    with locked(folder, rank, "sweep"):
        refuse_links(folder, [PARTS, "pictures"])
        for path in (folder, folder / PARTS):
            clear_asides(path)
        yield
