"""Gradients of Keras's layers by closed formula, written from the definitions, in NumPy: what `trace` compares with.

A formula takes a layer, its input `x`, its output `y` and the gradient `g` at its output, all float64, and returns for
each gradient ("input", or a variable's name) the value and a scale: the same sum over absolute values, to which
rounding errors are proportional. It is none, empty, where the layer's settings are others than it is written for. A new
formula is one function and one row of `FORMULAS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .keras_layers import own_variables, value_of
from .results import Difference

Array = npt.NDArray[Any]
ValuesAndScales = dict[str, tuple[Array, Array]]
Formula = Callable[[Any, Array, Array, Array], ValuesAndScales]

# Relative to the scale, by the name of the dtype; see `torch.inspect.formulas`.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}


def formula_differences(
    layer: Any, x: Array, y: Array, g: Array, gradients: Mapping[str, Array | None], dtype: str
) -> dict[str, Difference]:
    """Return how far the gradients of one call lie from its layer's closed formula; empty where there is none.

    Args:
        layer: a formula is there for the classes in `FORMULAS`, but not for subclasses, which may compute anything.
        x, y, g: its input, its output, and the gradient there.
        gradients: to compare, by "input" and the variables' names.
        dtype: in which the layer computed.
    """
    formula = FORMULAS.get(type(layer))
    if formula is None or dtype not in TOLERANCE:
        return {}
    x, y, g = (array.astype(np.float64) for array in (x, y, g))
    differences = {}
    for name, (value, scale) in formula(layer, x, y, g).items():
        gradient = gradients.get(name)
        if gradient is not None:
            n_terms = max(1, g.size // max(1, gradient.size)) if name != "input" else y.shape[-1]
            tolerance = max(TOLERANCE[dtype], n_terms * _ROUNDOFF.get(dtype, 0))
            differences[name] = _difference(gradient.astype(np.float64), value, scale, tolerance)
    return differences


def _difference(gradient: Array, value: Array, scale: Array, tolerance: float) -> Difference:
    both = (gradient == value) | (np.isnan(gradient) & np.isnan(value))  # infinity, or NaN, in both is no difference
    with np.errstate(invalid="ignore"):
        errors = np.where(both, 0, np.nan_to_num(np.abs(value - gradient), nan=math.inf))
    finite = scale[np.isfinite(scale)]
    return Difference(float(errors.max(initial=0)), tolerance * float(finite.max(initial=0)))


def _weights(layer: Any) -> dict[str, Array]:
    return {variable.name: value_of(variable).astype(np.float64) for variable in own_variables(layer)}


def _before_activation(layer: Any, y: Array, g: Array) -> tuple[Array, Array] | None:
    """Return the gradient before a layer's own activation and its scale; None for an activation that is not known."""
    derivative = _DERIVATIVES.get(layer.activation)
    if derivative is None:
        return None
    return _softmax_back(y, g) if derivative is _softmax_back else (g * derivative(y), np.abs(g))


def _softmax_back(y: Array, g: Array) -> tuple[Array, Array]:
    value = y * (g - (g * y).sum(-1, keepdims=True))
    return value, y * (np.abs(g) + (np.abs(g) * y).sum(-1, keepdims=True))


_DERIVATIVES: dict[Any, Callable[..., Any]] = {
    keras.activations.linear: np.ones_like,
    keras.activations.relu: lambda y: y > 0,
    keras.activations.relu6: lambda y: (y > 0) & (y < 6),
    keras.activations.sigmoid: lambda y: y * (1 - y),
    keras.activations.tanh: lambda y: 1 - y**2,
    keras.activations.softmax: _softmax_back,
}
"""f'(z) by what f returned, y = f(z); at its kinks as TensorFlow and torch have it."""


def _value_and_scale(formula: Callable[..., Array], g: tuple[Array, Array], *arrays: Array) -> tuple[Array, Array]:
    """Return a formula's value for a gradient and other arrays, and its scale."""
    value, scale = g
    return formula(value, *arrays), formula(scale, *(np.abs(array) for array in arrays))


def _activation(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """f'(x) g."""
    back = _before_activation(layer, y, g)
    return {} if back is None else {"input": back}


def _relu(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """1 above the threshold and below the cap, the slope below the threshold, 0 above the cap."""
    slope, top, threshold = (float(v or 0) for v in (layer.negative_slope, layer.max_value, layer.threshold))
    inside = x > threshold if layer.max_value is None else (x > threshold) & (x < top)
    return {"input": (g * np.where(inside, 1, np.where(x <= threshold, slope, 0)), np.abs(g))}


def _softmax(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """s (g - Σ g s)."""
    if layer.axis not in (-1, x.ndim - 1):
        return {}
    return {"input": _softmax_back(y, g)}


def _dense(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """y = f(x W + b): gradients g Wᵀ, xᵀ g and Σ g, for g before f."""
    weights, before = _weights(layer), _before_activation(layer, y, g)
    if before is None or weights["kernel"].ndim != 2:
        return {}
    rows = x.reshape(-1, x.shape[-1])
    outs = before[0].reshape(len(rows), -1), before[1].reshape(len(rows), -1)
    return {
        "input": _value_and_scale(lambda g, w: (g @ w.T).reshape(x.shape), outs, weights["kernel"]),
        "kernel": _value_and_scale(lambda g, x: x.T @ g, outs, rows),
        "bias": _value_and_scale(lambda g: g.sum(0), outs),
    }


def _conv2d(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """A cross-correlation: each kernel position multiplies one shifted, strided view of the padded input."""
    before = _before_activation(layer, y, g)
    if before is None or layer.data_format != "channels_last" or layer.padding not in ("valid", "same"):
        return {}
    kernel, groups = _weights(layer)["kernel"], layer.groups
    sizes, strides, steps = kernel.shape[:2], layer.strides, layer.dilation_rate
    pads = [_padding(layer.padding, *axis) for axis in zip(x.shape[1:3], sizes, strides, steps, strict=True)]
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    padded = padded.reshape(*padded.shape[:3], groups, -1)
    grouped = (*y.shape[:3], groups, y.shape[3] // groups)
    outs = before[0].reshape(grouped), before[1].reshape(grouped)
    taps = kernel.reshape(*kernel.shape[:3], groups, -1)
    positions = list(_positions(sizes, strides, steps, y.shape[1:3]))

    def by_kernel(outs: Array, padded: Array) -> Array:
        back = np.zeros_like(taps)
        for i, j, rows, columns in positions:
            back[i, j] = np.einsum("bhwgo,bhwgc->cgo", outs, padded[:, rows, columns], optimize=True)
        return back.reshape(kernel.shape)

    def by_input(outs: Array, taps: Array) -> Array:
        back = np.zeros_like(padded)
        for i, j, rows, columns in positions:
            back[:, rows, columns] += np.einsum("bhwgo,cgo->bhwgc", outs, taps[i, j], optimize=True)
        (top, _), (left, _) = pads
        return back[:, top : top + x.shape[1], left : left + x.shape[2]].reshape(x.shape)

    return {
        "input": _value_and_scale(by_input, outs, taps),
        "kernel": _value_and_scale(by_kernel, outs, padded),
        "bias": _value_and_scale(lambda g: g.sum((0, 1, 2)), before),
    }


def _padding(kind: str, size: int, kernel: int, stride: int, step: int) -> tuple[int, int]:
    """Return the zeros before and after an axis; "same" puts an odd one after."""
    if kind == "valid":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * step + 1 - size, 0)
    return total // 2, total - total // 2


def _positions(sizes: Any, strides: Any, steps: Any, out: Any) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield each position (row, column) in a kernel, with the rows and columns of the padded input that it reads."""
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            starts = (i * steps[0], j * steps[1])
            rows, columns = (slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, strides, out, strict=True))
            yield i, j, rows, columns


def _max_pool(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """The gradient goes to the first largest element of each window, in row-major order."""
    if layer.data_format != "channels_last":
        return {}
    sizes, strides = layer.pool_size, layer.strides
    pads = [_padding(layer.padding, *axis, 1) for axis in zip(x.shape[1:3], sizes, strides, strict=True)]
    padded = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-np.inf)
    back, taken = np.zeros_like(padded), np.zeros(g.shape, bool)
    for _, _, rows, columns in _positions(sizes, strides, (1, 1), g.shape[1:3]):
        wins = (padded[:, rows, columns] == y) & ~taken
        back[:, rows, columns] += g * wins
        taken |= wins
    (top, _), (left, _) = pads
    value = back[:, top : top + x.shape[1], left : left + x.shape[2]]
    return {"input": (value, np.abs(g) * sizes[0] * sizes[1])}


def _average_pool(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """Each output's gradient is spread evenly over its window, the padding aside."""
    if layer.data_format != "channels_last":
        return {}
    sizes, strides = layer.pool_size, layer.strides
    pads = [_padding(layer.padding, *axis, 1) for axis in zip(x.shape[1:3], sizes, strides, strict=True)]
    inside = np.pad(np.ones(x.shape), ((0, 0), *pads, (0, 0)))
    positions = list(_positions(sizes, strides, (1, 1), g.shape[1:3]))
    counts = sum(inside[:, rows, columns] for _, _, rows, columns in positions)
    (top, _), (left, _) = pads

    def spread(g: Array) -> Array:
        back = np.zeros_like(inside)
        for _, _, rows, columns in positions:
            back[:, rows, columns] += g / counts
        return back[:, top : top + x.shape[1], left : left + x.shape[2]]

    return {"input": _value_and_scale(spread, (g, np.abs(g)))}


def _global_average_pool(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """Spread evenly over all places."""
    axes = (2, 3) if layer.data_format == "channels_first" else (1, 2)
    count = math.prod(x.shape[axis] for axis in axes)
    wide = g if layer.keepdims else np.expand_dims(g, axes)
    return {"input": _value_and_scale(lambda g: np.broadcast_to(g / count, x.shape), (wide, np.abs(wide)))}


def _flatten(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """The same numbers in another shape."""
    return {"input": (g.reshape(x.shape), np.abs(g))} if layer.data_format == "channels_last" else {}


def _batch_norm(layer: Any, x: Array, y: Array, g: Array) -> ValuesAndScales:
    """x̂ = (x - μ) / √(σ² + ε), y = γ x̂ + β, with the moving μ and σ²."""
    axis = layer.axis % x.ndim
    axes = tuple(i for i in range(x.ndim) if i != axis)
    by_channel = [-1 if i == axis else 1 for i in range(x.ndim)]
    weights = {name: value.reshape(by_channel) for name, value in _weights(layer).items()}
    inverse = 1 / np.sqrt(weights["moving_variance"] + layer.epsilon)
    normal = (x - weights["moving_mean"]) * inverse
    size = (np.abs(x) + np.abs(weights["moving_mean"])) * inverse
    gain = weights.get("gamma", np.ones(())) * inverse
    return {
        "input": (gain * g, np.abs(gain) * np.abs(g)),
        "gamma": ((g * normal).sum(axes), (np.abs(g) * size).sum(axes)),
        "beta": (g.sum(axes), np.abs(g).sum(axes)),
    }


FORMULAS: dict[type, Formula] = {
    keras.layers.Dense: _dense,
    keras.layers.Conv2D: _conv2d,
    keras.layers.Activation: _activation,
    keras.layers.ReLU: _relu,
    keras.layers.Softmax: _softmax,
    keras.layers.MaxPooling2D: _max_pool,
    keras.layers.AveragePooling2D: _average_pool,
    keras.layers.GlobalAveragePooling2D: _global_average_pool,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.Flatten: _flatten,
}
