"""The packages that deriving builds on, imported when first needed."""

import importlib
from typing import Any

from ..errors import FrameworkError


def need(name: str) -> Any:
    """Import sympy or networkx.

    Raises:
        FrameworkError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise FrameworkError(
            f'{name}, on which derive builds, is missing; run: pip install "undertow[derive]"'
        ) from error
