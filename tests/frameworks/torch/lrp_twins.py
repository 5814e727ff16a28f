"""An independent twin of LRP for convolutional networks of any shape: layers are replaced while the network calls them.

Nothing here reads a graph or imports the library. Convolutions, linear layers and batch norms become functions whose
backward shares relevance out, in four sums: of positive and negative inputs by positive and negative weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

EPSILON = 1e-6
Linear = Callable[[Tensor, Tensor], Tensor]


def ratio(relevance: Tensor, whole: Tensor) -> Tensor:
    return relevance / (whole + torch.where(whole < 0, -EPSILON, EPSILON).to(whole))


def transposed(linear: Linear, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Return what a linear function's transpose makes of s."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(linear(leaf, w), leaf, s)
    return g


def shared(linear: Linear, x: Tensor, w: Tensor, b: Tensor, relevance: Tensor, sign: int, more: float = 0) -> Tensor:
    """Share out over contributions of one sign; or over all, and some more of those of one sign: R_i."""
    pairs = [(x.clamp(min=0), (sign * w).clamp(min=0) * sign), (x.clamp(max=0), (-sign * w).clamp(min=0) * -sign)]
    whole = sum(linear(a, v) for a, v in pairs) + (sign * b).clamp(min=0) * sign
    if not more:
        s = ratio(relevance, whole)
        return sum(a * transposed(linear, a, v, s) for a, v in pairs)
    s = ratio(relevance, linear(x, w) + b + more * whole)
    return x * transposed(linear, x, w, s) + more * sum(a * transposed(linear, a, v, s) for a, v in pairs)


def epsilon(linear, x, w, b, y, relevance):
    return x * transposed(linear, x, w, ratio(relevance, y))


def plus(linear, x, w, b, y, relevance):
    return shared(linear, x, w, b, relevance, 1)


def alpha2_beta1(linear, x, w, b, y, relevance):
    return 2 * plus(linear, x, w, b, y, relevance) - shared(linear, x, w, b, relevance, -1)


def gamma(linear, x, w, b, y, relevance):
    """All contributions, and a quarter more of those of the output's sign."""
    return sum(shared(linear, x, w, b, relevance * (sign * y > 0), sign, 0.25) for sign in (1, -1))


def flat(linear, x, w, b, y, relevance):
    ones, v = torch.ones_like(x), torch.ones_like(w)
    return transposed(linear, ones, v, ratio(relevance, linear(ones, v)))


def box(low, high):
    def rule(linear, x, w, b, y, relevance):
        corners = (x, w), (torch.full_like(x, -low), w.clamp(min=0)), (torch.full_like(x, -high), w.clamp(max=0))
        s = ratio(relevance, sum(linear(a, v) for a, v in corners))
        return sum(a * transposed(linear, a, v, s) for a, v in corners)

    return rule


def excitation(linear, x, w, b, y, relevance):
    a, v = x.clamp(min=0), w.clamp(min=0)
    return a * transposed(linear, a, v, ratio(relevance, linear(a, v)))


class _Shared(torch.autograd.Function):
    """y = linear(x, w) + b, whose backward takes R / y to R / x, or to R at the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, linear: Linear, rule: Any, is_first: bool) -> Tensor:
        y = linear(x, w) + b
        ctx.given = linear, x.clone(), w, b, y.clone(), rule, is_first  # networks write over both
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        linear, x, w, b, y, rule, is_first = ctx.given
        relevance = rule(linear, x, w, b, y, g * y)
        return relevance if is_first else torch.where(x == 0, 0, relevance / x), None, None, None, None, None


class _InProportion(torch.autograd.Function):
    """y = f(x), whose relevance is x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.given = x, y
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.given
        return torch.where(x == 0, 0, g * y / x), None


ACTIVATIONS = ("relu6", "hardtanh", "silu", "silu_", "hardswish", "hardswish_", "mish")
GATES = ("sigmoid", "sigmoid_", "hardsigmoid", "softmax")  # weights that products of two variables hold constant


class LrpTwin(TorchFunctionMode):
    """Answers the calls of layers and activations.

    Args:
        first, conv, dense: the rules of convolutions of the image, of all others, and of linear layers.
    """

    def __init__(self, first: Any, conv: Any, dense: Any) -> None:
        super().__init__()
        self.first, self.conv, self.dense = first, conv, dense
        self.image: Tensor | None = None  # what the first convolution reads
        self.before: tuple[Tensor, tuple[Any, ...]] | None = None  # the last convolution's output, and how it was made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in GATES:
            return func(*args, **kwargs).detach()
        if name in ACTIVATIONS:
            y = func(args[0].detach().clone(), *args[1:], **kwargs)
            return _InProportion.apply(args[0].clone(), y)
        if name == "conv2d":
            x, w, b, *how = args
            self.image = x if self.image is None else self.image
            is_first = x is self.image
            made = (
                x,
                w,
                zero_of(b, w),
                lambda a, v: F.conv2d(a, v, None, *how),
                self.first if is_first else self.conv,
                is_first,
            )
            output = _Shared.apply(*made[:2], made[2][:, None, None], *made[3:])
            self.before = output, made
            return output
        if name == "linear":
            x, w, b = args
            return _Shared.apply(x, w, zero_of(b, w), F.linear, self.dense, False)
        if name == "batch_norm":
            return self.batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def batch_norm(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, **_: Any
    ) -> Tensor:
        """One layer with the convolution whose output it is given; else a constant scale and shift."""
        scale = weight / (var + eps).sqrt()
        shift = bias - mean * scale
        if self.before is not None and self.before[0] is x:
            given, w, b, *others = self.before[1]
            folded = (b * scale + shift)[:, None, None]
            return _Shared.apply(given, w * scale[:, None, None, None], folded, *others)
        return x * scale[:, None, None] + shift[:, None, None]


def zero_of(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def relevance(net: Any, x: Tensor, rules: tuple[Any, Any, Any], target: int) -> Tensor:
    """Return the relevance of x for one of the scores of a network without gradients of its own."""
    leaf = x.detach().clone().requires_grad_()
    with LrpTwin(*rules):
        score = net(leaf.clone())[:, target].sum()
    return torch.autograd.grad(score, leaf)[0]
