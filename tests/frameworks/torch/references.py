"""The independent twin of an explanation: it replaces each activation while the forward pass calls it.

Nothing here reads the autograd graph or imports the library. A `TorchFunctionMode` sees every call that a model makes
(`F.relu`, `nn.ReLU`, `torch.relu`, `Tensor.relu_`, `torch.ops.aten.relu.default` in an exported module, ...), and each
call of an activation is answered by an `autograd.Function` whose backward applies the rule. The mode belongs to the
calling thread and ends with the call. It cannot see into C++ (a traced module, `nn.RNN`) or what a
checkpoint computes again: for those the table of networks has a plain twin.

An activation's own backward is written down here by formula for the ReLU-like kinds. At the ties torch's kernels
do not agree with one another, and the formulas follow them:

| activation | derivative at the edge itself |
|---|---|
| relu, threshold, leaky_relu, prelu, rrelu | that of the lower side (0, or the slope) |
| relu6, hardtanh | 0 at both edges |
| clamp, clip, clamp_min | 1 at both edges |
| maximum, max(x, zeros) | 1/2 |
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Local = Callable[[Tensor], Tensor]
Rule = Callable[[Tensor, Local], Tensor]


def _positive(g: Tensor) -> Tensor:
    """Return the positive part of `g`; NaN stays NaN."""
    return torch.where(g <= 0, 0.0, g)


RULES: dict[str, Rule] = {
    "gradient": lambda g, local: local(g),
    "deconvnet": lambda g, local: _positive(g),
    "guided": lambda g, local: local(_positive(g)),
}


def _relu(x: Tensor) -> Local:
    return lambda h: torch.where(x <= 0, 0.0, h)


def _relu6(x: Tensor) -> Local:
    return _hardtanh(x, 0.0, 6.0)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Local:
    return lambda h: torch.where((x > min_val) & (x < max_val), h, 0.0)


def _threshold(x: Tensor, threshold: float, value: float) -> Local:
    return lambda h: torch.where(x <= threshold, 0.0, h)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Local:
    return lambda h: torch.where(x > 0, h, h * negative_slope)


def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3) -> Local:
    """In evaluation: the mean slope. In training it is random, and not for a twin."""
    return _leaky_relu(x, (lower + upper) / 2)


def _prelu(x: Tensor, weight: Tensor) -> Local:
    """One slope, or one for each channel, which is axis 1."""
    slope = weight.detach().reshape([1, -1] + [1] * (x.ndim - 2)) if x.ndim > 1 else weight.detach()
    return lambda h: torch.where(x > 0, h, h * slope)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Local | None:
    """A ReLU, with or without a plateau, where the lower bound is zero; otherwise (an epsilon, say) none at all."""
    if not _is_zero(min):
        return None
    inside = (x >= min) if max is None else (x >= min) & (x <= max)
    return lambda h: torch.where(inside, h, 0.0)


def _maximum(x: Tensor, other: Any = None) -> Local | None:
    """`maximum(x, zeros)`; `max` over an axis or over everything is no activation."""
    if not (isinstance(other, Tensor) and _is_zero(other)):
        return None
    return lambda h: torch.where(x < 0, 0.0, torch.where(x == 0, h / 2, h))


def _is_zero(bound: Any) -> bool:
    """Tell whether a bound is the number zero, or a constant tensor of nothing but zeros."""
    if isinstance(bound, Tensor):
        return not bound.requires_grad and bool((bound == 0).all())
    return bound is not None and bound == 0


RELU_LIKE: dict[str, Callable[..., Local | None]] = {
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "prelu": _prelu,
    "prelu_kernel": _prelu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "maximum": _maximum,
    "max": _maximum,
}
SMOOTH = ("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "hardswish")


class _Ruled(torch.autograd.Function):
    """One activation call: forward is the value it was given, backward is the rule over `local`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, answer: tuple[Tensor, Local], inplace: bool, twin: "_Twin") -> Tensor:
        value, ctx.local = answer
        ctx.twin = twin
        if not inplace:
            return value
        ctx.mark_dirty(x.copy_(value))
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.twin.calls += 1
        return ctx.twin.rule(g, ctx.local), None, None, None


class _Twin(TorchFunctionMode):
    """Answers every activation call with `_Ruled`, and counts those that the gradient came back through."""

    def __init__(self, rule: Rule, kinds: Iterable[str]):
        super().__init__()
        self.rule, self.kinds, self.calls = rule, frozenset(kinds), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]  # "relu_.default" is how an exported module spells it
        kind = name.strip("_")
        x = _acted_on(kind, args, kwargs) if kind in self.kinds and torch.is_grad_enabled() else None
        answer = None if x is None else _answer(kind, x, func, args, kwargs)
        if answer is None:
            return func(*args, **kwargs)
        inplace = name.endswith("_") or bool(kwargs.get("inplace")) or any(a is True for a in args)
        return _Ruled.apply(x, answer, inplace, self)


def _acted_on(kind: str, args: Any, kwargs: Any) -> Tensor | None:
    """Return the tensor that an activation acts on, if a gradient can go back through it.

    It is the first tensor; only `maximum(zeros, x)` may have it second.
    """
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    either = tensors if kind in ("maximum", "max") else tensors[:1]
    return next((t for t in either if t.requires_grad), None)


def _answer(kind: str, x: Tensor, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Local] | None:
    """Return an activation's value and its own backward at `x`, without writing into `x`; None for no activation."""

    def call(y: Tensor) -> Tensor:
        return func(*(y if a is x else a for a in args), **{k: y if a is x else a for k, a in kwargs.items()})

    before = x.detach().clone()
    if kind in SMOOTH:
        with torch.enable_grad():
            value = call(before.requires_grad_().clone())  # a copy, because an in-place call may not change a leaf
        return value.detach().clone(), lambda h: torch.autograd.grad(value, before, h, retain_graph=True)[0]
    # What is left without x and the flags (`inplace`, `training`) are the activation's parameters.
    parameters = [a for a in args if a is not x and not isinstance(a, bool)]
    named = {k: a for k, a in kwargs.items() if a is not x and k not in ("inplace", "training", "generator")}
    local = RELU_LIKE[kind](before, *parameters, **named)
    with torch.no_grad():
        return None if local is None else (call(before.clone()), local)


def reference(
    model: Callable[..., Any],
    x: Tensor | tuple[Tensor, ...],
    target: int | Tensor,
    rule: str | Rule,
    activations: str = "relu-like",
) -> tuple[Any, int]:
    """Explain `model(x)` by replacing its activation calls.

    Args:
        model: any callable from tensor(s) to scores `(B, C)`: a tensor, a tuple whose first is, or with `.logits`.
        x: `(B, ...)` floating point, or a tuple of such, which the model takes as separate arguments.
        target: a class id for every sample, or a `(B,)` tensor of them.
        rule: "gradient", "deconvnet", "guided", or a function `(g, local) -> g`.
        activations: "relu-like", or "all" for the smooth ones too.

    Returns:
        The gradient at `x`, of its shape (a tuple for a tuple), and how many activation calls the rule was applied to:
        those between `x` and the chosen scores, so not those among the weights alone.
    """

    def score(output: Any) -> Tensor:
        scores = _scores(output)
        ids = torch.as_tensor(target, device=scores.device).expand(len(scores))
        return scores.gather(1, ids[:, None])

    maps, calls = ruled(model, x, score, rule, activations)
    given = x if isinstance(x, tuple) else (x,)
    values = tuple(torch.zeros_like(t) if m is None else m for m, t in zip(maps, given, strict=True))
    return values if isinstance(x, tuple) else values[0], calls


def ruled(
    model: Callable[..., Any],
    x: Any,
    score: Callable[[Any], Tensor],
    rule: str | Rule = "gradient",
    activations: str = "relu-like",
) -> tuple[list[Tensor | None], int]:
    """Explain any function of any output by replacing the model's activation calls.

    Args:
        model: any callable.
        x: a tensor, or tensors nested in tuples, lists and dicts with anything else beside them: a tuple is the model's
            positional arguments, a dict its keyword arguments.
        score: of the output as the model returned it; it is summed.

    Returns:
        For each leaf of `x`, in order, its gradient, None for what is no floating-point tensor and for what the score
        does not depend on; and how many activation calls the rule was applied to.
    """
    flat, structure = tree_flatten(x)
    leaves = [p.detach().clone().requires_grad_() if _is_floating(p) else p for p in flat]
    kinds = {"relu-like": RELU_LIKE, "all": (*RELU_LIKE, *SMOOTH)}[activations]
    with _Twin(RULES[rule] if isinstance(rule, str) else rule, kinds) as twin:
        fed = [p.clone() if isinstance(p, Tensor) else p for p in leaves]  # a model may write into its input
        total = score(called(model, tree_unflatten(fed, structure))).sum()
    wanted = [p for p in leaves if _is_floating(p)]
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(found) if _is_floating(p) else None for p in leaves], twin.calls


def grad_cam(
    model: Callable[..., Any],
    x: Any,
    score: Callable[[Any], Tensor],
    layer: torch.nn.Module,
    as_planes: Callable[[Tensor], Tensor],
    size: tuple[int, ...],
) -> Tensor:
    """Sum a layer's channels, weighted by their mean gradients, over its calls; the positive part, resized.

    Args:
        as_planes: from the layer's output to `(B, channels, *positions)`.
        size: of the map, `(H, W)`, or of a line or a volume.

    Returns:
        `(B, 1, *size)`.
    """
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    flat, structure = tree_flatten(x)
    fed = [p.detach().clone().requires_grad_() if _is_floating(p) else p for p in flat]
    total = score(called(model, tree_unflatten(fed, structure))).sum()
    handle.remove()
    terms = []
    for output, gradient in zip(outputs, torch.autograd.grad(total, outputs), strict=True):
        values, g = as_planes(output.detach()), as_planes(gradient)
        terms.append((values * g.mean(tuple(range(2, g.ndim)), keepdim=True)).sum(1, keepdim=True))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return torch.nn.functional.interpolate(sum(terms).clamp(min=0), size=size, mode=mode, align_corners=False)


def smoothgrad(
    model: Callable[..., Any], x: Any, score: Callable[[Any], Tensor], count: int, seed: int = 0
) -> list[Tensor | None]:
    """Average the gradient over `count` inputs with normal noise, a tenth of each sample's range of values.

    The noise is NumPy's, drawn for one input after the other in the order in which they stand in `x`. A map for each
    leaf of `x`, as of `ruled`.
    """
    generator = np.random.default_rng(seed)
    flat, structure = tree_flatten(x)
    with torch.no_grad():  # a list of samples, which have no batch axis, gives a score or a list's entry for each
        output = called(model, x)
        are_samples = type(x) is list and (type(output) is list or score(output).numel() == len(x))
    totals: list[Any] = [0.0 if _is_floating(p) else None for p in flat]
    for _ in range(count):
        noisy = [_noisy(p, generator, are_samples) if _is_floating(p) else p for p in flat]
        maps, _ = ruled(model, tree_unflatten(noisy, structure), score)
        totals = [None if m is None else t + m for t, m in zip(totals, maps, strict=True)]
    return [None if t is None else t / count for t in totals]


def at_output(
    model: Callable[..., Any], x: Any, score: Callable[[Any], Tensor], layer: torch.nn.Module, call: int = 0
) -> Tensor:
    """Return the gradient at what one call of a layer returns, which the rest of the model is run on as a leaf."""
    leaves: list[Tensor] = []
    count = 0

    def cut(_: Any, __: Any, output: Tensor) -> Tensor | None:
        nonlocal count
        count += 1
        if count != call + 1:
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()

    handle = layer.register_forward_hook(cut)
    total = score(called(model, x)).sum()
    handle.remove()
    return torch.autograd.grad(total, leaves[0])[0]


def called(model: Callable[..., Any], x: Any) -> Any:
    """Call a model as undertow says it does."""
    return model(**x) if isinstance(x, dict) else model(*x) if type(x) is tuple else model(x)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _noisy(x: Tensor, generator: np.random.Generator, is_sample: bool) -> Tensor:
    axes = tuple(range(0 if is_sample else 1, x.ndim))
    reach = (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)) / 10
    return x + torch.from_numpy(generator.standard_normal(x.shape)).to(x.dtype) * reach


def _scores(output: Any) -> Tensor:
    """Return the scores `(B, C)` in a model's output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple | list) else output.logits
