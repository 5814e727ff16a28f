"""Texts of others in figures: never a formula, never wider than their place, and still told apart."""

import math
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any, cast

from ..errors import FrameworkError, printable
from ..installing import install_command


def drawn(text: str) -> str:
    r"""Return a text as matplotlib draws it: with no formula between dollars, and in a legend whatever it begins with.

    >>> drawn("$x$")
    '\\$x\\$'
    """
    plain = legible(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def legible(text: str) -> str:
    r"""Return a text on one line, with escapes for letters that matplotlib's font lacks; `font.family` sets another.

    >>> legible("a\n猫")
    'a\\n\\u732b'
    """
    known = _letters()
    shown = (c if ord(c) in known else c.encode("ascii", "backslashreplace").decode() for c in printable(text))
    return "".join(shown)


def _letters() -> Container[int]:
    fonts = font_manager()
    return cast("Container[int]", fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap())


def font_manager() -> Any:
    """Import the part of matplotlib that all drawing needs first.

    Raises:
        FrameworkError: it is not installed.
    """
    try:
        from matplotlib import font_manager
    except ImportError as error:
        raise FrameworkError(f"drawing needs matplotlib; run: {install_command('plot')}") from error
    return font_manager


def width_of(text: str, size: float) -> float:
    """Return the width in points of a line of text in matplotlib's font, `size` points high."""
    fonts = font_manager()
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, fonts.FontProperties(size=size), ismath=False)
    return float(width)


def fitted(text: str, width: float, size: float) -> str:
    """Return a text of at most `width` points, as it is drawn; a longer one loses its middle.

    >>> fitted("layer1", 100, 8), fitted("features.denseblock4.denselayer16.conv2", 100, 8)
    ('layer1', 'features.d…yer16.conv2')
    """
    text = legible(text)
    if width_of(text, size) <= width:
        return drawn(text)
    low, high = 1, len(text)  # so many letters fit, and so many do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if width_of(_without_middle(text, middle), size) <= width else (low, middle)
    return drawn(_without_middle(text, low))


def told_apart(names: Sequence[str], width: float, size: float) -> list[str]:
    """Fit names into `width` points each; those that would then look alike are numbered.

    >>> told_apart(["conv", "a" * 40 + "b" * 40, "a" * 40 + "c" + "b" * 40], 60, 8)
    ['conv', '1: aaaa…bbbb', '2: aaaa…bbbb']
    """
    short = [fitted(name, width, size) for name in names]
    alike, seen = Counter(short), Counter[str]()
    for i, text in enumerate(short):
        if alike[text] > 1:
            seen[text] += 1
            number = f"{seen[text]}: "
            short[i] = number + fitted(names[i], width - width_of(number, size), size)
    return short


def wrapped(text: str, width: float, size: float, max_lines: int = 0) -> str:
    """Break a text into lines of at most `width` points; what is beyond `max_lines`, if any, becomes "…"."""
    lines = [""]
    for word in legible(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if width_of(longer, size) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append(word)
        else:
            lines[-1] = word
    if max_lines and len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} …"]
    return "\n".join(fitted(line, width, size) for line in lines)


def digits(value: float) -> str:
    """Write a number to three digits.

    >>> digits(0.0), digits(3.2561e-06), digits(float("nan"))
    ('0', '3.26e-06', 'none')
    """
    return "none" if math.isnan(value) else f"{value:.3g}"


def _without_middle(text: str, length: int) -> str:
    return f"{text[: length // 2]}…{text[len(text) - (length - length // 2) :]}"
