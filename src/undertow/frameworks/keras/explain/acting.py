"""What makes a traced pass depend on chance or on the rest of its batch: random operations, batch statistics."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from ....errors import ModelError
from ..internals import called_graphs

DROPOUT, NORM = "dropout", "batch norm in training"
_SEEDLESS = re.compile(r"State(less|ful)(Random(?!Get)|Truncated|Parameterized|Multinomial|Shuffle|StandardN|Uniform)")


def what_acts(scores: Sequence[Any], training: bool) -> dict[str, int]:
    """Return what acts in the forward pass behind scores, by name and how often.

    Dropout and batch norm act where a layer is called with `training=True`, whatever the model is called with. Noise of
    another kind is the model's design, and is not refused; it goes by the name of its operation.

    Args:
        scores: of the graph that is being traced.

    Raises:
        ModelError: dropout or batch norm in training acts, and `training=True` was not passed.
    """
    counts: Counter[str] = Counter()
    for op in _ops_behind(scores):
        if name := _acting_name(op):
            counts[name] += 1
    if not training and not counts.keys().isdisjoint((DROPOUT, NORM)):
        listed = ", ".join(f"{name} x{count}" for name, count in counts.items())
        raise ModelError(
            f"the map would depend on chance or on the rest of the batch, since these acted: {listed}; a layer within "
            "is called with training=True: leave that out, or pass training=True here too"
        )
    return dict(counts)


def _ops_behind(tensors: Sequence[Any]) -> Iterator[Any]:
    """Yield the operations that tensors depend on, those of called functions, loops and branches included."""
    remaining, seen = [tensor.op for tensor in tensors], set()
    while remaining:
        op = remaining.pop()
        if op in seen:
            continue
        seen.add(op)
        yield op
        remaining += [x.op for x in op.inputs]
        remaining += [y.op for body in called_graphs(op) for y in body.outputs]


def _acting_name(op: Any) -> str | None:
    if op.type.startswith("FusedBatchNorm"):
        return NORM if op.get_attr("is_training") else None
    if op.type == "Rsqrt" and "batchnorm" in op.name:  # the scope of tf.nn.batch_normalization
        return NORM if _is_of_batch(op.inputs[0]) else None
    if _SEEDLESS.match(op.type) or "seed2" in op.node_def.attr:
        return DROPOUT if "dropout" in op.name.lower() else op.type
    return None


def _is_of_batch(variance: Any) -> bool:
    """Whether a variance is a mean or a sum over the batch, where a layer out of training has a variable."""
    remaining = [variance.op]
    while remaining:
        op = remaining.pop()
        if op.type in ("Mean", "Sum"):
            axes = tf.get_static_value(op.inputs[1])
            return axes is not None and 0 in axes
        remaining += [x.op for x in op.inputs]
    return False
