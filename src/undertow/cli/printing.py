"""How the commands print: JSON, and lines that are neither wrapped nor taken for markup."""

import json
import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """Print plain data as JSON; infinity and NaN, which JSON lacks, become null."""
    click.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(console: "Console", text: str, style: str | None = None) -> None:
    """Print a text as it is, on one line however long it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)
