"""Which elements an activation or a pooling closes to the gradient, and the zeros that must come of it."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from ...keras_layers import own_variables
from ..arrays import to_numpy
from .op_graph import TensorReader

_SATURATING = {"tanh": 1.0, "sigmoid": 0.25, "hardsigmoid": 1 / 6, "softsign": 1.0}
"""Activations that are flat on both sides, with the largest value of their derivative."""
_SATURATED = 0.01
State = dict[str, Any]


def settings(unit: TensorReader) -> dict[str, Any]:
    """Return a unit's settings, plain data."""
    if unit.family == "pool":
        return _geometry(unit)
    if unit.name == "leaky_relu":
        attributes = _attributes(unit)
        if "alpha" in attributes:
            return {"negative_slope": float(attributes["alpha"])}
        slopes = np.unique(to_numpy(_slope(unit)))
        lower = [float(slope) for slope in slopes if 0 < slope < 1]
        return {"negative_slope": lower[0]} if len(lower) == 1 else {}
    return {}


def _attributes(unit: TensorReader) -> dict[str, Any]:
    names = unit.ops[-1].attributes
    return dict(zip(names[::2], names[1::2], strict=True))


def _geometry(unit: TensorReader) -> dict[str, Any]:
    """Return a pooling's kernel and stride; padding too where it is "valid": that of "same" differs by side."""
    layer = None if unit.call is None else unit.call.layer
    if layer is not None and hasattr(layer, "pool_size"):
        kernel, stride, padding = layer.pool_size, layer.strides, layer.padding
    else:
        attributes = _attributes(unit)
        axes = slice(2, None) if attributes["data_format"].startswith("NC") else slice(1, -1)
        kernel, stride, padding = attributes["ksize"][axes], attributes["strides"][axes], attributes["padding"]
    found: dict[str, Any] = {"kernel_size": [int(n) for n in kernel], "stride": [int(n) for n in stride]}
    if str(padding).lower() == "valid":
        found |= {"padding": [0] * len(kernel), "dilation": [1] * len(kernel), "ceil_mode": False}
    return found


def forward_state(unit: TensorReader, channels_second: Any) -> State:
    """Return what the forward pass closed; `channels_second` views an array as `(B, C, ...)`."""
    if unit.family == "activation":
        return _of_activation(unit, channels_second)
    if unit.family == "pool" and "max" in unit.name:
        return {"closed": _unreached(unit, tf.ones_like(_output(unit)))}
    return {}


def backward_state(unit: TensorReader, g: Any) -> State:
    """Return the zeros that the gradient at a unit's input must have, from the gradient at its output."""
    if unit.family == "activation":
        slope = to_numpy(_slope(unit))
        predicted = slope * to_numpy(g)
        zeros = np.count_nonzero((slope == 0) | (to_numpy(g) == 0))
        return {"expected_zeros": zeros, "expected_absolute": float(np.abs(predicted.astype(np.float64)).sum())}
    if unit.family == "pool" and "max" in unit.name:
        return {"expected_zeros": _unreached(unit, tf.cast(g != 0, _output(unit).dtype))}
    return {}


def _output(unit: TensorReader) -> Any:
    assert unit.y is not None
    return unit.y.value


def _slope(unit: TensorReader) -> Any:
    """Return the derivative of a pointwise activation."""
    slope = unit.gradient(tf.ones_like(_output(unit)))
    return tf.zeros_like(unit.x.value) if slope is None else slope


def _unreached(unit: TensorReader, hits: Any) -> int:
    """Count the elements that win no window that is hit."""
    return int(np.count_nonzero(to_numpy(unit.gradient(hits)) == 0))


def _of_activation(unit: TensorReader, channels_second: Any) -> State:
    slope = channels_second(to_numpy(_slope(unit)).astype(np.float64))
    closed, n = slope == 0, max(slope.size, 1)
    axes = (0, *range(2, slope.ndim))
    state = {
        "closed": int(closed.sum()),
        "active": (~closed).sum(axes),
        "slope": float(np.abs(slope).sum()) / n,
        "rms_slope": math.sqrt(float(np.square(slope).sum()) / n),
    }
    if unit.name in _SATURATING:
        state["saturated"] = int(np.count_nonzero(slope < _SATURATED * _SATURATING[unit.name]))
    return state


def operand(unit: TensorReader) -> float | None:
    """Return the sum of magnitudes of what a unit multiplies its input by; None where it multiplies by nothing."""
    if unit.product or unit.family == "norm":
        layer: Any = unit.call and unit.call.layer
        weights = getattr(layer, "kernel", None) if unit.product else getattr(layer, "gamma", None)
        return None if weights is None else _l1(weights.numpy())
    if unit.name in ("mul", "matmul") and unit.x.readers:
        op = next((op for op in unit.x.readers if op.name == unit.name), None)
        others = [x.value for x in op.inputs if x is not unit.x] if op is not None else []
        return _l1(to_numpy(others[0])) if others else None
    return None


def _l1(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).sum())


def weight_statistics(layer: Any) -> State:
    """Return whether a layer's own weights are broken and, for convolutions and dense layers, how large they are.

    `gain` is ||W|| / sqrt(inputs x stride), as for PyTorch.
    """
    own = [v.numpy() for v in own_variables(layer) if "float" in str(v.dtype)]
    if not own:
        return {}
    broken = {"broken_weights": int(sum(not np.isfinite(np.sum(np.abs(v, dtype=np.float64))) for v in own))}
    kernel = getattr(layer, "kernel", None)
    rank = getattr(layer, "rank", 0)
    if kernel is None or len(kernel.shape) != rank + 2 or "Transpose" in type(layer).__name__:
        return broken
    w = np.asarray(kernel.numpy(), np.float64)
    inputs = w.shape[-2] * getattr(layer, "groups", 1) * math.prod(getattr(layer, "strides", ()))
    norm = float(np.sqrt(np.square(w).sum()))
    return broken | {"gain": norm / math.sqrt(inputs), "weight_std": norm / math.sqrt(max(w.size, 1))}
