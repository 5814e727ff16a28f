"""Which elements an activation or a pooling closes to the gradient, and the zeros that must come of it.

Each function is given a call that is about to be made, and returns a `Forecast` of its gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..submodules import own_parameters
from .stats import arranged, count_true

_RELUS = ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "threshold", "clamp", "clamp_min", "clip")
_SMOOTH = ("elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "hardswish", "hardsigmoid")
_ACTIVATIONS = frozenset((*_RELUS, *_SMOOTH, "logsigmoid", "softsign"))
_NORMS = frozenset(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"))
_SATURATING = {"tanh": 1.0, "sigmoid": 0.25, "hardtanh": 1.0, "hardsigmoid": 1 / 6, "softsign": 1.0}
"""Activations that are flat on both sides, with the largest value of their derivative."""
_SATURATED = 0.01
_SCALED_NORMS = {"batch_norm": 3, "layer_norm": 2, "group_norm": 2, "instance_norm": 3, "rms_norm": 2}
_WEIGHTED = frozenset(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))))
_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "matmul", "__matmul__", "mm", "bmm"))
_POOL_AXES = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)}
_GEOMETRY = ("kernel_size", "stride", "padding")

State = dict[str, Any]


@dataclass(frozen=True)
class Forecast:
    """What is known of a call before its gradient comes.

    Attributes:
        settings: of the call, plain data.
        state: from the site's module to what the forward pass closed.
        predict: from the gradient at the output to the zeros at the input.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    state: Callable[[nn.Module], State] = lambda module: {}
    predict: Callable[[Tensor], State] = lambda gradient: {}


def forecast(function: Any, name: str, x: Tensor, args: Any, kwargs: Any) -> Forecast | None:
    """Return what is known of a call of a function on `x`; None for a function that is not followed."""
    if name in _ACTIVATIONS:
        return _activation(function, name, x, args, kwargs)
    if name in _POOL_AXES and x.ndim == _POOL_AXES[name] + 2:
        return _pooling(name, x, args, kwargs)
    return Forecast() if name in _NORMS else None


def _activation(function: Any, name: str, x: Tensor, args: Any, kwargs: Any) -> Forecast:
    """Compute the derivative of a pointwise activation: zero where it closes an element."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        value = function(leaf * 1, *args[1:], **{key: v for key, v in kwargs.items() if key != "input"})
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    closed = slope == 0

    def state(module: nn.Module) -> State:
        active = arranged(module, ~closed).float()  # booleans add up slowly; over space alone, floats are exact
        active = (active.flatten(2).sum(2) if active.ndim > 2 else active).long().sum(0)
        n = max(slope.numel(), 1)
        slopes = {"slope": l1(slope) / n, "rms_slope": l2(slope) / math.sqrt(n)}
        if name in _SATURATING and not (name == "hardtanh" and _lower_bound(args, kwargs) >= 0):  # as ReLU6 is one
            slopes["saturated"] = count_true(slope < _SATURATED * _SATURATING[name])
        return {"closed": count_true(closed), "active": active} | slopes

    def predict(g: Tensor) -> State:
        predicted = slope * g.reshape(slope.shape)
        return {
            "expected_zeros": count_true(closed | (g.reshape(closed.shape) == 0)),
            "expected_absolute": l1(predicted),
        }

    settings = {key: v for key, v in kwargs.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return Forecast(settings, state, predict)


def _lower_bound(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    return float(args[1] if len(args) > 1 else kwargs.get("min_val", -1.0))


def _pooling(name: str, x: Tensor, args: Any, kwargs: Any) -> Forecast:
    """Find which elements win a window, where pooling takes the largest."""
    settings = _geometry(name, args[1:], kwargs)
    if "max" not in name:
        return Forecast(settings)
    options = {key: v for key, v in kwargs.items() if key not in ("input", "return_indices")}
    with torch.no_grad():
        _, winners = getattr(F, name)(x.detach(), *args[1:6], **options, return_indices=True)
    size = math.prod(x.shape[2:])

    def reached(weights: Tensor) -> Tensor:
        hits = torch.zeros(*x.shape[:2], size, dtype=torch.int32, device=x.device)
        return hits.scatter_add_(2, winners.flatten(2), weights.flatten(2).int()) > 0

    def state(module: nn.Module) -> State:
        return {"closed": count_true(~reached(torch.ones_like(winners)))}

    def predict(g: Tensor) -> State:
        return {"expected_zeros": count_true(~reached(g.reshape(winners.shape) != 0))}

    return Forecast(settings, state, predict)


def _geometry(name: str, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pooling's settings, one number for each axis."""
    axes = _POOL_AXES[name]
    if name.startswith("adaptive"):
        return {"adaptive": True}
    later = ("dilation", "ceil_mode") if name.startswith("max") else ("ceil_mode", "count_include_pad")
    geometry = {"padding": 0, "dilation": 1, "ceil_mode": False, **dict(zip((*_GEOMETRY, *later), rest, strict=False))}
    geometry |= {key: v for key, v in kwargs.items() if key in (*_GEOMETRY, *later)}
    if geometry.get("stride") in (None, (), []):
        geometry["stride"] = geometry["kernel_size"]
    per_axis = (*_GEOMETRY, "dilation")
    return {key: list(_per_axis(geometry[key], axes)) for key in per_axis} | {"ceil_mode": bool(geometry["ceil_mode"])}


def _per_axis(value: Any, axes: int) -> Sequence[int]:
    if isinstance(value, int):
        return [value] * axes
    return list(value) * axes if len(value) == 1 else list(value)


def operand(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the sum of magnitudes of what a call multiplies its input by: a layer's weights, a factor, a norm's gains.

    Where that is zero, so is the gradient at the input. None for calls that multiply by nothing.
    """
    factor: Any = None
    if name in _WEIGHTED:
        factor = args[1] if len(args) > 1 else kwargs.get("weight")
    elif name in _SCALED_NORMS:
        position = _SCALED_NORMS[name]
        factor = args[position] if len(args) > position else kwargs.get("weight")
    elif name in _PRODUCTS and len(args) == 2:
        numbers = [arg for arg in args if not isinstance(arg, Tensor)]
        factor = numbers[0] if numbers else min(args, key=torch.numel)
    if isinstance(factor, int | float):
        return np.asarray(abs(float(factor)))
    return l1(factor.detach()) if isinstance(factor, Tensor) and factor.is_floating_point() else None


def weight_statistics(module: nn.Module) -> State:
    """Return whether a module's own weights are broken and, for convolutions and linear layers, how large they are.

    A layer multiplies the root mean square of a gradient of random signs by `gain`: each of its inputs is the sum of as
    many products as weights reach it, so it is ||W|| / sqrt(inputs x stride).
    """
    if isinstance(module, nn.Linear):
        inputs = module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = module.in_channels * math.prod(module.stride)
    else:
        own = [l2(parameter.detach()) for parameter in own_parameters(module).values()]
        return {"broken_weights": count_true(~torch.isfinite(torch.stack(own)))} if own else {}
    norm = l2(module.weight.detach())
    return {
        "gain": norm / math.sqrt(inputs),
        "weight_std": norm / math.sqrt(max(module.weight.numel(), 1)),
        "broken_weights": count_true(~torch.isfinite(norm)),
    }


def l1(x: Tensor) -> Any:
    """Return the sum of magnitudes, in float32 at least; on the CPU `vector_norm` takes five times as long for it."""
    return x.abs().sum(dtype=wide_dtype(x))


def l2(x: Tensor) -> Any:
    """Return the square root of the sum of squares, in float32 at least."""
    return torch.linalg.vector_norm(x, dtype=wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
