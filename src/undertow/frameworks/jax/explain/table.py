"""How a rule that is a table acts on one call: its operations are run again, each under the row of its kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from jax.extend.core import jaxprs_in_params

from ....errors import RuleError
from ....rules import identity
from ....tables import FIRST, Local, Operation, Row, Rule
from ...base import Request
from ...results import RewiringStats
from ..graph import BODIES, CUSTOM, Environment, JaxprGraph, JaxprNode, JaxprValue, Route, graph_of, route
from ..internals import closed
from .bodies import Runner, rebuilt
from .operations import ruled
from .recognition import element, recognize
from .relevance import Beginning, beginning
from .rewiring import UNSEEN, NothingRewired, named
from .steps import JaxprSteps


class TableRewiring:
    """A table on the operations of one call, and the counts of what it met between the scores and the inputs."""

    def __init__(self, request: Request) -> None:
        self.stats = RewiringStats()
        self._table = cast(Rule, request.rule)
        self._gives_relevance = self._table.values == "relevance" and not request.is_inside
        self._skipped: Counter[str] = Counter()
        self._opaque: Counter[str] = Counter()

    def runner(self, graph: JaxprGraph, inputs: Sequence[JaxprValue], outputs: Sequence[JaxprValue]) -> Runner:
        """Return a function of a graph's arguments to the outputs, whose gradient follows the table.

        Raises:
            RuleError: an equation on the way cannot be seen into or, by a strict table, has no row, or there is nothing
                to rewire.
        """
        run = self._runner(graph, route(graph.nodes, inputs, outputs), outputs, 1, self._gives_relevance)
        self.stats.skipped, self.stats.opaque = dict(self._skipped), dict(self._opaque)
        if not self.stats.rewired:
            met = self._met()
            raise NothingRewired(
                f"rule {self._table.name!r} found no operation of its kinds ({', '.join(self._table.rows)}) between "
                f"the input and the scores{f' (met: {met})' if met else ''}; rule='gradient' needs none"
            )
        return run

    def _runner(
        self,
        graph: JaxprGraph,
        way: Route,
        outputs: Sequence[JaxprValue],
        times: int,
        begins: bool,
    ) -> Runner:
        """Args: begins: the first layers are here, which give relevance itself."""
        self._refuse_hidden(graph, way)
        steps = JaxprSteps(graph, way)
        found, rows = recognize(steps), self._table.rows
        for counts, more in ((self._skipped, found.unknown), (self._opaque, found.opaque)):
            counts.update({name: count * times for name, count in more.items()})
        self._refuse_unknown()
        layers = {operation.nodes[0] for operation in found.operations if operation.is_layer}
        start = beginning(graph, steps, layers) if begins else Beginning()
        replaced: dict[JaxprNode, Callable[[Environment], list[Any]]] = {
            step.root: ruled(element(step), _pass_relevance, self._table.name) for step in start.scales
        }
        for operation in found.operations:
            self.stats.switches += times * (operation.kind == "pool")
            row = rows.get(operation.kind)
            if operation.nodes[0] in start.layers and row is not None:
                row = rows.get(FIRST, _relevance_of(row))
            if operation.is_layer and rows.get("relu") is not identity:  # its zeros may then pass relevance
                operation = replace(operation, has_negative_output=True)
            if row is None or operation.nodes[-1] in replaced:
                continue
            self.stats.rewired += times
            if row is not identity or not operation.is_proportional:
                replaced[operation.nodes[-1]] = ruled(operation, row, self._table.name)
        for node in found.bodies:
            make_runner = partial(self._runner, begins=node in start.bodies)
            replaced[node] = rebuilt(node, way, times, make_runner)

        def run(*values: Any) -> list[Any]:
            environment = graph.run(values, replaced)
            return [environment[value] for value in outputs]

        return run

    def _met(self) -> str:
        return ", ".join(f"{name} x{n}" for name, n in {**self._skipped, **self._opaque}.items())

    def _refuse_unknown(self) -> None:
        """Refuse what a strict table has no row for.

        Raises:
            RuleError: naming all of it.
        """
        if self._table.strict and self._met():
            raise RuleError(
                f"rule {self._table.name!r} has no row for {self._met()} on the way; rule='attnlrp' passes what it "
                "does not know"
            )

    def _refuse_hidden(self, graph: JaxprGraph, way: Route) -> None:
        """Refuse what cannot be seen into, in the bodies of functions with a derivative of their own too.

        Raises:
            RuleError: naming the first one.
        """
        for node in graph.nodes:
            if node not in way.nodes:
                continue
            if (hidden := _hidden(node)) is not None:
                raise RuleError(f"rule {self._table.name!r} cannot see into {named(node)}: {UNSEEN[hidden]}")
            if node.name not in BODIES and node.name not in CUSTOM and any(len(b.nodes) > 1 for b in _bodies(node)):
                raise RuleError(
                    f"rule {self._table.name!r} cannot see into {named(node)}: its body has operations, and this kind "
                    "of equation is not known here"
                )


def _pass_relevance(g: Any, local: Local, op: Operation) -> Any:
    return g


def _relevance_of(row: Row) -> Row:
    """Return the row of a first layer that gives relevance, of one that gives relevance by value."""
    return lambda g, local, op: op.input * row(g, local, op)


def _bodies(node: JaxprNode) -> list[JaxprGraph]:
    return [graph_of(closed(body)) for body in jaxprs_in_params(node.eqn.params)]


def _hidden(node: JaxprNode) -> str | None:
    """Return the name of what cannot be seen into in a node."""
    if node.name in UNSEEN:
        return node.name
    if node.name in BODIES:
        return None  # looked into later, as far as a gradient goes
    return next((name for body in _bodies(node) for inner in body.nodes if (name := _hidden(inner)) is not None), None)
