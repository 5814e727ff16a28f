"""Several rules for activations over the graph of one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext

from ....rules import gradient
from ....tables import AttentionRule, Rule
from ...base import Request
from ...results import Explanation
from ..calls import refuse_training
from ..state import unchanged
from .graph import ThroughGraph
from .passes import run_backward, run_forward


def can_share(requests: Sequence[Request]) -> bool:
    """Whether one forward pass serves all: a table and attention note what they need in a pass of their own."""
    return all(r.through == "graph" and not isinstance(r.rule, Rule | AttentionRule) for r in requests)


def explain_rules(requests: Sequence[Request]) -> Iterator[Explanation]:
    """Explain requests that differ in their rule alone, which `can_share`, in order; errors as of `explain`."""
    first = requests[0]
    if not first.training:
        refuse_training(first.model)
    with unchanged(first.model, first.inputs, first.training) as start, ExitStack() as stack:
        forward = run_forward(first, stack, start, None)
        for request in requests:
            with nullcontext() if request.rule is gradient else ThroughGraph(request) as attachment:
                yield run_backward(forward, request, attachment, keep=request is not requests[-1])
