"""Import a framework without what its native code prints."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Send the process's stderr to nowhere inside, where `TF_CPP_MIN_LOG_LEVEL` is 2 or more.

    TensorFlow obeys that variable except for a line or two that it prints before reading it. The command line sets the
    variable; a program that does not set it sees all lines.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "2":
        yield
        return
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
