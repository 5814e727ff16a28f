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

# Blue through white to red, alike in lightness on both sides: which side it is can be told with any colour vision.
# Source: ColorBrewer 2, RdBu reversed.
_DIVERGING = np.array(
    [
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ]
)
_SPARSE, _DENSE = 0.35, 0.65  # mean weight of a map in an overlay: below the one sparse, above the other dense
_MOST = 0.58  # of a pixel of a dense map's overlay: the rest is the photograph


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
    return _clipped(_largest(values))


def signed(values: Map) -> npt.NDArray[np.float64]:
    """Reduce a map `(C, H, W)` to `(H, W)` in [-1, 1]: the sum over the channels, zero where they cancel.

    Clipped at the 99th percentile of its absolute values on either side of zero, then divided by it.

    >>> signed(np.array([[[0.0, -2.0, 1.0]], [[1.0, 0.0, -1.0]]])).round(2).tolist()
    [[0.51, -1.0, 0.0]]
    """
    return _clipped(_sum(values))


def limit(values: Map, style: str) -> float:
    """Return the value of a map at the end of the scale of a style, "magnitude" or "signed"; 0 of a map of zeros.

    >>> limit(np.array([[[3.0]], [[-4.0]]]), "magnitude"), limit(np.array([[[3.0]], [[-4.0]]]), "signed")
    (4.0, 1.0)
    """
    return _top(_sum(values) if style == "signed" else _largest(values))


def _largest(values: Map) -> npt.NDArray[np.float64]:
    largest: npt.NDArray[np.float64] = np.abs(_map(values)).max(0)
    return largest


def _sum(values: Map) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = _map(values).sum(0)
    return total


def _map(values: Map) -> npt.NDArray[np.float64]:
    if values.ndim != 3:
        raise InputError(f"a map of shape {values.shape} cannot be drawn as an image; it needs (C, H, W)")
    return values.astype(np.float64)


def _top(plane: npt.NDArray[np.float64]) -> float:
    return float(np.percentile(np.abs(plane), CLIP)) or float(np.abs(plane).max())


def _clipped(plane: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    top = _top(plane)
    clipped: npt.NDArray[np.float64] = np.clip(plane / top, -1, 1) if top else plane
    return clipped


def heat(strength: npt.NDArray[np.float64]) -> Pixels:
    """Colour strengths in [0, 1], `(H, W)`, from black to pale yellow, `(H, W, 3)`.

    >>> heat(np.array([[0.0, 1.0]])).tolist()
    [[[0, 0, 4], [252, 255, 164]]]
    """
    return _coloured(strength, _HEAT, 0)


def diverging(strength: npt.NDArray[np.float64]) -> Pixels:
    """Colour strengths in [-1, 1], `(H, W)`, from blue through white at zero to red, `(H, W, 3)`.

    >>> diverging(np.array([[-1.0, 0.0, 1.0]])).tolist()
    [[[5, 48, 97], [247, 247, 247], [103, 0, 31]]]
    """
    return _coloured(strength, _DIVERGING, -1)


def _coloured(strength: npt.NDArray[np.float64], colours: npt.NDArray[Any], lowest: float) -> Pixels:
    stops = np.linspace(lowest, 1, len(colours))
    return np.stack([np.interp(strength, stops, colours[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def overlay(photograph: Pixels, values: Map) -> Pixels:
    """Blend a map's magnitude over its greyed photograph `(H, W, 3)`: the stronger, the less of the photograph.

    Of a dense map, such as a class activation map, at least 42 % of each pixel is the photograph's.
    """
    strength = magnitude(values)
    covered = float(np.sqrt(strength).mean())
    dense = min(max((covered - _SPARSE) / (_DENSE - _SPARSE), 0.0), 1.0)
    grey = photograph.astype(np.float64).mean(2, keepdims=True) * (0.6 + 0.3 * dense)
    weight = ((1 - (1 - _MOST) * dense) * strength ** (0.5 + 0.5 * dense))[..., None]
    mixed: Pixels = (grey * (1 - weight) + heat(strength) * weight).round().astype(np.uint8)
    return mixed


STYLES = {
    "magnitude": lambda values: heat(magnitude(values)),
    "signed": lambda values: diverging(signed(values)),
    "colour": colour,
}


def draw(values: Map, style: str) -> "Image":
    """Draw a map `(C, H, W)` in a style, one of `STYLES`.

    Raises:
        InputError: unknown style, or a map that the style cannot draw.
    """
    from PIL import Image

    if style not in STYLES:
        raise InputError(f"unknown style {style!r}{did_you_mean(style, STYLES)} (known: {', '.join(STYLES)})")
    return Image.fromarray(STYLES[style](values))
