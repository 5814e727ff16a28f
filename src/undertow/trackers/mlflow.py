"""MLflow: a server, or a local store in a folder; scalars as metrics, all else as artifacts."""

import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .base import Tracker, package
from .entries import CodeCounts, Entry, Note, Picture, Scalar

_AT_ONCE = 500  # metrics; MLflow takes 1000


class MLflow(Tracker):
    """An MLflow run. Histograms are artifacts, `histograms/TAG/STEP.npz` with `edges` and `counts`.

    Args:
        where: a tracking address, or a folder for a local store (SQLite, and artifacts beside it).
        name, identity: of the run; the same identity goes on with it.
        project: the experiment.

    Raises:
        FrameworkError: mlflow is missing.
    """

    def __init__(self, where: str | Path, name: str, identity: str, project: str) -> None:
        tracking = package("mlflow.tracking", "mlflow")
        self._metric: Any = package("mlflow.entities", "mlflow").Metric
        self._waiting: list[Any] = []
        with _quiet():
            address = f"sqlite:///{where.resolve()}/mlflow.db" if isinstance(where, Path) else where
            self._client: Any = tracking.MlflowClient(address)
            experiment = self._client.get_experiment_by_name(project)
            place = (where.resolve() / "artifacts").as_uri() if isinstance(where, Path) else None
            number = experiment.experiment_id if experiment else self._client.create_experiment(project, place)
            runs = self._client.search_runs([number], f"tags.`undertow.run` = '{identity}'", max_results=1)
            run = runs[0] if runs else self._client.create_run(number, run_name=name, tags={"undertow.run": identity})
            self.run_id: str = run.info.run_id

    def send(self, entry: Entry) -> None:
        """Take one entry."""
        match entry:
            case Scalar():
                now = int(time.time() * 1000)
                self._waiting.append(self._metric(_name(entry.tag), entry.value, now, entry.step))
                if len(self._waiting) >= _AT_ONCE:
                    self.flush()
            case CodeCounts():
                edges, counts = entry.buckets()
                self._file(entry, "npz", lambda path: np.savez(path, edges=edges, counts=counts))
            case Picture():
                with _quiet():
                    self._client.log_image(self.run_id, entry.pixels, artifact_file=f"{_name(entry.tag)}.png")
            case Note():
                with _quiet():
                    self._client.log_text(self.run_id, entry.text, f"{_name(entry.tag)}.md")

    def flush(self) -> None:
        """Log what waits."""
        with _quiet():
            if self._waiting:
                self._client.log_batch(self.run_id, metrics=self._waiting)
        self._waiting = []

    def close(self) -> None:
        """Mark the run as finished."""
        self.flush()
        with _quiet():
            self._client.set_terminated(self.run_id)

    def _file(self, entry: CodeCounts, ending: str, write: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / f"{entry.step:08d}.{ending}"
            write(path)
            self._client.log_artifact(self.run_id, str(path), _name(entry.tag))


@contextmanager
def _quiet() -> Iterator[None]:
    """Let neither MLflow tell of the tables it makes, nor its packages of one another."""
    log = logging.getLogger("mlflow")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def _name(tag: str) -> str:
    """Return a tag as MLflow takes names.

    >>> _name("magnitude/backward/net[0]/p50")
    'magnitude/backward/net_0_/p50'
    """
    return re.sub(r"[^\w\-. /]", "_", tag)
