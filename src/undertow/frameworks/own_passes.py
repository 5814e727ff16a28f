"""Passes that undertow makes for itself, as an explanation does: a recording around them leaves them out."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


@contextmanager
def own_pass() -> Iterator[None]:
    """Let no recording of this thread see what the network does inside."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def in_own_pass() -> bool:
    """Whether this thread is inside `own_pass`.

    >>> with own_pass():
    ...     in_own_pass()
    True
    >>> in_own_pass()
    False
    """
    return getattr(_thread, "depth", 0) > 0
