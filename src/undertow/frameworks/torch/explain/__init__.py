"""Maps under a rule, which acts on the autograd graph of one call, in swapped modules, or in backward hooks."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch

from ....inputs import ModelArguments
from ....outputs import Path
from ....rules import gradient
from ....tables import AttentionRule
from ...base import Request
from ...results import Explanation
from ..arrays import to_numpy
from ..calls import class_scores, refuse_training
from ..layers import call_number, channel_axis_by_sizes, from_layer, layer_outputs
from ..state import unchanged
from .attention import AttentionReader
from .graph import RuleAttachment, ThroughGraph
from .modules import ThroughHooks, ThroughSwap
from .passes import run_backward, run_forward

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
        kind = AttentionReader if isinstance(request.rule, AttentionRule) else THROUGH[request.through]
        attachment = None if request.rule is gradient else stack.enter_context(kind(request))
        forward = run_forward(request, stack, start, attachment)
        return run_backward(forward, request, attachment)


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
            channel_axis=channel_axis_by_sizes(request.model, layer, arguments.tensors[0].shape),
        )
        calls.append((arguments, inside))
    return calls


def scores(model: Callable[..., Any], x: torch.Tensor, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return to_numpy(class_scores(model, x, output).double())
