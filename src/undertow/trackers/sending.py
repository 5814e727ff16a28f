"""Sends each thing once: opens a tracker, and keeps note, in its folder, of what has gone there."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError, did_you_mean, printable
from ..files import published, read_bytes
from .base import Tracker
from .entries import Portion
from .mlflow import MLflow
from .tables import Csv, Npz
from .tensorboard import TensorBoard
from .wandb import WandB

TRACKERS = ("tensorboard", "wandb", "mlflow", "csv", "npz")
NOTE = "undertow-export.json"
PROJECT = "undertow"
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Sent:
    """What was sent.

    Attributes:
        to: the tracker.
        out: its folder or address.
        portions: how many parts of a run, findings and photographs were sent.
        before: how many had been sent before, and were left.
        entries: how many scalars, histograms, pictures and texts went.
    """

    to: str
    out: str
    portions: int
    before: int
    entries: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Sending:
    """An open way to a tracker.

    Args:
        source: the folder that is exported; names the tracker's run.
        identity: tells it from others.
        to: one of `TRACKERS`.
        out: the tracker's folder, or, of mlflow, also an address; None takes `SOURCE-TO`.
        project: of W&B; the experiment of MLflow.

    Raises:
        InputError: there is no such tracker.
        RunError: the folder holds something else.
        FrameworkError: the tracker's package is missing.
    """

    def __init__(self, source: Path, identity: str, to: str, out: str | Path | None, project: str = PROJECT) -> None:
        if to not in TRACKERS:
            raise InputError(f"{to!r} is no tracker that is known{did_you_mean(to, TRACKERS)} ({', '.join(TRACKERS)})")
        address = os.environ.get("MLFLOW_TRACKING_URI") if to == "mlflow" and out is None else None
        address = str(out) if to == "mlflow" and "://" in str(out) else address
        name = source.resolve().name
        self.to, self.out = to, address or str(out or source.resolve().with_name(f"{name}-{to}"))
        digest = hashlib.sha256(self.out.encode()).hexdigest()[:8]
        self._folder = Path(self.out) if address is None else source.resolve().with_name(f"{name}-{to}-{digest}")
        self._key = {"format": 1, "to": to, "identity": identity}
        self._sent = self._noted(self._folder)
        self._before = len(self._sent)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep_note()
        short = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._open: Callable[[], Tracker] = {
            "tensorboard": lambda: TensorBoard(self._folder),
            "wandb": lambda: WandB(self._folder, name, short, project),
            "mlflow": lambda: MLflow(address or self._folder, name, short, project),
            "csv": lambda: Csv(self._folder),
            "npz": lambda: Npz(self._folder),
        }[to]
        self._tracker: Tracker | None = None
        self.portions = self.entries = 0

    def send(self, portions: Iterable[Portion], told: Callable[[], None] = lambda: None) -> None:
        """Send what was not sent yet.

        Args:
            portions: all there are.
            told: called after each.
        """
        for portion in portions:
            if portion.name not in self._sent:
                self._tracker = self._tracker or self._open()
                for entry in portion.entries():
                    self._tracker.send(entry)
                    self.entries += 1
                self.portions += 1
                self._sent[portion.name] = None
                if not self._tracker.whole:
                    self._tracker.flush()
                    self._keep_note()
            told()

    def close(self) -> Sent:
        """Close the tracker, and say what was sent."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        return Sent(self.to, self.out, self.portions, self._before, self.entries)

    def _noted(self, folder: Path) -> dict[str, None]:
        """Return what was sent there before.

        Raises:
            RunError: the folder holds something else, or what was made of another run.
        """
        what = printable(folder)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return {}
        try:
            noted = json.loads(read_bytes(folder / NOTE, _MAX_BYTES))
            sent = dict.fromkeys(map(str, noted["sent"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"{what} is there already, and no export made it; choose another with --out") from error
        if {key: noted.get(key) for key in self._key} != self._key:
            raise RunError(f"{what} holds an export of something else; choose another with --out")
        return {} if self.to in ("csv", "npz") else sent

    def _keep_note(self) -> None:
        with published(self._folder / NOTE) as aside:
            aside.write_text(json.dumps({**self._key, "sent": list(self._sent)}, indent=1) + "\n", encoding="utf-8")
