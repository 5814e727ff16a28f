"""To a tracker while a run is recorded: what is on the disk goes there, each part once."""

import warnings
from pathlib import Path

from ..errors import InputError, UndertowWarning, one_line
from ..runs import Run
from .of_run import identity_of, portions_of_run
from .sending import PROJECT, TRACKERS, Sending


class LiveExport:
    """Follows a run that this process records.

    Of each part go all scalars, and the histograms of its last batch: all of them could take longer than the training.
    A tracker that fails ends no training: that is a warning, and `undertow export` sends the rest later.

    Args:
        run: its folder.
        to: "tensorboard", or with a folder behind a colon, "tensorboard:logs"; likewise "wandb" with a project, and
            "mlflow" with a folder or an address.

    Raises:
        InputError: no such tracker, or one that is written whole at the end.
    """

    def __init__(self, run: Path, to: str) -> None:
        name, _, where = to.partition(":")
        if name not in TRACKERS[:3]:
            raise InputError(
                f"to={to!r} is not understood; write one of {', '.join(TRACKERS[:3])}; csv and npz: ut.export"
            )
        self._run, self._to = run, name
        self._out = None if name == "wandb" or not where else where
        self._project = where if name == "wandb" and where else PROJECT
        self._sending: Sending | None = None
        self._failed = False

    def update(self, last: bool = False) -> None:
        """Send what is new; with `last` the findings too."""
        if self._failed:
            return
        try:
            run = Run(self._run)
            if self._sending is None:
                self._sending = Sending(self._run, identity_of(run), self._to, self._out, self._project)
            self._sending.send(portions_of_run(run, every=1, with_findings=last, sparse=True))
            if last:
                self._sending.close()
        except Exception as error:  # a tracker's own, a network's, a disk's
            self._failed = True
            rest = f"undertow export {self._run} --to {self._to} sends the rest"
            warnings.warn(f"nothing more goes to {self._to}: {one_line(error)}; {rest}", UndertowWarning, stacklevel=4)

    def close(self) -> None:
        """Let go of the tracker of a run that did not come to its end."""
        if self._sending is not None and not self._failed:
            self._sending.close()
