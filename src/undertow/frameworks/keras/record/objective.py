"""What is differentiated where photographs are recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from ..calls import output_of
from ..internals import all_layers, set_trainable


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

    layer_flags = [(layer, layer.trainable) for layer in all_layers(model)]
    variable_flags = [(variable, variable.trainable) for variable in model.variables]
    model.trainable = False
    try:
        yield run
    finally:
        for layer, trainable in layer_flags:
            set_trainable(layer, trainable)
        for variable, trainable in variable_flags:
            variable.trainable = trainable
