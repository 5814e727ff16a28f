"""Maps of one's own as pictures: what any framework calls a gradient, from any tool."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..frameworks.base import as_numpy
from ..images import Photograph, read
from . import heatmap

if TYPE_CHECKING:
    from PIL.Image import Image

_CHANNELS = (1, 3)


def draw(
    values: Any,
    style: str = "magnitude",
    *,
    photograph: Photograph | npt.NDArray[np.uint8] | None = None,
    channels_last: bool = False,
) -> "Image":
    """Draw one map, such as `input.grad`, as a picture of its height and width.

    Args:
        values: a tensor of any framework or an array, `(H, W)`, `(C, H, W)` or `(1, C, H, W)`, of real numbers.
        style: "magnitude" (largest |value| over the channels, clipped at its 99th percentile), "signed" (their sum,
            from blue through white at zero to red, clipped likewise) or "colour" (a tenth of a standard deviation
            about mid-grey, clipped; 1 or 3 channels).
        photograph: a path, a Pillow image or uint8 `(H, W, 3)`, to lay the magnitude over; of the map's size, as
            `classifier.preprocessing.view(image)` gives the part that the network saw.
        channels_last: the map is `(H, W, C)` or `(1, H, W, C)`.

    Raises:
        InputError: no map of one image, one with NaN or infinity, an unknown style, or a photograph of another size.
        PhotographError: the photograph cannot be read.

    >>> draw(np.eye(3)).size, draw(np.ones((1, 3, 20, 30)), "colour").size
    ((3, 3), (30, 20))
    """
    array = _one_map(values, channels_last)
    if photograph is None:
        return heatmap.draw(array, style)
    if style != "magnitude":
        raise InputError(f"over a photograph the magnitude is drawn, not {style!r}; leave out one of the two")
    return _over(photograph, array)


def _over(photograph: Photograph | npt.NDArray[np.uint8], values: heatmap.Map) -> "Image":
    from PIL import Image

    pixels = photograph if isinstance(photograph, np.ndarray) else np.asarray(read(photograph))
    if pixels.shape != (*values.shape[1:], 3) or pixels.dtype != np.uint8:
        raise InputError(
            f"the map is {_size(values.shape[1:])} and the photograph {_size(pixels.shape)} {pixels.dtype}; pass the "
            "part that the network saw, classifier.preprocessing.view(image), uint8 (H, W, 3)"
        )
    return Image.fromarray(heatmap.overlay(pixels, values))


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _one_map(values: Any, channels_last: bool) -> heatmap.Map:
    """Return one map as finite float64 `(C, H, W)`."""
    if values is None:
        raise InputError("the map is None, as .grad is before backward(); for an input, set x.requires_grad_() before")
    array = as_numpy(values)
    if np.iscomplexobj(array) or not np.issubdtype(array.dtype, np.number):
        raise InputError(f"a map of {array.dtype} cannot be drawn; pass real numbers")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[..., None] if channels_last else array[None]
    if array.ndim != 3 or not array.size:
        raise InputError(f"values of shape {array.shape} are no map of one image; pass (C, H, W), as in values[0]")
    channels, other = (-1, 0) if channels_last else (0, -1)
    if array.shape[channels] not in _CHANNELS and array.shape[other] in _CHANNELS:
        where = "first" if channels_last else "last"
        raise InputError(
            f"a map of shape {array.shape} has its channels {where}; pass channels_last={not channels_last}"
        )
    if not np.isfinite(array).all():
        raise InputError("the map holds NaN or infinity, which no picture can show; look at where its gradient broke")
    return np.moveaxis(array, channels, 0).astype(np.float64)
