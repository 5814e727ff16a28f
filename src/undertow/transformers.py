"""Recording in the loop of transformers: `Trainer(..., callbacks=[GradientRecorder("runs/a", sites="linear")])`."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, Unpack

from .diagnosis import Finding
from .errors import FrameworkError, InputError, one_line
from .frameworks.torch.zoo.importing import import_torchvision
from .recording.telling import LEVELS, OnFinding
from .recording.training import RecordOptions, Samples, TrainingRecorder

with suppress(FrameworkError):  # which transformers imports if it is there
    import_torchvision()
try:
    from transformers import TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise FrameworkError(
        f"transformers cannot be imported ({one_line(error)}); run: pip install transformers"
    ) from error

_LOG = logging.get_logger("transformers.undertow")


class GradientRecorder(TrainerCallback):
    """Records what passes through a model while a `Trainer` trains it: `undertow.record` as a callback.

    A batch of the recording is a step of the optimizer, with all micro-batches of `gradient_accumulation_steps`; it is
    counted within its epoch, also after `resume_from_checkpoint`. Evaluation is not recorded. Gradients are those of
    the loss, whatever mixed precision scales it by. With parameters among the sites, hooks on them and on the
    optimizer read their gradients before clipping (phase "accumulated") and after it ("gradient"); the Trainer's own
    events come too late for the former.

    The Trainer tells its callbacks of no error. What was recorded before one is published when the callback is gone,
    or trains again, or at the end of a `with` around the training:

        with GradientRecorder("runs/a", sites="linear") as recorder:
            Trainer(..., callbacks=[recorder]).train()

    The run is then unfinished, and the same training goes on with it. A folder whose run is finished is refused before
    the first step.

    Args:
        folder: of the run, the same in all processes.
        samples: which argument of the model holds the samples' names or numbers; or a function of these arguments, a
            dict. The Trainer gives callbacks no batch, and drops columns that the model does not take.
        on_finding: "logger": to the Trainer's logger (`transformers.utils.logging`), to the logger "undertow", and into
            `state.log_history`, which checkpoints keep. Or as `undertow.record` has it, "log", "raise", a function, or
            None, which looks for none.
        options: of `undertow.record`: sites, measures, phase, schedule, loss_reduction, axes, objective, reference,
            source, diagnose, every, group, to.

    Raises:
        InputError: an option that there is not. What cannot be recorded is said when the training begins.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples: Samples = None,
        on_finding: OnFinding = "logger",
        **options: Unpack[RecordOptions],
    ) -> None:
        self._training = TrainingRecorder(folder, samples, on_finding, options)
        self._steps_an_epoch = 1
        self._hook: Any = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._training.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._close(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the recording: a checkpoint is loaded."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.torch_compile:
            raise InputError("torch_compile=True runs past the hooks that record; train without it to record")
        self._close()
        model.train()  # as the Trainer does before each step; until then it may be in evaluation mode
        self._steps_an_epoch = _steps_an_epoch(args, state, kwargs["train_dataloader"])

        def tell(finding: Finding) -> None:
            _LOG.log(LEVELS[finding.severity], "%s: %s %s", finding.cause, finding.sentence, finding.remedy)
            facts = {"undertow": finding.cause, "severity": finding.severity, "sentence": finding.sentence}
            state.log_history.append({**facts, "step": state.global_step})

        self._training.start(model, optimizer, getattr(optimizer, "scaler", None), tell)
        if self._training.samples is not None:
            self._hook = model.register_forward_pre_hook(self._name, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step."""
        self._training.begin(*divmod(state.global_step, self._steps_an_epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step, which the optimizer has made."""
        self._training.end()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish what was recorded before the checkpoint."""
        self._training.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the run."""
        self._training.finish()
        self._close()

    def _name(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._training.in_batch:
            self._training.name(kwargs)

    def _close(self, error: BaseException | None = None) -> None:
        """Leave an unfinished run, if one is open, and nothing on the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._training.abandon(error)


def _steps_an_epoch(args: Any, state: Any, loader: Any) -> int:
    """Return how many steps the Trainer makes in an epoch; all of them where the data set has no length."""
    try:
        batches: int = len(loader)
    except TypeError:
        return max(int(state.max_steps), 1)
    return max(math.ceil(batches / int(args.gradient_accumulation_steps)), 1)
