"""Captum's LRP: relevance by the rule that each layer has in its attribute `rule`, and ε where it has none.

It reads the graph of the pass, so functional ReLUs, sums written as `+`, reused and in-place modules count as they are,
a batch norm is folded into the layer before it, and no module is needed for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..lrp import share, stabilized
from ..rules import TABLES
from ..tables import Local, Operation, Row, Rule, relu
from .arguments import Tensors, as_tuple, like, request_for
from .method import Method, maps_of

EPSILON = 1e-9


@dataclass(frozen=True)
class EpsilonRule:
    """Share relevance in proportion to x·w, of the output with ε·sign."""

    epsilon: float = EPSILON


@dataclass(frozen=True)
class GammaRule:
    """Favour positive weights: w + γ·w⁺."""

    gamma: float = 0.25
    set_bias_to_zero: bool = False


@dataclass(frozen=True)
class Alpha1_Beta0_Rule:
    """Share over positive contributions alone: w⁺."""

    set_bias_to_zero: bool = False


@dataclass(frozen=True)
class IdentityRule:
    """Hand relevance on as it is, by a layer that returns what has the shape of its input."""

    epsilon: float = EPSILON


LayerRule = EpsilonRule | GammaRule | Alpha1_Beta0_Rule | IdentityRule


class LRP(Method):
    """Layer-wise relevance propagation.

    Args:
        model: a module; layers may have `layer.rule = GammaRule()` or the like, of these classes or Captum's own. They
            keep it, where Captum takes it away after one call.

    Raises:
        TypeError: a layer's `rule` is something else.

    Source: Bach et al. 2015, doi 10.1371/journal.pone.0130140.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        self._rules()

    @property
    def multiplies_by_inputs(self) -> bool:
        """True."""
        return True

    def has_convergence_delta(self) -> bool:
        """True."""
        return True

    def attribute(
        self,
        inputs: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Return relevances, one like each input, in the unit of the score.

        Args:
            inputs, target, additional_forward_args: as of `Saliency.attribute`.
            return_convergence_delta: return also the score less what the relevances add up to, `(B,)`.
            verbose: print the rule of each layer that has one.

        Raises:
            RuleError: an operation for which no rule is known.
        """
        given, rules = as_tuple(inputs), self._rules()
        if verbose:
            for layer, rule in rules.items():
                print(f"Applied {rule} on layer {layer}")
        request = request_for(self.forward_func, given, target, additional_forward_args, _table(rules))
        maps = maps_of(request)
        if not return_convergence_delta:
            return like(inputs, maps)
        delta = self.compute_convergence_delta(maps, None, given, target, additional_forward_args)
        return like(inputs, maps), delta

    def compute_convergence_delta(
        self,
        attributions: Tensors,
        start_point: Any,
        end_point: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Return the score less what the relevances add up to, `(B,)`: what biases and ε keep."""
        given = as_tuple(end_point)
        request = request_for(self.forward_func, given, target, additional_forward_args)
        with torch.no_grad():
            output = request.bind(self.forward_func)(*given)
        total = sum(m.reshape(len(m), -1).sum(1) for m in as_tuple(attributions))
        delta: Tensor = request.target(output) - total
        return delta

    def _rules(self) -> dict[nn.Module, LayerRule]:
        """Return the layers that have a rule."""
        modules = (m for m in self.model.modules() if getattr(m, "rule", None) is not None)
        return {module: _own(module.rule, module) for module in modules}


def _own(rule: Any, module: nn.Module) -> LayerRule:
    """Return a rule of Captum's, or of these, as one of these."""
    if isinstance(rule, LayerRule):
        return rule
    kind = type(rule).__name__ if type(rule).__module__.startswith("captum.") else ""
    if kind == "EpsilonRule":
        return EpsilonRule(rule.STABILITY_FACTOR)
    if kind == "GammaRule":
        return GammaRule(rule.gamma, rule.set_bias_to_zero)
    if kind == "Alpha1_Beta0_Rule":
        return Alpha1_Beta0_Rule(rule.set_bias_to_zero)
    if kind == "IdentityRule":
        return IdentityRule()
    raise TypeError(
        f"{type(module).__name__} has the rule {type(rule).__name__}; EpsilonRule, GammaRule, Alpha1_Beta0_Rule and "
        "IdentityRule are there; others are rows of ut.Rule({...}) for ut.explain"
    )


def _table(rules: Mapping[nn.Module, LayerRule]) -> Rule:
    """Return the table in which each layer, known by its weights, has its own row."""
    rows = {
        weight.data_ptr(): _row(rule)
        for module, rule in rules.items()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
    }
    default = _row(EpsilonRule())

    def row(g: Any, local: Local, op: Operation) -> Any:
        own = op.own_weight.data_ptr()
        return rows.get(own, default)(g, local, op)

    base = TABLES["lrp:epsilon"]
    rows_by_kind = {**base.rows, "conv": row, "linear": row, "pool": lambda g, local, op: local(g)}
    return Rule(rows_by_kind, name="lrp", values="input-times", strict=True)


def _row(rule: LayerRule) -> Row:
    if isinstance(rule, IdentityRule):
        return _identity_row
    if isinstance(rule, EpsilonRule):

        def epsilon_row(g: Any, local: Local, op: Operation) -> Any:
            y = op.output
            return local(g * (y / stabilized(y, rule.epsilon)))

        return epsilon_row

    def modified_row(g: Any, local: Local, op: Operation) -> Any:
        w = op.weight
        up = relu(w)
        less = w - up
        more, other = (w + rule.gamma * up, w + rule.gamma * less) if isinstance(rule, GammaRule) else (up, less)
        bias = None if rule.set_bias_to_zero else op.bias
        return share(g * op.output, op, more, lambda: other, bias, EPSILON)

    return modified_row


def _identity_row(g: Any, local: Local, op: Operation) -> Any:
    relevance, x = g * op.output, op.input
    if relevance.shape != x.shape:
        shapes = f"{tuple(x.shape)} to {tuple(relevance.shape)}"
        raise RuleError(f"IdentityRule is for a layer that keeps its input's shape, and this one goes from {shapes}")
    return relevance / (x + (x == 0)) * (x != 0)
