"""Is the map more than the photograph's own edges?"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..similarity import correlation, plane, spearman, ssim
from .null import thresholds_against
from .result import NO, YES, Answer

Array = npt.NDArray[Any]
SOURCE = "Adebayo et al. 2018, arXiv 1810.03292, section 5; Nie et al. 2018, arXiv 1805.07039"
DEFINITION = (
    "Is the map more than an edge detector? Rank correlation of its magnitudes with the photograph's edges (Sobel). "
    "'no': as high as for random maps that share half of their variance with the edges, or higher. 'yes': no higher "
    "than for unrelated random maps."
)


def edges(image: Array) -> npt.NDArray[np.float64]:
    """Return the length of the Sobel gradient of an image's grey values at each pixel, `(C, H, W)` to `(H, W)`.

    Borders are mirrored. Unit: that of the image, per pixel.

    >>> edges(np.array([[[0.0, 1.0, 2.0]] * 3]))[:, 1].tolist()
    [1.0, 1.0, 1.0]
    """
    grey = np.pad(np.asarray(image, np.float64).mean(0), 1, mode="symmetric")
    smooth = (grey[:-2] + 2 * grey[1:-1] + grey[2:]) / 4
    across = (smooth[:, 2:] - smooth[:, :-2]) / 2
    smooth = (grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]) / 4
    along = (smooth[2:] - smooth[:-2]) / 2
    return np.hypot(across, along)  # type: ignore[no-any-return]


def answer(values: Array, image: Array, samples: int, seed: int) -> Answer:
    """Compare a map with the image that it is of.

    Args:
        values: the map, `(C, H, W)`.
        image: the input, `(C, H, W)`, of the same height and width.
    """
    magnitudes, steepness = plane(values), edges(image)
    value = spearman(magnitudes, steepness)
    null = thresholds_against(magnitudes, steepness, samples, np.random.default_rng(seed))
    level = null.classify(value)
    numbers = {
        "edges": value,
        "edges_ssim": ssim(magnitudes, steepness),
        "image": correlation(np.mean(values, 0), np.mean(image, 0)),
        "null": null.to_dict(),
    }
    return Answer(value, numbers, level, _sentence(level, value), DEFINITION, SOURCE)


def _sentence(level: str, value: float) -> str:
    if level == NO:
        return f"The map is mostly an edge detector: its magnitudes follow the photograph's own edges ({value:.2f})."
    if level == YES:
        return f"The map is no edge detector ({value:.2f} with the photograph's edges)."
    return f"The map follows the photograph's own edges in part ({value:.2f})."
