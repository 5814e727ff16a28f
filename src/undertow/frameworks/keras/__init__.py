"""Keras 3 on TensorFlow: rules on the traced graph of one call, or on a clone with swapped activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ...errors import InputError, ModelError, RuleError
from ..base import Answer, Request
from ..targets import class_ids, refuse_missing
from .calls import output_of, refuse_other_backends, refuse_other_shapes, refuse_unfinite, restored, tensors
from .tracing import traced


def explain(request: Request) -> Answer:
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
    return _answer(request, inputs, maps, targets, scores, single, deepcopy(graph.met))


def _answer(
    request: Request, inputs: Sequence[Any], maps: Sequence[Any], targets: Any, scores: Any, single: bool, met: Any
) -> Answer:
    """Complete the maps with None for integer inputs; what was asked for with NumPy arrays is answered with them."""
    waiting = iter(maps)
    every = [next(waiting) if x.dtype.is_floating else None for x in inputs]
    if single:
        every = [None if one is None else one[:, 0] for one in every]
        scores, targets = scores[:, 0], None if targets is None else targets[:, 0]
    whole = [_like(given, one) for given, one in zip(request.inputs, every, strict=True)]
    first = request.inputs[0]
    last = keras.config.image_data_format() == "channels_last"
    return Answer(tuple(whole), _like(first, targets), _like(first, scores), met, channels_last=last)


def _like(given: Any, value: Any) -> Any:
    return value.numpy() if isinstance(given, np.ndarray) and value is not None else value


def to_numpy(tensor: Any) -> npt.NDArray[Any]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    if tensor.dtype == tf.bfloat16:
        tensor = tf.cast(tensor, tf.float32)
    return np.array(tensor)


def like(array: npt.NDArray[Any], x: Any) -> Any:
    """Make an array what `x` is, a tensor or an array, of its dtype."""
    if isinstance(x, np.ndarray):
        return array.astype(x.dtype)
    return tf.cast(tf.constant(array), x.dtype)


def refuse_looking_inside(*_: Any, **__: Any) -> Any:
    """Refuse what verdicts and Grad-CAM need of a network.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "verdicts and Grad-CAM look into PyTorch networks alone, and this is one of Keras; "
        "the estimators smoothgrad, integrated and input-times work"
    )


scores = layers = redrawn = inside = refuse_looking_inside


def batch(arrays: Sequence[npt.NDArray[Any]], device: str) -> Any:
    """Stack arrays `(C, H, W)` into a batch, `(B, H, W, C)` where that is how Keras has its images, on a device."""
    stacked = np.stack(arrays)
    if keras.config.image_data_format() == "channels_last":
        stacked = np.moveaxis(stacked, 1, -1)
    with tf.device(device):
        return tf.constant(stacked)


def probabilities(model: Callable[..., Any], x: Any) -> npt.NDArray[Any]:
    """Return the softmax of the model's scores, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    scores = output_of(model, [x])
    refuse_other_shapes(scores, len(x))
    return to_numpy(tf.nn.softmax(tf.cast(scores, tf.float64)))


def device(name: str) -> str:
    """Return the device that a name means, as TensorFlow has it; "auto" is the fastest one there is.

    Raises:
        InputError: there is no such device here.
    """
    there = {found.name.removeprefix("/physical_device:").lower() for found in tf.config.list_physical_devices()}
    if name == "auto":
        return "gpu:0" if "gpu:0" in there else "cpu:0"
    kind, _, number = name.lower().replace("cuda", "gpu").partition(":")
    full = f"{kind}:{number or 0}"
    if full not in there:
        raise InputError(f"device {name!r} cannot be used here; use --device auto or cpu")
    return full


def place(model: Any, device: str) -> None:
    """Leave a network where it is: TensorFlow fetches variables to the device that computes."""


@contextmanager
def objective(model: Any, name: str) -> Iterator[Callable[[Any, Sequence[int] | None], None]]:
    """Give what runs a batch forward and backward; the objective is summed, so each sample's gradient is its own.

    Inside, the network is frozen: what is asked for are the gradients of what flows between the layers.

    Args:
        name: "predicted", "label" or "loss", as `undertow.recording.photographs` has them.
    """

    def run(x: Any, labels: Sequence[int] | None) -> None:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            scores = output_of(model, [x])
            if labels is None:
                value = tf.reduce_sum(tf.reduce_max(scores, 1))
            elif name == "label":
                value = tf.reduce_sum(tf.gather(scores, list(labels), axis=1, batch_dims=1))
            else:
                value = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(list(labels), scores))
        tape.gradient(value, x)

    flags = [(layer, layer.trainable) for layer in model._flatten_layers()]
    of_variables = [(variable, variable.trainable) for variable in model.variables]
    model.trainable = False
    try:
        yield run
    finally:
        for layer, was in flags:
            layer._trainable = was  # the property would set it for all layers within
        for variable, was in of_variables:
            variable.trainable = was
