"""How far a long command is: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .printing import echo

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS = 10.0


class Bar(Protocol):
    """Shows how far it is."""

    def begin(self, done: int, count: int) -> None:
        """Say how many there are, and how many are done already."""

    def advance(self, done: int, failed: int = 0) -> None:
        """Add some that were done, of which some failed."""


class _Lines:
    """Prints a line every ten seconds."""

    def __init__(self, noun: str, unit: str) -> None:
        self.noun, self.unit = noun, unit

    def begin(self, done: int, count: int) -> None:
        self.started = self.said = time.monotonic()
        self.done = self.failed = 0
        self.count = count - done

    def advance(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.failed += failed
        now = time.monotonic()
        if now - self.said >= _SECONDS and self.done:
            self.said, speed = now, self.done / (now - self.started)
            left = clock((self.count - self.done) / speed)
            failures = f", {self.failed} failed" if self.failed else ""
            echo(f"{self.done} of {self.count} {self.noun}, {speed:.1f} {self.unit}/s, {left} left{failures}", err=True)


class _Terminal:
    """Moves a bar."""

    def __init__(self, progress: "Progress", unit: str) -> None:
        self.progress, self.unit, self.failed = progress, unit, 0
        self.bar = progress.add_task("", total=None, speed="")

    def begin(self, done: int, count: int) -> None:
        self.progress.reset(self.bar, total=count - done)

    def advance(self, done: int, failed: int = 0) -> None:
        self.progress.advance(self.bar, done)
        self.failed += failed
        speed = self.progress.tasks[0].speed
        failures = f", {self.failed} failed" if self.failed else ""
        self.progress.update(self.bar, speed=f"{speed:.1f} {self.unit}/s{failures}" if speed else "")


class _Silent:
    """Says nothing."""

    def begin(self, done: int, count: int) -> None:
        pass

    def advance(self, done: int, failed: int = 0) -> None:
        pass


@contextmanager
def progress(silent: bool = False, noun: str = "photographs", unit: str = "images") -> Iterator[Bar]:
    """Give a bar, which is taken away again."""
    if silent or not sys.stderr.isatty():
        yield _Silent() if silent else _Lines(noun, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield _Terminal(shown, unit)


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds.

    >>> clock(83.2)
    '1:23'
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
