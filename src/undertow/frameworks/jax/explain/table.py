"""How a rule that is a table acts on one call: its operations are run again, each under the row of its kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from jax.extend.core import jaxprs_in_params

from ....errors import RuleError
from ....rules import identity
from ....tables import Rule
from ...base import Request
from ...results import RewiringStats
from ..graph import BODIES, Environment, JaxprGraph, JaxprNode, JaxprValue, Route, graph_of, route
from ..internals import closed
from .bodies import Runner, rebuilt
from .operations import ruled
from .recognition import recognize
from .rewiring import UNSEEN, NothingRewired, named
from .steps import JaxprSteps


class TableRewiring:
    """A table on the operations of one call, and the counts of what it met between the scores and the inputs."""

    def __init__(self, request: Request) -> None:
        self.stats = RewiringStats()
        self._table = cast(Rule, request.rule)
        self._skipped: Counter[str] = Counter()
        self._opaque: Counter[str] = Counter()

    def runner(self, graph: JaxprGraph, inputs: Sequence[JaxprValue], outputs: Sequence[JaxprValue]) -> Runner:
        """Return a function of a graph's arguments to the outputs, whose gradient follows the table.

        Raises:
            RuleError: an equation on the way cannot be seen into or, by a strict table, has no row, or there is nothing
                to rewire.
        """
        run = self._runner(graph, route(graph.nodes, inputs, outputs), outputs, 1)
        self.stats.skipped, self.stats.opaque = dict(self._skipped), dict(self._opaque)
        met = ", ".join(f"{name} x{n}" for name, n in {**self.stats.skipped, **self.stats.opaque}.items())
        if self._table.strict and met:
            raise RuleError(
                f"rule {self._table.name!r} has no row for {met} on the way; rule='attnlrp' passes what it does not "
                "know"
            )
        if not self.stats.rewired:
            raise NothingRewired(
                f"rule {self._table.name!r} found no operation of its kinds ({', '.join(self._table.rows)}) between "
                f"the input and the scores{f' (met: {met})' if met else ''}; rule='gradient' needs none"
            )
        return run

    def _runner(self, graph: JaxprGraph, way: Route, outputs: Sequence[JaxprValue], times: int) -> Runner:
        self._refuse_hidden(graph, way)
        found, rows = recognize(JaxprSteps(graph, way)), self._table.rows
        for counts, more in ((self._skipped, found.unknown), (self._opaque, found.opaque)):
            counts.update({name: count * times for name, count in more.items()})
        replaced: dict[JaxprNode, Callable[[Environment], list[Any]]] = {}
        for operation in found.operations:
            self.stats.switches += times * (operation.kind == "pool")
            row = rows.get(operation.kind)
            if row is None:
                continue
            self.stats.rewired += times
            if row is not identity or not operation.is_proportional:
                replaced[operation.nodes[-1]] = ruled(operation, row, self._table.name)
        for node in found.bodies:
            replaced[node] = rebuilt(node, way, times, self._runner)

        def run(*values: Any) -> list[Any]:
            environment = graph.run(values, replaced)
            return [environment[value] for value in outputs]

        return run

    def _refuse_hidden(self, graph: JaxprGraph, way: Route) -> None:
        """Refuse what cannot be seen into, in the bodies of functions with a derivative of their own too.

        Raises:
            RuleError: naming the first one.
        """
        for node in graph.nodes:
            if node in way.nodes and (hidden := _hidden(node)) is not None:
                raise RuleError(f"rule {self._table.name!r} cannot see into {named(node)}: {UNSEEN[hidden]}")


def _hidden(node: JaxprNode) -> str | None:
    """Return the name of what cannot be seen into in a node."""
    if node.name in UNSEEN:
        return node.name
    if node.name in BODIES:
        return None  # looked into later, as far as a gradient goes
    bodies = (graph_of(closed(body)) for body in jaxprs_in_params(node.eqn.params))
    return next((name for body in bodies for inner in body.nodes if (name := _hidden(inner)) is not None), None)
