"""A figure on another ground than white: greys are exchanged for others, hues stay, or get lighter until seen."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import InputError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rgba = tuple[float, float, float, float]

GROUNDS = ("white", "dark", "transparent")
NIGHT, CHALK = 0.094, 0.95  # grey of the dark ground, and of the text on it
MIDDLE = 0.463  # the grey whose contrast to white and to black is alike, 4.5 : 1
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0  # the least of WCAG 2.2, 1.4.3 and 1.4.11


@contextmanager
def on_ground(figure: "Figure", ground: str) -> Iterator[None]:
    """Recolour a figure for a ground; it is as before once the context is left.

    Args:
        ground: one of `GROUNDS`; what is drawn for a transparent one can be read on white and on black.

    Raises:
        InputError: unknown ground.
    """
    if ground not in GROUNDS:
        raise InputError(f"unknown ground {ground!r}{did_you_mean(ground, GROUNDS)} (known: {', '.join(GROUNDS)})")
    with ExitStack() as undo:
        if ground != "white":
            figure.draw_without_rendering()  # ticks come into being when they are first drawn
            for artist in figure.findobj():
                _recolour(artist, ground, undo)
        yield


def _recolour(artist: Any, ground: str, undo: ExitStack) -> None:
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    if isinstance(artist, Text):
        patch = artist.get_bbox_patch()
        if patch is not None and not _is_grey(_rgba(patch.get_facecolor())):
            return  # written on a colour of its own, which stays
        _exchange(artist, "color", ground, undo, TEXT_CONTRAST)
        if patch is not None:
            _recolour(patch, ground, undo)
    elif isinstance(artist, Line2D):
        for part in ("color", "markerfacecolor", "markeredgecolor"):
            _exchange(artist, part, ground, undo)
    elif isinstance(artist, Patch):
        for part in ("facecolor", "edgecolor"):
            _exchange(artist, part, ground, undo)
    elif isinstance(artist, Collection):
        for part in ("facecolor", "edgecolor"):
            before = getattr(artist, f"get_{part}")()
            _set(artist, part, before, [colour_on(_rgba(colour), ground) for colour in before], undo)


def _exchange(artist: Any, part: str, ground: str, undo: ExitStack, contrast: float = LINE_CONTRAST) -> None:
    before = getattr(artist, f"get_{part}")()
    if isinstance(before, str) and before in ("none", "auto"):
        return
    _set(artist, part, before, colour_on(_rgba(before), ground, contrast), undo)


def _set(artist: Any, part: str, before: Any, after: Any, undo: ExitStack) -> None:
    setter: Callable[[Any], object] = getattr(artist, f"set_{part}")
    undo.callback(setter, before)
    setter(after)


def colour_on(colour: Rgba, ground: str, least: float = LINE_CONTRAST) -> Rgba:
    """Return the colour to use on a ground for one that was chosen for white.

    >>> colour_on((1.0, 1.0, 1.0, 1.0), "dark"), colour_on((1.0, 1.0, 1.0, 1.0), "transparent")
    ((0.094, 0.094, 0.094, 1.0), (1.0, 1.0, 1.0, 0.0))
    >>> colour_on((0.0, 0.0, 0.0, 1.0), "dark"), colour_on((0.0, 0.0, 0.0, 1.0), "transparent")
    ((0.95, 0.95, 0.95, 1.0), (0.463, 0.463, 0.463, 1.0))
    """
    *hue, alpha = colour
    grey = sum(hue) / 3
    if ground == "transparent":
        if not _is_grey(colour) or MIDDLE < grey <= 0.9:
            return colour
        return (*hue, 0.0) if grey > 0.9 else (MIDDLE, MIDDLE, MIDDLE, alpha)  # type: ignore[return-value]
    if _is_grey(colour):
        other = round(CHALK - grey * (CHALK - NIGHT), 6)
        return (other, other, other, alpha)
    for step in range(20):
        lighter = [part + (1 - part) * step / 20 for part in hue]
        if (luminance(lighter) + 0.05) / (luminance([NIGHT] * 3) + 0.05) >= least:
            break
    return (*lighter, alpha)  # type: ignore[return-value]


def luminance(rgb: "list[float] | tuple[float, ...]") -> float:
    """Return the relative luminance of an sRGB colour, in [0, 1].

    Source: WCAG 2.2, "relative luminance".

    >>> luminance((1.0, 1.0, 1.0)), round(luminance((0.0, 0.0, 1.0)), 4)
    (1.0, 0.0722)
    """
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _is_grey(colour: Rgba) -> bool:
    return max(colour[:3]) - min(colour[:3]) < 0.06


def _rgba(colour: Any) -> Rgba:
    from matplotlib.colors import to_rgba

    return to_rgba(colour)
