"""The objective whose gradients are recorded where photographs are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from ...base import Objective
from ..calls import output_of
from ..internals import all_layers, logits_behind, set_trainable


@contextmanager
def objective(model: Any, name: str) -> Iterator[Objective]:
    """Yield a function that runs a batch forward and backward.

    It returns each sample's class, the one with the highest score or the label, and the score of that class.

    The objective is summed over the batch, so each sample's gradient is independent of the others; it is one of the
    scores before a final softmax or sigmoid. The network is frozen meanwhile: no gradient of its weights is asked for.

    Args:
        name: "predicted", "label" or "loss", as in `undertow.recording.photographs`.
    """

    def run(x: Any, labels: Sequence[int] | None) -> tuple[list[int], list[float]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            scores = logits_behind(output_of(model, [x]))
            ids = tf.argmax(scores, 1).numpy().tolist() if labels is None else list(labels)
            of_class = tf.gather(scores, ids, axis=1, batch_dims=1)
            if name == "loss":
                value = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(ids, scores))
            else:
                value = tf.reduce_sum(tf.reduce_max(scores, 1) if labels is None else of_class)
        tape.gradient(value, x)
        return ids, of_class.numpy().tolist()

    layer_flags = [(layer, layer.trainable) for layer in all_layers(model)]
    variable_flags = [(variable, variable.trainable) for variable in model.variables]
    model.trainable = False
    last: Any = model.layers[-1] if getattr(model, "layers", None) else None
    activation = getattr(last, "activation", None)
    if activation in (keras.activations.softmax, keras.activations.sigmoid):  # the layer then gives what is explained
        last.activation = keras.activations.linear
    try:
        yield run
    finally:
        if activation is not None:
            last.activation = activation
        for layer, trainable in layer_flags:
            set_trainable(layer, trainable)
        for variable, trainable in variable_flags:
            variable.trainable = trainable
