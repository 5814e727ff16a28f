"""Recording in Keras's training loop: `model.fit(..., callbacks=[GradientRecorder("runs/a", sites="conv")])`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, Unpack

from .errors import FrameworkError, InputError, one_line
from .frameworks.base import refuse_backend
from .recording.telling import OnFinding
from .recording.training import RecordOptions, Samples, TrainingRecorder

try:
    import keras
except ImportError as error:
    raise FrameworkError(f"keras cannot be imported ({one_line(error)}); run: pip install keras") from error


class GradientRecorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Records what passes through a model in `fit`: `undertow.record` as a callback.

    A compiled `fit` stays compiled: only a batch that the schedule wants is trained eagerly, by the model's own
    `train_step`, since in a traced graph no batch can be told from another. So a sparse schedule costs little.
    Validation is not recorded. Of a loss scaled by a `LossScaleOptimizer` the scale is divided out.

    An error in a training step leaves an unfinished run, which the same training goes on with; of an error elsewhere
    Keras tells its callbacks nothing, and what was recorded is published when the callback is gone or fits again, or
    at the end of a `with` around `fit`. A folder whose run is finished is refused before the first step.

    Args:
        folder: of the run.
        samples: names by a function of the data of a batch, `(x, y, sample_weight)` as `fit` makes it, or a position.
        on_finding: as `undertow.record` has it.
        options: of `undertow.record`: sites, measures, phase, schedule, loss_reduction, objective, reference, source,
            group, to.

    Raises:
        InputError: an option that there is not. What cannot be recorded is said when the training begins:
            `steps_per_execution` over 1, several devices, Keras on JAX or torch.

    >>> import os, tempfile, numpy as np, keras, undertow as ut
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="low")])
    >>> model.compile("sgd", "mse")
    >>> recorder = GradientRecorder(tempfile.mkdtemp(), sites="linear", schedule=ut.Schedule(every=2))
    >>> _ = model.fit(np.ones((8, 4)), np.ones((8, 2)), batch_size=2, callbacks=[recorder], verbose=0)
    >>> ut.Run(recorder.folder).table("zero_fraction")["batch"].to_pylist()
    [0, 2]
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples: Samples = None,
        on_finding: OnFinding = None,
        **options: Unpack[RecordOptions],
    ) -> None:
        super().__init__()
        self._training = TrainingRecorder(folder, samples, on_finding, options)
        self._epoch = self._number = 0
        self._usual: Any = None
        self._eager: Any = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._training.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._close(error)

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the recording, and stand before the function that makes a step."""
        self._close()
        refuse_backend(keras.backend.backend())
        if not self.model.built:  # Keras builds it before, unless its inputs are of a kind that it cannot make up
            raise InputError("the model has no weights yet; call it once on a batch, then fit")
        if self.model.steps_per_execution != 1:
            raise InputError(
                "steps_per_execution is over 1, so steps cannot be told apart; compile without it to record"
            )
        strategy = getattr(self.model, "distribute_strategy", None)
        if getattr(strategy, "num_replicas_in_sync", 1) != 1:
            raise InputError("the model trains on several devices at once; train on one to record")
        optimizer = self.model.optimizer
        scaler = optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else None
        self._training.start(self.model, optimizer, scaler, lambda finding: None)
        self._usual = self.model.train_function
        self._eager = self._eager_function()
        self.model.train_function = self._train

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count batches within the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note which batch comes."""
        self._number = batch

    def on_train_end(self, logs: Any = None) -> None:
        """Finish the run."""
        self._training.finish()
        self._close()

    def _train(self, iterator: Any) -> Any:
        """Make a step as the model does, or eagerly if it is to be recorded."""
        try:
            recorded = self._training.begin(self._epoch, self._number)
            logs = (self._eager if recorded else self._usual)(iterator)
            self._training.end()
        except StopIteration as error:  # fewer batches than `fit` was told, which it handles
            self._training.leave(error)
            raise
        except BaseException as error:
            self._close(error)
            raise
        return logs

    def _eager_function(self) -> Callable[[Any], Any]:
        """Let the model make a function for a step that is not traced, whose data can be seen."""
        model: Any = self.model
        train_step = model.train_step

        def step(data: Any) -> Any:
            self._training.name(data)
            return train_step(data)

        own, was_eager = vars(model).get("train_step"), model.run_eagerly
        try:
            vars(model)["train_step"] = step  # Keras would track an ordinary attribute as state
            model.run_eagerly = True
            model.make_train_function(force=True)
            function: Callable[[Any], Any] = model.train_function
        finally:
            model.run_eagerly = was_eager
            if own is None:
                del vars(model)["train_step"]
            else:
                vars(model)["train_step"] = own
            model.train_function = self._usual
        return function

    def _close(self, error: BaseException | None = None) -> None:
        """Leave an unfinished run, if one is open, and the model as it was."""
        if self._usual is not None:
            self.model.train_function, self._usual, self._eager = self._usual, None, None
        self._training.abandon(error)
