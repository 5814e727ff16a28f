"""The two classical attachments: a custom autograd function in place of each activation module, and backward hooks.

Both work on a private copy of the model's structure that shares its weights, so the model itself is not changed and
threads do not interfere. Both see modules alone; an activation called as a function is found in the graph afterwards,
and is an error rather than a wrong map.
"""

import copy
from collections import defaultdict
from typing import Any, final

import torch
from torch import nn
from torch.autograd.graph import Node

from ....errors import RuleError, one_line
from ....tables import ActivationRule
from ...base import Request
from ..calls import uncompiled
from ..internals import function_class, next_sequence_number, sequence_number
from ..nodes import NodeKind, name_of
from .graph import WANTED, RuleAttachment
from .rule_hooks import apply_rule

_RELU_LIKE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold)
_SMOOTH = (nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Hardswish)
ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {"relu-like": _RELU_LIKE, "all": _RELU_LIKE + _SMOOTH}


class _ThroughModules(RuleAttachment):
    """What swapping and hooking share: a private copy, and the activations that were missed in it."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.copy = _private_copy(uncompiled(request.model), request.through)
        self.network = self.copy
        self.missed: list[Node] = []
        self._spans: list[tuple[int, int, str]] = []
        _record_spans(self.copy, self._spans)

    def missed_if_wanted(self, node: Node, kind: NodeKind) -> bool:
        """Record an activation that the rule should have acted on and did not; always False."""
        if kind in WANTED[self.request.activations]:
            self.missed.append(node)
        return False

    def refuse_missed(self) -> None:
        """Raise RuleError where activations were missed, naming each with the module that called it."""
        if self.missed:
            calls = dict.fromkeys(f"{name_of(node)} in {self._caller(node)}" for node in self.missed)
            listed = ", ".join(list(calls)[:5]) + (", ..." if len(calls) > 5 else "")
            raise RuleError(
                f"through={self.request.through!r} sees modules alone and missed {len(self.missed)} activation "
                f"call(s): {listed}; through='graph' sees them all"
            )

    def _caller(self, node: Any) -> str:
        number = sequence_number(node)
        around = [(end - start, name) for start, end, name in self._spans if start <= number < end]
        name = min(around, default=(0, ""))[1]
        return repr(name) if name else "the model's own forward"


@final
class ThroughSwap(_ThroughModules):
    """Replaces each activation module of the copy by one around a custom Function."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        swapped: dict[nn.Module, nn.Module] = {}  # a module with two names stays one module
        for name, module in list(self.copy.named_modules(remove_duplicate=False)):
            if isinstance(module, ACTIVATIONS[request.activations]):
                new = swapped.setdefault(module, RuledActivation(module, request.activation_rule))
                parent, _, leaf = name.rpartition(".")
                if name:
                    setattr(self.copy.get_submodule(parent), leaf, new)
                else:
                    self.network = new

    def attach(self, node: Node, kind: NodeKind) -> bool:
        """Whether the node is one of the custom Function's."""
        return function_class(node) is RuledFunction or self.missed_if_wanted(node, kind)


class RuledActivation(nn.Module):
    """An activation module whose backward follows a rule."""

    def __init__(self, activation: nn.Module, rule: ActivationRule) -> None:
        super().__init__()
        self.activation = activation
        self.rule = rule

    def forward(self, x: torch.Tensor) -> Any:
        """Apply the activation to `x`, of any shape; one of several operations is left as it is, and is missed."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = self.activation(leaf)
        if getattr(output.grad_fn.next_functions[0][0], "variable", None) is not leaf:
            return self.activation(x)
        return RuledFunction.apply(x, (leaf, output), self.rule)  # type: ignore[no-untyped-call]


class RuledFunction(torch.autograd.Function):
    """The activation forward; backward the rule, whose `local` is the activation's own backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ran: tuple[torch.Tensor, torch.Tensor], rule: ActivationRule
    ) -> torch.Tensor:
        """Return the output of the activation, which ran on a separate graph: `ran` is its input and output there."""
        ctx.ran, ctx.rule = ran, rule
        return ran[1].detach()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        """Apply the rule."""

        def local(h: torch.Tensor) -> torch.Tensor:
            leaf, output = ctx.ran
            return torch.autograd.grad(output, leaf, h, retain_graph=True)[0]  # type: ignore[no-any-return]

        return apply_rule(ctx.rule, g, local), None, None


@final
class ThroughHooks(_ThroughModules):
    """Puts tensor hooks around each call of an activation module of the copy."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._handles: list[Any] = []
        self._covered: set[Node] = set()
        self._entered: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor] | None]] = defaultdict(list)
        for module in list(self.copy.modules()):
            if isinstance(module, ACTIVATIONS[request.activations]):
                self._handles += [module.register_forward_pre_hook(self._before)]
                self._handles += [module.register_forward_hook(self._after)]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:  # the copy's hooks refer to this object, which refers to the copy
            handle.remove()
        self._covered.clear()

    def attach(self, node: Node, kind: NodeKind) -> bool:
        """Whether the node is that of a hooked call."""
        return node in self._covered or self.missed_if_wanted(node, kind)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not args[0].requires_grad:
            self._entered[module].append(None)
            return None
        outer = args[0].clone()  # read by this call alone, whoever else reads the pre-activation
        inner = outer.clone()
        self._entered[module].append((outer, inner))
        return (inner, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], activated: Any) -> torch.Tensor | None:
        entered = self._entered[module].pop()
        if entered is None or not _is_one_step(activated, entered[1]):
            return None
        outer, inner = entered
        self._covered.add(activated.grad_fn)
        return _hooked(outer, inner, activated, self.request.activation_rule)


def _is_one_step(activated: torch.Tensor, inner: torch.Tensor) -> bool:
    return activated.grad_fn is not None and activated.grad_fn.next_functions[0][0] is inner.grad_fn


def _hooked(outer: torch.Tensor, inner: torch.Tensor, activated: torch.Tensor, rule: ActivationRule) -> torch.Tensor:
    """Apply the rule when the gradient reaches the output, and replace the gradient at the input by its result."""
    result: list[torch.Tensor] = []
    output = activated.clone()

    def local(h: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(activated, inner, h, retain_graph=True)[0]

    output.register_hook(lambda g: result.append(apply_rule(rule, g, local)))
    outer.register_hook(lambda _: result.pop())
    return output


def _private_copy(model: Any, through: str) -> nn.Module:
    """Return a copy of a model that shares its tensors, and in which no activation works in place."""
    if not isinstance(model, nn.Module):
        raise RuleError(f"through={through!r} needs an nn.Module, not a {type(model).__name__}; use through='graph'")
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        model_copy = copy.deepcopy(model, shared)
    except Exception as error:
        reason = one_line(error)
        raise RuleError(f"through={through!r} could not copy the model ({reason}); use through='graph'") from error
    for module in model_copy.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010  mypy takes an nn.Module's attribute for a tensor
    return model_copy


def _record_spans(model: nn.Module, spans: list[tuple[int, int, str]]) -> None:
    """Record for each call of a module the sequence numbers of the graph nodes that it creates."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        starts: list[int] = []

        def before(_: nn.Module, __: Any, starts: list[int] = starts) -> None:
            starts.append(next_sequence_number())

        def after(_: nn.Module, __: Any, ___: Any, name: str = name, starts: list[int] = starts) -> None:
            spans.append((starts.pop(), next_sequence_number(), name))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
