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


_GAP = 2  # between columns
_WORD, _HEADING = 32, 16  # longer words may be broken to make room, those in the heading of numbers first


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


def print_shaded(console: "Console", pieces: Iterable[tuple[str, tuple[int, int, int]]]) -> None:
    """Print a text in pieces, each on a ground of its own (red, green, blue to 255) where the terminal has colours."""
    from rich.text import Text

    text = Text(no_wrap=False)
    for piece, ground in pieces:
        text.append(printable(piece), "black on #{:02x}{:02x}{:02x}".format(*ground))
    console.print(text, highlight=False, markup=False, emoji=False)


def print_table(
    headings: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    title: object = None,
    title_style: str = "",
    right: Sequence[object] = (),
    bold: Sequence[int] = (),
) -> None:
    """Print a table as wide as the terminal allows; nothing in it is cut.

    Where there is no room for all columns, words are wrapped, and then columns go to further tables below, each with
    the first column again. A number is never broken.

    Args:
        headings: of the columns; the first names the row.
        rows: their cells.
        title: printed above it, where there is one.
        title_style: of the title.
        right: the headings of columns of numbers, which are set to the right.
        bold: the numbers of rows that stand out.
    """
    from rich.console import Console

    cells = [[printable(heading) for heading in headings], *([printable(cell) for cell in row] for row in rows)]
    numbers = [heading in right for heading in headings]
    console = Console()
    if title is not None:
        print_line(console, printable(title), title_style or "italic")
    for i, (columns, widths) in enumerate(_blocks(cells, numbers, console.width)):
        if i:
            console.print()
        table_width = max(console.width, sum(widths) + _GAP * len(widths))
        _print_block(
            Console(width=table_width),
            [[row[i] for i in columns] for row in cells],
            [numbers[i] for i in columns],
            widths,
            bold,
        )


def fits(lines: Sequence[Sequence[object]]) -> bool:
    """Whether a table, its headings first, is no wider than the terminal."""
    from rich.cells import cell_len
    from rich.console import Console

    columns = zip(*lines, strict=True)
    return sum(max(cell_len(printable(cell)) for cell in column) + _GAP for column in columns) <= Console().width


def _print_block(
    console: "Console",
    cells: Sequence[Sequence[str]],
    numbers: Sequence[bool],
    widths: Sequence[int],
    bold: Sequence[int],
) -> None:
    from rich.table import Table

    table = Table(box=None)
    for heading, number, width in zip(cells[0], numbers, widths, strict=True):
        side: Any = "right" if number else "left"
        table.add_column(shown(heading), justify=side, overflow="fold", width=width)
    for i, row in enumerate(cells[1:]):
        table.add_row(*map(shown, row), style="bold" if i in bold else "")
    console.print(table)


def _blocks(cells: Sequence[Sequence[str]], numbers: Sequence[bool], width: int) -> list[tuple[list[int], list[int]]]:
    """Divide columns into tables that are no wider than `width`; return each one's columns and their widths.

    >>> _blocks([["site", "50 %", "70 %"], ["conv1", "0.00012", "0.00034"]], [False, True, True], 20)
    [([0, 1], [5, 7]), ([0, 2], [5, 7])]
    """
    from rich.cells import cell_len

    columns = list(zip(*cells, strict=True))
    most = [max(map(cell_len, column)) for column in columns]
    least = [_least(column, number) for column, number in zip(columns, numbers, strict=True)]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        needed = sum(least[j] + _GAP for j in [*blocks[-1], i])
        if needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(i)
    return [(block, _widths([least[i] for i in block], [most[i] for i in block], width)) for block in blocks]


def _least(column: Sequence[str], number: bool) -> int:
    """Return the width that a column needs, its heading first: numbers are not broken, long words may be."""
    from rich.cells import cell_len

    parts = column[0].split() if number else [word for cell in column for word in cell.split()]
    longest_word = min(_HEADING if number else _WORD, max(map(cell_len, parts), default=1))
    return max([longest_word, *(cell_len(cell) for cell in column[1:] if number)])


def _widths(least: Sequence[int], most: Sequence[int], width: int) -> list[int]:
    """Give each column what it needs, and what is left over to the first one first."""
    spare = width - sum(least) - _GAP * len(least)
    widths = []
    for low, high in zip(least, most, strict=True):
        more = max(0, min(high - low, spare))
        widths.append(low + more)
        spare -= more
    return widths
