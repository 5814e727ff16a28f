"""What is explained, beyond classes: a region or a token of dense scores, a unit inside the network, a detector's box.

A class id, several, one-hot labels, "top:K" or a function need nothing of this: `undertow.explain` takes them as they
are, and for dense scores `(B, ...)` also a place in them after the batch axis, such as `(class, y, x)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .display import ShownFields
from .errors import TargetError


class Target(ShownFields):
    """What is explained where it is no class."""


@dataclass(frozen=True, eq=False, repr=False)
class Region(Target):
    """The sum of a class's scores over a region; see `where`."""

    mask: npt.NDArray[Any]
    class_id: int

    def weights(self, shape: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return the weight of each score of an output of a shape: `(B, ...)`, or `(1, ...)` for all samples alike.

        Raises:
            TargetError: the mask does not lie on the scores' plane, or there is no such class.
        """
        rows = self.mask if self.mask.ndim == len(shape) - 1 else self.mask[None]
        axes = [axis for axis in (1, len(shape) - 1) if (*shape[1:axis], *shape[axis + 1 :]) == rows.shape[1:]]
        if rows.ndim != len(shape) - 1 or len(rows) not in (1, shape[0]) or not axes:
            raise TargetError(
                f"the mask has shape {self.mask.shape} and the scores {tuple(shape)}; resize it to their plane, "
                f"{tuple(shape[2:])} where classes come second"
            )
        axis = axes[0]
        if not 0 <= self.class_id < shape[axis]:
            raise TargetError(f"target {self.class_id} is out of range: the model has classes 0 to {shape[axis] - 1}")
        weights = np.zeros((len(rows), *shape[1:]))
        np.moveaxis(weights, axis, 1)[:, self.class_id] = rows
        return weights


@dataclass(frozen=True, eq=False, repr=False)
class Token(Target):
    """A class target at one position of `(B, positions, classes)` scores; see `token`."""

    target: Any
    position: Any


@dataclass(frozen=True, repr=False)
class Unit(Target):
    """A unit inside the network; see `unit`."""

    layer: str
    channel: int
    place: tuple[int, ...] | None
    axis: int | None


@dataclass(frozen=True, repr=False)
class Box(Target):
    """A box that a detector keeps; see `box`."""

    index: int
    near: tuple[float, ...] | None


def where(mask: Any, class_id: int) -> Region:
    """Explain a class over a region: the sum of its scores where a mask is on.

    Args:
        mask: bool, or weights, of the scores' plane: `(H, W)` for all samples or `(B, H, W)`, for scores
            `(B, classes, H, W)` or `(B, H, W, classes)`; `(T,)` for `(B, T, classes)`. Classes are taken to come
            second where both fit. A tensor on the CPU, or an array.
        class_id: of the model.

    Raises:
        TargetError: the mask is empty.

    >>> where(np.eye(2), 1).weights((1, 3, 2, 2))[0, 1].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    array = np.asarray(mask, np.float64)
    if not array.any():
        raise TargetError("the mask is off everywhere; there is nothing to explain")
    return Region(array, class_id)


def token(target: Any = None, position: Any = -1) -> Token:
    """Explain the score of a token at a position of a language model's scores `(B, positions, vocabulary)`.

    Args:
        target: a token's id, or whatever `undertow.explain` takes for classes; None is the likeliest token.
        position: the same for all samples, or one for each, `(B,)`; -1 is the last, whose scores are of the next token.

    >>> token(42).position
    -1
    """
    return Token(target, position)


def unit(layer: str, channel: int, place: Sequence[int] | None = None, *, axis: int | None = None) -> Unit:
    """Explain a unit inside the network: the sum of a channel of a layer's output, or one element of it.

    Args:
        layer: a module's dotted name; `layer@1` is its second call.
        channel: in the layer's output.
        place: the element's position along the other axes, such as `(y, x)`; None sums over all.
        axis: of the channels; None takes what the layer's module and sizes tell.

    >>> unit("features.28", 12).channel
    12
    """
    return Unit(layer, channel, None if place is None else tuple(place), axis)


def box(index: int = 0, *, near: Sequence[float] | None = None) -> Box:
    """Explain the score of a box that a detector keeps.

    Args:
        index: among the boxes of an image, the best first.
        near: a box `(x0, y0, x1, y1)` in the detector's own unit: the kept box that overlaps it most is explained.

    The output is torchvision's (for each image a dict of "boxes" and "scores"), or DETR's ("pred_boxes" beside "logits"
    or "pred_logits": the logit of a query's likeliest class, boxes in fractions of the image).

    Raises:
        TargetError: `near` is no box.

    >>> box(near=(0, 0, 10, 20)).near
    (0.0, 0.0, 10.0, 20.0)
    """
    corners = None if near is None else tuple(map(float, near))
    if corners is not None and (len(corners) != 4 or corners[2] <= corners[0] or corners[3] <= corners[1]):
        raise TargetError(f"near={tuple(near or ())} is no box; give (x0, y0, x1, y1), x1 above x0 and y1 above y0")
    return Box(index, corners)
