"""Independent twins of rules that are tables: each function is replaced while the forward pass calls it.

Nothing here reads a graph or imports the library. Weights are frozen, so a tensor takes a gradient where it lies on the
way from the input. What models write out in several operations (a norm, an activation) is replaced by class.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.clip import modeling_clip
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5


class _Identity(torch.autograd.Function):
    """y whose relevance is x's: g·y/x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        return g * (y / x), None


def half(x: Tensor) -> Tensor:
    """The same value, half the gradient."""
    return 0.5 * x + 0.5 * x.detach()


def layer_norm(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Centred, over a standard deviation that is held constant."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.pow(2).mean(axes, keepdim=True) + eps).sqrt().detach()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()


def gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS = ("gelu", "silu", "mish", "elu", "tanh", "hardswish", "relu6", "hardtanh", "softplus", "exp")
GATES = ("sigmoid", "sigmoid_", "hardsigmoid")
PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__")
MATRIX_PRODUCTS = ("matmul", "bmm", "__matmul__", "einsum")


class Twin(TorchFunctionMode):
    """Answers calls under AttnLRP, or CP-LRP where `cp`."""

    def __init__(self, cp: bool) -> None:
        super().__init__()
        self.cp = cp
        self.gates: list[Tensor] = []  # what a sigmoid gave
        self.activations: list[Tensor] = []

    def weight_among(self, factors: tuple[Tensor, Tensor]) -> int | None:
        """Which of two factors weighs the other: what a sigmoid gave, else what an activation gave."""
        for weights in (self.gates, self.activations):
            are = [any(x is weight for weight in weights) for x in factors]
            if sum(are) == 1:
                return are.index(True)
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        if name in (*ACTIVATIONS, *GATES) and x.requires_grad:
            result = _Identity.apply(x, func(x.detach().clone(), *args[1:], **kwargs))
            (self.gates if name in GATES else self.activations).append(result)
            return result
        if name == "softmax" and self.cp:
            return func(*args, **kwargs).detach()
        if name in (*PRODUCTS, *MATRIX_PRODUCTS) and isinstance(args[1], Tensor):
            return self.product(func, x, args[1])
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name == "layer_norm":
            return self.layer_norm(*args, **kwargs)
        if name == "group_norm":
            return self.group_norm(*args, **kwargs)
        if name == "normalize":
            return self.normalize(*args, **kwargs)
        if name == "rms_norm":
            return rms_norm(x, kwargs.get("eps", args[3] if len(args) > 3 else None)) * args[2]
        return func(*args, **kwargs)

    def product(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        if not (a.requires_grad and b.requires_grad):
            return func(a, b)
        weight = self.weight_among((a, b)) if self.cp else None
        if weight is not None:
            return func(a.detach(), b) if weight == 0 else func(a, b.detach())
        return func(half(a), half(b))

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        if self.cp:
            q, k = q.detach(), k.detach()
        scores = self.product(torch.matmul, q, k.transpose(-2, -1)) * (scale or 1 / math.sqrt(q.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        p = scores.softmax(-1)
        return p @ v if self.cp else self.product(torch.matmul, p, v)

    def layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5):
        y = layer_norm(x, tuple(range(-len(shape), 0)), eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def normalize(self, x, p=2.0, dim=1, eps=1e-12, out=None):
        assert p == 2
        return x / x.pow(2).sum(dim, keepdim=True).sqrt().clamp(min=eps).detach()

    def group_norm(self, x, groups, weight=None, bias=None, eps=1e-5):
        y = layer_norm(x.reshape(len(x), groups, -1), (-1,), eps).reshape(x.shape)
        channels = (1, -1, *[1] * (x.ndim - 2))
        y = y if weight is None else y * weight.view(channels)
        return y if bias is None else y + bias.view(channels)


def _identity_of(f: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: _Identity.apply(x, f(x.detach())) if x.requires_grad else f(x)


def _rms(self: Any, x: Tensor) -> Tensor:
    return self.weight * rms_norm(x.to(torch.float32), self.variance_epsilon).to(x.dtype)


def _gemma_rms(self: Any, x: Tensor) -> Tensor:
    return (rms_norm(x.float(), self.eps) * (1.0 + self.weight.float())).type_as(x)


def _response_norm(self: Any, x: Tensor) -> Tensor:
    size = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
    share = size / (size.mean(dim=self.channel_dim, keepdim=True) + self.eps).detach()
    return x + self.bias.view(self.wb_shape) + self.weight.view(self.wb_shape) * (x * share)  # the mode halves it


def _t5_rms(self: Any, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return self.weight * (x * (variance + self.variance_epsilon).rsqrt().detach())


def _attention(self: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Self-attention, batch first, out of calls that a mode sees: it does not see into torch's own."""
    parts = nn.functional.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


@contextmanager
def written_out_replaced() -> Iterator[None]:
    """Replace what transformers writes out, and torch's own multi-head attention."""
    activations = transformers.activations
    with ExitStack() as stack:
        for cls, forward in (
            (activations.NewGELUActivation, _identity_of(gelu_tanh)),
            (activations.QuickGELUActivation, _identity_of(lambda x: x * torch.sigmoid(1.702 * x))),
            (nn.MultiheadAttention, _attention),
            (modeling_llama.LlamaRMSNorm, _rms),
            (modeling_mistral.MistralRMSNorm, _rms),
            (modeling_phi3.Phi3RMSNorm, _rms),
            (modeling_qwen2.Qwen2RMSNorm, _rms),
            (modeling_qwen3.Qwen3RMSNorm, _rms),
            (modeling_gemma.GemmaRMSNorm, _gemma_rms),
            (GlobalResponseNorm, _response_norm),
            (modeling_t5.T5LayerNorm, _t5_rms),
        ):
            stack.enter_context(patch.object(cls, "forward", forward))
        norm = lambda x: x.pow(2).sum(-1, keepdim=True).pow(0.5).detach()  # noqa: E731
        stack.enter_context(patch.object(modeling_clip, "_get_vector_norm", norm))
        yield


def relevance(model: nn.Module, x: Any, score: Callable[[Any], Tensor], rule: str) -> Tensor:
    """Return x·g of the first tensor of `x`, a tensor, or a dict whose first it is."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    first = x if isinstance(x, Tensor) else next(iter(x.values()))
    leaf = first.detach().clone().requires_grad_()
    with written_out_replaced(), Twin(rule == "cp-lrp"):
        fed = leaf.clone()
        output = frozen(fed) if isinstance(x, Tensor) else frozen(**{**x, next(iter(x)): fed})
        total = score(output).sum()
    (g,) = torch.autograd.grad(total, leaf)
    return (g * leaf).detach()
