"""What replaces a pixel that is taken away: a blur, a mean, or an interpolation of its neighbours."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Image = npt.NDArray[np.float32]
BLUR = 1 / 10  # standard deviation, as a fraction of the longer side
NOISE = 0.01
WEIGHTS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def blurred(image: Array) -> Image:
    """Blur an image `(C, H, W)` by a Gaussian of a tenth of its longer side, weights renormalised at borders.

    >>> blurred(np.ones((1, 2, 3))).round(3).tolist()
    [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    height, width = image.shape[-2:]
    deviation = BLUR * max(height, width)
    rows, columns = (_gaussian(size, deviation) for size in (height, width))
    return np.asarray(rows @ image @ columns.T, np.float32)


def _gaussian(size: int, deviation: float) -> npt.NDArray[np.float64]:
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    weights = np.exp(-0.5 * (distance / deviation) ** 2)
    return weights / weights.sum(1, keepdims=True)  # type: ignore[no-any-return]


def mean_image(image: Array) -> Image:
    """Return an image of each channel's mean.

    >>> mean_image(np.array([[[1.0, 3.0]]])).tolist()
    [[[2.0, 2.0]]]
    """
    return np.broadcast_to(np.mean(image, (-2, -1), keepdims=True), image.shape).astype(np.float32)


def imputed(
    image: Array,
    missing: npt.NDArray[np.bool_],
    generator: np.random.Generator,
    noise: float = NOISE,
    max_steps: int = 25,
) -> Image:
    """Fill missing pixels so that each is the weighted mean of its eight neighbours, plus a little noise.

    Direct neighbours weigh 1/6, diagonal ones 1/12, those beyond the border nothing. The linear system is solved by
    conjugate gradients from a coarse guess, which after `max_steps` steps leaves an error that nobody sees.

    Args:
        image: `(C, H, W)`.
        missing: `(H, W)`, True where a pixel is to be filled; at least one must stay.
        noise: standard deviation, in the image's unit.

    Source: noisy linear imputation, Rong et al. 2022, arXiv 2202.00449, section 4.
    """
    present = np.where(missing, np.float32(0), np.asarray(image, np.float32))
    degree = _neighbours(np.ones(missing.shape, np.float32))
    guess = np.where(missing, _coarse(present, ~missing), np.float32(0))
    # unknowns u: degree * u - (sum of missing neighbours) = (sum of present ones); symmetric and positive definite
    solved = _conjugate_gradients(lambda u: missing * (degree * u - _neighbours(u)),
                                  missing * _neighbours(present), guess, max_steps)  # fmt: skip
    drawn = noise * generator.standard_normal(present.shape)
    return np.where(missing, solved + drawn, present).astype(np.float32)


def _neighbours(values: Array) -> Array:
    """Return at each pixel the weighted sum of its neighbours, zero beyond the border."""
    height, width = values.shape[-2:]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(1, 1), (1, 1)])
    sides = 0.5 * (padded[..., :, :-2] + padded[..., :, 2:]) + padded[..., :, 1:-1]
    rows = (sides[..., :-2, :] + sides[..., 2:, :]) / 6
    middle = padded[..., 1 : height + 1, :]
    return np.asarray(rows + (middle[..., :width] + middle[..., 2:]) / 6)


def _coarse(image: Image, present: npt.NDArray[np.bool_]) -> Image:
    """Guess missing pixels by the mean of the smallest aligned block, of 2, 4, 8, ... pixels, with any present."""
    if present.all() or not present.any():
        return image
    height, width = present.shape
    even = [(0, height % 2), (0, width % 2)]
    count = _block_sums(np.pad(present.astype(np.float32), even))
    total = _block_sums(np.pad(image * present, [(0, 0), *even]))
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    coarser = np.where(count > 0, mean, _coarse(mean, count > 0))
    return np.where(present, image, coarser.repeat(2, -2).repeat(2, -1)[..., :height, :width])


def _block_sums(values: Image) -> Image:
    return values[..., ::2, ::2] + values[..., 1::2, ::2] + values[..., ::2, 1::2] + values[..., 1::2, 1::2]


def _conjugate_gradients(apply: Any, right: Array, guess: Array, max_steps: int) -> Image:
    """Solve a symmetric positive definite system, all channels at once; stop where the residual is rounding."""
    solution = guess.copy()
    residual = right - apply(solution)
    direction, size = residual.copy(), float(np.vdot(residual, residual))
    tolerance = 1e-12 * float(np.vdot(right, right))
    for _ in range(max_steps):
        if size <= tolerance:
            break
        product = apply(direction)
        step = size / float(np.vdot(direction, product))
        solution += np.float32(step) * direction
        residual -= np.float32(step) * product
        previous, size = size, float(np.vdot(residual, residual))
        direction = residual + np.float32(size / previous) * direction
    return solution
