"""One picture for one photograph: the photograph once, and beside it a row of pictures for each rule and class."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import InputError, did_you_mean, printable
from . import heatmap

TILE, GAP, LINE, BAR = 224, 10, 22, 8
COLUMNS = ("colour", "magnitude", "signed", "overlay")
SCALE_NOTE = (
    "Colour: a tenth of a standard deviation around mid-grey, clipped. Magnitude: the largest |value| over the "
    "channels. Signed: their sum, red above zero, blue below it. Both are clipped at their 99th percentile, which "
    "stands at the end of the bar. Each map has its own scale: compare shapes between rules, not brightness."
)
Colour = tuple[int, int, int]
# paper, ink, and what is fainter; without paper a grey that can be read on white and on black
GROUNDS: dict[str, tuple[Colour | None, Colour, Colour]] = {
    "white": ((255, 255, 255), (24, 24, 27), (90, 90, 98)),
    "dark": ((24, 24, 24), (242, 242, 242), (170, 170, 178)),
    "transparent": (None, (118, 118, 118), (118, 118, 118)),
}


@dataclass(frozen=True)
class PanelRow:
    """One class of a panel: its label, and for each rule a heading and a map `(C, H, W)`."""

    label: str
    maps: Sequence[tuple[str, heatmap.Map]]


def panel(
    photograph: heatmap.Pixels,
    title: str,
    rows: Sequence[PanelRow],
    notes: Sequence[str] = (),
    *,
    ground: str = "white",
) -> Image.Image:
    """Draw a panel: the photograph, and for each class and rule the map in colour, as magnitude, signed, and laid over.

    Args:
        photograph: `(H, W, 3)` uint8, the network's input.
        title: one line at the top.
        rows: one for each class.
        notes: sentences at the bottom, after the note on scales.
        ground: "white", "dark" or "transparent".

    Raises:
        InputError: unknown ground.
    """
    if ground not in GROUNDS:
        raise InputError(f"unknown ground {ground!r}{did_you_mean(ground, GROUNDS)} (known: {', '.join(GROUNDS)})")
    paper, ink, faint = GROUNDS[ground]
    width = GAP + (TILE + GAP) * (1 + len(COLUMNS))
    lines = [line for note in (SCALE_NOTE, *notes) for line in textwrap.wrap(printable(note), width // 7)]
    maps = [(row.label, heading, values) for row in rows for heading, values in row.maps]
    top = GAP + LINE + 6
    row_height = LINE + TILE + BAR + 4 + LINE
    height = top + LINE + row_height * len(maps) + GAP + LINE * len(lines) + GAP
    image = (
        Image.new("RGB", (width, height), paper) if paper else Image.new("RGBA", (width, height), (255, 255, 255, 0))
    )
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), _shortened(title, width - 2 * GAP, 18), ink, _font(18))
    for i, column in enumerate(COLUMNS, 1):
        draw.text((GAP + i * (TILE + GAP), top), column, faint, _font(14))
    top += LINE
    _paste(image, photograph, GAP, top + LINE)
    for label, heading, values in maps:
        _describe(draw, 2 * GAP + TILE, top, label, heading, ink, faint)
        _row(image, draw, top + LINE, photograph, values, faint)
        top += row_height
    top += GAP
    for line in lines:
        draw.text((GAP, top), line, faint, _font(14))
        top += LINE
    return image


def _describe(
    draw: ImageDraw.ImageDraw, left: int, top: int, label: str, heading: str, ink: Colour, faint: Colour
) -> None:
    """Write above a row its rule and its class."""
    room = (TILE + GAP) * len(COLUMNS) - GAP
    heading = _shortened(heading, room // 2, 16)
    draw.text((left, top), heading, ink, _font(16))
    beside = int(draw.textlength(heading, _font(16))) + 2 * GAP
    draw.text((left + beside, top + 2), _shortened(label, room - beside, 14), faint, _font(14))


def _row(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    top: int,
    photograph: heatmap.Pixels,
    values: heatmap.Map,
    faint: Colour,
) -> None:
    """Draw one map in all styles, with a bar below those that have a scale."""
    for i, style in enumerate(COLUMNS, 1):
        left = GAP + i * (TILE + GAP)
        if style == "overlay":
            _paste(image, heatmap.overlay(photograph, values), left, top)
        elif style != "colour" or values.shape[0] in (1, 3):
            _paste(image, np.asarray(heatmap.draw(values, style)), left, top)
        else:
            draw.text((left, top), f"none of {values.shape[0]} channels", faint, _font(14))
        if style != "colour":
            _bar(image, draw, left, top + TILE + 4, values, "signed" if style == "signed" else "magnitude", faint)


def _bar(
    image: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, values: heatmap.Map, style: str, faint: Colour
) -> None:
    """Draw the scale of a style, with the values at its ends and in the middle of a signed one."""
    end = heatmap.limit(values, style)
    lowest, colours = (-1, heatmap.diverging) if style == "signed" else (0, heatmap.heat)
    strip = colours(np.tile(np.linspace(lowest, 1, TILE), (BAR, 1)))
    image.paste(Image.fromarray(strip), (left, top))
    ends = {0.0: f"{lowest * end:.2g}" if lowest else "0", 1.0: f"{end:.2g}"} | ({0.5: "0"} if lowest else {})
    for place, text in ends.items():
        x = left + place * (TILE - draw.textlength(text, _font(12)))
        draw.text((x, top + BAR + 1), text, faint, _font(12))


def _paste(image: Image.Image, pixels: heatmap.Pixels, left: int, top: int) -> None:
    """Paste pixels into the middle of a square of TILE pixels; enlarged pixels stay sharp rectangles."""
    picture = Image.fromarray(pixels)
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    image.paste(fitted, (left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2))


def _shortened(text: str, width: int, size: int) -> str:
    """Return a text of at most `width` pixels; a longer one loses its end."""
    text = shown = printable(text)
    while shown and _font(size).getlength(shown) > width:
        text = text[: len(text) * 9 // 10]
        shown = f"{text}…"
    return shown


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
