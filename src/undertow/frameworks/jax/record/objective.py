"""The objective whose gradients are recorded where photographs are."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from ....errors import InputError
from ...base import Objective
from ..calls import watched
from ..graph import JaxprValue, graph_of, route
from ..marks import outputs_marked
from ..models import network_of
from ..modules import TRACE, library_of
from ..patterns import head_of_scores
from ..perturbing import PerturbedGraph
from ..places import unmarked
from ..targets import refuse_non_class_scores, scores_of
from .gradients import Watching, watching
from .probe import current
from .sites import frozen, placed


@contextmanager
def objective(model: Any, name: str) -> Iterator[Objective]:
    """Yield a function that runs a batch forward and backward, and gives what was seen to the probe that is open.

    It returns each sample's class, the one with the highest score or the label, and the score of that class.

    The objective is summed over the batch, so each sample's gradient is independent of the others; it is one of the
    scores before a final softmax or sigmoid.

    Args:
        name: "predicted", "label" or "loss", as in `undertow.recording.photographs`.

    Raises:
        InputError: the model is the trace of a function.
    """
    if library_of(model) == TRACE:
        raise InputError("a trace holds no weights to run; record photographs through a Flax, Equinox or Keras module")
    programs: dict[Any, Any] = {}

    def run(x: Any, labels: Sequence[int] | None) -> tuple[list[int], list[float]]:
        probe = current()
        key = (tuple(probe.modules), x.shape, labels is None)
        if key not in programs:
            programs[key] = _program(watching(model, key[0], probe.phases, ()), name, jnp.asarray(x), labels is None)
        ids, scores, seen = programs[key](jnp.asarray(x), None if labels is None else jnp.asarray(labels, jnp.int32))
        probe.add(seen)
        return ids.tolist(), [float(score) for score in scores]

    with frozen():
        yield run


def _program(what: Watching, name: str, x: Any, predicted: bool) -> Any:
    """Return a compiled function of a batch and its labels to classes, their scores, and what was seen."""
    with watched(what.model, what.names, outputs_marked):
        network = network_of(what.model).anew()
        closed = jax.make_jaxpr(lambda weights, x: scores_of(network.with_weights(weights)(x)))(network.weights, x)
    graph = graph_of(closed)
    head, before = head_of_scores(unmarked(graph.outputs[0]))
    refuse_non_class_scores(before.aval, len(x))
    # the layer that gives the head gives, as a site, what is explained
    last = [value.node for value in _marks(graph.outputs[0])] if head else []
    find = placed(what.names, "backward" in what.phases)
    places = [place for node in last if (place := find(node)) is not None]
    at = {before: places[-1]} if places else {}
    whole = PerturbedGraph(graph, lambda node: None if node in last else find(node), at)
    way = route(graph.nodes, [*graph.arguments[-1:], *itertools.chain(*whole.sources)], [before])
    reached = [not way.wanted.isdisjoint(values) and "backward" in what.phases for values in whole.sources]

    def summed(perturbations: Sequence[Any], weights: Any, x: Any, labels: Any) -> Any:
        remaining = iter(perturbations)
        given = [next(remaining) if is_one else None for is_one in reached]
        (scores,), taken = whole.run([*closed.consts, *weights, x], given, [before])
        ids = jnp.argmax(scores, 1) if predicted else labels
        of_class = jnp.take_along_axis(scores, ids[:, None], 1)[:, 0]
        value = -jax.nn.log_softmax(scores)[jnp.arange(len(ids)), ids].sum() if name == "loss" else of_class.sum()
        return value, (ids, of_class, taken)

    @jax.jit
    def program(weights: Any, x: Any, labels: Any) -> Any:
        zeros = [jnp.zeros(s.shape, s.dtype) for s, is_one in zip(whole.shapes, reached, strict=True) if is_one]
        (_, (ids, of_class, taken)), at_places = jax.value_and_grad(summed, has_aux=True)(zeros, weights, x, labels)
        return ids, of_class, what.seen(whole, taken, reached, at_places)

    return lambda x, labels: program(network.weights, x, labels)


def _marks(value: JaxprValue) -> Iterator[JaxprValue]:
    """Yield the marks on a value, the outermost first."""
    while value.node is not None and value.node.name == "undertow_mark":
        yield value
        value = value.node.inputs[0]
