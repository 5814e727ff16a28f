"""The verb: watch sites of a network through the batches of a loop, and leave a run."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from ..diagnosis import Findings, diagnosed
from ..display import Part, ShownItem, ShownTable, brief, counted
from ..errors import InputError, RunError, one_line, printable
from ..files import clear_asides, published
from ..frameworks.base import BatchProbe, ParameterProbe, Recorder, bound, capability, framework_of
from ..measures import Measure, resolve
from ..runs.checksums import FOLDER as CHECKSUMS
from ..runs.checksums import missing, read_checksums
from ..runs.format import COMMITTED, DIAGNOSIS, FORMAT, KEYS, STEPS, TABLES, arrow, columns_of, damaged
from ..runs.manifest import read_manifest, write_manifest
from ..runs.parts import batch_counts, batches_of, parts_of
from ..signals import unwound_by_sigterm
from ..sites import Predicate, Selection, Site, recorder_of, selection
from ..trackers.live import LiveExport
from .axes import SiteAxes, given_axes
from .lock import locked, refuse_links, refuse_strangers
from .naming import give_names, n_samples
from .schedule import Schedule
from .steps import FROZEN, EndedBatch, Learning, learning_of
from .telling import OnFinding, Teller, checked, tell_of_bytes
from .writer import Writer

PHASES = {"backward": ("backward",), "forward": ("forward",), "both": ("forward", "backward")}
REDUCTIONS = ("mean", "sum")
_NEVER_CALLED = "its module was never called"
_HIDDEN = "no gradient reached its output, a view: if that is changed in place afterwards, take the module before it"
_SETTINGS = ("phase", "schedule", "measures", "objective", "source", "loss_reduction", "world_size", "diagnose", "axes")


def record(
    folder: str | Path,
    model: Any,
    *,
    sites: str | Predicate | Iterable[str | Site] = "conv",
    measures: str | Measure | Iterable[str | Measure] = ("channel-norm", "zero-fraction"),
    phase: str = "backward",
    schedule: Schedule | None = None,
    loss_reduction: str = "mean",
    scaler: Any = None,
    optimizer: Any = None,
    axes: str | Mapping[str, str] | None = None,
    objective: str | None = None,
    reference: str | None = None,
    source: dict[str, Any] | None = None,
    diagnose: bool | int = False,
    on_finding: OnFinding = None,
    every: int = 100,
    group: int = 256,
    to: str | None = None,
) -> "Recording":
    """Record what passes through sites of a network, batch by batch, into a folder that outlives a crash.

    Recording into the folder of an unfinished run of the same network and settings goes on with it: batches that are
    on the disk are not recorded again. A network in training mode is the same if its structure is, since its weights
    change; in evaluation mode its weights must be the same too.

    Backward values are the gradient of what `.backward()` was called on, with respect to the site's output, with the
    AMP scale divided out and nothing else: a mean over B samples makes each sample's gradient B times smaller. Sizes,
    reduction and number of processes are recorded for each batch, and `per_sample=True` in reading undoes the mean.

    Args:
        folder: of the run; made where there is none.
        model: a `torch.nn.Module`, not compiled; behind DistributedDataParallel its own names count. Or a Keras model
            that runs eagerly, under a `tf.GradientTape` or compiled with `run_eagerly=True`. Or a Flax or Equinox
            module, a Keras model on JAX, or of a function its trace, `jax.jit(loss).trace(...)`: see
            `Recording.value_and_grad`.
        sites: a selection such as "conv[:2]", see `undertow.select`; slices follow the first batch's execution.
            Parameters are "params", "params:layer4" or "layer4.*.weight".
        measures: "norm", "channel-norm", "zero-fraction", "moments", "channel-sums", "histogram", "keep" (a file for
            each batch and site), "keep:sample" (one for each sample and site), or measures of your own. What "keep"
            takes is told to the logger "undertow" (INFO) after the first batch.
        phase: "backward" (gradients with respect to outputs), "forward" (the outputs) or "both".
        schedule: which batches; None is all.
        loss_reduction: "mean" or "sum": how the loss joins the samples of a batch. Recorded, see above.
        scaler: the `torch.amp.GradScaler` or `keras.optimizers.LossScaleOptimizer` that scales the loss, where there
            is one.
        optimizer: the `torch.optim.Optimizer` that steps the parameters among the sites, or a list of several: what
            each step is given and makes of them is recorded, in the batch or behind it. A parameter's rows have the
            phase "accumulated" (the gradient that the backward passes left, the AMP scale divided out), "gradient" (as
            the step was given it, after clipping), "weight" (before the step) and "update" (weight after less weight
            before). Without `optimizer`, "gradient" is what the last backward pass of the batch left. Put all
            micro-batches of a step into one batch, so that a schedule wants all of them or none. Of a sharded parameter
            each process records its part; a step that a GradScaler skips is none.
        axes: a letter for each axis of modules' outputs, where these do not tell: b the samples, c the channels, any
            other a further axis, as in "tbc". One text for all outputs of as many axes, or one for each selection, as
            in {"head": "tbc", "norm": "bhwc"}.
        objective: what the gradient is of, in words, for the manifest.
        reference: how the network is called, for the manifest.
        source: what the batches are made from, plain data for the manifest; going on with a run needs the same.
        diagnose: watch every so many batches more closely, so that `undertow.diagnose` can prove causes; True is 32.
        on_finding: what to do with findings while it trains: "log" (the logger "undertow"), "raise" (`FindingError`,
            from warnings on), or a function that is given each `Finding`. Each is told once. Without `diagnose`, every
            `every`-th batch is watched.
        every: after how many batches to look for findings; the first time after the first batch.
        group: how many batches are published together at most; what ten seconds brought is published
            anyway with the batch that follows. A killed process loses what is not yet published.
        to: an experiment tracker that what is published goes to at once: "tensorboard", "wandb" or "mlflow", with its
            folder, project or address behind a colon, as in "tensorboard:logs/a"; `undertow.export` says what goes.

    Raises:
        InputError: an argument that cannot be used, or sites that select nothing.
        RunError: the folder holds something else: a finished run, one of another network or of other settings.

    >>> import tempfile, torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten())
    >>> folder = tempfile.mkdtemp()
    >>> with record(folder, net, sites="conv", measures=["channel-norm"]) as recording:
    ...     with recording.batch(samples=["a.jpg", "b.jpg"], epoch=0):
    ...         net(torch.ones(2, 1, 5, 5)).sum().backward()
    >>> import undertow as ut
    >>> ut.Run(folder).table("channel_norm").select(["name", "site"]).to_pylist()
    [{'name': 'a.jpg', 'site': '0'}, {'name': 'b.jpg', 'site': '0'}]
    """
    for option, word, choices in (("phase", phase, PHASES), ("loss_reduction", loss_reduction, REDUCTIONS)):
        if word not in choices:
            raise InputError(f"{option} {word!r} is not understood (known: {', '.join(choices)})")
    checked(on_finding, every)
    watch = 32 if diagnose is True else diagnose or (every if on_finding is not None else 0)
    for option, value, least in (("group", group, 1), ("diagnose", watch, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{option}={value!r} must be a whole number of at least {least}")
    if watch and phase == "forward":
        raise InputError('diagnose needs gradients; record with phase="backward" or "both"')
    arrow()
    chosen = selection(sites)
    model = bound(model)
    recorder = recorder_of(model)
    modules, parameters = recorder.named_modules(model), recorder.named_parameters(model)
    chosen.candidates(modules, parameters)
    learning = learning_of(recorder, chosen.parameters(modules, parameters), parameters, optimizer)
    given = given_axes(axes, modules)
    layouts = recorder.layouts(model, given)
    resolved = resolve(measures)
    rank, world_size = recorder.world()
    settings = {
        "phase": phase,
        "schedule": None if schedule is None else schedule.to_dict(),
        "measures": [measure.to_dict() for measure in resolved],
        "objective": objective,
        "source": source,
        "loss_reduction": loss_reduction,
        "world_size": world_size,
        "diagnose": int(watch),
        "axes": dict(axes) if isinstance(axes, Mapping) else axes,
    }
    in_particular = given if isinstance(axes, Mapping) else {}
    facts = (
        schedule,
        scaler,
        settings,
        reference,
        rank,
        group,
        learning,
        layouts,
        Teller(on_finding, every),
        in_particular,
        None if to is None or rank else LiveExport(Path(folder), to),
    )
    return Recording(Path(folder), model, recorder, chosen, resolved, *facts)


@dataclass(repr=False)
class Recording(ShownItem):
    """A recording on its way: `with recording.batch(...)` around each batch.

    Attributes:
        folder: of the run.
        batches: how many batches this process has recorded.
        skipped: how many were on the disk already.
        sample_columns: the types of further columns of the table `samples`, which `describe` fills.
        done: epoch and number of those that were on the disk when it began.
    """

    folder: Path
    model: Any
    recorder: Recorder
    selection: Selection
    measures: Sequence[Measure]
    schedule: Schedule | None
    scaler: Any
    settings: dict[str, Any]
    reference: str | None
    rank: int
    group: int
    learning: Learning
    layouts: Any
    teller: Teller
    given_axes: Mapping[str, str]
    export: LiveExport | None
    sample_columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batches = self.skipped = self._exported = 0
        self.done: frozenset[tuple[int, int]] = frozenset()
        self._published: frozenset[int] = frozenset()
        self._counted: dict[int, int] = {}
        self._seen: set[tuple[int, int]] = set()
        self._reached: set[str] = set()
        self._arrived: set[str] = set()
        self._views: set[str] = set()
        self._unread: dict[str, str] = {}
        self._axes = SiteAxes(self.given_axes)
        self._told: set[str] = set()
        self._described: dict[str, list[Any]] = {}
        self._stack = ExitStack()
        self._writer: Writer | None = None
        self._ending: EndedBatch | None = None
        self._open = False
        self._named: list[str] | None = None
        self._probe: BatchProbe | None = None
        self._readers: list[Any] = []

    def __enter__(self) -> Self:
        self._process = os.getpid()
        with _disk_named(self.folder), ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_strangers(self.folder)
            stack.enter_context(locked(self.folder, self.rank))
            stack.enter_context(unwound_by_sigterm())
            self._named_modules = self.recorder.named_modules(self.model)
            self._named_parameters = self.recorder.named_parameters(self.model)
            self.manifest = self._begin()
            names = self.manifest["sites"]["names"]
            self._choose(names or self.selection.candidates(self._named_modules, self._named_parameters))
            folders = sorted({*self.manifest["tables"], *TABLES, CHECKSUMS, "tensors"})
            refuse_links(self.folder, folders)
            self.done = _on_disk(self.folder, self.rank, "checksums" in self.manifest)
            for name in ("", *folders):
                clear_asides(self.folder / name)
            others = [name for name in ("diagnosis", "steps") if name in self.manifest["tables"]]
            facts = (self.rank, self.group, others, self.sample_columns)
            self._writer = Writer(self.folder, self.measures, *facts)
            stack.callback(self._finish_writing)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self._refuse_other_process()
            self._stack.close()
        except RunError as failed:
            if error is None:
                raise
            error.add_note(str(failed))
        if error is None:
            with _disk_named(self.folder):
                self._finish()
        if self.export is not None:
            self.export.update(last=error is None)
            self.export.close()

    def _shown(self) -> Iterator[Part]:
        state = "closed" if self._writer is None else "a batch is being recorded" if self._open else "open"
        yield f"Recording into {str(self.folder)!r}: {counted(self.batches, 'batch')}, {state}"
        rows = [
            ("sites", brief(getattr(self, "_names", None)) or self.selection.text),
            ("measures", brief([type(measure).__name__ for measure in self.measures])),
            ("schedule", brief(self.schedule)),
            ("skipped, already on the disk", str(self.skipped)),
        ]
        yield ShownTable(("", ""), rows, len(rows))

    @contextmanager
    def batch(self, samples: Any = None, *, epoch: int = 0, batch: int | None = None) -> Iterator[bool]:
        """Record what happens inside, forward and backward, if the schedule wants it and the disk has it not.

        Hooks are on the model inside alone. If an exception leaves it, nothing of this batch is recorded. Each call
        counts as one batch, also under gradient accumulation; calls of modules are counted within it.

        Args:
            samples: one name for each sample, or None. Where the network runs several times inside, as under gradient
                accumulation, those of all passes in turn, or of each.
            epoch: counted from 0.
            batch: counted from 0 within its epoch; None counts the calls of this method.

        Yields:
            Whether this batch is recorded.

        Raises:
            RunError: something could not be written.
            InputError: the batch was there already, is inside another, or has not as many samples as names.
            FindingError: `on_finding` is "raise", and something is wrong; the batch is recorded.
        """
        writer = self._entered()
        if self.export is not None and writer.committed > self._exported:
            self._exported = writer.committed
            self.export.update()
        if self._ending is not None:  # an optimizer's steps may have followed it
            self._end_batch()
            self._tell()
        names = None if samples is None else as_names(samples)
        epoch, number = int(epoch), self._count(int(epoch), batch)
        writer.check()
        if (epoch, number) in self._seen:
            raise InputError(f"batch {number} of epoch {epoch} is recorded already; count batches within each epoch")
        self._seen.add((epoch, number))
        if self.schedule is not None and not self.schedule.wants(epoch, number):
            yield False
            return
        if (epoch, number) in self.done:
            self.skipped += 1
            yield False
            return
        watched = self.model if self._is_watched(number) else None
        phases = frozenset(PHASES[self.settings["phase"]])
        count = None if names is None else len(names)
        facts = (phases, self.scaler, watched, self.layouts, count)
        probe = self.recorder.new_probe(self._modules, self.measures, *facts)
        parameters = self._parameter_probe()
        self._open, self._described, self._named, self._probe = True, {}, names, probe
        self._readers = [probe] if parameters is None else [probe, parameters]
        try:
            with probe, parameters or nullcontext():
                yield True
            self._refuse_other_process()
            self._take(probe, parameters, self._named, epoch, number)
        except BaseException:
            self._seen.discard((epoch, number))
            self._ending = None
            if parameters is not None:
                parameters.close()
            raise
        finally:
            self._open, self._probe, self._readers = False, None, []
        if not self.learning.optimizers:
            self._tell()

    def _tell(self) -> None:
        """Look for findings behind the batch that ended last, where that is asked for and due."""
        if self.batches and self.teller.wants(self.batches):
            self.teller.tell(self.check())

    def check(self) -> Findings:
        """Diagnose what this process has recorded so far, without reading the run: the findings of `undertow.diagnose`.

        The course of 1024 batches is kept, and 8 of those that were watched (`diagnose=`).

        Raises:
            RunError: something could not be written.
            InputError: the recording is not open, or a batch is being recorded.

        >>> import tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> with record(tempfile.mkdtemp(), net, sites="linear", diagnose=1) as recording:
        ...     with recording.batch():
        ...         net(torch.ones(8, 4)).mul(0).sum().backward()
        ...     print([finding.cause for finding in recording.check()])
        ['no-gradient']
        """
        writer = self._entered()
        self._end_batch()
        writer.settle()
        run = SimpleNamespace(manifest=self.manifest | {"unreached": self.unreached}, sites=self._names)
        return diagnosed(writer.live.evidence(run))

    @property
    def unreached(self) -> dict[str, str]:
        """The sites of which nothing was recorded, each with the reason."""
        backward = self.settings["phase"] != "forward"
        reasons = {name: _NEVER_CALLED for name in self._names if name not in self._reached}
        for name in self._names if backward else ():
            if name in self._reached and name not in self._arrived:
                lost = _HIDDEN if name in self._views else "no gradient reached its output inside a batch"
                reasons[name] = self._unread.get(name, lost)
        for name in self.learning.parameters:
            if name not in self._arrived:
                reasons[name] = self.learning.why_none(name)
        return reasons if self.batches else {}

    def describe(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add to the batch that is being recorded a value for each sample, in columns named in `sample_columns`.

        Raises:
            InputError: no batch is being recorded, or no such column was announced.
        """
        if not self._open:
            raise InputError("no batch is being recorded; describe its samples inside `with recording.batch(...)`")
        if unknown := set(columns) - set(self.sample_columns):
            raise InputError(f"the column {unknown.pop()!r} was not announced in sample_columns")
        self._described |= {name: list(values) for name, values in columns.items()}

    def value_and_grad(
        self, function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
    ) -> Callable[..., tuple[Any, Any, Any]]:
        """Return `jax.value_and_grad` of a loss, with what passes through the sites as a third result.

        JAX's functions are pure, so no hook can sit in them: what is seen leaves the user's `jax.jit` as further
        outputs of the same program, and is given to `add`. Differentiated are parameters of an nnx module, and arrays
        of floating point in anything else, as `nnx.value_and_grad` and `eqx.filter_value_and_grad` do.

        Args:
            function: the loss, one number; the recorded module is an argument of it, or of linen the variables.
            argnums, has_aux: as `jax.value_and_grad` has them.

        Raises:
            ModelError: the network is not of JAX.
            InputError: the recording is not open.

        As in::

            step = jax.jit(recording.value_and_grad(loss))
            with recording.batch(samples=names):
                value, gradients, seen = step(params, x, y)
                recording.add(seen)
        """
        gradients = capability(framework_of(self.model) or "torch", "record.gradients")
        if self._writer is None:
            raise InputError("this recording is not open; write `with record(...) as recording:`")
        phases = frozenset(PHASES[self.settings["phase"]])
        what = gradients.watching(self.model, self._names, phases, list(self.learning.parameters))
        return gradients.value_and_grad(what, function, argnums, has_aux)

    def add(self, seen: Any) -> None:
        """Add a pass to the batch that is being recorded.

        Args:
            seen: the third result of a function of `value_and_grad`, outside of `jax.jit`.

        Raises:
            InputError: no batch is being recorded, or `seen` is something else.
        """
        if self._probe is None:
            raise InputError("no batch is being recorded; add what was seen inside `with recording.batch():`")
        for reader in self._readers:
            reader.add(seen)

    def name_samples(self, samples: Any) -> None:
        """Name samples of the batch that is being recorded: those of the next pass, behind those of passes before it.

        Args:
            samples: as for `batch`.

        Raises:
            InputError: no batch is being recorded.
        """
        if self._probe is None:
            raise InputError("no batch is being recorded; name its samples inside `with recording.batch():`")
        names = as_names(samples)
        self._probe.n_samples = len(names)
        self._named = [*(self._named or ()), *names]

    def flush(self) -> None:
        """Publish all that was recorded so far; call it where a checkpoint of the training is saved."""
        writer = self._entered()
        self._end_batch()
        writer.flush()

    @property
    def _remedy(self) -> str:
        """What to do where nothing was recorded."""
        return _remedy(self.unreached, str(self.manifest["model"].get("framework", "torch")))

    def _entered(self) -> Writer:
        if self._writer is None:
            raise InputError("this recording is not open; write `with record(...) as recording:`")
        self._refuse_other_process()
        if self._open:
            raise InputError("a batch is being recorded; leave it before the next")
        return self._writer

    def _refuse_other_process(self) -> None:
        """Refuse a forked child, in which no thread writes and the folder is not its own.

        Raises:
            RunError: this is one.
        """
        if os.getpid() != self._process:
            raise RunError(
                f"the recording into {printable(self.folder)} belongs to process {self._process}, not to this one, "
                f"{os.getpid()}, which was forked from it; record there, or open a recording of its own here"
            )

    def _count(self, epoch: int, batch: int | None) -> int:
        number = self._counted.get(epoch, 0) if batch is None else int(batch)
        self._counted[epoch] = number + 1
        return number

    def _is_watched(self, number: int) -> bool:
        """Whether a batch is watched for a diagnosis: which ones are must not depend on where a run was resumed."""
        every = self.settings["diagnose"]
        return bool(every) and number % every == 0

    def _parameter_probe(self) -> ParameterProbe | None:
        if not self.learning.parameters:
            return None
        return self.recorder.new_parameter_probe(
            self.learning.parameters, self.measures, self.learning.optimizers, self.scaler
        )

    def _take(
        self, probe: BatchProbe, parameters: ParameterProbe | None, names: list[str] | None, epoch: int, number: int
    ) -> None:
        """Hand a batch over to the writer, now or, where a step of an optimizer may follow, before the next."""
        settled = self.manifest["sites"]["names"] or not probe.order
        sites = self._names if settled else self.selection.chosen(self._named_modules, list(probe.order))
        selected = set(sites)
        observations = [o for o in probe.observations if o.key.site in selected]
        nameless = give_names(names, observations, probe.inputs)
        self._axes.note(observations)
        if not settled:
            self._settle(sites)
        self._reached.update(probe.order)
        self._views.update(probe.views)
        self._unread.update(probe.unread)
        self._warn_of_scale(probe.unscaled)
        self._warn_of_axes(nameless)
        facts = {key: self.settings[key] for key in ("loss_reduction", "world_size")}
        sites = [*self._names, *self.learning.parameters]
        points = probe.diagnosis_points(self._names)
        size = n_samples(names, observations, probe.n_samples)
        described = self._described_for(size)
        self._ending = EndedBatch(epoch, number, names, size, sites, facts, probe, points, parameters, described)
        self.batches += 1
        if not self.learning.optimizers:
            self._end_batch()

    def _described_for(self, size: int) -> dict[str, list[Any]]:
        for name, values in self._described.items():
            if len(values) != size:
                raise InputError(f"{name} has {len(values)} values, and the batch {size} samples")
        return self._described

    def _end_batch(self) -> None:
        """Hand over the batch that has ended, with the steps that came behind it."""
        ending, self._ending = self._ending, None
        if ending is None:
            return
        assert self._writer is not None
        batch = ending.close()
        if len(self._arrived) < len(batch.sites):
            self._arrived.update(ending.arrived)
        self._writer.put(batch)
        self._tell_of_bytes(batch.transfer.nbytes)
        if not ending.observed:
            where = f"nothing was recorded of batch {ending.number} of epoch {ending.epoch}"
            self._warn(f"{where}: {_listed(self.unreached)}; {self._remedy}", once="nothing")

    def _tell_of_bytes(self, of_batch: int) -> None:
        """Say, once, what the files of tensors take: a measure such as "keep" can fill a disk."""
        if "bytes" not in self._told and any("tensor" in measure.columns.values() for measure in self.measures):
            self._told.add("bytes")
            tell_of_bytes(self.folder, of_batch)

    def _warn(self, message: str, once: str) -> None:
        """Warn, once for each of the things that a recording may warn of."""
        if once not in self._told:
            self._told.add(once)
            warnings.warn(message, stacklevel=7)

    def _warn_of_scale(self, unscaled: bool) -> None:
        if unscaled:
            self._warn(
                "float16 gradients came out of autocast, and no scaler was given: if a GradScaler scales the loss, the "
                "recorded gradients are scaled too; pass record(..., scaler=scaler)",
                once="scale",
            )

    def _warn_of_axes(self, nameless: Mapping[str, str]) -> None:
        """Say of which sites it is not known what their axes are, where that is asked for; and what cannot be read."""
        remedy = "where an axis holds the samples or the channels, say so, as in record(..., axes={'head': 'tbc'})"
        if nameless:
            self._warn(f"some rows bear no names at {_listed(dict(nameless))}; {remedy}", once="names")
        if self._unread:
            self._warn(_listed(self._unread), once="unread")

    def _settle(self, names: list[str]) -> None:
        """Keep to the sites, in order of execution, that the first batch has shown, and write down their axes."""
        self._choose(names)
        self.manifest["sites"] |= {
            "names": self._names,
            "order": "execution",
            **self._axes.to_dict(self.manifest["sites"]),
        }
        if self.rank == 0:
            write_manifest(self.folder, self.manifest)

    def _choose(self, names: list[str]) -> None:
        self._names, wanted = names, set(names)
        self._modules = {named.name: named.module for named in self._named_modules if named.name in wanted}

    def _begin(self) -> dict[str, Any]:
        """Publish a manifest, or go on with that of the same network and settings."""
        manifest = {
            "format": FORMAT,
            "checksums": "sha256",
            "finished": False,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": {"reference": self.reference, **self.recorder.identity(self.model)},
            "sites": {"select": self.selection.text, "names": [], "order": None},
            "parameters": self.learning.to_dict(),
            **self.settings,
            "tables": {measure.table: columns_of(measure) for measure in self.measures}
            | ({"diagnosis": KEYS | DIAGNOSIS} if self.settings["diagnose"] else {})
            | ({"steps": KEYS | STEPS} if self.learning.optimizers else {})
            | ({"samples": TABLES["samples"] | self.sample_columns} if self.sample_columns else {}),
        }
        try:
            write_manifest(self.folder, manifest, new=True)
        except FileExistsError:
            before = read_manifest(self.folder)
            _refuse_others(self.folder, before, manifest)
            return before
        return manifest

    def _finish_writing(self) -> None:
        if self._writer is None:
            return
        try:
            self._end_batch()
        finally:
            writer, self._writer = self._writer, None
            writer.close()
            self._published = frozenset(writer.published)

    def _finish(self) -> None:
        """Say what was not reached, and mark the run as finished."""
        if not self.batches and not self.done:
            raise InputError(f"no batch was recorded into {self.folder}: {self._why_none()}")
        unreached = self.unreached
        n_sites = len(self._names) + len(self.learning.parameters)
        if n_sites and len(unreached) == n_sites and not self.done:
            raise InputError(f"nothing was recorded into {self.folder}: {_listed(unreached)}; {self._remedy}")
        if lost := missing(self.folder, self.rank, self._published, "checksums" in self.manifest):
            raise damaged(lost, "has vanished while it was written")
        if self._is_last():
            finished = {"finished": True, "unreached": unreached or self.manifest.get("unreached", {})}
            self.manifest = {**read_manifest(self.folder), **finished}
            self.manifest["sites"] |= self._axes.to_dict(self.manifest["sites"])
            write_manifest(self.folder, self.manifest)
        surprising = {name: reason for name, reason in unreached.items() if reason != FROZEN}
        if surprising:
            missed = f"{len(surprising)} of {n_sites} sites were not recorded: {_listed(surprising)}"
            warnings.warn(missed, stacklevel=3)

    def _is_last(self) -> bool:
        """Whether all processes of this run have come to their end, this one among them; each leaves a mark."""
        if self.settings["world_size"] == 1:
            return True
        with published(self.folder / f".finished-{self.rank:03d}"):
            pass
        return all((self.folder / f".finished-{r:03d}").exists() for r in range(self.settings["world_size"]))

    def _why_none(self) -> str:
        if self._seen:
            return f"the schedule wanted none of {len(self._seen)} batches; see Schedule(epoch=, first=, every=)"
        return "put `with recording.batch(samples=names, epoch=epoch):` around each of them"


def _remedy(unreached: Mapping[str, str], framework: str) -> str:
    """Return what to do where nothing was recorded."""
    if framework.startswith("keras"):
        return (
            "run the model, and ask a tf.GradientTape for gradients, inside `with recording.batch(...)`; what was "
            "compiled before, as fit is, runs past it: pass undertow.keras.GradientRecorder to fit, or compile with "
            "run_eagerly=True"
        )
    remedy = (
        "run the model, and call .backward() for gradients, inside `with recording.batch(...)`; of a network of JAX, "
        "hand what recording.value_and_grad saw to recording.add"
    )
    if _NEVER_CALLED in unreached.values():
        remedy += "; what torch.compile made beforehand runs past all hooks: call the model itself"
    return remedy


def as_names(samples: Any) -> list[str]:
    """Return the names of samples, from texts, numbers, or an array of numbers.

    Raises:
        InputError: it is one text, not one for each sample.

    >>> as_names(("a.jpg", 7))
    ['a.jpg', '7']
    """
    if isinstance(samples, str | bytes):
        raise InputError(f"samples is one text, {samples!r}; pass one name for each sample of the batch")
    names = list(getattr(samples, "tolist", lambda: samples)())
    try:
        "".join(names)  # a tenth of the time that it takes to ask each of them
    except TypeError:
        return list(map(str, names))
    return names


def _listed(reasons: dict[str, str]) -> str:
    """Join names by their reason, the first few of each."""
    groups = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name or "(model)" for name, why in reasons.items() if why == reason]
        groups.append(f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: {reason}")
    return "; ".join(groups)


def _on_disk(folder: Path, rank: int, listed: bool) -> frozenset[tuple[int, int]]:
    """Return epoch and number of the batches that this rank has published, all of whose files must be there.

    Args:
        listed: whether each group must have its checksums.

    Raises:
        RunError: a file is missing or damaged.
    """
    parts = {number: path for (of, number), path in parts_of(folder, COMMITTED).items() if of == rank}
    if lost := missing(folder, rank, parts, listed):
        commit = printable(folder / COMMITTED / f"{lost.stem}.parquet")
        remedy = f"restore it from a copy, or delete {commit}: then its batches are recorded again"
        raise RunError(f"{printable(lost)} is missing; {remedy}")
    done: set[tuple[int, int]] = set()
    for path in parts.values():
        digests = folder / CHECKSUMS / f"{path.stem}.sha256"
        sha256 = read_checksums(digests)[f"{COMMITTED}/{path.name}"] if digests.exists() else None
        done.update(batch_counts(batches_of(path, sha256)))
    return frozenset(done)


@contextmanager
def _disk_named(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that names the folder.

    Raises:
        RunError: it refused something.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot record into {printable(folder)}: {one_line(error)}") from error


def _refuse_others(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a run that is finished, or of another network or settings.

    Raises:
        RunError: with the first difference.
    """
    facts = ["class", "structure_sha256"]
    if "evaluation" in (before["model"].get("mode"), now["model"]["mode"]):
        facts += ["mode", "weights_sha256"]
    pairs = [(f"model {fact}", before["model"].get(fact), now["model"][fact]) for fact in facts]
    pairs += [("sites", before["sites"].get("select"), now["sites"]["select"])]
    pairs += [(name, before.get(name), now[name]) for name in (*_SETTINGS, "tables")]
    shown = printable(folder)
    for name, recorded, asked in pairs:
        if recorded != asked:
            difference = printable(f"{name} {recorded!r}, not {asked!r}")
            raise RunError(f"{shown} is a run with {difference}; choose another folder")
    if before["finished"]:
        raise RunError(f"{shown} is a finished run; choose another folder, or read it with Run({str(folder)!r})")
