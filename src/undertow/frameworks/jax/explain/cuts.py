"""Why an input has no gradient, and where a gradient becomes NaN."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ....errors import InputError, ModelError
from ...base import Request
from ..graph import CUTTING, Environment, JaxprNode, JaxprValue, Route, behind, route
from ..internals import bind
from .program import TracedCall


def without_gradient(request: Request, call: TracedCall, i: int) -> InputError:
    """Return the error for an input that no gradient comes to."""
    scores, x = call.scores(request.head), call.inputs[i]
    nodes = list(behind([scores]))
    if x is not scores and not any(x in node.inputs for node in nodes):
        return InputError(f"{request.describe(i)} does not influence the scores; bind it, as with functools.partial")
    cuts = _cuts(nodes, route(call.graph.nodes, [x], [scores]))
    where = f"{_described(cuts[0])}" if cuts else "an operation without a derivative"
    return InputError(f"the gradient of the scores does not reach {request.describe(i)}: it ends at {where}")


def _cuts(nodes: Sequence[JaxprNode], way: Route) -> list[JaxprNode]:
    """Return the nodes that read what depends on an input and make what does not."""
    ends = [n for n in nodes if not way.live.isdisjoint(n.inputs) and way.live.isdisjoint(n.outputs)]
    return sorted(ends, key=lambda node: node.name not in CUTTING)


def _described(node: JaxprNode) -> str:
    return f"{node.name}{f' in {node.scope!r}' if node.scope else ''}"


def nan_gradient(request: Request, call: TracedCall, values: Sequence[Any]) -> ModelError:
    """Return the error for a gradient that is no number."""
    return ModelError(
        f"the scores are finite and their gradient is NaN, first at {_first_nan(request, call, values)}; look for a "
        "root, a norm or a logarithm at zero there"
    )


def _first_nan(request: Request, call: TracedCall, values: Sequence[Any]) -> str:
    """Name the first operation whose derivative makes NaN, by going back through the plain gradient step by step."""
    scores = call.scores(request.head)
    environment = call.graph.run(values)
    way = route(call.graph.nodes, call.inputs, [scores])
    gradients: dict[JaxprValue, Any] = {scores: jnp.ones_like(environment[scores])}
    for node in reversed(call.graph.nodes):
        if node not in way.nodes:
            continue
        for value, g in _pulled(node, way, environment, gradients):
            if bool(jnp.isnan(g).any()):
                return _described(node)
            gradients[value] = gradients[value] + g if value in gradients else g
    return f"the rule {request.rule_name!r}"


def _pulled(
    node: JaxprNode, way: Route, environment: Environment, gradients: dict[JaxprValue, Any]
) -> list[tuple[JaxprValue, Any]]:
    wanted = [value for value in dict.fromkeys(node.inputs) if value in way.live]
    made = [i for i, value in enumerate(node.outputs) if value in gradients]

    def again(*moved: Any) -> list[Any]:
        inner = Environment({**environment.values, **dict(zip(wanted, moved, strict=True))})
        results = bind(node.eqn, [inner[value] for value in node.inputs], scope=node.scope)
        return [results[i] for i in made]

    _, pull = jax.vjp(again, *(environment[value] for value in wanted))
    return list(zip(wanted, pull([gradients[node.outputs[i]] for i in made]), strict=True)) if made else []
