"""The inputs that an estimator averages over: which of them move, noise, and lines that begin at a baseline."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..frameworks.base import as_numpy

Array = npt.NDArray[Any]
BLUR = 15  # the blur's standard deviation is this part of the image's side


def baseline_like(
    baseline: Any, inputs: Sequence[Array], maps: Sequence[Array | None], channels_last: bool = False
) -> list[Array]:
    """Return where the line to each input begins; an input without a map stays as it is.

    Args:
        maps: None for an input that is not moved.
        baseline: "zero"; "blur", the input smoothed by a normal kernel of a fifteenth of its side; a number; an array
            that fits one sample or the batch, with one value for each channel where it has just as many.

    Raises:
        InputError: it is something else, or does not fit.

    >>> x = np.ones((1, 3, 2, 2))
    >>> baseline_like((0, 1, 2), [x], [x])[0][0, :, 0, 0].tolist()
    [0.0, 1.0, 2.0]
    """
    return [x if m is None else _start(baseline, x, channels_last) for x, m in zip(inputs, maps, strict=True)]


def _start(baseline: Any, x: Array, channels_last: bool) -> Array:
    plane = range(1, x.ndim - 1) if channels_last else range(2, x.ndim)
    if isinstance(baseline, str):
        if baseline == "zero":
            return np.zeros_like(x)
        if baseline != "blur":
            raise InputError(f"unknown baseline {baseline!r}; it is 'zero', 'blur', a number or an array like x")
        if not plane:
            raise InputError(f"baseline 'blur' needs images, (B, C, H, W), and the input has shape {x.shape}")
        return _blurred(x, plane)
    try:
        array = as_numpy(baseline) if hasattr(baseline, "shape") else np.asarray(baseline, x.dtype)
        channel_axis = x.ndim - 1 if channels_last else 1
        if array.ndim == 1 and x.ndim > 2 and len(array) == x.shape[channel_axis]:
            array = array.reshape([-1 if axis == channel_axis else 1 for axis in range(x.ndim)])
        return np.broadcast_to(array, x.shape).astype(x.dtype)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a baseline of shape {np.shape(baseline)} does not fit the input {x.shape}; pass 'zero', 'blur', a "
            "number, one for each channel, or an array like the input"
        ) from error


def _blurred(x: Array, plane: Iterable[int]) -> Array:
    blurred = x.astype(np.float64)
    for axis in plane:
        distance = np.subtract.outer(np.arange(x.shape[axis]), np.arange(x.shape[axis])) * BLUR / x.shape[axis]
        kernel = np.exp(-(distance**2) / 2)
        kernel /= kernel.sum(1, keepdims=True)
        blurred = np.moveaxis(np.moveaxis(blurred, axis, -1) @ kernel.T, -1, axis)
    return blurred.astype(x.dtype)


def moved(inputs: Sequence[Array], maps: Sequence[Array | None]) -> list[bool]:
    """Say which inputs an estimator changes: those with a map, but for masks, of zeros and ones, beside others.

    >>> image, mask, ids = np.array([0.5, 2.0]), np.array([1.0, 0.0]), np.array([3, 4])
    >>> moved([image, mask, ids], [image, mask, None]), moved([mask], [mask])
    ([True, False, False], [True])
    """
    has_map = [m is not None for m in maps]
    ordinary = [has and not np.isin(x, (0, 1)).all() for x, has in zip(inputs, has_map, strict=True)]
    return ordinary if any(ordinary) else has_map


def noisy(
    inputs: list[Array], moved: list[bool], count: int, seed: int, noise: float, per_sample: bool
) -> Iterator[list[Array]]:
    """Yield `count` noisy copies of the inputs.

    Args:
        per_sample: the range that scales the noise is that of each sample, else of the whole input.
    """
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield [
            x + _normal_noise(x, generator, noise, per_sample) if moves else x
            for x, moves in zip(inputs, moved, strict=True)
        ]


def _normal_noise(x: Array, generator: np.random.Generator, noise: float, per_sample: bool) -> Array:
    axes = tuple(range(1 if per_sample else 0, x.ndim))
    value_range = x.max(axes, keepdims=True) - x.min(axes, keepdims=True)
    drawn: Array = generator.standard_normal(x.shape) * noise * value_range
    return drawn.astype(x.dtype)


def on_the_line(inputs: list[Array], starts: list[Array], maps: list[Any], count: int) -> Iterator[list[Array]]:
    """Yield the midpoints of `count` equal parts of the line to the input."""
    for i in range(count):
        share = (i + 0.5) / count
        yield [
            x if m is None else start + (x - start) * x.dtype.type(share)
            for x, start, m in zip(inputs, starts, maps, strict=True)
        ]
