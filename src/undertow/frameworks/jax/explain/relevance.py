"""Where relevance by value becomes relevance itself: the first layers, and what lies between them and the input."""

from collections.abc import Collection
from dataclasses import dataclass

from ....errors import RuleError
from ..graph import BODIES, JaxprGraph, JaxprNode
from .kinds import COPIES, SMOOTH, VIEWS
from .steps import JaxprStep, JaxprSteps

_SCALES = frozenset(("mul", "div", "neg", "abs", "max", "min", "clamp"))
_HANDED_ON = VIEWS | COPIES | SMOOTH | _SCALES | {"add", "sub", "reduce_window_max"}


@dataclass(frozen=True)
class Beginning:
    """What lies at the beginning of a graph.

    Attributes:
        layers: the products of the first layers, from whose input no other is reached.
        scales: steps between the input and these that scale it.
        bodies: blocks and branches with the first layers inside.
    """

    layers: frozenset[JaxprNode] = frozenset()
    scales: tuple[JaxprStep, ...] = ()
    bodies: frozenset[JaxprNode] = frozenset()


def beginning(graph: JaxprGraph, steps: JaxprSteps, layers: Collection[JaxprNode]) -> Beginning:
    """Return the first layers of a graph whose inputs are the network's own.

    Args:
        layers: the products of all layers.

    Raises:
        RuleError: the scores depend on the input by a way without a layer, it is pooled or added before the first, or
            the first is inside a loop.
    """
    bodies = {step.root for step in steps.all if step.name in BODIES}
    if not layers and not bodies:
        raise RuleError("there is no convolution or matrix product with constants between the input and the scores")
    reaches: dict[JaxprStep, bool] = {}
    for step in steps.all:
        behind = [steps.maker[value] for value in step.inputs if value in steps.maker]
        reaches[step] = any(b.root in layers or b.root in bodies or reaches[b] for b in behind)
    started = {step for step in steps.all if reaches[step] or step.root in layers or step.root in bodies}
    for step in (s for s in started if reaches[s]):
        if any(steps.maker.get(value) not in started for value in step.inputs):
            raise _beside(step.name)
    if any(value in steps.way.wanted and steps.maker.get(value) not in started for value in graph.outputs):
        raise _beside("the scores, or what a block returns,")
    between = [step for step in steps.all if step not in started]
    for step in between:
        if len(step.inputs) > 1 or not (step.match or step.name in _HANDED_ON):
            raise RuleError(
                f"{step.name} lies between x and the first layer, where relevance is shared out already; apply it to x "
                "beforehand"
            )
    for step in started:
        if step.name == "scan" and not reaches[step]:
            raise RuleError("x enters a loop (scan) before the first layer; unroll it, or explain at= what it returns")
    return Beginning(
        frozenset(step.root for step in started if step.root in layers and not reaches[step]),
        tuple(step for step in between if _scales(step)),
        frozenset(step.root for step in started if step.root in bodies and not reaches[step]),
    )


def _scales(step: JaxprStep) -> bool:
    """Whether what passes a step is multiplied on its way back."""
    return step.match is not None or step.name in SMOOTH | _SCALES or (step.name == "sub" and step.places == (1,))


def _beside(what: str) -> RuleError:
    return RuleError(
        f"x reaches {what} beside the first layers, where relevance is that of a layer's output and not of x; explain "
        "at= the output of a layer behind"
    )
