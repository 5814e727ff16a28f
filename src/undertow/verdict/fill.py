"""What stands in the place of a pixel that is taken away: a blur, a mean, or what its neighbours suggest."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Image = npt.NDArray[np.float32]
BLUR = 1 / 10  # standard deviation, as a fraction of the longer side
NOISE = 0.01
WEIGHTS = {(y, x): 1 / 6 if 0 in (y, x) else 1 / 12 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def blurred(image: Array) -> Image:
    """Blur an image `(C, H, W)` by a Gaussian of a tenth of its longer side; at borders the rest counts more.

    >>> blurred(np.ones((1, 2, 3))).round(3).tolist()
    [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    height, width = image.shape[-2:]
    width_of_blur = BLUR * max(height, width)
    rows, columns = (_gaussian(size, width_of_blur) for size in (height, width))
    return np.asarray(rows @ image @ columns.T, np.float32)


def _gaussian(size: int, deviation: float) -> npt.NDArray[np.float64]:
    away = np.subtract.outer(np.arange(size), np.arange(size))
    weights = np.exp(-0.5 * (away / deviation) ** 2)
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
    known = np.where(missing, np.float32(0), np.asarray(image, np.float32))
    degree = _neighbours(np.ones(missing.shape, np.float32))
    guess = np.where(missing, _coarse(known, ~missing), np.float32(0))
    # unknowns u: degree * u - (their missing neighbours) = (their known neighbours); symmetric and positive definite
    solved = _conjugate_gradients(lambda u: missing * (degree * u - _neighbours(u)),
                                  missing * _neighbours(known), guess, max_steps)  # fmt: skip
    drawn = noise * generator.standard_normal(known.shape)
    return np.where(missing, solved + drawn, known).astype(np.float32)


def _neighbours(values: Array) -> Array:
    """Return at each pixel the weighted sum of its neighbours; beyond the border there is nothing."""
    height, width = values.shape[-2:]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(1, 1), (1, 1)])
    sides = 0.5 * (padded[..., :, :-2] + padded[..., :, 2:]) + padded[..., :, 1:-1]
    total = (sides[..., :-2, :] + sides[..., 2:, :]) / 6
    middle = padded[..., 1 : height + 1, :]
    return np.asarray(total + (middle[..., :width] + middle[..., 2:]) / 6)


def _coarse(known: Image, there: npt.NDArray[np.bool_]) -> Image:
    """Guess missing pixels by the mean of the smallest aligned block, of 2, 4, 8, ... pixels, that knows any."""
    if there.all() or not there.any():
        return known
    height, width = there.shape
    even = [(0, height % 2), (0, width % 2)]
    count = _blocks(np.pad(there.astype(np.float32), even))
    total = _blocks(np.pad(known * there, [(0, 0), *even]))
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    above = np.where(count > 0, mean, _coarse(mean, count > 0))
    return np.where(there, known, above.repeat(2, -2).repeat(2, -1)[..., :height, :width])


def _blocks(values: Image) -> Image:
    return values[..., ::2, ::2] + values[..., 1::2, ::2] + values[..., ::2, 1::2] + values[..., 1::2, 1::2]


def _conjugate_gradients(apply: Any, right: Array, guess: Array, max_steps: int) -> Image:
    """Solve a symmetric positive definite system, all channels in one; stop where the residual is rounding."""
    solution = guess.copy()
    residual = right - apply(solution)
    direction, size = residual.copy(), float(np.vdot(residual, residual))
    enough = 1e-12 * float(np.vdot(right, right))
    for _ in range(max_steps):
        if size <= enough:
            break
        moved = apply(direction)
        step = size / float(np.vdot(direction, moved))
        solution += np.float32(step) * direction
        residual -= np.float32(step) * moved
        before, size = size, float(np.vdot(residual, residual))
        direction = residual + np.float32(size / before) * direction
    return solution
