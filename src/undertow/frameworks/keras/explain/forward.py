"""The forward pass of one explanation while it is traced: the scores to explain, and what is known of them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from ....errors import InputError
from ....outputs import head_of
from ....targets import Unit
from ...base import AS_IS, Request
from ..calls import run, scores_of
from ..outputs import recorded_outputs
from ..targets import Chosen, chosen_scores, unit_scores
from .acting import what_acts
from .heads import before_head

_WRITING_OPS = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "ResourceScatterUpdate")


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass in the graph that is being traced.

    Attributes:
        chosen: the scores to explain.
        classes: how many scores the model gives; None where the target is none of classes.
        head: the softmax or sigmoid that the model ends in; "" where it does not, or the target is a function.
        acting: what acts in it as in training, by name and how often.
        operations: of the graph, in the order of their creation.
        writes: it writes variables.
    """

    chosen: Chosen
    classes: int | None
    head: str
    acting: dict[str, int]
    operations: Sequence[Any]
    writes: bool


def run_forward(
    request: Request,
    network: Callable[..., Any],
    sources: Sequence[Any],
    choose: Callable[[Any], Chosen] | None = None,
    ids: Any = None,
) -> Forward:
    """Run a network in the graph that is being traced.

    Args:
        sources: the tensors that it is a function of.
        choose: from the scores, before a head, to those that are explained; None: those of the request's target.
        ids: `(B, K)` where the target is class ids, else None.

    Raises:
        ModelError, TargetError: as `undertow.explain` says.
    """
    unit = request.target if isinstance(request.target, Unit) and choose is None else None
    outputs: dict[str, Any] = {}
    with nullcontext() if unit is None else recorded_outputs(network, [unit.layer], outputs):
        output, head = run(request.around(network), *request.fill(sources), request.training), ""
    if unit is not None:
        output = unit_scores(unit, network, outputs)
    elif callable(request.target) and choose is None:
        output = output if request.output is None else head_of(output, request.output)
    else:
        output = scores_of(output, request.output)
        before, head = before_head(output)
        output = output if request.head == AS_IS else before
    target = request.target if unit is None else _as_it_is
    chosen = choose(output) if choose else chosen_scores(output, target, ids, request.batch)
    acting = what_acts([begin for begin, _ in chosen.columns], request.training)
    operations = tf.compat.v1.get_default_graph().get_operations()
    classes = None if chosen.ids is None else output.shape[1]
    writes = any(op.type in _WRITING_OPS for op in operations)
    return Forward(chosen, classes, head, acting, operations, writes)


def _as_it_is(scores: Any) -> Any:
    return scores


def maps_of(columns: Sequence[tuple[Any, Any]], sources: Sequence[Any]) -> list[Any]:
    """Return, for each input of floating point, a map for each target: `(B, K, ...)`.

    Raises:
        InputError: an input has none.
    """
    wanted = [source for source in sources if source.dtype.is_floating]
    rows = [tf.gradients(scores, wanted, grad_ys=begin) for scores, begin in columns]
    if all(values is None for values in rows[0]) and len(sources) == 1:
        raise InputError("the scores do not depend on x by any gradient (tf.stop_gradient, or rounding, on the way)")
    for index, source in enumerate(sources):
        if source.dtype.is_floating and rows[0][[s is source for s in wanted].index(True)] is None:
            raise InputError(f"input {index} does not influence the scores; bind it, as with functools.partial")
    return [tf.stack([tf.convert_to_tensor(values) for values in maps], 1) for maps in zip(*rows, strict=True)]
