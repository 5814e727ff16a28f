"""Which scores a target means, in the graph of one call: of classes, or of places in dense outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ...errors import InputError, ModelError, TargetError
from ...targets import Box, Region, Token, Unit
from ..keras_layers import channel_axis
from ..targets import class_ids, places, refuse_missing, top
from .calls import refuse_non_class_scores
from .outputs import layer_named


@dataclass(frozen=True)
class Chosen:
    """The scores to explain.

    Attributes:
        scores: `(B, K)`.
        ids: class ids, int64 `(B, K)`; None where the target is none of classes.
        columns: for each of K backward passes a tensor to differentiate and the gradient there.
        single: each sample has one target.
        is_general: other targets of the same kind have the same graph, class ids being given to it.
    """

    scores: Any
    ids: Any
    columns: list[tuple[Any, Any]]
    single: bool = True
    is_general: bool = False


def chosen_scores(output: Any, target: Any, ids: Any, batch: int | None) -> Chosen:
    """Return the scores that a target means.

    Args:
        output: the scores of a model, `(B, ...)`; what a target function is given where the target is one.
        target: as `undertow.explain` takes it.
        ids: `(B, K)` where the target is class ids, else None.
        batch: the number of samples, where the inputs tell.

    Raises:
        TargetError: the target does not fit the scores, or its function does not return one score for each sample.
        ModelError: the output is not `(B, classes)`, and the target names no place in it.
    """
    if callable(target):
        return _alone(_checked_scores(target(output), batch))
    if isinstance(target, Box):
        raise ModelError("ut.targets.box is not there for Keras yet; pass a function of the output")
    if isinstance(target, Region):
        weights = tf.constant(target.weights(output.shape), output.dtype)
        return _alone(tf.reduce_sum(output * weights, list(range(1, output.shape.rank))))
    if isinstance(target, Token):
        return _of_classes(_at_position(output, target.position), target.target, None, batch)
    if output.shape.rank is not None and output.shape.rank > 2 and target is not None and not isinstance(target, str):
        indices, single = places(target, output.shape)
        rows = np.broadcast_to(np.arange(len(indices))[:, None, None], (*indices.shape[:2], 1))
        scores = tf.gather_nd(output, np.concatenate([rows, indices], -1))
        columns = [(scores[:, k], tf.ones_like(scores[:, k])) for k in range(indices.shape[1])]
        return Chosen(scores, None, columns, single)
    return _of_classes(output, target, ids, batch)


def unit_scores(target: Unit, network: Any, outputs: Mapping[str, Any]) -> Any:
    """Return the scores `(B,)` of a unit, from the outputs of its layer in the graph of one call.

    Raises:
        InputError: the layer returned no tensor. TargetError: it has no such channel or place.
    """
    layer = target.layer
    if layer not in outputs:
        raise InputError(f"layer {layer!r} does not run for this x, or returns no tensor; name another")
    values = outputs[layer]
    axis = channel_axis(layer_named(network, layer)) if target.axis is None else target.axis
    channels = tf.experimental.numpy.moveaxis(values, 1 if values.shape.rank == 2 else axis, 1)
    if not 0 <= target.channel < channels.shape[1]:
        raise TargetError(f"layer {layer!r} has channels 0 to {channels.shape[1] - 1}; there is no {target.channel}")
    plane = channels[:, target.channel]
    if target.place is None:
        return tf.reduce_sum(plane, list(range(1, plane.shape.rank)))
    sizes = tuple(plane.shape[1:])
    if len(target.place) != len(sizes) or any(not -n <= i < n for i, n in zip(target.place, sizes, strict=True)):
        raise TargetError(f"layer {layer!r} has places {sizes}; there is none at {target.place}")
    return plane[(slice(None), *target.place)]


def _alone(scores: Any) -> Chosen:
    return Chosen(scores[:, None], None, [(scores, tf.ones_like(scores))])


def _of_classes(output: Any, target: Any, ids: Any, batch: int | None) -> Chosen:
    refuse_non_class_scores(output, output.shape[0] if batch is None else batch)
    is_general, single = True, not isinstance(target, str)
    if ids is None and (target is None or not single):
        ids = tf.math.top_k(output, 1 if target is None else top(target, output.shape[1])).indices
    elif ids is None:
        array, single = class_ids(target, output.shape[0])
        refuse_missing(array, output.shape[1])
        ids, is_general = tf.constant(array), False
    ids = tf.cast(ids, tf.int64)
    scores = tf.gather(output, ids, axis=1, batch_dims=1)
    columns = [(output, tf.one_hot(ids[:, k], output.shape[1], dtype=output.dtype)) for k in range(ids.shape[1])]
    return Chosen(scores, ids, columns, single, is_general)


def _at_position(output: Any, position: Any) -> Any:
    if output.shape.rank != 3:
        raise TargetError(
            f"a token has scores (batch, positions, vocabulary); the model returned {tuple(output.shape)}"
        )
    return output[:, position]


def _checked_scores(scores: Any, batch: int | None) -> Any:
    if isinstance(scores, tf.Tensor) and scores.shape.rank == 1 and batch in (None, scores.shape[0]):
        return scores
    description = f"shape {tuple(scores.shape)}" if isinstance(scores, tf.Tensor) else f"a {type(scores).__name__}"
    raise TargetError(
        f"the target function returned {description}; it must return one score for each sample, ({batch},)"
    )
