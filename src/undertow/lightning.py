"""Recording in Lightning's training loop: `Trainer(callbacks=[GradientRecorder("runs/a", sites="conv")])`."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

from .diagnosis import Finding
from .errors import FrameworkError, one_line
from .frameworks.torch.zoo.importing import import_torchvision
from .recording.telling import OnFinding
from .recording.training import RecordOptions, Samples, TrainingRecorder

with suppress(FrameworkError):  # torchmetrics, which Lightning imports, imports torchvision if it is there
    import_torchvision()
try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise FrameworkError(f"lightning cannot be imported ({one_line(error)}); run: pip install lightning") from error


class GradientRecorder(Callback):
    """Records what passes through a LightningModule while it trains: `undertow.record` as a callback.

    A batch of the recording is a step of the optimizer, with all micro-batches of `accumulate_grad_batches`; it is
    counted within its epoch, also after a checkpoint was loaded. With manual optimization it is a batch of the loader.
    Validation, the sanity check, testing and predicting are not recorded. Gradients are those of the loss, whatever
    `precision` scales it by; with parameters among the sites, the trainer's optimizers are watched, before clipping
    and after it. Each process of DDP records its own rows into the one folder.

    A training that ends by an error or Ctrl-C leaves an unfinished run, which the same training goes on with. A folder
    whose run is finished is refused before the first step.

    Args:
        folder: of the run, the same in all processes.
        samples: where a batch of the loader has its samples' names: a key, a position, or a function of the batch.
        on_finding: "logger": to the trainer's loggers, as the metric `undertow/CAUSE`, and with its sentence to the
            logger "undertow" of `logging`. Or as `undertow.record` has it, "log", "raise", a function, or None, which
            looks for none.
        options: of `undertow.record`: sites, measures, phase, schedule, loss_reduction, axes, objective, reference,
            source, diagnose, every, group, to.

    Raises:
        InputError: an option that there is not. What cannot be recorded is said when the training begins.

    >>> import tempfile, torch, lightning, undertow as ut
    >>> class Net(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 2)
    ...     def training_step(self, batch, _):
    ...         return self.layer(batch["x"]).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), 0.1)
    >>> data = [{"x": torch.ones(4), "name": f"{n}.png"} for n in range(4)]
    >>> recorder = GradientRecorder(tempfile.mkdtemp(), sites="linear", samples="name", on_finding=None)
    >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[recorder], enable_checkpointing=False,
    ...                             accelerator="cpu", **quiet)
    >>> trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=2))
    >>> ut.Run(recorder.folder).table("zero_fraction").select(["batch", "site"]).to_pylist()
    [{'batch': 0, 'site': 'layer'}, {'batch': 1, 'site': 'layer'}]
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

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._training.folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recording: the optimizers are there, and a checkpoint is loaded."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def tell(finding: Finding) -> None:
            for logger in trainer.loggers:
                logger.log_metrics({f"undertow/{finding.cause}": 1.0}, step=trainer.global_step)

        self._training.start(pl_module, trainer.optimizers, scaler, tell)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, or go on with it."""
        if not self._training.in_batch:
            self._training.begin(trainer.current_epoch, batch_idx // trainer.accumulate_grad_batches)
        self._training.name(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step, unless further micro-batches belong to it."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._training.end()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave out a validation, which may come between two micro-batches."""
        self._training.pause()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on."""
        self._training.go_on()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Publish what was recorded before the checkpoint."""
        self._training.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the run."""
        self._training.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave an unfinished run."""
        self._training.abandon(exception)
