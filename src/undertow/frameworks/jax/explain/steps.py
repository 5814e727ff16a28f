"""The nodes between the scores and the inputs as steps, in which an activation of `patterns.py` is one."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..graph import JaxprGraph, JaxprNode, JaxprValue, Route
from ..patterns import PatternMatch, matches
from .kinds import COPIES, VIEWS

_SHIFTED = COPIES | {"add", "sub"}


@dataclass(frozen=True, eq=False)
class JaxprStep:
    """One node on the way, or those of an activation.

    Attributes:
        name: of the primitive, or of the activation.
        nodes: in the order of execution; the last gives the result.
        inputs: what it is given that is on the way, in the order of its operands; an activation's is given once.
        places: of each of those, its place among the node's operands.
        match: the activation.
    """

    name: str
    nodes: tuple[JaxprNode, ...]
    inputs: tuple[JaxprValue, ...]
    places: tuple[int, ...]
    match: PatternMatch | None = None

    @property
    def root(self) -> JaxprNode:
        """The node that gives the result."""
        return self.nodes[-1]

    @property
    def output(self) -> JaxprValue:
        return self.root.outputs[0]


class JaxprSteps:
    """The steps of one graph, in the order of execution."""

    def __init__(self, graph: JaxprGraph, way: Route) -> None:
        self.way = way
        found = matches(graph, way)
        within = {node for match in found.values() for node in match.nodes}
        self.all = [
            _step_of(node, way, found.get(node))
            for node in graph.nodes
            if node in way.nodes and (node not in within or node in found)
        ]
        self.maker = {value: step for step in self.all for value in step.root.outputs}
        self.order = {value: i for i, step in enumerate(self.all) for value in step.root.outputs}
        self.reader = {value: step for step in self.all for value in step.inputs}
        self.readers = Counter(value for step in self.all for value in step.inputs)
        self.readers.update(graph.outputs)
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def name(self, value: JaxprValue) -> str:
        """Return the name of the step that gives a value; "" of what none gives."""
        step = self.maker.get(value)
        return "" if step is None else step.name

    def behind(self, value: JaxprValue) -> tuple[JaxprValue, ...]:
        """Return what the step that gives a value is given."""
        step = self.maker.get(value)
        return () if step is None else step.inputs

    def through(self, value: JaxprValue, passing: Collection[str]) -> JaxprValue:
        """Follow a value through steps of certain names with one input on the way."""
        while self.name(value) in passing and len(self.behind(value)) == 1:
            (value,) = self.behind(value)
        return value

    @cached_property
    def of_softmax(self) -> set[JaxprValue]:
        """The values that the input reaches through softmaxes alone."""
        found = set[JaxprValue]()
        for step in self.all:
            if (
                self.is_softmax(step)
                or self.is_softmax_by_logarithm(step)
                or (step.inputs and found.issuperset(step.inputs))
            ):
                found.update(step.root.outputs)
        return found

    def is_softmax(self, step: JaxprStep) -> bool:
        """Whether a step is the last of a softmax: exp(x) by its own sum."""
        if step.name != "div" or len(step.inputs) != 2:
            return False
        top, bottom = (self.through(value, VIEWS | COPIES) for value in step.inputs)
        if self.name(top) != "exp" or self.name(bottom) != "reduce_sum":
            return False
        summed = self.through(self.behind(bottom)[0], VIEWS | COPIES)
        return summed is top or (self.name(summed) == "exp" and self.behind(summed) == self.behind(top))

    def is_softmax_by_logarithm(self, step: JaxprStep) -> bool:
        """Whether a step is the exponential of a log-softmax."""
        if step.name != "exp":
            return False
        behind = self.maker.get(self.through(step.inputs[0], VIEWS | COPIES))
        return behind is not None and self.log_softmax(behind) is not None

    def log_softmax(self, step: JaxprStep) -> tuple[JaxprValue, set[JaxprStep]] | None:
        """Return the x, and the steps before the last, of x - log(sum(exp(x))), x less its maximum or not."""
        if step.name != "sub" or len(step.inputs) != 2:
            return None
        logarithm = self.through(step.inputs[1], VIEWS | _SHIFTED)
        if self.name(logarithm) != "log":
            return None
        total = self.through(self.behind(logarithm)[0], VIEWS | COPIES | {"abs"})
        exp = self.through(self.behind(total)[0], VIEWS | COPIES) if self.name(total) == "reduce_sum" else total
        if self.name(exp) != "exp":
            return None
        x, summed = step.inputs[0], self.behind(exp)[0]
        inner = set(self.until(step.inputs[1], "exp"))
        while summed is not x:
            if self.name(summed) not in _SHIFTED or len(self.behind(summed)) != 1:
                return None
            inner.add(self.maker[summed])
            (summed,) = self.behind(summed)
        return x, inner

    def until(self, value: JaxprValue, name: str) -> Iterator[JaxprStep]:
        """Yield the steps from a value to the first of a name, each with one input on the way."""
        while True:
            step = self.maker[value]
            yield step
            if step.name == name:
                return
            (value,) = step.inputs


def _step_of(node: JaxprNode, way: Route, match: PatternMatch | None) -> JaxprStep:
    if match is not None:
        return JaxprStep(match.name, match.nodes, (match.x,), (0,), match)
    at = [i for i, value in enumerate(node.inputs) if value in way.live]
    return JaxprStep(node.name, (node,), tuple(node.inputs[i] for i in at), tuple(at))
