"""One forward pass, and the backward passes over its graph: one for each target, and for each rule that shares it."""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....errors import InputError, RuleError
from ....rules import RULES
from ....tables import Rule
from ...base import Request
from ...results import Explanation, RewiringStats
from ..batch_norm import readable_by_batch_norm
from ..calls import eager, has_channels_last, leaves_and_copies
from ..heads import run_to_scores
from ..nodes import NodeKind, hidden_reason, name_of, nodes_behind
from ..state import RngAndBuffers
from ..targets import target_scores, with_function
from .acting import what_acts
from .attention import AttentionReader
from .cuts import cudnn_errors_named, nan_gradient, no_gradient, without_gradient
from .graph import RuleAttachment, rewired_backward


@dataclass(frozen=True)
class ForwardGraph:
    """The graph of one call.

    Attributes:
        request: what was run, its target a function of the output where that is one.
        scores: `(B, K)`, the explained ones.
        targets: class ids, `(B, K)`; None where the target is a function.
        single: there is one target a sample, and results have no axis for it.
        sources: the leaves to differentiate by; None for integers.
        fed: what the model was given.
        acting: random operations and batch norms in training that acted.
        head: the softmax or sigmoid that the model ends in.
    """

    request: Request
    scores: torch.Tensor
    targets: torch.Tensor | None
    single: bool
    sources: list[torch.Tensor | None]
    fed: list[torch.Tensor]
    acting: dict[str, int]
    head: str


def run_forward(
    request: Request, stack: ExitStack, start: RngAndBuffers, attachment: RuleAttachment | None
) -> ForwardGraph:
    """Run the model, through an attachment if there is one.

    Args:
        stack: of what remains until the backward passes are over.
        start: the state before.

    Raises:
        InputError, ModelError, TargetError: as `undertow.explain` says.
    """
    sources, fed = leaves_and_copies(request.inputs, request.is_plain)
    network = eager(request.model) if attachment is None else attachment.network
    request = with_function(request, network, stack)
    with nullcontext() if attachment is None else attachment.forward():
        output, path, head = run_to_scores(request, fed, network)
        scores, ids, single = target_scores(output, request.target, request.batch, path)
    if scores.grad_fn is None:
        raise no_gradient(request, fed)
    return ForwardGraph(request, scores, ids, single, sources, fed, what_acts(request, scores.grad_fn, start), head)


def run_backward(
    forward: ForwardGraph, request: Request, attachment: RuleAttachment | None, keep: bool = False
) -> Explanation:
    """Run a backward pass for each target.

    Args:
        request: as in `forward`, perhaps with another rule.
        attachment: of the rule; None for the plain gradient.
        keep: whether others follow over the same graph.

    Raises:
        InputError, RuleError: as `undertow.explain` says.
    """
    scores, sources = forward.scores, forward.sources
    request = replace(forward.request, rule=request.rule, rule_name=request.rule_name)
    root = scores.grad_fn
    assert root is not None
    with readable_by_batch_norm(root), nullcontext() if attachment is None else rewired_backward(root, attachment):
        maps = _maps(forward, request, attachment, keep)
    if isinstance(request.rule, Rule) and _is_by_value(request.rule, request.is_inside):
        maps = tuple(_times(m, source) for m, source in zip(maps, sources, strict=True))
    detached, ids = scores.detach(), forward.targets
    if forward.single:
        maps = tuple(None if m is None else m[:, 0] for m in maps)
        detached, ids = detached[:, 0], None if ids is None else ids[:, 0]
    stats = RewiringStats() if attachment is None else attachment.stats
    channels_last = has_channels_last(request.model)
    return Explanation(maps, ids, detached, stats, channels_last, forward.acting, forward.head)


def _maps(forward: ForwardGraph, request: Request, attachment: RuleAttachment | None, keep: bool) -> tuple[Any, ...]:
    """Return, for each input, a map for each target: `(B, K, ...)`.

    Beside the graph there is no more at any time than these maps and one gradient.
    """
    scores, wanted = forward.scores, [source for source in forward.sources if source is not None]
    count = scores.shape[1]
    compares = isinstance(request.rule, Rule) and request.rule.values == "difference"
    explained = scores[: len(scores) // 2] if compares else scores  # the baseline's own scores are not
    whole: list[torch.Tensor | None] = [None] * len(wanted)
    if isinstance(attachment, AttentionReader):
        attachment.samples = len(scores)
    for k in range(count):
        # a rule that calls `local` runs a node's backward a second time, for which the graph must not be freed
        keep_graph = keep or k + 1 < count or request.rule not in RULES.values()
        gradients = _gradients(explained, wanted, k, keep_graph)
        _refuse_missing(gradients, request, forward.fed)
        maps = attachment.maps(wanted) if isinstance(attachment, AttentionReader) else gradients
        for i, g in enumerate(maps):
            whole[i] = whole[i] if g is None else _put(whole[i], g, k, count)
    stacked = iter(whole)
    return tuple(None if source is None else next(stacked) for source in forward.sources)


def _put(whole: torch.Tensor | None, g: torch.Tensor, k: int, count: int) -> torch.Tensor:
    """Put the map of the k-th target among all, `(B, K, ...)`; those of targets without a gradient are zero."""
    if count == 1:
        return g.unsqueeze(1)
    if whole is None:
        whole = g.new_zeros((len(g), count, *g.shape[1:]))
    whole[:, k] = g
    return whole


def _is_by_value(rule: Rule, is_inside: bool) -> bool:
    """Whether what a table carries back is relevance by value, which the input turns into relevance."""
    return rule.values == "input-times" or (rule.values == "relevance" and is_inside)


def _times(maps: torch.Tensor | None, source: torch.Tensor | None) -> torch.Tensor | None:
    """Multiply the maps of K targets, `(B, K, ...)`, by the input."""
    return None if maps is None or source is None else maps * source.detach().unsqueeze(1)


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
