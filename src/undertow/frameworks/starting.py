"""Start a framework without the lines that it writes past Python."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Hold back what libraries write to the process's stderr while they load, where `TF_CPP_MIN_LOG_LEVEL` asks for it.

    TensorFlow obeys that variable but for a line or two from before it has read it. The command sets it; a program
    that does not is left alone.
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
