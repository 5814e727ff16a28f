"""What is told while it trains: findings that are new, and what tensors take on the disk."""

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..diagnosis import SEVERITIES, Finding
from ..errors import FindingError, InputError

OnFinding = str | Callable[[Finding], Any] | None
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
"""Of `logging`, by a finding's severity."""
_LOG = logging.getLogger("undertow")


def checked(on_finding: OnFinding, every: int) -> None:
    """Refuse what cannot be used.

    Raises:
        InputError: `on_finding` is no word that is known and no function, or `every` is no number of batches.
    """
    if not (on_finding in (None, "log", "raise") or callable(on_finding)):
        raise InputError(f'on_finding={on_finding!r} is not understood; pass "log", "raise" or a function')
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise InputError(f"every={every!r} must be a whole number of batches, at least 1")


def tell_of_bytes(folder: Path, of_batch: int) -> None:
    """Log how many bytes a batch like this takes, and for how many more the disk has room.

    Args:
        folder: on that disk.
        of_batch: bytes of one batch.
    """
    room = shutil.disk_usage(folder).free // max(of_batch, 1)
    _LOG.info("tensors take about %.3g MB a batch; the disk has room for %s more like the first", of_batch / 1e6, room)


@dataclass
class Teller:
    """Tells each finding once: again only where it is at further sites, or of another batch.

    Args:
        on_finding: "log" (to the logger "undertow"), "raise" (from warnings on), or a function of a finding.
        every: after how many batches the findings are looked for; the first time after the first.
    """

    on_finding: OnFinding
    every: int
    _told: dict[tuple[str, ...], set[str]] = field(default_factory=lambda: defaultdict(set))

    def wants(self, n_batches: int) -> bool:
        """Whether findings are to be looked for behind this batch."""
        return self.on_finding is not None and (n_batches - 1) % self.every == 0

    def tell(self, findings: Iterable[Finding]) -> None:
        """Tell what is new.

        Raises:
            FindingError: a warning or an error is new, and `on_finding` is "raise".
        """
        alarms = []
        for finding in findings:
            told = self._told[finding.cause, finding.severity, str(finding.evidence.get("batch"))]
            if told.issuperset(finding.sites):
                continue
            told.update(finding.sites)
            if callable(self.on_finding):
                self.on_finding(finding)
            elif self.on_finding == "raise" and SEVERITIES.index(finding.severity) > 0:
                alarms.append(finding)
            else:
                _LOG.log(LEVELS[finding.severity], "%s: %s %s", finding.cause, finding.sentence, finding.remedy)
        if alarms:
            raise FindingError("; ".join(f"{one.cause}: {one.sentence} {one.remedy}" for one in alarms), alarms)
