"""Maps of Keras 3 networks on TensorFlow: rules on the traced graph of one call, or on a clone with its own ReLUs."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ....errors import RuleError
from ...base import Request
from ...results import Explanation
from ...targets import class_ids, refuse_missing
from ..arrays import to_numpy
from ..calls import output_of, refuse_other_backends, refuse_other_shapes, refuse_unfinite, restored, tensors
from .tracing import traced


def explain(request: Request) -> Explanation:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    refuse_other_backends()
    if request.through == "hook":
        raise RuleError("through='hook' is PyTorch's: Keras layers have no backward hooks; use 'graph' or 'swap'")
    inputs = tensors(request.inputs)
    target, ids, single = request.target, None, not isinstance(request.target, str)
    if target is not None and single and not callable(target):
        ids, single = class_ids(target, len(inputs[0]))
    graph = traced(request, inputs, 0 if ids is None else ids.shape[1])
    if ids is not None and graph.classes is not None:
        refuse_missing(ids, graph.classes)
    with restored(graph.written):
        scores, found_ids, *maps = graph.run(*inputs, *(() if ids is None else (tf.constant(ids),)))
    refuse_unfinite(scores)
    targets = None if callable(target) else found_ids
    return _explanation(request, inputs, maps, targets, scores, single, deepcopy(graph.stats))


def _explanation(
    request: Request, inputs: Sequence[Any], maps: Sequence[Any], targets: Any, scores: Any, single: bool, stats: Any
) -> Explanation:
    """Complete the maps with None for integer inputs; what was asked for with NumPy arrays is answered with them."""
    remaining = iter(maps)
    by_input = [next(remaining) if x.dtype.is_floating else None for x in inputs]
    if single:
        by_input = [None if values is None else values[:, 0] for values in by_input]
        scores, targets = scores[:, 0], None if targets is None else targets[:, 0]
    completed = tuple(_like(x, values) for x, values in zip(request.inputs, by_input, strict=True))
    first = request.inputs[0]
    last = keras.config.image_data_format() == "channels_last"
    return Explanation(completed, _like(first, targets), _like(first, scores), stats, channels_last=last)


def _like(given: Any, value: Any) -> Any:
    return value.numpy() if isinstance(given, np.ndarray) and value is not None else value


def probabilities(model: Callable[..., Any], x: Any) -> npt.NDArray[Any]:
    """Return the softmax of the model's scores, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    scores = output_of(model, [x])
    refuse_other_shapes(scores, len(x))
    return to_numpy(tf.nn.softmax(tf.cast(scores, tf.float64)))
