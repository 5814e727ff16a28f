"""Optional packages, imported on first use."""

import importlib
from typing import Any

from ..errors import FrameworkError
from ..installing import install_command


def need(name: str) -> Any:
    """Import and return sympy or networkx.

    Raises:
        FrameworkError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise FrameworkError(
            f"derive needs {name}, which is not installed; run: {install_command('derive')}"
        ) from error
