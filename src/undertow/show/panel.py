"""One picture for one photograph: the photograph, then each rule's map in colour and in magnitude."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import printable
from . import heatmap

TILE, GAP, LINE = 224, 10, 22
INK, FAINT, PAPER = (24, 24, 27), (90, 90, 98), (255, 255, 255)
SCALE_NOTE = (
    "Colour: a tenth of a standard deviation around mid-grey, clipped. Magnitude: the largest |value| over the "
    "channels, clipped at its 99th percentile. Each map has its own scale: compare shapes between rules, "
    "not brightness."
)


@dataclass(frozen=True)
class PanelRow:
    """One row of a panel: a target's label, and for each rule a heading and a map `(C, H, W)`."""

    label: str
    maps: Sequence[tuple[str, heatmap.Map]]


def panel(photograph: heatmap.Pixels, title: str, rows: Sequence[PanelRow], notes: Sequence[str] = ()) -> Image.Image:
    """Draw a panel: for each target the photograph and each rule's map, once in colour and once as magnitude.

    Args:
        photograph: `(H, W, 3)` uint8, the network's input.
        title: one line at the top.
        rows: one for each target, all with the same rules.
        notes: sentences at the bottom, after the note on scales.
    """
    width = GAP + (TILE + GAP) * (1 + 2 * len(rows[0].maps))
    lines = [line for note in (SCALE_NOTE, *notes) for line in textwrap.wrap(printable(note), width // 7)]
    row_height = 2 * LINE + TILE + GAP
    height = GAP + LINE + 6 + row_height * len(rows) + LINE * len(lines) + GAP
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), printable(title), INK, _font(18))
    top = GAP + LINE + 6
    for row in rows:
        _row(image, draw, top, photograph, row)
        top += row_height
    for line in lines:
        draw.text((GAP, top), line, FAINT, _font(14))
        top += LINE
    return image


def _row(image: Image.Image, draw: ImageDraw.ImageDraw, top: int, photograph: heatmap.Pixels, row: PanelRow) -> None:
    draw.text((GAP, top + LINE - 2), _shortened(printable(row.label), TILE), INK, _font(14))
    image.paste(_tile(photograph), (GAP, top + 2 * LINE))
    left = GAP + TILE + GAP
    for heading, values in row.maps:
        draw.text((left, top), _shortened(heading, 2 * TILE), INK, _font(16))
        for style in ("colour", "magnitude"):
            drawable = style == "magnitude" or values.shape[0] in (1, 3)
            draw.text((left, top + LINE), style if drawable else "(no colours)", FAINT, _font(14))
            if drawable:
                image.paste(_tile(np.asarray(heatmap.draw(values, style))), (left, top + 2 * LINE))
            left += TILE + GAP


def _tile(pixels: heatmap.Pixels) -> Image.Image:
    """Scale pixels into a square tile; enlarged pixels stay sharp rectangles."""
    image = Image.fromarray(pixels)
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(fitted, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def _shortened(text: str, width: int) -> str:
    max_chars = width // 8
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
