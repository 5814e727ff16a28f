"""Maps as pictures: NumPy arrays in, Pillow images out."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

Map = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

CLIP = 99.0
# Black through violet and orange to pale yellow: lightness rises monotonically, so it also reads in greyscale.
_HEAT = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ]
)


def colour(values: Map) -> Pixels:
    """Draw a map `(C, H, W)` of 1 or 3 channels as `(H, W, 3)`: a tenth of a standard deviation around mid-grey.

    Clipped to [0, 255]. Mean and standard deviation are those of the whole map; a constant map is mid-grey. Each map
    has its own scale, so brightness does not compare between maps.

    >>> colour(np.zeros((3, 1, 1))).tolist()
    [[[127, 127, 127]]]
    """
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise InputError(f"a map of shape {values.shape} cannot be drawn in colour; it needs (1, H, W) or (3, H, W)")
    as_float64 = values.astype(np.float64)
    score = (as_float64 - as_float64.mean()) / (as_float64.std() or 1.0)
    grey = np.clip(0.5 + 0.1 * score, 0, 1)
    return np.broadcast_to((grey * 255).astype(np.uint8).transpose(1, 2, 0), (*values.shape[1:], 3)).copy()


def magnitude(values: Map) -> npt.NDArray[np.float64]:
    """Reduce a map `(C, H, W)` to `(H, W)` in [0, 1]: the largest |value| over the channels.

    Clipped at the 99th percentile, then divided by it.

    Source: the maximum over channels, Simonyan et al. 2013, arXiv 1312.6034, section 3.1.

    >>> magnitude(np.array([[[0.0, -2.0]], [[1.0, 0.5]]])).round(2).tolist()
    [[0.5, 1.0]]
    """
    if values.ndim != 3:
        raise InputError(f"a map of shape {values.shape} cannot be drawn as an image; it needs (C, H, W)")
    largest = np.abs(values.astype(np.float64)).max(0)
    top = float(np.percentile(largest, CLIP)) or float(largest.max())
    strength: npt.NDArray[np.float64] = np.clip(largest / top, 0, 1) if top else largest
    return strength


def heat(strength: npt.NDArray[np.float64]) -> Pixels:
    """Colour strengths in [0, 1], `(H, W)`, from black to pale yellow, `(H, W, 3)`.

    >>> heat(np.array([[0.0, 1.0]])).tolist()
    [[[0, 0, 4], [252, 255, 164]]]
    """
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(strength, stops, _HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def overlay(photograph: Pixels, values: Map) -> Pixels:
    """Blend a map's magnitude over its greyed photograph `(H, W, 3)`: the stronger, the less of the photograph."""
    strength = magnitude(values)
    grey = photograph.astype(np.float64).mean(2, keepdims=True) * 0.6
    weight = np.sqrt(strength)[..., None]
    mixed: Pixels = (grey * (1 - weight) + heat(strength) * weight).round().astype(np.uint8)
    return mixed


STYLES = {"magnitude": lambda values: heat(magnitude(values)), "colour": colour}


def draw(values: Map, style: str) -> "Image":
    """Draw a map `(C, H, W)` in a style, one of `STYLES`.

    Raises:
        InputError: unknown style, or a map that the style cannot draw.
    """
    from PIL import Image

    if style not in STYLES:
        raise InputError(f"unknown style {style!r}{did_you_mean(style, STYLES)} (known: {', '.join(STYLES)})")
    return Image.fromarray(STYLES[style](values))
