"""The operations of one call, for rules that are tables: which nodes each is made of, and what they saved."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from ....errors import RuleError
from ..internals import saved
from ..nodes import name_of, normalizes_by_batch
from .folding import Folded, in_layers_order
from .kinds import stem
from .notes import ForwardNotes

aten = torch.ops.aten
Exit = tuple[Any, int]
"""A node and one of its inputs."""

GATES = ("Softmax", "SafeSoftmax", "Sigmoid", "Hardsigmoid")
# What a node saved as its input, where it is not "self".
_SAVED_OPERANDS = {
    **dict.fromkeys(("Mul", "Div", "Maximum"), ("self", "other")),
    **dict.fromkeys(("Bmm", "Mm"), ("self", "mat2")),
    "Pow": ("self", "exponent"),
    "Mv": ("self", "vec"),
    "Addmm": ("", "mat1", "mat2"),
    "Baddbmm": ("", "batch1", "batch2"),
    "Convolution": ("input", "weight"),
}
_BIAS = {"Addmm": 0, "Baddbmm": 0, "Convolution": 2}
_ADDED_TO = ("Addmm", "Baddbmm")  # matrix products whose first operand is the bias

# An activation's own forward, from what its node saved and its input; of all else the node saved the result.
_FORWARD: Mapping[str, Callable[[Callable[[str], Any], Tensor], Tensor]] = {
    "Gelu": lambda read, x: F.gelu(x, approximate=read("approximate")),
    "Silu": lambda _, x: F.silu(x),
    "Mish": lambda _, x: F.mish(x),
    "Elu": lambda read, x: aten.elu(x, read("alpha"), read("scale"), read("input_scale")),
    "Celu": lambda read, x: F.celu(x, read("alpha")),
    "Softplus": lambda read, x: F.softplus(x, read("beta"), read("threshold")),
    "Hardswish": lambda _, x: F.hardswish(x),
    "Hardsigmoid": lambda _, x: F.hardsigmoid(x),
    "LogSigmoid": lambda _, x: F.logsigmoid(x),
    "Hardtanh": lambda read, x: F.hardtanh(x, read("min_val"), read("max_val")),
    "Hardshrink": lambda read, x: F.hardshrink(x, read("lambd")),
    "Softshrink": lambda read, x: F.softshrink(x, read("lambd")),
    "Pow": lambda read, _: read("self") ** read("exponent"),
    "Abs": lambda _, x: x.abs(),
    "PreluKernel": lambda read, x: torch.where(x > 0, x, x * read("weight")),
    "RreluWithNoise": lambda read, x: (
        x * read("noise") if read("training") else F.leaky_relu(x, (read("lower") + read("upper")) / 2)
    ),
    "Clamp": lambda read, x: x.clamp(read("min"), read("max")),
    "ClampMin": lambda read, x: x.clamp(min=read("min")),
    "ClampMax": lambda read, x: x.clamp(max=read("max")),
    "Sin": lambda _, x: x.sin(),
    "Cos": lambda _, x: x.cos(),
    "Erf": lambda _, x: x.erf(),
    "Erfc": lambda _, x: x.erfc(),
    "Log": lambda _, x: x.log(),
    "Log1P": lambda _, x: x.log1p(),
    "Atan": lambda _, x: x.atan(),
    "Sinh": lambda _, x: x.sinh(),
    "Cosh": lambda _, x: x.cosh(),
    "Asinh": lambda _, x: x.asinh(),
    "Maximum": lambda _, x: x.clamp(min=0),  # with a constant zero
    "Relu": lambda read, _: read("result"),
    "LeakyRelu": lambda read, x: F.leaky_relu(x, read("negative_slope")),
}


@final
@dataclass(eq=False)
class NodeOperation:
    """One operation as nodes of the graph: `undertow.tables.Operation`.

    Attributes:
        kind: one of `undertow.tables.KINDS`.
        entry: the last of its nodes, whose output is the operation's.
        operands: for each operand, the nodes' inputs through which it enters; none for one off the way.
        notes: of the forward pass.
        gate: which of two factors something computed as a weight.
        inner: its nodes beside the entry.
        relu: the ReLU that alone reads a layer's output, whose own output then stands for it.
        is_proportional: f(x) / x is the derivative itself, as of a ReLU.
        shape: of its output, once a gradient has arrived there.
        weights: of a fused node, for each operand what makes it a weight: see `recognition.WEIGHTS`.
        folded: what scales and shifts a layer's channels behind it, up to the entry.
    """

    kind: str
    entry: Any
    operands: tuple[tuple[Exit, ...], ...]
    notes: ForwardNotes
    gate: int | None = None
    inner: frozenset[Any] = frozenset()
    is_proportional: bool = False
    relu: Any = None
    shape: torch.Size | None = None
    weights: tuple[Collection[str], ...] = ()
    folded: Folded | None = None

    @cached_property
    def is_turned(self) -> bool:
        """Whether it is W @ x of matrices, which rows are shown as xᵀ @ Wᵀ."""
        node, place = self.operands[0][0] if self.operands and self.operands[0] else (self.entry, 0)
        return self.kind == "linear" and stem(node) != "Mv" and place == (2 if stem(node) in _ADDED_TO else 1)

    @cached_property
    def name(self) -> str:
        """For messages."""
        return name_of(self.entry)

    @cached_property
    def input(self) -> Tensor:
        """The tensor that the operation was given."""
        for node, i in self.operands[0]:
            x = self._operand(node, i)
            if x is not None:
                return x.mT if self.is_turned else x
        for node, i in self.operands[0]:
            x = self._unscaled(node, i)
            if x is not None:
                return x
        raise self._missing("input")

    @property
    def output(self) -> Tensor:
        """What it returned."""
        node, name = self.entry, stem(self.entry)
        if self.kind in ("conv", "linear"):
            return self._layer_output
        if name in ("Mul", "Div"):
            first, second = (self._operand(node, i) for i in (0, 1))
            if first is None or second is None:
                raise self._missing("output")
            return first * second if name == "Mul" else first / second
        if name == "Threshold":
            return torch.where(self.input > saved(node, "threshold"), self.input, self._noted(node, 1, "value"))
        if self.kind == "pool":
            places = self._saved(node, "result1")
            axes = -3 if "3D" in name else -2
            return self.input.flatten(axes).gather(-1, places.flatten(axes)).view_as(places)
        if name in _FORWARD:
            return _FORWARD[name](partial(self._saved, node), self.input)
        result: Tensor = self._saved(node, "result")
        return result

    @cached_property
    def layer(self) -> Any:
        """The weighted node: the entry, or the layer that is folded."""
        return self.operands[0][0][0]

    @cached_property
    def own_weight(self) -> Tensor:
        """The constant weights as the layer holds them; of `W @ x`, turned."""
        node, place = self.operands[0][0]
        is_second = self.is_turned or (stem(node) in ("Mv", "Dot") and place == 1)
        weight = self._operand(node, place - 1 if is_second else place + 1)
        if weight is None:
            raise self._missing("weight")
        return weight.mT if is_second and weight.ndim > 1 else weight

    @cached_property
    def weight(self) -> Tensor:
        """The constant weights, a batch norm behind them folded in."""
        weight = self.own_weight
        if stem(self.layer) in _ADDED_TO and saved(self.layer, "alpha") != 1:
            weight = weight * saved(self.layer, "alpha")
        if self._norm is None:
            return weight
        scale = self._norm[0].to(weight.dtype)
        if stem(self.layer) != "Convolution":
            return weight * scale
        if not saved(self.layer, "transposed"):
            return weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        groups = saved(self.layer, "groups")  # the weights of each group's inputs, for its own outputs
        scale = scale.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        return weight * scale.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))

    @cached_property
    def bias(self) -> Tensor | None:
        """The bias, a batch norm behind the layer folded in."""
        place = _BIAS.get(stem(self.layer))
        bias = None if place is None else self._noted(self.layer, place)
        if bias is not None and stem(self.layer) in _ADDED_TO and saved(self.layer, "beta") != 1:
            bias = bias * saved(self.layer, "beta")
        if bias is not None and self.is_turned:
            bias = torch.atleast_2d(bias).mT
        if self._norm is None:
            return bias
        scale, shift = self._norm
        return (shift if bias is None else bias * scale + shift).to(self.weight.dtype)

    @cached_property
    def _norm(self) -> tuple[Tensor, Tensor] | None:
        """The scale and shift of each channel behind the layer, `(C,)` each."""
        if self.folded is None:
            return None
        scale: Any = 1
        shift: Any = 0
        for step in self.folded.steps:
            by, more = self._of_batch_norm(step.node) if step.constant is None else step.scale_and_shift()
            scale, shift = scale * by, shift * by + more
        scale, shift = torch.broadcast_tensors(torch.as_tensor(scale), torch.as_tensor(shift))
        return scale, shift

    def _of_batch_norm(self, node: Any) -> tuple[Tensor, Tensor]:
        scale = (self._saved(node, "running_var") + _eps(node)).rsqrt()
        weight, bias = self._saved(node, "weight"), self._noted(node, 2)
        scale = scale if weight is None else scale * weight
        shift = -self._saved(node, "running_mean") * scale
        return scale, shift if bias is None else shift + bias

    @cached_property
    def _layer_output(self) -> Tensor:
        if self.relu is not None:
            positive: Tensor = self._saved(self.relu, "result")
            positive = positive if self.shape is None else positive.reshape(self.shape)
            if self.folded is not None:
                positive = in_layers_order(positive, self.folded.order)
            return positive.mT if self.is_turned else positive
        if self._norm is None or not stem(self.entry).endswith("BatchNorm") or len(self.inner) > 1:
            return self.forward(self.input, self.weight, self.bias)
        y = self._saved(self.entry, "input")  # what the layer returned
        scale, shift = (_per_channel(values.to(y.dtype), y) for values in self._norm)
        output: Tensor = y * scale + shift
        return output

    def _noted(self, node: Any, i: int, what: str = "bias") -> Any:
        """Return an operand that only the forward pass told; None where the call had none."""
        operand = self.notes.operand(node, i)
        if operand is None and (not self.notes.has(node) or self.notes.was_given(node, i)):
            raise self._missing(what)
        return operand

    @cached_property
    def has_negative_input(self) -> bool:
        """Whether an element of the input is negative."""
        return bool((self.input < 0).any())

    has_negative_output = True  # the relevance itself tells

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of the input behind its channels; its features where there are none."""
        return tuple(range(2, self.input.ndim)) or (self.input.ndim - 1,)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer to another input, with other weights."""
        if stem(self.layer) == "Convolution":
            return aten.convolution(x, weight, bias, *self._how)  # type: ignore[no-any-return]
        return x @ weight if bias is None else x @ weight + bias

    def backward(self, s: Tensor, weight: Tensor) -> Tensor:
        """Apply the layer's transpose with other weights."""
        if stem(self.layer) == "Convolution":
            given = (s, self.input, weight, None, *self._how, [True, False, False])
            return aten.convolution_backward(*given)[0]  # type: ignore[no-any-return]
        return s.unsqueeze(-1) * weight if weight.ndim == 1 else s @ weight.mT

    @cached_property
    def _how(self) -> list[Any]:
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        return [saved(self.layer, name) for name in names]

    def _operand(self, node: Any, i: int) -> Tensor | None:
        name = stem(node)
        names = _SAVED_OPERANDS.get(name, ("self",))
        if name == "Pow" and len(node.next_functions) == 1 and isinstance(self._saved(node, "exponent"), Tensor):
            names = ("exponent",)  # of a number
        kept = self._saved(node, names[i]) if i < len(names) and hasattr(type(node), f"_saved_{names[i]}") else None
        operand: Tensor | None = kept if isinstance(kept, Tensor) else self.notes.operand(node, i)
        return operand

    def _unscaled(self, node: Any, i: int) -> Tensor | None:
        """Return what a node multiplied or divided by a constant, from what was saved of its result."""
        if stem(node) not in ("Mul", "Div") or (stem(node) == "Div" and i):
            return None
        factor = self._saved(node, "other" if i == 0 else "self")
        for reader in (self.entry, *self.inner):
            for j, (behind, _) in enumerate(reader.next_functions):
                scaled = self._operand(reader, j) if behind is node else None
                if scaled is not None and factor is not None:
                    x: Tensor = scaled / factor if stem(node) == "Mul" else scaled * factor
                    return x
        return None

    def _saved(self, node: Any, name: str) -> Any:
        try:
            return self.notes.saved.read(node, name)
        except AttributeError as error:
            raise self._missing(name) from error

    def _missing(self, what: str) -> RuleError:
        return RuleError(f"the {what} of {self.name} ({self.kind}) was kept by nothing, and the rule needs it")

    def hold_spread(self, g: Tensor) -> Tensor:
        """Return the gradient at a norm's input as if its spread were constant."""
        hold = _HOLD_SPREAD.get(stem(self.entry))
        if hold is None:
            raise RuleError(f"the spread of {self.name} cannot be held constant: the norm is not known")
        return hold(self, g)


def _centred(g: Tensor, axes: tuple[int, ...]) -> Tensor:
    return g - g.mean(axes, keepdim=True)


def _layer_norm(op: NodeOperation, g: Tensor) -> Tensor:
    axes = tuple(range(-len(saved(op.entry, "normalized_shape")), 0))
    weight, spread = op._saved(op.entry, "weight"), op._saved(op.entry, "result2")
    scaled: Tensor = g if weight is None else g * weight
    return _centred(scaled, axes).mul_(spread).to(g.dtype)


def _rms_norm(op: NodeOperation, g: Tensor) -> Tensor:
    weight, spread = op._saved(op.entry, "weight"), op._saved(op.entry, "result1")
    held: Tensor = (g if weight is None else g * weight) * spread
    return held.to(g.dtype)


def _group_norm(op: NodeOperation, g: Tensor) -> Tensor:
    weight, spread = op._saved(op.entry, "weight"), op._saved(op.entry, "result2")
    scaled = g if weight is None else g * _per_channel(weight, g)
    groups = scaled.reshape(*spread.shape, -1)
    held: Tensor = _centred(groups, (-1,)) * spread.unsqueeze(-1)
    return held.reshape(g.shape).to(g.dtype)


def _batch_norm(op: NodeOperation, g: Tensor) -> Tensor:
    """In eval mode it is a constant scale; of batch statistics, as in an instance norm, the spread is held."""
    weight = op._saved(op.entry, "weight")
    scaled = g if weight is None else g * _per_channel(weight, g)
    if not normalizes_by_batch(op.entry):
        spread = (op._saved(op.entry, "running_var") + _eps(op.entry)).rsqrt()
        return (scaled * _per_channel(spread, g)).to(g.dtype)
    axes = tuple(i for i in range(g.ndim) if i != 1)
    return (_centred(scaled, axes) * _per_channel(op._saved(op.entry, "result2"), g)).to(g.dtype)


def _eps(batch_norm: Any) -> float:
    return float(saved(batch_norm, "eps" if hasattr(batch_norm, "_saved_eps") else "epsilon"))  # cuDNN's is "epsilon"


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 2))


_HOLD_SPREAD: Mapping[str, Callable[[NodeOperation, Tensor], Tensor]] = {
    "NativeLayerNorm": _layer_norm,
    "FusedRmsNorm": _rms_norm,
    "NativeGroupNorm": _group_norm,
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"), _batch_norm),
}
