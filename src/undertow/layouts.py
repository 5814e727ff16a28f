"""Where a layer's output has its channels and its positions: found from the sizes and the module, or told.

| layer's output | for an input `(B, C, H, W)` |
|---|---|
| bchw, bhwc | a plane with its channels first or last |
| btc, bct | tokens: the plane row by row, behind up to 8 tokens that have no place in it, such as a class token |

A line `(B, C, L)` and a volume `(B, C, T, H, W)` likewise; tokens of a volume have no grid that their number tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

MAX_EXTRA_TOKENS = 8
MAX_PATCH = 32  # pixels a side: no vision transformer has larger ones, and a detector's 100 queries are no 10 by 10
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How a layer's output lies over the input.

    Attributes:
        channel_axis: 1, or -1 for the last.
        grid: how many positions there are along each of the input's axes.
        extra: how many tokens come before those of the grid.
        is_exact: the grid has the proportions of the input, not only nearly.
    """

    channel_axis: int
    grid: tuple[int, ...]
    extra: int = 0
    is_exact: bool = True

    def channels_first(self, array: Array, lead: int = 1) -> Array:
        """Return an array `(..., C, *grid)`.

        Args:
            lead: how many axes come before those of the layer: 1 for the batch.
        """
        moved = np.moveaxis(array, lead if self.channel_axis == 1 else -1, lead)
        flat = moved.reshape(*moved.shape[: lead + 1], -1)[..., self.extra :]
        return flat.reshape(*moved.shape[: lead + 1], *self.grid)


def find_layout(
    layer: str, shape: Sequence[int], input_shape: Sequence[int], channel_axis: int | None = None, axes: str = ""
) -> Layout:
    """Find the layout of a layer's output.

    Args:
        layer: for messages.
        shape: of the output.
        input_shape: `(B, C, H, W)`, or with one or three axes in place of the two.
        channel_axis: 1 or -1 where the module tells: it is believed unless only the other one fits the sizes.
        axes: a letter for each axis, "b" first and "c" second or last; empty: find them.

    Raises:
        InputError: no layout fits, or several do.

    >>> find_layout("block", (1, 8, 6, 32), (1, 3, 64, 48))
    Layout(channel_axis=-1, grid=(8, 6), extra=0, is_exact=True)
    >>> find_layout("encoder", (1, 197, 768), (1, 3, 224, 224))
    Layout(channel_axis=-1, grid=(14, 14), extra=1, is_exact=True)
    """
    described = f"layer {layer!r} gives {tuple(shape)} for an input of {tuple(input_shape)}"
    plane = tuple(input_shape[2:])
    if not plane or len(shape) not in (3, len(plane) + 2):
        raise InputError(
            f"a map over the input needs a layer of channels on a plane, (B, C, H, W), or tokens (B, T, C); {described}"
        )
    if shape[0] != input_shape[0]:
        raise InputError(f"a map over the input needs a layer with a place for each sample; {described}")
    told = _told(axes, len(shape)) if axes else channel_axis
    fits = {axis: layout for axis in (1, -1) if (layout := _layout(shape, plane, axis)) is not None}
    if len({layout.is_exact for layout in fits.values()}) == 2:
        fits = {axis: layout for axis, layout in fits.items() if layout.is_exact}
    if told is None and len(fits) == 1:
        return next(iter(fits.values()))
    if told is not None and (axes or told in fits or not fits):
        layout = _layout(shape, plane, told, is_told=True)
        if layout is not None:
            return layout
    example = "'bchw' or 'bhwc'" if len(shape) == 4 else "'btc' or 'bct'"
    if axes or (not fits and len(shape) == 3):
        asked = f"with axes {axes!r} " if axes else ""
        raise InputError(
            f"{described}: {asked}its tokens make no grid of square patches of up to {MAX_PATCH} pixels; take a layer "
            "that has a place for each patch of the input"
        )
    raise InputError(f"{described}: which of its axes are channels cannot be told; pass axes={example}")


def gridded(layout: Layout, shape: Sequence[int], grid: tuple[int, ...]) -> Layout:
    """Return a layout with another grid, which its tokens have behind all others.

    Args:
        shape: of the layer's output.

    Raises:
        InputError: there are fewer tokens.

    >>> gridded(Layout(-1, (14, 14)), (1, 30, 8), (4, 7)).extra
    2
    """
    count = math.prod(shape[2:] if layout.channel_axis == 1 else shape[1:-1])
    if math.prod(grid) > count or len(grid) != 2 or min(grid) < 1:
        raise InputError(f"grid={grid} has no place among {count} tokens; give (rows, columns) of at most so many")
    return Layout(layout.channel_axis, tuple(grid), count - math.prod(grid))


def _told(axes: str, count: int) -> int:
    position = axes.find("c")
    if len(axes) != count or len(set(axes)) != count or axes[0] != "b" or position not in (1, count - 1):
        raise InputError(
            f"axes {axes!r} are not understood; write a letter for each of the layer's {count} axes, b first and c "
            "second or last, as in bhwc"
        )
    return 1 if position == 1 else -1


def _layout(shape: Sequence[int], plane: tuple[int, ...], channel_axis: int, is_told: bool = False) -> Layout | None:
    positions = tuple(shape[2:] if channel_axis == 1 else shape[1:-1])
    if len(positions) != len(plane):
        return _tokens(positions[0], plane, channel_axis)
    is_exact = all(p * plane[0] == positions[0] * size for p, size in zip(positions, plane, strict=True))
    if is_told or (is_exact and positions[0] <= plane[0]) or _is_nearly_proportional(positions, plane):
        return Layout(channel_axis, positions, is_exact=is_exact)
    return None


def _is_nearly_proportional(positions: tuple[int, ...], plane: tuple[int, ...]) -> bool:
    """Whether one stride gives every axis its positions, within one at the border."""
    low = max((p - 1) / size for p, size in zip(positions, plane, strict=True))
    high = min((p + 1) / size for p, size in zip(positions, plane, strict=True))
    return low <= high and low < 1


def _tokens(count: int, plane: tuple[int, ...], channel_axis: int) -> Layout | None:
    """Return the grid of the patches that leave the fewest extra tokens, None where there is none.

    Patches divide the plane: else the rows of an image would be found to be tokens, 28 of them a grid of 5 by 5 and 3.
    In a volume they need not be as long in time as in space: 8 by 14 by 14 tokens would be found to be 2 by 28 by 28.
    """
    if len(plane) != 2:
        return None
    patches = [p for p in range(1, min(*plane, MAX_PATCH) + 1) if not any(size % p for size in plane)]
    grids = [tuple(size // patch for size in plane) for patch in patches]
    fitting = [(extra, grid) for grid in grids if 0 <= (extra := count - math.prod(grid)) <= MAX_EXTRA_TOKENS]
    if not fitting:
        return None
    extra, grid = min(fitting)
    return Layout(channel_axis, grid, extra)


def upsampled(planes: Array, size: tuple[int, ...]) -> Array:
    """Resize the last axes by linear interpolation along each, an element's value being at its centre.

    >>> upsampled(np.array([[0.0, 1.0]]), (1, 4)).tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    for axis, new in enumerate(size, -len(size)):
        planes = np.moveaxis(np.moveaxis(planes, axis, -1) @ _weights(planes.shape[axis], new).T, -1, axis)
    return planes


def filled(planes: Array, size: tuple[int, ...]) -> Array:
    """Resize the last axes so that each element fills its rectangle.

    >>> filled(np.array([[0.0, 1.0]]), (1, 4)).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    for axis, new in enumerate(size, -len(size)):
        planes = np.take(planes, np.arange(new) * planes.shape[axis] // new, axis)
    return planes


def _weights(old: int, new: int) -> Array:
    """Return the weight of each old pixel in each new one, `(new, old)`."""
    positions = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    weights: Array = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old)))
    return weights
