"""Maps under a rule, which acts on the autograd graph of one call, in swapped modules, or in backward hooks."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy.typing as npt
import torch

from ....errors import InputError, RuleError
from ....rules import RULES, gradient
from ...base import Request
from ...results import Explanation, RewiringStats
from ..arrays import to_numpy
from ..calls import class_scores, eager, leaves_and_copies, output_of, refuse_training, target_scores
from ..nodes import NodeKind, hidden_reason, name_of, nodes_behind
from ..state import unchanged
from .graph import RuleAttachment, ThroughGraph, rewired_backward
from .modules import ThroughHooks, ThroughSwap

THROUGH: dict[str, type[RuleAttachment]] = {"graph": ThroughGraph, "swap": ThroughSwap, "hook": ThroughHooks}


def explain(request: Request) -> Explanation:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    if not request.training:
        refuse_training(request.model)
    with unchanged(request.model, request.inputs, request.training), ExitStack() as stack:
        sources, fed = leaves_and_copies(request.inputs)
        plain = request.rule is gradient
        attachment = None if plain else stack.enter_context(THROUGH[request.through](request))
        output = output_of(eager(request.model) if attachment is None else attachment.network, fed)
        scores, ids, single = target_scores(output, request.target, len(fed[0]))
        if scores.grad_fn is None:
            raise InputError("the scores do not depend on x by any gradient (detached, or made under no_grad)")
        if attachment is not None:
            stack.enter_context(rewired_backward(scores.grad_fn, attachment))
        maps = _maps(scores, sources, request)
        detached = scores.detach()
    if single:
        maps = tuple(None if m is None else m[:, 0] for m in maps)
        detached, ids = detached[:, 0], None if ids is None else ids[:, 0]
    return Explanation(maps, ids, detached, RewiringStats() if attachment is None else attachment.stats)


def _maps(scores: torch.Tensor, sources: list[torch.Tensor | None], request: Request) -> tuple[Any, ...]:
    """Return, for each input, a map for each target: `(B, K, ...)`."""
    wanted = [source for source in sources if source is not None]
    count = scores.shape[1]
    rows = []
    for k in range(count):
        ones = torch.zeros_like(scores)
        ones[:, k] = 1
        # a rule that calls `local` runs a node's backward a second time, for which the graph must not be freed
        keep = k + 1 < count or request.rule not in RULES.values()
        rows.append(_gradients(scores, wanted, ones, keep))
    stacked = iter([torch.stack(maps, 1) if count > 1 else maps[0].unsqueeze(1) for maps in zip(*rows, strict=True)])
    return tuple(None if source is None else next(stacked) for source in sources)


def _gradients(scores: torch.Tensor, wanted: list[torch.Tensor], ones: torch.Tensor, keep: bool) -> tuple[Any, ...]:
    try:
        gradients = torch.autograd.grad(scores, wanted, ones, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        nodes = nodes_behind(scores.grad_fn) if scores.grad_fn is not None else ()
        hidden = [n for n, kind in nodes if kind is NodeKind.HIDDEN and name_of(n) != "CopySlices"]
        if hidden:
            raise RuleError(f"no gradient passes {name_of(hidden[0])}: {hidden_reason(hidden[0])}") from error
        raise
    for i, g in enumerate(gradients):
        if g is None:
            raise InputError(f"input {i} does not influence the scores; bind it, as with functools.partial")
    return gradients


def probabilities(model: Callable[..., Any], x: torch.Tensor) -> npt.NDArray[Any]:
    """Return the softmax of the model's scores, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return to_numpy(class_scores(model, x).double().softmax(1))
