"""Maps of Keras 3 networks on TensorFlow: a rule acts in the traced graph of one call, or in a clone of the model."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ....errors import RuleError, TargetError
from ....inputs import ModelArguments
from ....outputs import Path
from ....targets import Target
from ...base import Request
from ...own_passes import own_pass
from ...results import Explanation, RewiringStats
from ...targets import class_ids, refuse_missing
from ..arrays import to_numpy
from ..calls import (
    refuse_non_class_scores,
    refuse_non_finite,
    refuse_other_backends,
    restored,
    run,
    scores_of,
    tensors,
)
from ..outputs import call_number, from_layer, layer_outputs
from ..weights import on_network
from .tracing import traced_graph


def explain(request: Request) -> Explanation:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    refuse_other_backends()
    _ = request.activation_rule  # a table is refused before anything is traced
    if request.through == "hook":
        raise RuleError("through='hook' is PyTorch's: Keras layers have no backward hooks; use 'graph' or 'swap'")
    inputs = tensors(request.inputs, request.is_plain)
    ids, single = _class_ids(request.target, len(inputs[0]) if inputs[0].shape.rank else 1)
    request, values = on_network(request)
    with own_pass():
        graph = traced_graph(request, inputs, 0 if ids is None else ids.shape[1])
    passed = graph.passed
    if ids is not None and passed.classes is not None:
        refuse_missing(ids, passed.classes)
    with own_pass(), restored(graph.written):
        scores, explained_ids, *maps = graph.run(
            request, [*inputs, *([] if ids is None else [tf.constant(ids)])], values
        )
    refuse_non_finite(scores)
    targets = explained_ids if passed.classes is not None else None
    single = single if passed.chosen.is_general else passed.chosen.single
    explanation = _explanation(request, inputs, maps, targets, scores, single)
    return replace(explanation, stats=deepcopy(graph.stats(request)), head=passed.head, acting=dict(passed.acting))


def _class_ids(target: Any, batch: int) -> tuple[npt.NDArray[np.int64] | None, bool]:
    """Return class ids `(B, K)`, None where the target may be anything else, and whether there is one a sample."""
    if target is None or isinstance(target, str | Target) or callable(target):
        return None, not isinstance(target, str)
    try:
        return class_ids(target, batch)
    except TargetError:  # a place in dense scores, perhaps, which only the output tells
        return None, True


def _explanation(
    request: Request, inputs: Sequence[Any], maps: Sequence[Any], targets: Any, scores: Any, single: bool
) -> Explanation:
    """Complete the maps with None for integer inputs; give NumPy arrays where the inputs are."""
    remaining = iter(maps)
    maps_by_input = [next(remaining) if x.dtype.is_floating else None for x in inputs]
    if single:
        maps_by_input = [None if values is None else values[:, 0] for values in maps_by_input]
        scores, targets = scores[:, 0], None if targets is None else targets[:, 0]
    completed = tuple(_like_input(x, values) for x, values in zip(request.inputs, maps_by_input, strict=True))
    first = request.inputs[0]
    channels_last = keras.config.image_data_format() == "channels_last"
    as_given = _like_input(first, targets), _like_input(first, scores)
    return Explanation(completed, *as_given, RewiringStats(), channels_last=channels_last)


def _like_input(x: Any, value: Any) -> Any:
    return value.numpy() if isinstance(x, np.ndarray) and value is not None else value


def at_layer(request: Request, layer: str) -> list[tuple[ModelArguments, Request]]:
    """Return, for each call of a layer, its output as arguments, and the request to explain by them.

    Raises:
        InputError: there is no such layer, or it does not run.
    """
    refuse_other_backends()
    calls = []
    for call, output in enumerate(layer_outputs(request, layer), call_number(layer) or 0):
        arguments = ModelArguments(output, (output,), {})
        inside = replace(
            request,
            inputs=arguments.tensors,
            around=from_layer(request, layer, call),
            fill=arguments.fill,
            structure=f"{layer}@{call}",
            is_plain=False,
            noun=f"the output of layer {layer!r}",
        )
        calls.append((arguments, inside))
    return calls


def scores(model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    with own_pass():
        returned = scores_of(run(model, [x], {}), output)
    refuse_non_class_scores(returned, len(x))
    return to_numpy(tf.cast(returned, tf.float64))
