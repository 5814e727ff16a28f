"""What a tracker is here, and what all of them share."""

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ..errors import FrameworkError, one_line
from .entries import Entry


class Tracker(ABC):
    """Takes entries, in the order of their steps.

    Where `whole` is set, all is sent each time, and written anew.
    """

    whole: ClassVar[bool] = False

    @abstractmethod
    def send(self, entry: Entry) -> None:
        """Take one entry."""

    @abstractmethod
    def flush(self) -> None:
        """Let what was sent be seen."""

    def close(self) -> None:
        """Send nothing more."""
        self.flush()


def package(name: str, distribution: str) -> Any:
    """Import a tracker's package.

    Raises:
        FrameworkError: it is missing or broken; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        why = "is missing" if getattr(error, "name", "") == root else f"cannot be imported ({one_line(error)})"
        raise FrameworkError(f"{root} {why}; run: pip install {distribution}") from error
