"""Signals that end a process: SIGTERM unwinds like Ctrl-C, and a Ctrl-C is told from a file that raises one."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""143, the exit code that a shell gives a process which SIGTERM ended."""


class Terminated(SystemExit):
    """SIGTERM came, as clusters send it before they kill: what is open is closed, and the process exits with 143."""


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside, in the main thread; a handler of somebody else's is left as it is.

    A forked child dies of SIGTERM as it would without this.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated(TERMINATED)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    with _handled(signal.SIGTERM, signal.SIG_DFL, end):
        yield


class _Interrupts:
    """The handler of SIGINT inside `interrupts`: notes that it came, and raises as Python's own does."""

    def __init__(self) -> None:
        self.came: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)
        raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Give a list that is empty until Ctrl-C comes; any other KeyboardInterrupt was raised by somebody's code.

    Where somebody else handles SIGINT that cannot be told, and the list is not empty.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler in (signal.SIG_IGN, signal.SIG_DFL):
        yield []
    elif isinstance(handler, _Interrupts):
        yield handler.came
    elif handler is not signal.default_int_handler:
        yield [signal.SIGINT]
    else:
        own = _Interrupts()
        with _handled(signal.SIGINT, signal.default_int_handler, own):
            yield own.came


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back, in the main thread, the handlers of SIGTERM and SIGINT that a library sets inside for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)


@contextmanager
def _handled(number: int, usual: Any, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal inside, where this is the main thread and nobody else handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not usual:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        is_ours = threading.current_thread() is threading.main_thread() and signal.getsignal(number) is handler
        if is_ours:
            signal.signal(number, usual)
