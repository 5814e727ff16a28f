"""Maps under a rule, which acts on the autograd graph of one call, in swapped modules, or in backward hooks."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch

from ....errors import InputError, RuleError
from ....inputs import ModelArguments
from ....outputs import Path
from ....rules import RULES, gradient
from ....tables import AttentionRule, Rule
from ...base import Request
from ...results import Explanation, RewiringStats
from ..arrays import to_numpy
from ..calls import class_scores, eager, has_channels_last, leaves_and_copies, refuse_training
from ..heads import run_to_scores
from ..layers import call_number, from_layer, layer_outputs
from ..nodes import NodeKind, hidden_reason, name_of, nodes_behind
from ..state import unchanged
from ..targets import target_scores, with_function
from .acting import what_acts
from .attention import AttentionReader
from .cuts import cudnn_errors_named, nan_gradient, no_gradient, without_gradient
from .graph import RuleAttachment, ThroughGraph, rewired_backward
from .modules import ThroughHooks, ThroughSwap

THROUGH: dict[str, type[RuleAttachment]] = {"graph": ThroughGraph, "swap": ThroughSwap, "hook": ThroughHooks}


def explain(request: Request) -> Explanation:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    if request.through != "graph":
        _ = request.activation_rule  # a table is refused before anything runs
    if not request.training:
        refuse_training(request.model)
    with unchanged(request.model, request.inputs, request.training) as start, ExitStack() as stack:
        sources, fed = leaves_and_copies(request.inputs, request.is_plain)
        plain = request.rule is gradient
        kind = AttentionReader if isinstance(request.rule, AttentionRule) else THROUGH[request.through]
        attachment = None if plain else stack.enter_context(kind(request))
        network = eager(request.model) if attachment is None else attachment.network
        request = with_function(request, network, stack)
        with nullcontext() if attachment is None else attachment.forward():
            output, path, head = run_to_scores(request, fed, network)
            scores, ids, single = target_scores(output, request.target, request.batch, path)
        if scores.grad_fn is None:
            raise no_gradient(request, fed)
        if attachment is not None:
            stack.enter_context(rewired_backward(scores.grad_fn, attachment))
        acting = what_acts(request, scores.grad_fn, start)
        maps = _maps(scores, sources, fed, request, attachment)
        if isinstance(request.rule, Rule) and _is_by_value(request.rule, request.is_inside):
            maps = tuple(_times(m, source) for m, source in zip(maps, sources, strict=True))
        detached = scores.detach()
    if single:
        maps = tuple(None if m is None else m[:, 0] for m in maps)
        detached, ids = detached[:, 0], None if ids is None else ids[:, 0]
    stats = RewiringStats() if attachment is None else attachment.stats
    return Explanation(maps, ids, detached, stats, has_channels_last(request.model), acting, head)


def _maps(
    scores: torch.Tensor,
    sources: list[torch.Tensor | None],
    fed: list[torch.Tensor],
    request: Request,
    attachment: RuleAttachment | None,
) -> tuple[Any, ...]:
    """Return, for each input, a map for each target: `(B, K, ...)`."""
    wanted = [source for source in sources if source is not None]
    count = scores.shape[1]
    rows = []
    if isinstance(attachment, AttentionReader):
        attachment.samples = len(scores)
    for k in range(count):
        # a rule that calls `local` runs a node's backward a second time, for which the graph must not be freed
        keep = k + 1 < count or request.rule not in RULES.values()
        gradients = _gradients(scores, wanted, k, keep)
        _refuse_missing(gradients, request, fed)
        rows.append(attachment.maps(wanted) if isinstance(attachment, AttentionReader) else gradients)
    stacked = iter([_stacked(maps) for maps in zip(*rows, strict=True)])
    return tuple(None if source is None else next(stacked) for source in sources)


def _is_by_value(rule: Rule, is_inside: bool) -> bool:
    """Whether what a table carries back is relevance by value, which the input turns into relevance."""
    return rule.values == "input-times" or (rule.values == "relevance" and is_inside)


def _times(maps: torch.Tensor | None, source: torch.Tensor | None) -> torch.Tensor | None:
    """Multiply the maps of K targets, `(B, K, ...)`, by the input."""
    return None if maps is None or source is None else maps * source.detach().unsqueeze(1)


def _stacked(maps: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """Join the maps of K targets, `(B, K, ...)`; None for an input that none of them depends on."""
    if all(values is None for values in maps):
        return None
    like = next(values for values in maps if values is not None)
    whole = [torch.zeros_like(like) if values is None else values for values in maps]
    return torch.stack(whole, 1) if len(whole) > 1 else whole[0].unsqueeze(1)


def _gradients(scores: torch.Tensor, wanted: list[torch.Tensor], k: int, keep: bool) -> tuple[Any, ...]:
    """Return the gradient of the k-th scores by each input; None for one that they do not depend on."""
    try:
        with cudnn_errors_named():
            # of a sum, since to check a gradient that is passed in torch imports SymPy, which takes half a second
            return torch.autograd.grad(scores[:, k].sum(), wanted, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        nodes = nodes_behind(scores.grad_fn) if scores.grad_fn is not None else ()
        hidden = [n for n, kind in nodes if kind is NodeKind.HIDDEN and name_of(n) != "CopySlices"]
        if hidden:
            raise RuleError(f"no gradient passes {name_of(hidden[0])}: {hidden_reason(hidden[0])}") from error
        raise


def _refuse_missing(gradients: tuple[Any, ...], request: Request, fed: list[torch.Tensor]) -> None:
    """Refuse inputs without a gradient, where each must have one or none has, and gradients that are not numbers."""
    missing = [i for i, g in enumerate(gradients) if g is None]
    if missing and (request.is_plain or len(missing) == len(gradients)):
        floating = [i for i, x in enumerate(fed) if x.is_floating_point()]
        raise InputError(without_gradient(request, fed, floating[missing[0]]))
    if any(g is not None and bool(g.isnan().any()) for g in gradients):
        raise nan_gradient(request, fed)


def at_layer(request: Request, layer: str) -> list[tuple[ModelArguments, Request]]:
    """Return, for each call of a layer, its output as arguments, and the request to explain by them.

    Raises:
        InputError: there is no such layer, or it does not run.
    """
    calls = []
    for call, output in enumerate(layer_outputs(request, layer), call_number(layer) or 0):
        arguments = ModelArguments(output, (output,), {})
        inside = replace(
            request,
            inputs=arguments.tensors,
            around=from_layer(request, layer, call),
            fill=arguments.fill,
            structure=f"{layer}@{call}",
            is_plain=False,
            noun=f"the output of layer {layer!r}",
        )
        calls.append((arguments, inside))
    return calls


def scores(model: Callable[..., Any], x: torch.Tensor, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return to_numpy(class_scores(model, x, output).double())
