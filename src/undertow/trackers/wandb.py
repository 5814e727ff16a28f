"""Weights & Biases: into the run that this process has, or one of its own; offline where WANDB_MODE says so."""

from pathlib import Path
from typing import Any

from .base import Tracker, package
from .entries import CodeCounts, Entry, Note, Picture, Scalar

PREFIX = "undertow/"
_MOST = 512  # buckets that W&B takes


class WandB(Tracker):
    """A W&B run. Its entries have the axis `undertow/step`, so that they agree with whatever else logs there.

    Histograms have at most 512 buckets, of whole cells.

    Args:
        folder: for the files of a run of one's own.
        name, identity: of the run; the same identity goes on with it.
        project: where a run of one's own is filed.

    Raises:
        FrameworkError: wandb is missing.
    """

    def __init__(self, folder: Path, name: str, identity: str, project: str) -> None:
        wandb = package("wandb", "wandb")
        self._wandb, self._waiting = wandb, dict[str, Any]()
        self._is_own = wandb.run is None
        self._run: Any = wandb.run
        if self._is_own:
            settings = wandb.Settings(console="off", silent=True)
            where = {"dir": str(folder), "project": project, "settings": settings}
            self._run = wandb.init(id=identity, name=name, resume="allow", **where)
        self._run.define_metric(f"{PREFIX}step")
        self._run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def send(self, entry: Entry) -> None:
        """Take one entry; those of a step go together."""
        if self._waiting.get(f"{PREFIX}step", entry.step) != entry.step:
            self.flush()
        self._waiting |= {f"{PREFIX}step": entry.step, f"{PREFIX}{entry.tag}": self._value(entry)}

    def flush(self) -> None:
        """Log what waits."""
        if self._waiting:
            self._run.log(self._waiting)
        self._waiting = {}

    def close(self) -> None:
        """Finish a run of one's own."""
        self.flush()
        if self._is_own:
            self._run.finish()

    def _value(self, entry: Entry) -> Any:
        match entry:
            case Scalar():
                return entry.value
            case CodeCounts():
                edges, counts = entry.buckets(_MOST)
                return self._wandb.Histogram(np_histogram=(counts, edges))
            case Picture():
                return self._wandb.Image(entry.pixels)
            case Note():
                return self._wandb.Html(f"<pre>{_escaped(entry.text)}</pre>")


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)
