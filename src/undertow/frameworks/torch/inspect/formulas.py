"""Gradients by closed formula, written from the definitions: the twin of autograd that `trace` holds it to.

Each formula takes a module, its input `x` and the gradient `g` at its output, both float64, and gives for each gradient
that it knows ("input", or a parameter's name) the value and a scale: the same sum over absolute values, which is what
rounding errors grow with. A new one is one function and one row of `FORMULAS`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...results import Difference

Parts = dict[str, tuple[Tensor, Tensor]]
Formula = Callable[[Any, Tensor, Tensor], Parts]

# Relative to the scale. TF32, which CUDA may use for float32, keeps 10 bits of each factor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_TF32 = 2e-3
# Parameters' gradients are sums over places. Summed one by one, as oneDNN does for a bias, rounding grows with their
# number: 1.2e-4 of the value was seen for 98,568 places in float32.
_MANY = 1000
_MULTIPLIES = (nn.Linear, nn.Conv2d)


def compared(module: nn.Module, x: Tensor, g: Tensor, found: Mapping[str, Tensor | None]) -> dict[str, Difference]:
    """Hold the gradients of one call to the closed formula of its module; empty where there is none.

    Args:
        module: of a class in `FORMULAS`, itself and no subclass, which may compute anything.
        x, g: its input and the gradient at its output.
        found: "input" and parameters' names, with the gradients to judge.
    """
    formula = FORMULAS.get(type(module))
    if formula is None:
        return {}
    parts = formula(module, wide(x), wide(g))
    dtypes = [t.dtype for t in (x, g) if t.dtype in TOLERANCE]
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    if x.is_cuda and isinstance(module, _MULTIPLIES) and tolerance == TOLERANCE[torch.float32]:
        tolerance = _TF32
    places = g.numel() / max(1, parts["bias"][0].numel()) if "bias" in parts else 1
    summed = tolerance * max(1.0, math.sqrt(places / _MANY))
    return {
        name: _difference(found[name], part, tolerance if name == "input" else summed)
        for name, part in parts.items()
        if found.get(name) is not None
    }


def wide(t: Any) -> Tensor:
    """Return a tensor's values in float64, on its device where that has it."""
    return t.detach().to("cpu" if t.device.type == "mps" else t.device, torch.float64)  # type: ignore[no-any-return]


def _difference(found: Any, part: tuple[Tensor, Tensor], tolerance: float) -> Difference:
    value, scale = part
    found = found.detach().to(value.device)
    apart = (value - found).abs_()
    largest = float(apart.amax()) if apart.numel() else 0.0
    if largest != largest or largest == math.inf:  # inf less inf, and NaN in both, are no difference
        same = (value == found) | (value.isnan() & found.isnan())
        largest = float(apart.masked_fill_(same, 0).nan_to_num_(nan=math.inf).amax())
    finite = scale[scale.isfinite()]
    return Difference(largest, tolerance * float(finite.amax() if finite.numel() else 0.0))


def _linear(module: nn.Linear, x: Tensor, g: Tensor) -> Parts:
    """y = x Wᵀ + b: gradients g W, gᵀ x and Σ g."""
    rows, outs, weight = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), wide(module.weight)
    return {
        "input": ((outs @ weight).reshape(x.shape), _greatest(outs, weight)),
        "weight": (outs.T @ rows, _greatest(outs.T, rows)),
        "bias": _both(lambda outs: outs.sum(0), outs),
    }


def _greatest(a: Tensor, b: Tensor) -> Tensor:
    """Return no less than any element of |a| |b|, by Cauchy and Schwarz; the product itself would double the work."""
    return torch.linalg.vector_norm(a, dim=1).amax() * torch.linalg.vector_norm(b, dim=0).amax()  # type: ignore[no-any-return]


def _both(formula: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return formula(*tensors), formula(*(t.abs() for t in tensors))


def _conv2d(module: nn.Conv2d, x: Tensor, g: Tensor) -> Parts:
    """A correlation, place by place in the kernel: the weight there meets one shifted, strided view of the input."""
    if module.padding_mode != "zeros" or x.ndim != g.ndim or x.ndim not in (3, 4):
        return {}
    groups = module.groups
    left, right, top, bottom = _conv_padding(module)
    images, outs = x.reshape(-1, *x.shape[-3:]), g.reshape(-1, *g.shape[-3:])
    padded = F.pad(images, (left, right, top, bottom)).unflatten(1, (groups, -1))
    outs = outs.unflatten(1, (groups, -1))
    weight = wide(module.weight).unflatten(0, (groups, -1))
    places = list(_places(module.kernel_size, module.stride, module.dilation, g.shape[-2:]))

    def by_weight(outs: Tensor, padded: Tensor) -> Tensor:
        taps = [torch.einsum("bgohw,bgchw->goc", outs, padded[..., rows, columns]) for _, _, rows, columns in places]
        return torch.stack(taps, -1).reshape(module.weight.shape)

    def by_input(outs: Tensor, weight: Tensor) -> Tensor:
        back = torch.zeros_like(padded)
        for i, j, rows, columns in places:
            back[..., rows, columns] += torch.einsum("bgohw,goc->bgchw", outs, weight[..., i, j])
        return back.flatten(1, 2)[..., top : top + x.shape[-2], left : left + x.shape[-1]].reshape(x.shape)

    return {
        "input": _both(by_input, outs, weight),
        "weight": _both(by_weight, outs, padded),
        "bias": _both(lambda outs: outs.sum((0, 3, 4)).flatten(), outs),
    }


def _conv_padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the zeros left, right, top and bottom; "same" puts the odd one at the end."""
    if module.padding == "same":
        (height, width) = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    height, width = (0, 0) if isinstance(module.padding, str) else module.padding
    return width, width, height, height


def _places(
    kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], out: torch.Size
) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield each place in a kernel, and the rows and columns of the padded input that it meets."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            starts = (i * dilation[0], j * dilation[1])
            rows, columns = (
                slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, tuple(out), strict=True)
            )
            yield i, j, rows, columns


def _sigmoid(_: nn.Module, x: Tensor, g: Tensor) -> Parts:
    """s = 1 / (1 + exp(-x)): s' = s (1 - s)."""
    s = 1 / (1 + torch.exp(-x))
    return {"input": (g * s * (1 - s), g.abs())}


def _tanh(_: nn.Module, x: Tensor, g: Tensor) -> Parts:
    """t' = 1 - t²."""
    return {"input": (g * (1 - torch.tanh(x) ** 2), g.abs())}


def _relu(_: nn.Module, x: Tensor, g: Tensor) -> Parts:
    """1 above zero, 0 at and below it; a NaN passes, as in torch."""
    return {"input": (torch.where(x <= 0, 0.0, g), g.abs())}


def _softmax(module: nn.Softmax, x: Tensor, g: Tensor) -> Parts:
    """s (g - Σ g s)."""
    if module.dim is None:
        return {}
    s = torch.exp(x - x.amax(module.dim, keepdim=True))
    s = s / s.sum(module.dim, keepdim=True)
    value = s * (g - (g * s).sum(module.dim, keepdim=True))
    return {"input": (value, s * (g.abs() + (g.abs() * s).sum(module.dim, keepdim=True)))}


def _flatten(_: nn.Module, x: Tensor, g: Tensor) -> Parts:
    """The same numbers in another shape."""
    return {"input": (g.reshape(x.shape), g.abs())}


def _max_pool2d(module: nn.MaxPool2d, x: Tensor, g: Tensor) -> Parts:
    """All goes to the first greatest of each window, read row by row."""
    kernel, stride, (top, left), dilation = (
        _pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    height, width = (
        max((n - 1) * s + (k - 1) * d + 1, p + size)
        for n, s, k, d, p, size in zip(g.shape[-2:], stride, kernel, dilation, (top, left), x.shape[-2:], strict=True)
    )
    rest = (left, width - left - x.shape[-1], top, height - top - x.shape[-2])
    padded = F.pad(x, rest, value=float("-inf"))
    numbers = torch.arange(height * width, device=x.device).reshape(height, width)
    best = torch.full_like(g, float("-inf"))
    winner = torch.zeros(g.shape, dtype=torch.long, device=x.device)
    for _, _, rows, columns in _places(kernel, stride, dilation, g.shape[-2:]):
        seen = padded[..., rows, columns]
        better = (seen > best) | seen.isnan()
        best = torch.where(better, seen, best)
        winner = torch.where(better, numbers[rows, columns], winner)
    back = torch.zeros_like(padded).flatten(-2).scatter_add_(-1, winner.flatten(-2), g.flatten(-2))
    value = back.reshape(padded.shape)[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    return {"input": (value, g.abs() * kernel[0] * kernel[1])}


def _avg_pool2d(module: nn.AvgPool2d, x: Tensor, g: Tensor) -> Parts:
    """Each output spreads evenly over its window: a matrix for the rows, one for the columns."""
    kernel, stride, padding = (_pair(value) for value in (module.kernel_size, module.stride, module.padding))
    spreads = []
    for size, n, k, s, p in zip(x.shape[-2:], g.shape[-2:], kernel, stride, padding, strict=True):
        windows = [(o * s - p, min(o * s - p + k, size + p)) for o in range(n)]
        whole = bool(module.count_include_pad) and not module.divisor_override
        spreads.append(_spread(size, windows, whole, x))
    if module.divisor_override:
        spreads = [(spread > 0).to(g) for spread in spreads]
        g = g / module.divisor_override
    return _spread_back(g, spreads)


def _adaptive_avg_pool2d(_: nn.Module, x: Tensor, g: Tensor) -> Parts:
    """As `AvgPool2d`, with windows from ⌊o·size/n⌋ to ⌈(o+1)·size/n⌉."""
    return _spread_back(
        g,
        [
            _spread(size, [(o * size // n, -(-(o + 1) * size // n)) for o in range(n)], False, x)
            for size, n in zip(x.shape[-2:], g.shape[-2:], strict=True)
        ],
    )


def _spread(size: int, windows: list[tuple[int, int]], whole: bool, like: Tensor) -> Tensor:
    """Return `(windows, size)`: each window's weight on each place; `whole` counts its places outside too."""
    spread = like.new_zeros(len(windows), size)
    for row, (start, end) in enumerate(windows):
        low, high = max(start, 0), min(end, size)
        spread[row, low:high] = 1 / (end - start if whole else high - low)
    return spread


def _spread_back(g: Tensor, spreads: list[Tensor]) -> Parts:
    return {"input": _both(lambda g, rows, columns: rows.T @ g @ columns, g, *spreads)}


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, g: Tensor) -> Parts:
    """x̂ = (x - μ) / √(σ² + ε), y = γ x̂ + β; in training μ and σ² are the batch's own."""
    axes = [axis for axis in range(x.ndim) if axis != 1]

    def by_channel(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *(1 for _ in axes[1:]))

    own = module.training or module.running_mean is None
    mean = x.mean(axes) if own else wide(module.running_mean)
    variance = x.var(axes, correction=0) if own else wide(module.running_var)
    inverse = by_channel((variance + module.eps).rsqrt())
    normal = (x - by_channel(mean)) * inverse
    size = (x.abs() + by_channel(mean).abs()) * inverse
    gain = inverse if module.weight is None else by_channel(wide(module.weight)) * inverse
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
