"""A recording that a trainer's hooks open and close: what the callbacks of all trainers share."""

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from ..diagnosis import Finding
from ..errors import InputError, UndertowError, UndertowWarning, did_you_mean, one_line
from ..frameworks.own_passes import own_pass
from ..measures import Measure
from ..sites import Predicate, Site, recorder_of, selection
from .record import Recording, record
from .schedule import Schedule
from .telling import LEVELS, OnFinding

_LOG = logging.getLogger("undertow")
Samples = str | int | Callable[[Any], Any] | None
Tell = Callable[[Finding], Any]


class RecordOptions(TypedDict, total=False):
    """What the callbacks hand on to `undertow.record`, which says what each means."""

    sites: str | Predicate | Iterable[str | Site]
    measures: str | Measure | Iterable[str | Measure]
    phase: str
    schedule: Schedule | None
    loss_reduction: str
    axes: str | Mapping[str, str] | None
    objective: str | None
    reference: str | None
    source: dict[str, Any] | None
    diagnose: bool | int
    every: int
    group: int
    to: str | None


class TrainingRecorder:
    """One recording of one training: `start`, then `begin` and `end` around each step of the optimizer, then `finish`.

    An error inside one of these abandons the recording first: what came before it is on the disk, and unfinished.

    Args:
        folder: of the run.
        samples: where a batch has the names of its samples: a key, a position, or a function of the batch.
        on_finding: "logger" (the trainer's, and "undertow"), or as `undertow.record` has it.
        options: for `undertow.record`.

    Raises:
        InputError: an option that there is not.
    """

    def __init__(self, folder: str | Path, samples: Samples, on_finding: OnFinding, options: RecordOptions) -> None:
        if unknown := set(options) - set(RecordOptions.__annotations__):
            name = unknown.pop()
            hint = did_you_mean(name, RecordOptions.__annotations__)
            raise InputError(
                f"{name}= is no option of a callback{hint} (there are {', '.join(RecordOptions.__annotations__)})"
            )
        self.folder, self.samples, self.on_finding, self.options = Path(folder), samples, on_finding, options
        self.recording: Recording | None = None
        self._batch: Any = None
        self._wanted = False
        self._paused = ExitStack()
        self._at_exit: Any = None

    @property
    def in_batch(self) -> bool:
        """Whether a step of the optimizer is under way, recorded or not."""
        return self._batch is not None

    def start(self, model: Any, optimizer: Any, scaler: Any, tell: Tell) -> None:
        """Open the recording of a training that begins, or goes on.

        Args:
            model: the network, in training mode.
            optimizer: the trainer's, one or several; used if there are parameters among the sites.
            scaler: of the loss, where there is one.
            tell: brings a finding to the trainer's logger.

        Raises:
            InputError, RunError: as `undertow.record`.
        """
        self.abandon()  # of a training that ended by an error of which no hook was told
        told = (lambda finding: _told(finding, tell)) if self.on_finding == "logger" else self.on_finding
        steps = optimizer if self._reads_parameters(model) else None
        recording = record(self.folder, model, optimizer=steps, scaler=scaler, on_finding=told, **self.options)
        self.recording = recording.__enter__()
        self._at_exit = weakref.finalize(self, _abandon, recording, InputError("the training ended without a word"))

    def begin(self, epoch: int, number: int) -> bool:
        """Begin a batch, all passes that one step of the optimizer is made of; return whether it is recorded."""
        assert self.recording is not None
        with self._abandoned_on_error():
            batch = self.recording.batch(epoch=epoch, batch=number)
            self._wanted = batch.__enter__()
            self._batch = batch
        return self._wanted

    def name(self, batch: Any) -> None:
        """Name the samples of a pass, if it is recorded and `samples` says how."""
        if self._wanted and self.samples is not None and self.recording is not None:
            with self._abandoned_on_error():
                self.recording.name_samples(_names_in(batch, self.samples))

    def end(self) -> None:
        """End the batch."""
        batch, self._batch, self._wanted = self._batch, None, False
        if batch is not None:
            with self._abandoned_on_error():
                batch.__exit__(None, None, None)

    def pause(self) -> None:
        """Leave out what follows, such as a validation in the midst of a batch."""
        self._paused.enter_context(own_pass())

    def go_on(self) -> None:
        """Record again."""
        self._paused.close()

    def flush(self) -> None:
        """Publish what was recorded: a checkpoint is saved, from which the training may go on."""
        if self.recording is not None and not self.in_batch:
            with self._abandoned_on_error():
                self.recording.flush()

    def finish(self) -> None:
        """Close the recording of a training that came to its end. What is wrong is a warning, since that is done."""
        if self.in_batch:  # not a whole step, so not recorded
            self.leave(InputError("the step was not made"))
        recording, self.recording = self.recording, None
        if recording is not None:
            self._at_exit.detach()
            try:
                recording.__exit__(None, None, None)
            except UndertowError as error:
                warnings.warn(
                    f"the recording did not end as it should: {one_line(error)}", UndertowWarning, stacklevel=3
                )

    def abandon(self, error: BaseException | None = None) -> None:
        """Close the recording of a training that did not come to its end. It can be gone on with."""
        self.go_on()
        error = error or InputError("the training did not come to its end")
        self.leave(error)
        recording, self.recording = self.recording, None
        if recording is not None:
            self._at_exit.detach()
            _abandon(recording, error)

    def leave(self, error: BaseException) -> None:
        """Leave the batch, of which nothing is recorded."""
        batch, self._batch, self._wanted = self._batch, None, False
        if batch is not None:
            batch.__exit__(type(error), error, error.__traceback__)

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def _reads_parameters(self, model: Any) -> bool:
        recorder = recorder_of(model)
        chosen = selection(self.options.get("sites", "conv"))
        return bool(chosen.parameters(recorder.named_modules(model), recorder.named_parameters(model)))


def _abandon(recording: Recording, error: BaseException) -> None:
    recording.__exit__(type(error), error, error.__traceback__)


def _told(finding: Finding, tell: Tell) -> None:
    _LOG.log(LEVELS[finding.severity], "%s: %s %s", finding.cause, finding.sentence, finding.remedy)
    tell(finding)


def _names_in(batch: Any, samples: Samples) -> Any:
    """Return the names of a batch's samples.

    Raises:
        InputError: the batch has nothing there.

    >>> _names_in({"image": [0.0], "name": ["a.jpg"]}, "name")
    ['a.jpg']
    """
    if callable(samples):
        return _plain(samples(batch))
    try:
        return _plain(batch[samples])
    except (LookupError, TypeError) as error:
        there = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise InputError(
            f"samples={samples!r} is not in the batch, {there}; pass a key, a position or a function of it"
        ) from error


def _plain(names: Any) -> Any:
    """Return the values of TensorFlow's tensors, whose texts are bytes; anything else as it is."""
    if hasattr(names, "numpy") and not hasattr(names, "tolist"):
        return [name.decode() if isinstance(name, bytes) else name for name in names.numpy().tolist()]
    return names
