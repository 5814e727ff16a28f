"""One call of a network as a graph: its jaxpr with the bodies of `jax.jit` calls in the place of those calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from .internals import bind, body_of_call, body_of_custom, closed, scope_of

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
REMATERIALISED = frozenset(("checkpoint", "remat", "remat2"))
CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))
PASSING = frozenset(("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "copy", "pvary",
                     "pcast", "pbroadcast", "stop_gradient"))  # fmt: skip
CUTTING = frozenset(("stop_gradient", "floor", "ceil", "round", "sign", "nextafter"))
"""Operations whose derivative is zero everywhere, by definition or by intention."""
BODIES = {"scan": "jaxpr", "cond": "branches", **dict.fromkeys(REMATERIALISED, "jaxpr")}
"""Equations with bodies that are looked into, and the parameter that holds these."""
MAX_KNOWN = 1 << 16  # elements of a constant that is looked at


@dataclass(eq=False, slots=True)
class JaxprValue:
    """One value of a call.

    Attributes:
        aval: its shape and dtype.
        node: what made it; None for an argument or a constant.
        known: the constant itself, where it is one.
        outer: of the argument of a `custom_jvp` body, the operand that it stands for.
    """

    aval: Any
    node: "JaxprNode | None" = None
    known: Any = None
    outer: "JaxprValue | None" = None

    @property
    def is_float(self) -> bool:
        """Whether it has a derivative: a complex value has, as of a rotary embedding."""
        return bool(jnp.issubdtype(self.aval.dtype, jnp.inexact))


@dataclass(eq=False, slots=True)
class JaxprNode:
    """One equation, with the values that it reads and makes.

    Attributes:
        scope: the names around it, "block/Dense_0".
    """

    eqn: Any
    inputs: list[JaxprValue]
    outputs: list[JaxprValue]
    scope: str

    @property
    def name(self) -> str:
        return str(self.eqn.primitive.name)


@dataclass(frozen=True, eq=False)
class JaxprGraph:
    """A jaxpr as nodes in the order of execution.

    Attributes:
        arguments: the values of its constants and of its arguments.
    """

    nodes: list[JaxprNode]
    arguments: list[JaxprValue]
    outputs: list[JaxprValue]

    def run(
        self,
        values: Sequence[Any],
        replaced: Mapping[JaxprNode, Callable[["Environment"], list[Any]]] | None = None,
        given: Mapping[JaxprValue, Any] | None = None,
    ) -> "Environment":
        """Run every node on values for the arguments.

        Args:
            replaced: what to do in the place of some nodes.
            given: values that take the place of what nodes make.
        """
        environment = Environment(dict(zip(self.arguments, values, strict=True)))
        for node in self.nodes:
            if replaced is not None and node in replaced:
                results = replaced[node](environment)
            else:
                results = bind(node.eqn, [environment[value] for value in node.inputs], scope=node.scope)
            environment.values.update(zip(node.outputs, results, strict=True))
            if given is not None:
                environment.values.update((value, given[value]) for value in node.outputs if value in given)
        return environment


@dataclass(frozen=True)
class Environment:
    """What each value of a graph is in one run."""

    values: dict[JaxprValue, Any]

    def __getitem__(self, value: JaxprValue) -> Any:
        return self.values.get(value, value.known)

    def __contains__(self, value: JaxprValue) -> bool:
        return value in self.values


def graph_of(closed: ClosedJaxpr, known: Sequence[Any] | None = None, calls: frozenset[str] = CALLS) -> JaxprGraph:
    """Return a jaxpr as a graph whose arguments are its constants, then its own.

    Args:
        known: the value of each argument where it is a constant, else None.
        calls: equations in whose place their bodies are put.
    """
    jaxpr = closed.jaxpr
    constants = [JaxprValue(var.aval, known=_small(c)) for var, c in zip(jaxpr.constvars, closed.consts, strict=True)]
    known = known or [None] * len(jaxpr.invars)
    arguments = [JaxprValue(var.aval, known=k) for var, k in zip(jaxpr.invars, known, strict=True)]
    nodes: list[JaxprNode] = []
    outputs = _flatten(jaxpr, constants, arguments, nodes, "", calls)
    return JaxprGraph(nodes, constants + arguments, outputs)


def body_graph(node: JaxprNode) -> JaxprGraph:
    """Return the body of a `custom_jvp` or `custom_vjp` call; its arguments know the operands they stand for."""
    body = body_of_custom(node.eqn)
    pairs = zip(body.jaxpr.invars, node.inputs, strict=True)
    arguments = [JaxprValue(var.aval, known=operand.known, outer=operand) for var, operand in pairs]
    constants = [JaxprValue(v.aval, known=c) for v, c in zip(body.jaxpr.constvars, body.consts, strict=True)]
    nodes: list[JaxprNode] = []
    outputs = _flatten(body.jaxpr, constants, arguments, nodes, node.scope)
    return JaxprGraph(nodes, constants + arguments, outputs)


def _small(constant: Any) -> Any:
    return constant if np.size(constant) <= MAX_KNOWN else None


def _flatten(
    jaxpr: Any,
    constants: list[JaxprValue],
    arguments: list[JaxprValue],
    nodes: list[JaxprNode],
    scope: str,
    calls: frozenset[str] = CALLS,
) -> list[JaxprValue]:
    """Append a jaxpr's equations to `nodes`; return its outputs. A body that two calls share becomes two bodies."""
    values = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> JaxprValue:
        return JaxprValue(atom.aval, known=atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = "/".join(filter(None, (scope, scope_of(eqn))))
        if eqn.primitive.name in calls:
            body = (body_of_custom if eqn.primitive.name in CUSTOM else body_of_call)(eqn)
            captured = [JaxprValue(v.aval, known=c) for v, c in zip(body.jaxpr.constvars, body.consts, strict=True)]
            outputs = _flatten(body.jaxpr, captured, inputs, nodes, inner, calls)
        else:
            node = JaxprNode(eqn, inputs, [], inner)
            outputs = node.outputs = [JaxprValue(var.aval, node) for var in eqn.outvars]
            nodes.append(node)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def uniform(value: JaxprValue) -> Any:
    """Return the number that fills a value which is known while tracing; None where there is none.

    >>> import jax
    >>> graph = graph_of(jax.make_jaxpr(lambda x: jnp.maximum(x, jnp.zeros_like(x)))(jnp.ones(3)))
    >>> [uniform(v) for v in graph.nodes[-1].inputs]
    [None, 0.0]
    """
    while value.known is None:
        if value.outer is not None:
            value = value.outer
        elif value.node is not None and value.node.name in PASSING:
            value = value.node.inputs[0]
        else:
            return None
    if isinstance(value.known, jax.core.Tracer) or not 0 < np.size(value.known) <= MAX_KNOWN:
        return None
    array = np.asarray(value.known)
    if not np.issubdtype(array.dtype, np.number) and array.dtype != jnp.bfloat16:
        return None
    first = array.flat[0]
    return float(first) if (array == first).all() else None


@dataclass(frozen=True)
class Route:
    """Where a gradient goes.

    Attributes:
        live: values that depend on the inputs by a derivative.
        nodes: those through which a gradient comes from the outputs to the inputs.
        wanted: values that such a gradient reaches.
    """

    live: frozenset[JaxprValue]
    nodes: frozenset[JaxprNode]
    wanted: frozenset[JaxprValue]


def route(nodes: Sequence[JaxprNode], inputs: Iterable[JaxprValue], outputs: Iterable[JaxprValue]) -> Route:
    """Find the way of a gradient from outputs to inputs."""
    live = _live(nodes, inputs)
    wanted, on_way = {value for value in outputs if value in live}, set()
    for node in reversed(nodes):
        if node.name not in CUTTING and not wanted.isdisjoint(node.outputs):
            on_way.add(node)
            wanted.update(value for value in node.inputs if value in live)
    return Route(frozenset(live), frozenset(on_way), frozenset(wanted))


def _live(nodes: Sequence[JaxprNode], inputs: Iterable[JaxprValue]) -> set[JaxprValue]:
    """Return all values that depend on inputs by a derivative."""
    live = {value for value in inputs if value.is_float}
    for node in nodes:
        if not live.isdisjoint(node.inputs):
            _, made = flow(node, [value in live for value in node.inputs])
            live.update(value for value, is_live in zip(node.outputs, made, strict=True) if is_live)
    return live


def bodies_of(node: JaxprNode) -> tuple[ClosedJaxpr, ...]:
    """Return the bodies of a node of `BODIES`: one, or one for each branch."""
    body = node.eqn.params[BODIES[node.name]]
    return tuple(map(closed, body if isinstance(body, tuple) else (body,)))


def flow(node: JaxprNode, is_live: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Return which arguments of a node's body and which of its outputs depend on those of its operands that are live.

    What a loop carries is live where it is so at any of its steps: a counter beside it is not.
    """
    if node.name not in BODIES:
        return [], [node.name not in CUTTING and any(is_live) and value.is_float for value in node.outputs]
    arguments = list(is_live[1:] if node.name == "cond" else is_live)
    while True:
        outputs = [False] * len(node.outputs)
        for body in bodies_of(node):
            graph = graph_of(body)
            own = graph.arguments[len(graph.arguments) - len(arguments) :]
            live = _live(graph.nodes, [value for value, is_one in zip(own, arguments, strict=True) if is_one])
            outputs = [was or value in live for was, value in zip(outputs, graph.outputs, strict=True)]
        if node.name != "scan":
            return arguments, outputs
        at, count = node.eqn.params["num_consts"], node.eqn.params["num_carry"]
        carried = [a or b for a, b in zip(arguments[at : at + count], outputs[:count], strict=True)]
        if carried == arguments[at : at + count]:
            return arguments, carried + outputs[count:]
        arguments[at : at + count] = carried


def behind(outputs: Iterable[JaxprValue]) -> Iterator[JaxprNode]:
    """Yield every node that values depend on, by a derivative or not, each once."""
    remaining, seen = [value.node for value in outputs], set[JaxprNode]()
    while remaining:
        node = remaining.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            remaining += [value.node for value in node.inputs]
