"""Loops, branches and rematerialised blocks on a gradient's way, run again around a body in which a rule acts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from ..graph import (
    BODIES,
    Environment,
    JaxprGraph,
    JaxprNode,
    JaxprValue,
    Route,
    bodies_of,
    flow,
    graph_of,
    route,
    uniform,
)
from ..internals import bind

Runner = Callable[..., list[Any]]
MakeRunner = Callable[[JaxprGraph, Route, Sequence[JaxprValue], int], Runner]
"""From a graph, the way in it, its outputs and how often it runs in one call, to what runs it under a rule."""


def rebuilt(node: JaxprNode, way: Route, times: int, make_runner: MakeRunner) -> Callable[[Environment], list[Any]]:
    """Return what runs a node of `BODIES` with a rule in its body.

    Args:
        times: how often the node runs in one call.
    """
    params, key = dict(node.eqn.params), BODIES[node.name]
    operands = node.inputs[1:] if node.name == "cond" else node.inputs
    live, _ = flow(node, [value in way.live for value in node.inputs])
    known = [uniform(value) for value in operands]
    if node.name == "scan":  # a carry does not keep its first value; slices are not known
        known = known[: params["num_consts"]] + [None] * (len(known) - params["num_consts"])
        times *= params["length"]
    originals = params[key] if isinstance(params[key], tuple) else (params[key],)
    new_bodies, constants = _sharing_constants(
        [_rebuilt_body(body, live, known, times, make_runner) for body in bodies_of(node)]
    )
    jaxprs = tuple(
        new if isinstance(old, ClosedJaxpr) else new.jaxpr for new, old in zip(new_bodies, originals, strict=True)
    )
    params[key] = jaxprs if isinstance(params[key], tuple) else jaxprs[0]
    if node.name == "scan":
        params["num_consts"] += len(constants)
        if "linear" in params:  # of earlier versions
            params["linear"] = (False,) * len(constants) + tuple(params["linear"])

    def run(environment: Environment) -> list[Any]:
        values = [environment[value] for value in node.inputs]
        at = 1 if node.name == "cond" else 0
        return bind(node.eqn, [*values[:at], *constants, *values[at:]], params, node.scope)

    return run


def _rebuilt_body(
    body: ClosedJaxpr, live: Sequence[bool], known: Sequence[Any], times: int, make_runner: MakeRunner
) -> ClosedJaxpr:
    constants = [
        None if number is None else np.full((), number, aval.dtype)
        for number, aval in zip(known, body.in_avals, strict=True)
    ]
    graph = graph_of(body, constants)
    own = graph.arguments[len(body.consts) :]
    way = route(graph.nodes, [v for v, is_live in zip(own, live, strict=True) if is_live], graph.outputs)
    run = make_runner(graph, way, graph.outputs, times)
    return jax.make_jaxpr(lambda *values: run(*body.consts, *values))(*_shapes(body.in_avals))


def _sharing_constants(bodies: Sequence[ClosedJaxpr]) -> tuple[list[ClosedJaxpr], list[Any]]:
    """Return bodies that take their constants as further arguments, before their own, and all of these constants."""
    constants = [constant for body in bodies for constant in body.consts]
    if not constants:
        return list(bodies), []
    shared, start = [], 0
    for body in bodies:
        own = slice(start, start + len(body.consts))

        def run(*values: Any, body: ClosedJaxpr = body, own: slice = own) -> list[Any]:
            return list(jax.core.eval_jaxpr(body.jaxpr, values[own], *values[len(constants) :]))

        shapes = [*_shapes([jax.typeof(c) for c in constants]), *_shapes(body.in_avals)]
        shared.append(jax.make_jaxpr(run)(*shapes))
        start = own.stop
    return shared, constants


def _shapes(avals: Sequence[Any]) -> list[Any]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
