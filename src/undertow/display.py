"""How results show themselves on the last line of a notebook's cell: one screen of text, or small static HTML.

A result says once what there is to see, as parts: lines, tables and pictures. Text takes the lines and the first rows
of tables; HTML takes all of it. The HTML holds no script, no style sheet and no request, inherits its colours, so that
it reads on light and dark grounds, escapes every text, and says what it leaves out to stay small.
"""

import base64
import html
import io
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar, overload

from .errors import one_line, printable

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

WIDTH, LINES, TEXT_ROWS = 100, 18, 10  # of a repr: characters a line, lines, rows of a table
ITEM_WIDTH = 400  # of the one line of a result that stands in lists
FIRST_CELL, TEXT_CELL = 48, 76  # characters of a cell of text, in the first column and the others
HTML_ROWS, HTML_CELL = 30, 400  # of HTML: rows of a table, characters of a cell or a line
MAX_LATEX = 5_000  # characters of a formula
PICTURE_BYTES = 100_000  # of all pictures of one result as PNG, before base64
# Okabe and Ito's palette: distinguishable with any colour vision. Source: jfly.uni-koeln.de/color
GOOD, POOR, BAD, PLAIN = "#009E73", "#E69F00", "#D55E00", "#56B4E9"
_GREY = "1px solid rgba(128,128,128,.5)"


@dataclass(frozen=True)
class Mark:
    """A cell's text behind a coloured square."""

    text: str
    colour: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ShownTable:
    """A table whose rows are made as they are shown.

    Attributes:
        headings: of the columns.
        rows: their cells, numbers as text.
        total: how many rows there are.
        text: whether the text shows it too.
    """

    headings: Sequence[str]
    rows: Iterable[Sequence[object]]
    total: int
    text: bool = True


@dataclass(frozen=True)
class Pictures:
    """Pictures beside one another, drawn when HTML is asked for.

    Attributes:
        draw: returns a caption and a picture for each; an error in it is told in their place.
        left_out: what is not among them, in words.
    """

    draw: Callable[[], Iterable[tuple[str, "Image"]]]
    left_out: str = ""


Part = str | ShownTable | Pictures


class Shown(ABC):
    """A result that shows itself, by its parts; the first is its title."""

    _max_lines = LINES

    @abstractmethod
    def _shown(self) -> Iterator[Part]:
        """Yield what there is to see."""

    def __repr__(self) -> str:
        """Return at most one screen; a part that fails is told by its error."""
        return as_text(_safely(self._shown, type(self).__name__), self._max_lines)

    def _repr_html_(self) -> str | None:
        return as_html(_safely(self._shown, type(self).__name__))


class ShownFormula(Shown):
    """A result that shows itself as a formula, and as text where that would be too long to read."""

    @property
    @abstractmethod
    def latex(self) -> str:
        """The formula, without dollars."""

    def _repr_latex_(self) -> str | None:
        try:
            return in_dollars(self.latex)
        except Exception:  # such as a missing SymPy; the text says what is wrong
            return None

    def _repr_html_(self) -> str | None:
        """Return nothing where LaTeX says it, for notebooks prefer HTML to it."""
        return None if self._repr_latex_() else super()._repr_html_()


class ShownItem(Shown):
    """A result that often stands in a list of them: its text is one line, its title."""

    _max_lines = 1


class ShownFields(ShownItem):
    """A dataclass that shows its fields, each shortened."""

    def _shown(self) -> Iterator[Part]:
        values = {name: getattr(self, name) for name in _names(self)}
        cells = [(name, brief(value)) for name, value in values.items()]
        listed = {name for name, value in values.items() if isinstance(value, tuple | list | dict)}
        texts = (f"{name}=[{_cut(text, 60)}]" if name in listed else f"{name}={_cut(text, 60)}" for name, text in cells)
        yield f"{type(self).__name__}({', '.join(texts)})"
        yield ShownTable(("", ""), cells, len(cells))


class Rows(Shown, list[T]):
    """A list that shows itself as a table, of the fields of its items where these have any; in all else a list."""

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> T: ...
    @overload
    def __getitem__(self, key: slice, /) -> Self: ...
    def __getitem__(self, key: Any, /) -> Any:
        """Return an item; of a slice, a list of the same kind."""
        taken = super().__getitem__(key)
        return self._like(taken) if isinstance(key, slice) else taken

    def _like(self, items: list[T]) -> Self:
        return type(self)(items)

    def __repr__(self) -> str:
        return list.__repr__(self) if _is_plain(self) else super().__repr__()

    def _shown(self) -> Iterator[Part]:
        yield from _rows(self)


class FrozenRows(Shown, tuple[T, ...]):
    """A tuple that shows itself as `Rows` do; in all else a tuple."""

    def __repr__(self) -> str:
        return tuple.__repr__(self) if _is_plain(self) else super().__repr__()

    def _shown(self) -> Iterator[Part]:
        yield from _rows(self)


def _is_plain(items: Sequence[Any]) -> bool:
    """Whether items are names or the like, and so few that Python's own text of them is short."""
    return len(items) <= 40 and not any(_names(item) for item in items) and len(str([*items])) < WIDTH * TEXT_ROWS


def _rows(items: Sequence[Any]) -> Iterator[Part]:
    """Yield how many items there are of which kind, and their table."""
    yield f"{len(items):,} x {type(items[0]).__name__}" if items else "nothing: an empty list"
    names = _names(items[0]) if items else []
    headings = names or [""]
    rows = ([brief(getattr(item, name)) for name in names] if names else [brief(item)] for item in items)
    yield ShownTable(headings, rows, len(items))


def brief(value: object) -> str:
    """Return a value as a cell's text: a tensor by its shape, a long collection by its length.

    >>> brief(0.123456), brief(("a", "b")), brief(list(range(100)))
    ('0.1235', 'a, b', '0, 1, 2, 3, 4, 5, ... (100)')
    """
    if value is None or isinstance(value, str):
        return "" if value is None else printable(value[: 2 * HTML_CELL])
    if isinstance(value, float):
        return number(value)
    if hasattr(type(value), "shape") and hasattr(type(value), "dtype"):
        return shape_of(value)
    if isinstance(value, dict):
        return _listed([f"{brief(key)}: {brief(item)}" for key, item in islice(value.items(), 6)], len(value))
    if isinstance(value, tuple | list | set | frozenset):
        return _listed([brief(item) for item in islice(value, 6)], len(value))
    return printable(repr(value)) if isinstance(value, int | Shown) else printable(str(value)[: 2 * HTML_CELL])


def number(value: float) -> str:
    """Return a number to four digits, and a dash for NaN.

    >>> number(1234.5678), number(float("nan"))
    ('1235', '-')
    """
    return f"{value:.4g}" if value == value else "-"


def shape_of(tensor: Any) -> str:
    """Return shape and dtype of an array or a tensor of any framework.

    >>> import numpy as np
    >>> shape_of(np.ones((2, 3), np.float32))
    '(2, 3) float32'
    """
    dtype = str(tensor.dtype).rpartition(".")[2]
    return f"({', '.join(map(str, tensor.shape))}{',' * (len(tensor.shape) == 1)}) {dtype}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "call"), counted(1200, "call"), counted(0, "batch")
    ('1 call', '1,200 calls', '0 batches')
    """
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def as_text(parts: Iterable[Part], max_lines: int = LINES) -> str:
    """Return parts as text of at most so many lines, in which no name is obeyed.

    >>> print(as_text(["two sites", ShownTable(("site", "zeros"), [("conv1", "0.5"), ("\\x1b[31m", "0")], 2)]))
    two sites
      site        zeros
      conv1       0.5
      \\x1b[31m  0
    """
    lines: list[str] = []
    width = WIDTH if max_lines > 1 else ITEM_WIDTH
    for part in parts:
        if isinstance(part, str):
            lines += [row for line in part.split("\n") for row in _wrapped(printable(line), width)]
        elif isinstance(part, ShownTable) and part.text:
            lines += _text_table(part)
        if len(lines) >= max_lines:
            break
    if len(lines) > max_lines > 1:
        lines[max_lines - 1 :] = ["  ..."]
    return "\n".join(lines[:max_lines])


def as_html(parts: Iterable[Part]) -> str:
    """Return parts as one HTML element.

    >>> as_html(["<b>", ShownTable(("a",), [("1",)], 1)]).count("<b>")
    0
    """
    budget = PICTURE_BYTES
    pieces: list[str] = []
    for part in parts:
        if isinstance(part, str):
            style = "opacity:.8" if pieces else "font-weight:600"
            pieces += [f'<div style="{style}">{escaped(line)}</div>' for line in part.split("\n")]
        elif isinstance(part, ShownTable):
            pieces.append(_html_table(part))
        else:
            piece, used = _html_pictures(part, budget)
            budget -= used
            pieces.append(piece)
    return f'<div style="overflow-x:auto;line-height:1.45;text-align:left">{"".join(pieces)}</div>'


def escaped(text: object) -> str:
    """Return a text for HTML, shortened: shown as it is, nothing in it obeyed."""
    return html.escape(_cut(printable(text), HTML_CELL))


def in_dollars(latex: str) -> str | None:
    r"""Return a formula as notebooks typeset it, in which no name can be HTML; None of one that is too long.

    >>> print(in_dollars(r"\mathrm{<b>}"))
    $\displaystyle \mathrm{\lt b\gt }$
    """
    if len(latex) > MAX_LATEX:
        return None
    return rf"$\displaystyle {latex}$".replace("<", r"\lt ").replace(">", r"\gt ")


def png(image: "Image") -> bytes:
    """Return a picture as PNG of 255 colours, a third of the size of one with all; rare ones are kept."""
    from PIL import Image as Pillow

    buffer = io.BytesIO()
    plain = image if image.mode in ("P", "L") else image.convert("RGB")
    small = (
        plain.quantize(255, Pillow.Quantize.MAXCOVERAGE, dither=Pillow.Dither.NONE) if plain.mode == "RGB" else plain
    )
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _safely(parts: Callable[[], Iterator[Part]], name: str) -> Iterator[Part]:
    """Yield the parts up to one that cannot be told, and its error."""
    try:
        yield from parts()
    except Exception as error:  # a damaged run, a tensor whose memory is gone: the last line of a cell must not fail
        yield f"{name}: {one_line(error)}"


def _names(value: Any) -> list[str]:
    return [field.name for field in fields(value) if field.repr] if is_dataclass(value) else []


def _listed(texts: Sequence[str], total: int) -> str:
    return ", ".join(texts) + (f", ... ({total:,})" if total > len(texts) else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _wrapped(line: str, width: int) -> list[str]:
    """Break a line between words, into four at most."""
    indent = line[: len(line) - len(line.lstrip())][:8]
    return textwrap.wrap(
        line.strip(), width, initial_indent=indent, subsequent_indent=indent, max_lines=4, placeholder=" …"
    )


def _text_table(table: ShownTable) -> list[str]:
    """Align the first rows; columns that do not fit on a line are left out from the right."""
    rows = [
        [_cut(printable(cell), TEXT_CELL if i else FIRST_CELL) for i, cell in enumerate(row)]
        for row in islice(table.rows, TEXT_ROWS)
    ]
    headings = [_cut(printable(heading), FIRST_CELL) for heading in table.headings]
    body = [headings, *rows] if any(headings) else rows
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    kept = max((n for n in range(1, len(widths) + 1) if sum(widths[:n]) + 2 * n <= WIDTH), default=1)
    # the last column may be cut instead of left out
    kept = min(kept + (sum(widths[:kept]) + 2 * kept < WIDTH - 12), len(widths))
    lines = [
        _cut("  " + "  ".join(c.ljust(w) for c, w in zip(row[:kept], widths[:kept], strict=True)).rstrip(), WIDTH)
        for row in body
    ]
    more = [counted(table.total - len(rows), "more row")] if table.total > len(rows) else []
    more += [counted(len(widths) - kept, "more column")] if kept < len(widths) else []
    return [*lines, f"  ... {' and '.join(more)}"] if more else lines


def _html_table(table: ShownTable) -> str:
    rows = list(islice(table.rows, HTML_ROWS))
    if not rows:
        return ""
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(rows[0]))]  # the first has names
    sides = ["right" if is_numeric else "left" for is_numeric in numeric]
    head = "".join(
        f'<th style="text-align:{side};padding:2px 10px 2px 0;border-bottom:{_GREY}">{escaped(heading)}</th>'
        for heading, side in zip(table.headings, sides, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_html_cell(cell, side) for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    more = table.total - len(rows)
    rest = f'<div style="opacity:.8">{counted(more, "more row")} left out</div>' if more > 0 else ""
    header = f"<thead><tr>{head}</tr></thead>" if any(table.headings) else ""
    style = "border-collapse:collapse;margin:.4em 0;font-size:90%;font-variant-numeric:tabular-nums"
    return f'<table style="{style}">{header}<tbody>{body}</tbody></table>{rest}'


def _html_cell(cell: object, side: str) -> str:
    square = f'<span style="color:{cell.colour}">■</span> ' if isinstance(cell, Mark) else ""
    style = f"text-align:{side};vertical-align:top;padding:2px 10px 2px 0"
    return f'<td style="{style}">{square}{escaped(cell)}</td>'


def _is_number(cell: object) -> bool:
    text = str(cell).replace(",", "").removesuffix(" %").replace("−", "-")
    try:
        float(text or "nan")
    except ValueError:
        return text in ("-", "")
    return True


def _html_pictures(pictures: Pictures, budget: int) -> tuple[str, int]:
    """Return pictures as HTML, and how many bytes they have; those beyond the budget are left out, and that is said."""
    pieces, used, dropped = [], 0, 0
    try:
        for caption, image in pictures.draw():
            data = png(image)
            if used + len(data) > budget:
                dropped += 1
                continue
            used += len(data)
            pieces.append(_html_picture(caption, data, image.size))
    except Exception as error:  # such as a missing matplotlib: the rest is worth showing
        pieces.append(f'<div style="opacity:.8">no picture: {escaped(one_line(error))}</div>')
    notes = [f"{counted(dropped, 'picture')} left out, to stay small"] if dropped else []
    notes += [pictures.left_out] if pictures.left_out else []
    rest = f'<div style="opacity:.8">{escaped("; ".join(notes))}</div>' if notes else ""
    return f"<div>{''.join(pieces)}</div>{rest}", used


def _html_picture(caption: str, data: bytes, size: tuple[int, int]) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    below = f'<div style="font-size:85%;max-width:{max(size[0], 96)}px">{escaped(caption)}</div>' if caption else ""
    return (
        '<div style="display:inline-block;vertical-align:top;margin:.3em .6em .3em 0">'
        f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="{escaped(caption)}" '
        f'style="max-width:100%;height:auto;margin:0">{below}</div>'
    )
