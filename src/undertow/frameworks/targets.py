"""Which classes a target means; no framework is needed here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TargetError


def top(target: str, classes: int) -> int:
    """Return K of "top:K".

    Raises:
        TargetError: the target is something else, or K is larger than the number of classes.

    >>> top("top:3", 10)
    3
    """
    word, _, count = target.partition(":")
    if word != "top" or not count.isdecimal() or int(count) < 1:
        raise TargetError(f"target {target!r} is not understood; the only words are 'top:K', as in 'top:3'")
    if int(count) > classes:
        raise TargetError(f"target {target!r} asks for more classes than the model has ({classes})")
    return int(count)


def from_one_hot(target: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the classes `(B,)` of one-hot labels `(B, classes)`, whole numbers or not; anything else as it is.

    No list of different classes has more than two entries of which all are 0 or 1.

    >>> from_one_hot(np.eye(3)).tolist(), from_one_hot(np.array([[0, 1]])).tolist()
    ([0, 1, 2], [[0, 1]])
    """
    is_one_hot = target.ndim == 2 and target.shape[1] > 2 and np.isin(target, (0, 1)).all()
    return target.argmax(1) if is_one_hot and (target.sum(1) == 1).all() else target


def class_ids(target: Any, batch: int) -> tuple[npt.NDArray[np.int64], bool]:
    """Return class ids `(B, K)` from an int, `(B,)` or `(B, K)`, and whether it was one class for each sample.

    Raises:
        TargetError: the target is something else.

    >>> class_ids(7, 2)
    (array([[7],
           [7]]), True)
    """
    try:
        ids = from_one_hot(np.asarray(target))
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_understood(target) from error
    if ids.dtype.kind not in "biuf":
        raise _not_understood(target)
    if ids.dtype.kind not in "iu":
        raise TargetError(f"target has dtype {ids.dtype}; class ids are integers")
    if ids.ndim == 0:
        ids = np.broadcast_to(ids, (batch,))
    if ids.ndim not in (1, 2) or len(ids) != batch or 0 in ids.shape[1:]:
        raise TargetError(f"target has shape {ids.shape} for a batch of {batch}: pass an int, ({batch},) or (B, K)")
    single = ids.ndim == 1
    return ids.astype(np.int64).reshape(batch, -1 if batch else 1), single


def refuse_missing(ids: npt.NDArray[np.int64], classes: int) -> None:
    """Refuse class ids that the model does not have.

    Raises:
        TargetError: naming the first such id.
    """
    wrong = ids[(ids < 0) | (ids >= classes)]
    if wrong.size and classes == 1:
        raise TargetError(
            f"target {int(wrong[0])} is out of range: the model has one score, class 0; what spoke against it is "
            "target=lambda output: -output[:, 0]"
        )
    if wrong.size:
        raise TargetError(f"target {int(wrong[0])} is out of range: the model has classes 0 to {classes - 1}")


def places(target: Any, shape: Sequence[int]) -> tuple[npt.NDArray[np.int64], bool]:
    """Return places in dense scores, `(B, K, axes)`, and whether there is one for each sample.

    Args:
        target: a place after the batch axis, such as `(class, y, x)`; one for each sample, `(B, axes)`; or several,
            `(B, K, axes)`. Negative ones count from the end.
        shape: of the scores, the batch first.

    Raises:
        TargetError: the target is something else, or out of range.

    >>> places((1, -1), (2, 3, 4))[0].tolist()
    [[[1, 3]], [[1, 3]]]
    """
    batch, sizes = shape[0], np.asarray(shape[1:])
    try:
        array = np.asarray(target)
    except (TypeError, ValueError) as error:
        raise _not_understood(target) from error
    is_several = array.ndim == 3 and array.shape == (batch, array.shape[1] or 1, len(sizes))
    if array.dtype.kind not in "iu" or not (is_several or array.shape in ((len(sizes),), (batch, len(sizes)))):
        raise TargetError(
            f"target {target!r} names no place in scores of shape {tuple(shape)}: pass {len(sizes)} whole numbers, one "
            "for each axis after the batch, as in (class, y, x), or ut.targets.where(mask, class)"
        )
    indices = np.broadcast_to(array, (batch, len(sizes)))[:, None] if array.ndim < 3 else array
    if ((indices < -sizes) | (indices >= sizes)).any():
        raise TargetError(f"target {target!r} is out of range: the scores have shape {tuple(shape)}, the batch first")
    return np.where(indices < 0, indices + sizes, indices).astype(np.int64), array.ndim < 3


def _not_understood(target: Any) -> TargetError:
    return TargetError(
        f"target {target!r} is not understood: pass None, an int, (B,) or (B, K) class ids, 'top:K' or a function"
    )
