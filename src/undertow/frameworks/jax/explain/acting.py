"""What makes a pass depend on chance or on the rest of its batch: random numbers, batch statistics."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jax.extend.core import jaxprs_in_params

from ....errors import ModelError
from ..graph import PASSING, JaxprNode, JaxprValue, Route, behind, graph_of
from ..internals import closed

RANDOM, NORM = "random numbers", "batch norm in training"
_DRAWS = frozenset(("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"))
_STATISTIC = frozenset((*PASSING, "add", "sub", "mul", "div", "max", "square", "integer_pow", "neg", "select_n"))


def what_acts(scores: Sequence[JaxprValue], way: Route, training: bool) -> dict[str, int]:
    """Return what acts in the forward pass behind scores, by name and how often.

    Random numbers count wherever the scores depend on them, those of a key that never changes too: another key would
    give another map.

    Raises:
        ModelError: something acts, and `training=True` was not passed.
    """
    counts: Counter[str] = Counter()
    for node in behind(scores):
        counts[RANDOM] += _draws(node)
        if node in way.nodes and node.name in ("rsqrt", "sqrt") and _is_of_batch(node.inputs[0], way):
            counts[NORM] += 1
    acting = {name: count for name, count in counts.items() if count}
    if acting and not training:
        listed = ", ".join(f"{name} x{count}" for name, count in acting.items())
        raise ModelError(
            f"the map would depend on chance or on the rest of the batch, since these acted: {listed}; call the model "
            "as it predicts, as with model.eval() in nnx, train=False in linen or eqx.nn.inference_mode(model), or "
            "pass training=True"
        )
    return acting


def _draws(node: JaxprNode) -> int:
    """Return how often a node draws random numbers, in its body too."""
    if node.name in _DRAWS:
        return 1
    return sum(_draws(inner) for body in _bodies(node) for inner in graph_of(closed(body)).nodes)


def _bodies(node: JaxprNode) -> list[Any]:
    return list(jaxprs_in_params(node.eqn.params))


def _is_of_batch(variance: JaxprValue, way: Route) -> bool:
    """Whether what a root is taken of is a sum over the batch, by elementwise steps."""
    remaining, seen = [variance], set[JaxprValue]()
    while remaining:
        value = remaining.pop()
        node = value.node
        if node is None or value in seen or value not in way.live:
            continue
        seen.add(value)
        if node.name == "reduce_sum":
            if 0 in node.eqn.params["axes"]:
                return True
        elif node.name in _STATISTIC:
            remaining += node.inputs
    return False
