"""pytorch-grad-cam's functions around a map: an image to a tensor, a map over its image, a gradient as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError

Array = npt.NDArray[Any]
JET = 2  # OpenCV's number


def preprocess_image(
    img: Array, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """Return an image `(H, W, C)`, uint8 or from 0 to 1, as a normalised batch of one, float32 `(1, C, H, W)`.

    >>> preprocess_image(np.full((2, 2, 3), 255, np.uint8)).unique()
    tensor([1.])
    """
    scaled = img / 255 if img.dtype == np.uint8 else img
    planes = ((scaled - np.asarray(mean)) / np.asarray(std)).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes[None], np.float32))


def deprocess_image(img: Array) -> Array:
    """Return values of any range as uint8: a tenth of a standard deviation about mid-grey.

    >>> deprocess_image(np.zeros((1, 1)))
    array([[127]], dtype=uint8)
    """
    scaled = (img - img.mean()) / (img.std() + 1e-5) * 0.1 + 0.5
    return np.asarray(scaled.clip(0, 1) * 255, np.uint8)


def show_cam_on_image(
    img: Array, mask: Array, use_rgb: bool = False, colormap: int = JET, image_weight: float = 0.5
) -> Array:
    """Lay a map, coloured from blue to red, over its image.

    Args:
        img: float `(H, W, 3)` from 0 to 1.
        mask: `(H, W)` from 0 to 1.
        use_rgb: colours in the order red, green, blue; else blue, green, red, as OpenCV has them.
        colormap: 2, OpenCV's JET, alone.
        image_weight: of the image, from 0 to 1.

    Returns:
        uint8 `(H, W, 3)`, its brightest value 255.

    Raises:
        InputError: another colour map, or values out of their range.

    >>> show_cam_on_image(np.zeros((1, 1, 3)), np.ones((1, 1)), use_rgb=True).tolist()
    [[[255, 0, 0]]]
    """
    if colormap != JET:
        raise InputError(f"colormap={colormap} is not there; 2, JET, is, and ut.show.draw draws maps in other ways")
    if img.max() > 1 or not 0 <= image_weight <= 1:
        raise InputError(f"img goes up to {img.max():.4g} and image_weight is {image_weight}; both lie between 0 and 1")
    level = (255 * mask).astype(np.uint8)[..., None] / 255
    red_green_blue = (1.5 - np.abs(4 * level - np.array([3, 2, 1]))).clip(0, 1)
    heat = red_green_blue if use_rgb else red_green_blue[..., ::-1]
    laid = (1 - image_weight) * heat + image_weight * img
    return np.asarray(255 * laid / laid.max(), np.uint8)
