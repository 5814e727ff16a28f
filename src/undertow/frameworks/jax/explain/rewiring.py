"""How a rule acts on one call: the call's equations are run again as they are, but for its activations, each of which
becomes a `jax.custom_vjp` around its own equations. Loops, branches and rematerialised blocks are rebuilt around a
body in which the same was done. The network itself is not touched.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from ....errors import RuleError
from ....rules import relu
from ....tables import ActivationRule
from ...base import Request
from ...results import RewiringStats
from ..graph import BODIES, CUSTOM, Environment, JaxprGraph, JaxprNode, JaxprValue, Route, graph_of, route
from ..internals import bind, body_of_custom, closed, function_name, is_of_jax
from ..patterns import ACTIVATIONS, JaxKind, PatternMatch, matches
from .bodies import Runner, rebuilt

for _kind in (jax.Array, jax.core.Tracer):
    relu.register(_kind, lambda g: jnp.maximum(g, 0))

WANTED_KINDS = {"relu-like": frozenset((JaxKind.RELU,)), "all": frozenset((JaxKind.RELU, JaxKind.SMOOTH))}
_KERNEL = "a kernel keeps its operations to itself; write that part with jax.numpy"
_CALLBACK = "a callback runs Python that no jaxpr shows; write it with jax.numpy"
UNSEEN = {
    **dict.fromkeys(("pallas_call", "tpu_custom_call", "triton_kernel_call", "custom_call", "ffi_call"), _KERNEL),
    **dict.fromkeys(("pure_callback", "io_callback", "host_callback"), _CALLBACK),
    "while": "JAX has no gradient of a while loop whose number of steps is not fixed; use lax.scan, or lax.fori_loop "
    "with fixed bounds",
}
_BOUNDS = {"max": "Maximum", "min": "Minimum", "clamp": "Clamp"}

_SMOOTH = frozenset(name for name, kind, _ in ACTIVATIONS if kind is JaxKind.SMOOTH)


def refuse_unseen(nodes: Sequence[JaxprNode], way: Route) -> None:
    """Refuse equations on a gradient's way that no gradient passes, whatever the rule.

    Raises:
        RuleError: naming the first one.
    """
    for node in nodes:
        if node in way.nodes and node.name in ("while", "pure_callback", "io_callback"):
            raise RuleError(f"no gradient passes {named(node)}: {UNSEEN[node.name]}")


class NothingRewired(RuleError):
    """There was no activation for a rule to act on."""


class JaxprRewiring:
    """A rule on the activations of one call, and the counts of what it met between the scores and the inputs."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stats = RewiringStats()
        self._wanted = WANTED_KINDS[request.activations]
        self._skipped: Counter[str] = Counter()
        self._opaque: Counter[str] = Counter()

    def runner(self, graph: JaxprGraph, inputs: Sequence[JaxprValue], outputs: Sequence[JaxprValue]) -> Runner:
        """Return a function of a graph's arguments to the outputs, whose gradient follows the rule.

        Raises:
            RuleError: an equation on the way cannot be seen into, or there is nothing to rewire.
        """
        run = self._runner(graph, route(graph.nodes, inputs, outputs), outputs, 1)
        self.stats.skipped, self.stats.opaque = dict(self._skipped), dict(self._opaque)
        if not self.stats.rewired:
            raise NothingRewired(self._nothing_rewired())
        return run

    def _runner(self, graph: JaxprGraph, way: Route, outputs: Sequence[JaxprValue], times: int) -> Runner:
        """Args: times: how often the graph runs in one call, as the body of a loop."""
        replaced: dict[JaxprNode, Callable[[Environment], list[Any]]] = {}
        parts: set[JaxprNode] = set()
        for root, match in matches(graph, way).items():
            parts.update(match.nodes)
            if match.kind in self._wanted:
                self.stats.rewired += times
                replaced[root] = self._activation(match)
            else:
                self._skipped[match.name] += times
        for node in graph.nodes:
            if node in way.nodes and node not in parts:
                body = self._beside_activations(node, way, times)
                if body is not None:
                    replaced[node] = body

        def run(*values: Any) -> list[Any]:
            environment = graph.run(values, replaced)
            return [environment[value] for value in outputs]

        return run

    def _beside_activations(self, node: JaxprNode, way: Route, times: int) -> Callable[[Environment], list[Any]] | None:
        """Count, refuse or rebuild a node that is no part of an activation."""
        if node.name in UNSEEN:
            raise self._refusal(node, UNSEEN[node.name])
        if node.name in BODIES:
            return rebuilt(node, way, times, self._runner)
        if node.name in CUSTOM:
            self._count_custom(node, way, times)
        elif node.name == "reduce_window_max":
            self.stats.switches += times
        elif node.name in _BOUNDS:
            if any(value in way.live for value in node.inputs):
                self._skipped[_BOUNDS[node.name]] += times
        elif node.name == "select_n":
            if _depends(node.inputs[0], way):
                self._skipped["Where"] += times
        elif any(map(_has_activations, jaxprs_in_params(node.eqn.params))):
            raise self._refusal(node, "its body has activations, and this kind of equation is not known here")
        return None

    def _count_custom(self, node: JaxprNode, way: Route, times: int) -> None:
        """Count a function with a derivative of its own; JAX's own functions are no activations unless listed as such.

        Raises:
            RuleError: there are activations in it, or what cannot be seen into: the rule would not act there.
        """
        body = body_of_custom(node.eqn)
        if is_of_jax(body.jaxpr):
            return
        name = function_name(body.jaxpr)
        if _has_activations(body.jaxpr):
            raise self._refusal(node, "its derivative is its own, and activations are in it; leave that derivative out")
        self._opaque[name] += times

    def _refusal(self, node: JaxprNode, reason: str) -> RuleError:
        return RuleError(f"rule {self.request.rule_name!r} cannot see into {named(node)}: {reason}")

    def _activation(self, match: PatternMatch) -> Callable[[Environment], list[Any]]:
        """Return what runs an activation with the rule for its derivative."""
        made = {value for node in match.nodes for value in node.outputs}
        read = dict.fromkeys(value for node in match.nodes for value in node.inputs)
        read.pop(match.x)
        rule, output = self.request.activation_rule, match.root.outputs[0]

        def run(environment: Environment) -> list[Any]:
            # all that the body of a loop reads must be an argument: a constant would be taken out of the loop
            others = [value for value in read if value not in made and value in environment]

            def forward(x: Any, *rest: Any) -> Any:
                inner = Environment({match.x: x, **dict(zip(others, rest, strict=True))})
                for node in match.nodes:
                    results = bind(node.eqn, [inner[value] for value in node.inputs], scope=node.scope)
                    inner.values.update(zip(node.outputs, results, strict=True))
                return inner[output]

            def backward(saved: Any, g: Any) -> Any:
                x, *rest = saved
                _, pull = jax.vjp(lambda value: forward(value, *rest), x)
                return apply_rule(rule, g, lambda h: pull(h)[0]), *[None] * len(rest)

            activation = jax.custom_vjp(forward)
            activation.defvjp(lambda *arguments: (forward(*arguments), arguments), backward)
            return [activation(*(environment[value] for value in (match.x, *others)))]

        return run

    def _nothing_rewired(self) -> str:
        left_alone = {**self.stats.skipped, **self.stats.opaque}
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(left_alone.items())) or "none"
        remedies = ["rule='gradient' needs none"]
        if self.request.activations != "all" and not _SMOOTH.isdisjoint(left_alone):
            remedies.insert(0, "activations='all' takes the smooth ones too")
        return (
            f"rule {self.request.rule_name!r} found no activation to rewire between the input and the scores "
            f"(met: {listed}); {'; '.join(remedies)}"
        )


def named(node: JaxprNode) -> str:
    """Name an equation in a message."""
    name = str(node.eqn.params.get("name_and_src_info", "") or node.eqn.params.get("name", ""))
    return f"{node.name}{f' {name}' if name else ''}{f' in {node.scope!r}' if node.scope else ''}"


def _depends(value: JaxprValue, way: Route) -> bool:
    """Whether a condition depends on the network's input."""
    remaining, seen = [value], set[JaxprValue]()
    while remaining:
        current = remaining.pop()
        if current in way.live:
            return True
        if current.node is not None and current not in seen:
            seen.add(current)
            remaining += current.node.inputs
    return False


def _has_activations(jaxpr: Any) -> bool:
    """Whether there is an activation in a body, or what cannot be seen into, where all its arguments are live."""
    whole = closed(jaxpr)
    graph = graph_of(whole)
    way = route(graph.nodes, graph.arguments, graph.outputs)
    if any(match.kind is not JaxKind.OTHER for match in matches(graph, way).values()):
        return True
    nodes = [node for node in graph.nodes if node in way.nodes]
    return any(node.name in UNSEEN or any(map(_has_activations, jaxprs_in_params(node.eqn.params))) for node in nodes)


def apply_rule(rule: ActivationRule, g: Any, local: Callable[[Any], Any]) -> Any:
    """Return `rule(g, local)`.

    Raises:
        RuleError: the rule gave no array of the shape and dtype of `g`, or gave `local` none.
    """

    def checked(did: str, new: Any) -> Any:
        if isinstance(new, jax.Array) and new.shape == g.shape and new.dtype == g.dtype:
            return new
        what = f"{new.shape} {new.dtype}" if isinstance(new, jax.Array) else f"a {type(new).__name__}"
        name = getattr(rule, "__name__", type(rule).__name__)
        raise RuleError(f"rule {name!r} {did} {what} where the gradient is {g.shape} {g.dtype}")

    return checked("returned", rule(g, lambda h: local(checked("gave local", h))))
