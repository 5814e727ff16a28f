"""The one gate for what the commands print: JSON, lines and tables, in which no text of others is obeyed.

Names of classes, files, layers and runs come from elsewhere. They are shown as they are: markup is no markup, and what
a terminal would obey, or could not print, is escaped.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import printable
from ..files import to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def print_anywhere() -> None:
    """Let stdout and stderr escape the letters that their encoding lacks, where they would fail at one."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # something else stands in for it
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def nobody_reads(error: BaseException) -> bool:
    """Whether an error comes of printing into a pipe that nobody reads any more, as in `undertow ... | head`."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def print_json(value: Any) -> None:
    """Print plain data as JSON; infinity and NaN, which JSON lacks, become null."""
    click.echo(to_json(value))


def echo(text: object, err: bool = False) -> None:
    """Print a text of one or several lines."""
    click.echo("\n".join(map(printable, str(text).split("\n"))), err=err)


def echo_error(text: object) -> None:
    """Print one line on stderr that says what could not be done."""
    click.echo(f"error: {printable(text)}", err=True)


def echo_click_error(error: click.ClickException) -> None:
    """Print what click has to say about the words of a command."""
    context = getattr(error, "ctx", None)
    if context is not None:
        echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
    echo(f"Error: {error.format_message()}", err=True)


def shown(text: object, style: str = "") -> "Text":
    """Return a text as rich prints it: on one line, with nothing in it obeyed."""
    from rich.text import Text

    return Text(printable(text), style)


def print_line(console: "Console", text: object, style: str = "") -> None:
    """Print a text as it is, on one line however long it is."""
    console.print("\n".join(map(printable, str(text).split("\n"))), highlight=False, markup=False, soft_wrap=True,
                  emoji=False, style=style or None)  # fmt: skip


def print_table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    title: object = None,
    title_style: str = "",
    right: Sequence[object] = (),
    fold: bool = False,
    bold: Sequence[int] = (),
) -> None:
    """Print a table.

    Args:
        headings: of the columns.
        rows: their cells.
        title: printed above it, where there is one.
        title_style: of the title.
        right: the headings of columns that are set to the right.
        fold: break long cells rather than cut them, but for those of the first column, which stay on one line.
        bold: the numbers of rows that stand out.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=None if title is None else shown(title, title_style), title_justify="left", box=None)
    for i, heading in enumerate(headings):
        side: Any = "right" if heading in right else "left"
        table.add_column(shown(heading), justify=side, overflow="fold" if fold else "ellipsis", no_wrap=fold and not i)
    for i, row in enumerate(rows):
        table.add_row(*map(shown, row), style="bold" if i in bold else "")
    Console().print(table)
