"""Gradients by closed formula, written from the definitions: what `trace` compares autograd's gradients with.

A formula takes a module, its input `x` and the gradient `g` at its output, both float64, and returns for each gradient
("input", or a parameter's name) the value and a scale: the same sum over absolute values, to which rounding errors are
proportional. A new formula is one function and one row of `FORMULAS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...results import Difference

ValuesAndScales = dict[str, tuple[Tensor, Tensor]]
Formula = Callable[[Any, Tensor, Tensor], ValuesAndScales]

# Relative to the scale. TF32, which CUDA may use for float32, keeps 10 bits of each factor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_TF32 = 2e-3
# A gradient is a sum of n terms. Added one by one, as oneDNN does for a bias, its rounding error is at most n - 1 units
# of roundoff of the sum of absolute values, and comes near to that where all terms have one sign, as behind average
# pooling. Source: Higham, Accuracy and Stability of Numerical Algorithms, section 4.2.
_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
# Half-precision kernels add up in float32 mostly, so the result's own rounding dominates and grows slowly.
_TERMS_WITHOUT_GROWTH = 1000
_USES_TF32 = (nn.Linear, nn.Conv2d)


def formula_differences(
    module: nn.Module, x: Tensor, g: Tensor, gradients: Mapping[str, Tensor | None]
) -> dict[str, Difference]:
    """Return how far the gradients of one call lie from its module's closed formula; empty where there is none.

    Args:
        module: a formula is there for the classes in `FORMULAS`, but not for subclasses, which may compute anything.
        x, g: its input, and the gradient at its output, of the output's shape.
        gradients: to compare, by "input" and the parameters' names.
    """
    formula = FORMULAS.get(type(module))
    if formula is None:
        return {}
    expected = formula(module, to_float64(x), to_float64(g))
    dtypes = [t.dtype for t in (x, g) if t.dtype in TOLERANCE]
    coarsest = max(dtypes, key=lambda dtype: TOLERANCE[dtype])
    tolerance = TOLERANCE[coarsest]
    if x.is_cuda and isinstance(module, _USES_TF32) and coarsest is torch.float32:
        tolerance = _TF32
    n_positions = g.numel() // max(1, expected["bias"][0].numel()) if "bias" in expected else 1
    differences = {}
    for name, (value, scale) in expected.items():
        gradient = gradients.get(name)
        if gradient is None:
            continue
        n_terms = _terms_of_input(module, n_positions) if name == "input" else n_positions
        if value.shape != gradient.shape:  # one element stands for several, as one bias for all units
            n_terms *= value.numel() // max(1, gradient.numel())
            value, scale = value.sum_to_size(gradient.shape), scale.sum_to_size(gradient.shape)
        differences[name] = _difference(gradient, value, scale, _grown(tolerance, coarsest, n_terms))
    return differences


def _terms_of_input(module: nn.Module, n_positions: int) -> int:
    """Return how many terms are added up for one element of the gradient by the input."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels // module.groups * math.prod(module.kernel_size)
    return n_positions


def _grown(tolerance: float, dtype: torch.dtype, n_terms: int) -> float:
    """Return a tolerance, or, where it is larger, the bound of a sum's rounding error, relative to the scale."""
    if dtype in _ROUNDOFF:
        return max(tolerance, n_terms * _ROUNDOFF[dtype])
    return tolerance * max(1.0, math.sqrt(n_terms / _TERMS_WITHOUT_GROWTH))


def to_float64(t: Any) -> Tensor:
    """Return a detached tensor in float64, on the CPU where its device (MPS) has no float64."""
    return t.detach().to("cpu" if t.device.type == "mps" else t.device, torch.float64)  # type: ignore[no-any-return]


def _difference(gradient: Any, value: Tensor, scale: Tensor, tolerance: float) -> Difference:
    gradient = gradient.detach().to(value.device)
    errors = (value - gradient).abs_()
    largest = float(errors.amax()) if errors.numel() else 0.0
    if largest != largest or largest == math.inf:  # infinity in both, or NaN in both, is no difference
        same = (value == gradient) | (value.isnan() & gradient.isnan())
        largest = float(errors.masked_fill_(same, 0).nan_to_num_(nan=math.inf).amax())
    finite = scale[scale.isfinite()]
    return Difference(largest, tolerance * float(finite.amax() if finite.numel() else 0.0))


def _linear(module: nn.Linear, x: Tensor, g: Tensor) -> ValuesAndScales:
    """y = x Wᵀ + b: gradients g W, gᵀ x and Σ g."""
    rows, outs, weight = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), to_float64(module.weight)
    return {
        "input": ((outs @ weight).reshape(x.shape), _bound_of_product(outs, weight)),
        "weight": (outs.T @ rows, _bound_of_product(outs.T, rows)),
        "bias": _value_and_scale(lambda outs: outs.sum(0), outs),
    }


def _bound_of_product(a: Tensor, b: Tensor) -> Tensor:
    """Return an upper bound of the elements of |a| |b|, by Cauchy and Schwarz; the product would double the work."""
    return torch.linalg.vector_norm(a, dim=1).amax() * torch.linalg.vector_norm(b, dim=0).amax()  # type: ignore[no-any-return]


def _value_and_scale(formula: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return formula(*tensors), formula(*(t.abs() for t in tensors))


def _conv2d(module: nn.Conv2d, x: Tensor, g: Tensor) -> ValuesAndScales:
    """A cross-correlation: each kernel position multiplies one shifted, strided view of the padded input."""
    if module.padding_mode != "zeros" or x.ndim != g.ndim or x.ndim not in (3, 4):
        return {}
    groups = module.groups
    left, right, top, bottom = _conv_padding(module)
    images, outs = x.reshape(-1, *x.shape[-3:]), g.reshape(-1, *g.shape[-3:])
    padded = F.pad(images, (left, right, top, bottom)).unflatten(1, (groups, -1))
    outs = outs.unflatten(1, (groups, -1))
    weight = to_float64(module.weight).unflatten(0, (groups, -1))
    positions = list(_kernel_positions(module.kernel_size, module.stride, module.dilation, g.shape[-2:]))

    def by_weight(outs: Tensor, padded: Tensor) -> Tensor:
        taps = [torch.einsum("bgohw,bgchw->goc", outs, padded[..., rows, columns]) for _, _, rows, columns in positions]
        return torch.stack(taps, -1).reshape(module.weight.shape)

    def by_input(outs: Tensor, weight: Tensor) -> Tensor:
        back = torch.zeros_like(padded)
        for i, j, rows, columns in positions:
            back[..., rows, columns] += torch.einsum("bgohw,goc->bgchw", outs, weight[..., i, j])
        return back.flatten(1, 2)[..., top : top + x.shape[-2], left : left + x.shape[-1]].reshape(x.shape)

    return {
        "input": _value_and_scale(by_input, outs, weight),
        "weight": _value_and_scale(by_weight, outs, padded),
        "bias": _value_and_scale(lambda outs: outs.sum((0, 3, 4)).flatten(), outs),
    }


def _conv_padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the zeros left, right, top and bottom; "same" puts an odd one right and at the bottom."""
    if module.padding == "same":
        (height, width) = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    height, width = (0, 0) if isinstance(module.padding, str) else module.padding
    return width, width, height, height


def _kernel_positions(
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], out: torch.Size
) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield each position (row, column) in a kernel, with the rows and columns of the padded input that it reads."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            starts = (i * dilation[0], j * dilation[1])
            rows, columns = (
                slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, tuple(out), strict=True)
            )
            yield i, j, rows, columns


def _sigmoid(_: nn.Module, x: Tensor, g: Tensor) -> ValuesAndScales:
    """s = 1 / (1 + exp(-x)): s' = s (1 - s)."""
    s = 1 / (1 + torch.exp(-x))
    return {"input": (g * s * (1 - s), g.abs())}


def _tanh(_: nn.Module, x: Tensor, g: Tensor) -> ValuesAndScales:
    """t' = 1 - t²."""
    return {"input": (g * (1 - torch.tanh(x) ** 2), g.abs())}


def _relu(_: nn.Module, x: Tensor, g: Tensor) -> ValuesAndScales:
    """1 above zero, 0 at and below it; a NaN passes, as in torch."""
    return {"input": (torch.where(x <= 0, 0.0, g), g.abs())}


def _softmax(module: nn.Softmax, x: Tensor, g: Tensor) -> ValuesAndScales:
    """s (g - Σ g s)."""
    if module.dim is None:
        return {}
    s = torch.exp(x - x.amax(module.dim, keepdim=True))
    s = s / s.sum(module.dim, keepdim=True)
    value = s * (g - (g * s).sum(module.dim, keepdim=True))
    return {"input": (value, s * (g.abs() + (g.abs() * s).sum(module.dim, keepdim=True)))}


def _flatten(_: nn.Module, x: Tensor, g: Tensor) -> ValuesAndScales:
    """The same numbers in another shape."""
    return {"input": (g.reshape(x.shape), g.abs())}


def _max_pool2d(module: nn.MaxPool2d, x: Tensor, g: Tensor) -> ValuesAndScales:
    """The gradient goes to the first largest element of each window, in row-major order."""
    kernel, stride, (top, left), dilation = (
        _pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    height, width = (
        max((n - 1) * s + (k - 1) * d + 1, p + size)
        for n, s, k, d, p, size in zip(g.shape[-2:], stride, kernel, dilation, (top, left), x.shape[-2:], strict=True)
    )
    padding = (left, width - left - x.shape[-1], top, height - top - x.shape[-2])
    padded = F.pad(x, padding, value=float("-inf"))
    numbers = torch.arange(height * width, device=x.device).reshape(height, width)
    best = torch.full_like(g, float("-inf"))
    winner = torch.zeros(g.shape, dtype=torch.long, device=x.device)
    for _, _, rows, columns in _kernel_positions(kernel, stride, dilation, g.shape[-2:]):
        candidate = padded[..., rows, columns]
        better = (candidate > best) | candidate.isnan()
        best = torch.where(better, candidate, best)
        winner = torch.where(better, numbers[rows, columns], winner)
    back = torch.zeros_like(padded).flatten(-2).scatter_add_(-1, winner.flatten(-2), g.flatten(-2))
    value = back.reshape(padded.shape)[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    return {"input": (value, g.abs() * kernel[0] * kernel[1])}


def _avg_pool2d(module: nn.AvgPool2d, x: Tensor, g: Tensor) -> ValuesAndScales:
    """Each output's gradient is spread evenly over its window: one matrix for the rows, one for the columns."""
    kernel, stride, padding = (_pair(value) for value in (module.kernel_size, module.stride, module.padding))
    matrices = []
    for size, n, k, s, p in zip(x.shape[-2:], g.shape[-2:], kernel, stride, padding, strict=True):
        windows = [(o * s - p, min(o * s - p + k, size + p)) for o in range(n)]
        count_padding = bool(module.count_include_pad) and not module.divisor_override
        matrices.append(_pooling_matrix(size, windows, count_padding, x))
    if module.divisor_override:
        matrices = [(matrix > 0).to(g) for matrix in matrices]
        g = g / module.divisor_override
    return _pooled_back(g, matrices)


def _adaptive_avg_pool2d(_: nn.Module, x: Tensor, g: Tensor) -> ValuesAndScales:
    """As `AvgPool2d`, with windows from ⌊o·size/n⌋ to ⌈(o+1)·size/n⌉."""
    return _pooled_back(
        g,
        [
            _pooling_matrix(size, [(o * size // n, -(-(o + 1) * size // n)) for o in range(n)], False, x)
            for size, n in zip(x.shape[-2:], g.shape[-2:], strict=True)
        ],
    )


def _pooling_matrix(size: int, windows: list[tuple[int, int]], count_padding: bool, like: Tensor) -> Tensor:
    """Return `(windows, size)`: the weight of each position in each window's mean; the padding may count in it too."""
    matrix = like.new_zeros(len(windows), size)
    for row, (start, end) in enumerate(windows):
        low, high = max(start, 0), min(end, size)
        matrix[row, low:high] = 1 / (end - start if count_padding else high - low)
    return matrix


def _pooled_back(g: Tensor, matrices: list[Tensor]) -> ValuesAndScales:
    return {"input": _value_and_scale(lambda g, rows, columns: rows.T @ g @ columns, g, *matrices)}


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, g: Tensor) -> ValuesAndScales:
    """x̂ = (x - μ) / √(σ² + ε), y = γ x̂ + β; in training μ and σ² are the batch's own."""
    axes = [axis for axis in range(x.ndim) if axis != 1]

    def by_channel(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *(1 for _ in axes[1:]))

    own = module.training or module.running_mean is None
    mean = x.mean(axes) if own else to_float64(module.running_mean)
    variance = x.var(axes, correction=0) if own else to_float64(module.running_var)
    inverse = by_channel((variance + module.eps).rsqrt())
    normal = (x - by_channel(mean)) * inverse
    size = (x.abs() + by_channel(mean).abs()) * inverse
    gain = inverse if module.weight is None else by_channel(to_float64(module.weight)) * inverse
    back, scale = g, g.abs()
    if own:
        back = g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True)
        scale = scale + scale.mean(axes, keepdim=True) + size * (scale * size).mean(axes, keepdim=True)
    return {
        "input": (gain * back, gain.abs() * scale),
        "weight": ((g * normal).sum(axes), (g.abs() * size).sum(axes)),
        "bias": (g.sum(axes), g.abs().sum(axes)),
    }


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


FORMULAS: dict[type[nn.Module], Formula] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.ReLU: _relu,
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Softmax: _softmax,
    nn.Flatten: _flatten,
}
