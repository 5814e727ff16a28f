"""Named places in one call: what a watched module gave, what `jax.ad_checkpoint.checkpoint_name` marks, and what leaves
a named scope.

Flax linen and Keras put a scope around each layer; nnx has none, Equinox its classes' names. `jax.named_scope("block")`
makes one in any function. `block.Dense_0` is the layer `Dense_0` in `block`.
"""

import re
from collections.abc import Iterator, Sequence

from jax.extend.core import jaxprs_in_params

from ...errors import InputError, did_you_mean
from .graph import JaxprGraph, JaxprNode, JaxprValue, Route, graph_of
from .internals import closed

_TRANSFORMED = re.compile(r"\w+\(([^()]*)\)")


def words_of(scope: str) -> tuple[str, ...]:
    """Return the names in a scope without the transformations around them.

    >>> words_of("L/vmap(block)/Dense_0")
    ('L', 'block', 'Dense_0')
    """
    while (plain := _TRANSFORMED.sub(r"\1", scope)) != scope:
        scope = plain
    return tuple(filter(None, scope.split("/")))


def values_at(graph: JaxprGraph, way: Route, layer: str) -> list[JaxprValue]:
    """Return what a place gives, one value for each time that it runs on the way of a gradient.

    Args:
        layer: its name; `layer@1` is its second call.

    Raises:
        InputError: there is no such place, it is inside a loop, or several values leave it.
    """
    name, _, number = layer.partition("@")
    found = _returned(graph, name)
    if not found:
        found = [v for n in graph.nodes if n.name == "name" and n.eqn.params["name"] == name for v in n.outputs]
    if not found:
        found = [v for run in _runs(graph.nodes, _words(name)) for v in _leaving(graph, way, run, name)]
    values = [value for value in found if value in way.wanted]
    if number:
        values = values[int(number) : int(number) + 1] if number.isdecimal() else []
    if not values:
        raise InputError(_missing(graph, way, layer))
    return values


def _returned(graph: JaxprGraph, name: str) -> list[JaxprValue]:
    """Return what the calls of a module gave, where they are marked, see `marks.py`.

    Raises:
        InputError: they gave several values each.
    """
    marks = [n for n in graph.nodes if n.name == "undertow_mark" and n.eqn.params["site"] == name]
    positions = {node.eqn.params["position"] for node in marks}
    if len(positions) > 1:
        raise InputError(
            f"{name!r} returns {len(positions)} values; take the part of it that gives the one that is meant"
        )
    return [node.outputs[0] for node in marks]


def unmarked(value: JaxprValue) -> JaxprValue:
    """Return what marks were put on."""
    while value.node is not None and value.node.name == "undertow_mark":
        value = value.node.inputs[0]
    return value


def _words(name: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[./]", name)))


def _contains(scope: Sequence[str], words: Sequence[str]) -> bool:
    return any(tuple(scope[i : i + len(words)]) == tuple(words) for i in range(len(scope) - len(words) + 1))


def _runs(nodes: Sequence[JaxprNode], words: Sequence[str]) -> Iterator[list[JaxprNode]]:
    """Yield the nodes of each run of a scope, which follow one another."""
    run: list[JaxprNode] = []
    for node in nodes:
        if words and _contains(words_of(node.scope), words):
            run.append(node)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _leaving(graph: JaxprGraph, way: Route, run: list[JaxprNode], name: str) -> list[JaxprValue]:
    inside = set(run)
    read = {value for node in graph.nodes if node not in inside for value in node.inputs} | set(graph.outputs)
    values = [value for node in run for value in node.outputs if value in read and value in way.wanted]
    if len(values) > 1:
        raise InputError(
            f"{len(values)} values leave {name!r} on the way to the scores; mark the one that is meant, as in "
            "h = jax.ad_checkpoint.checkpoint_name(h, 'here')"
        )
    return values


def place_names(graph: JaxprGraph, way: Route) -> list[str]:
    """List the names of places on the way, in the order of execution."""
    names: dict[str, None] = {}
    for node in graph.nodes:
        if node in way.nodes:
            if node.name == "name":
                names[node.eqn.params["name"]] = None
            words = words_of(node.scope)
            if words:
                names[".".join(words)] = None
    return list(names)


def _missing(graph: JaxprGraph, way: Route, layer: str) -> str:
    if any(layer in _names_within(node) for node in graph.nodes):
        return f"{layer!r} is inside a loop or a branch, which holds it to itself; unroll it"
    names = place_names(graph, way)
    listed = did_you_mean(layer, names) or f" (there are: {', '.join(names[:8]) or 'none'})"
    return (
        f"no layer {layer!r} on the way from x to the scores{listed}; give it a name, as in "
        "h = jax.ad_checkpoint.checkpoint_name(h, 'here') or with jax.named_scope('block'):"
    )


def _names_within(node: JaxprNode) -> set[str]:
    names = set()
    for body in jaxprs_in_params(node.eqn.params):
        for inner in graph_of(closed(body)).nodes:
            names |= {*words_of(inner.scope), *_names_within(inner)}
            names |= {inner.eqn.params["name"]} if inner.name == "name" else set()
    return names
