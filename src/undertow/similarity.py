"""How alike two maps are. NumPy in, numbers out; no framework.

Maps are `(C, H, W)`. Which pixels a map marks is its plane: the largest |value| over its channels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
WINDOW = 7  # pixels, of SSIM


def plane(values: Array) -> npt.NDArray[np.float64]:
    """Return a map's magnitudes, `(H, W)`: the largest |value| over the channels, as a heatmap shows it.

    >>> plane(np.array([[[0.0, -2.0]], [[1.0, 0.5]]])).tolist()
    [[1.0, 2.0]]
    """
    return np.abs(np.asarray(values, np.float64)).max(0)  # type: ignore[no-any-return]


def ranks(values: Array) -> npt.NDArray[np.float64]:
    """Return each value's rank from 0, flat; equal values share the mean of their ranks.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, inverse, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    mean: npt.NDArray[np.float64] = np.cumsum(counts) - (counts + 1) / 2
    return mean[inverse]


def correlation(a: Array, b: Array) -> float:
    """Return Pearson's correlation in [-1, 1]: 1 for two constants, 0 for one constant beside another array.

    >>> correlation(np.array([1.0, 2.0, 4.0]), np.array([-1.0, -2.0, -4.0]))
    -1.0
    """
    return cosine(*(np.ravel(v).astype(np.float64) - np.mean(v, dtype=np.float64) for v in (a, b)))


def cosine(a: Array, b: Array) -> float:
    """Return the cosine of the angle between two arrays in [-1, 1]: 1 for two of zeros, 0 for one beside another.

    >>> round(cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 4)
    0.7071
    """
    unit_a, unit_b = (_unit(np.ravel(v).astype(np.float64)) for v in (a, b))
    if unit_a is None or unit_b is None:
        return float(unit_a is unit_b)
    return float(np.clip(unit_a @ unit_b, -1, 1).round(12))


def _unit(flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Scale to length 1, whatever the range of the values; None for zeros and for what is rounding about zero."""
    largest = float(np.abs(flat).max(initial=0))
    if largest == 0 or not np.isfinite(largest):
        return None
    scaled = flat / largest
    return scaled / np.linalg.norm(scaled)


def spearman(a: Array, b: Array) -> float:
    """Return Spearman's rank correlation of two arrays in [-1, 1]: whether the same pixels are strong in both.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 9.0, 5.0])), 4)
    0.5
    """
    return correlation(ranks(a), ranks(b))


def ssim(a: Array, b: Array) -> float:
    """Return the structural similarity of two planes `(H, W)`, each scaled to [0, 1] by its 99th percentile.

    Windows of 7 x 7 pixels with equal weights and sample covariances; smaller planes are one window.

    Source: Wang et al. 2004, doi 10.1109/TIP.2003.819861, with the constants 0.01 and 0.03.

    >>> ssim(np.eye(9), np.eye(9))
    1.0
    """
    x, y = (_scaled(v) for v in (a, b))
    size = min(WINDOW, *x.shape)
    unbiased = size * size / max(size * size - 1, 1)
    mean_x, mean_y = _means(x, size), _means(y, size)
    covariance = unbiased * (_means(x * y, size) - mean_x * mean_y)
    variances = unbiased * (_means(x * x, size) - mean_x**2 + _means(y * y, size) - mean_y**2)
    numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    return float((numerator / ((mean_x**2 + mean_y**2 + 0.01**2) * (variances + 0.03**2))).mean().round(12))


def _scaled(values: Array) -> npt.NDArray[np.float64]:
    values = np.asarray(values, np.float64)
    top = float(np.percentile(values, 99)) or float(values.max())
    scaled: npt.NDArray[np.float64] = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    return scaled


def _means(values: Array, size: int) -> npt.NDArray[np.float64]:
    """Return the mean of every whole window."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (size, size))
    return windows.mean((-2, -1))  # type: ignore[no-any-return]


def similarities(a: Array, b: Array) -> dict[str, float]:
    """Compare two maps `(C, H, W)`: rank correlation and SSIM of magnitudes, cosine and correlation of signed values.

    >>> similarities(np.ones((1, 2, 2)) * [[[1, 2], [3, 4]]], -np.ones((1, 2, 2)) * [[[1, 2], [3, 4]]])
    {'spearman': 1.0, 'ssim': 1.0, 'cosine': -1.0, 'correlation': -1.0}
    """
    plane_a, plane_b = plane(a), plane(b)
    return {
        "spearman": spearman(plane_a, plane_b),
        "ssim": ssim(plane_a, plane_b),
        "cosine": cosine(a, b),
        "correlation": correlation(a, b),
    }
