"""Maps of any kind in little: small heatmaps of images and frames, the strongest positions of all else."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import heatmap

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 128  # pixels of a tile's longer side
FRAMES = 4  # of a video or a volume


def planes(values: npt.NDArray[Any], channels_last: bool = False) -> list[tuple[str, heatmap.Map]]:
    """Return one sample's map as planes `(C, H, W)`, each with what it is: of a video some of its frames.

    Of values that are no image `(C, H, W)` and no video or volume `(C, T, H, W)`, nothing; channels may come last.

    >>> [(name, plane.shape) for name, plane in planes(np.ones((3, 9, 4, 5)))][:2]
    [('frame 0 of 9', (3, 4, 5)), ('frame 3 of 9', (3, 4, 5))]
    """
    if values.ndim not in (3, 4) or min(values.shape, default=0) < 1:
        return []
    first = np.moveaxis(values, -1, 0) if channels_last else values
    if first.ndim == 3:
        return [("", first)] if min(first.shape[1:]) > 1 else []
    count = first.shape[1]
    chosen = sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    return [(f"frame {i} of {count}", first[:, i]) for i in chosen]


def tile(plane: heatmap.Map) -> "Image":
    """Draw the magnitude of a plane `(C, H, W)` small; NaN and infinity count as zero."""
    from PIL import Image

    finite = np.where(np.isfinite(plane), plane, 0).astype(np.float64)
    return fitted(Image.fromarray(heatmap.heat(heatmap.magnitude(finite))))


def fitted(image: "Image", side: int = SIDE) -> "Image":
    """Scale a picture so that its longer side has so many pixels; enlarged pixels stay sharp rectangles."""
    from PIL import Image

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def strip(images: Sequence["Image"], gap: int = 6) -> "Image":
    """Put pictures side by side on transparent ground."""
    from PIL import Image

    width = sum(image.width for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGBA", (width, max(image.height for image in images)))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width + gap
    return joined


def strongest(values: npt.NDArray[Any], axes: int, count: int = 5) -> Iterator[tuple[str, float]]:
    """Yield the positions of the largest values, along the first `axes` axes, with their value, the largest first.

    Of values that have further axes, such as tokens' embeddings `(T, E)`, the ℓ2 norm over these.

    >>> list(strongest(np.array([0.5, -2.0, 1.0]), 1, count=2))
    [('1', -2.0), ('2', 1.0)]
    >>> list(strongest(np.array([[3.0, 4.0], [1.0, 0.0]]), 1))
    [('0', 5.0), ('1', 1.0)]
    """
    wide = values.astype(np.float64)
    if values.ndim > axes:
        wide = np.sqrt(np.square(wide).sum(tuple(range(axes, values.ndim))))
    size = np.where(np.isnan(wide), np.inf, np.abs(wide)).ravel()
    for flat in np.argsort(-size, kind="stable")[:count]:
        place = np.unravel_index(flat, wide.shape)
        yield ", ".join(map(str, map(int, place))), float(wide[place])
