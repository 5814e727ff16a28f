"""`jax.value_and_grad` that also returns what passes through the places that are recorded, as further outputs of
the same program: at each place a perturbation of zeros is added, and the gradient by it is that of all that reads it.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ....errors import InputError, ModelError, TargetError
from ..calls import watched
from ..graph import JaxprGraph, JaxprValue, graph_of, route
from ..marks import OUTPUT, outputs_marked
from ..models import own_model
from ..modules import EQUINOX, KERAS, NNX, TRACE, instances, library_of
from ..perturbing import PerturbedGraph, Place, named_place
from ..places import values_at
from .arguments import Argument, taken_apart
from .parameters import named_parameters
from .seen import Seen
from .sites import names_of, placed


@dataclass(frozen=True, eq=False)
class Watching:
    """What is to be seen of a model, however often it runs.

    Attributes:
        names: for each name of a site its first one.
        phases: "forward", "backward" or both.
        parameters: names of those whose gradients are.
    """

    model: Any
    names: Mapping[str, str]
    phases: frozenset[str]
    parameters: frozenset[str]

    def graph(self, graph: JaxprGraph, inputs: Sequence[JaxprValue]) -> PerturbedGraph:
        """Return a graph with the sites as its places."""
        if library_of(self.model) != TRACE:
            return PerturbedGraph(graph, placed(self.names, "backward" in self.phases))
        marked = {n.eqn.params["name"] for n in graph.nodes if n.name == "name"}
        at: dict[JaxprValue, Place] = {}
        for name in dict.fromkeys(self.names.values()):
            if name not in marked and not _is_marked_within(graph, name):
                way = route(graph.nodes, inputs, graph.outputs[:1])
                at |= {value: Place(name, OUTPUT, "", -1) for value in values_at(graph, way, name)}
        return PerturbedGraph(graph, self._named, at)

    def _named(self, node: Any) -> Place | None:
        wanted = node.name == "name" and node.eqn.params["name"] in self.names
        return named_place(node) if wanted else None

    def seen(self, whole: PerturbedGraph, taken: Sequence[Any], reached: Sequence[bool], given: Sequence[Any]) -> Seen:
        """Return values and gradients at the places, without those of parameters."""
        values = taken if "forward" in self.phases else [None] * len(taken)
        by_place = iter(given)
        gradients = [next(by_place) if is_one else None for is_one in reached]
        return Seen(tuple(values), tuple(gradients), {}, tuple(whole.places))


def watching(model: Any, sites: Sequence[str], phases: frozenset[str], parameters: Sequence[str]) -> Watching:
    """Return what is to be seen at sites, by their first names."""
    wanted = set(sites)
    names = {name: first for name, first in names_of(model).items() if first in wanted}
    return Watching(model, names, phases, frozenset(parameters))


def value_and_grad(
    what: Watching, function: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Seen]]:
    """Return a function of a loss's arguments to its value, its gradients, and what was seen.

    Raises:
        InputError, when it is called: a site is where it cannot be looked at, or none was met.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any, Seen]:
        plain = [taken_apart(value) for value in (*args, kwargs)]
        structures: list[Any] = []

        def traced(*arrays: Any) -> Any:
            remaining = iter(arrays)
            rebuilt = [each.rebuilt([next(remaining) for _ in each.arrays]) for each in inner]
            result = function(*rebuilt[:-1], **rebuilt[-1])
            states = [each.state_of(value) for each, value in zip(inner, rebuilt, strict=True)]
            loss, aux = result if has_aux else (result, None)
            leaves, structure = jax.tree.flatten((aux, states))
            structures.append(structure)
            return loss, leaves

        with watched(_model_in(own_model(what.model), (*args, *kwargs.values())), what.names, outputs_marked):
            inner = [taken_apart(value) for value in (*args, kwargs)]
            arrays = [x for each in inner for x in each.arrays]
            closed = jax.make_jaxpr(traced)(*arrays)
        _refuse_no_scalar(function, closed.out_avals[0])
        graph = graph_of(closed)
        own = graph.arguments[len(closed.consts) :]
        moved = _differentiated(plain, positions)
        whole = what.graph(graph, own)
        if what.names and not whole.places:
            raise InputError(_nothing_met(what, function))
        way = route(graph.nodes, [*own, *itertools.chain(*whole.sources)], graph.outputs[:1])
        reached = [not way.wanted.isdisjoint(values) and "backward" in what.phases for values in whole.sources]

        def objective(by: Sequence[Any], perturbations: Sequence[Any]) -> Any:
            values = list(arrays)
            for i, x in zip(moved, by, strict=True):
                values[i] = x
            remaining = iter(perturbations)
            given = [next(remaining) if is_one else None for is_one in reached]
            (loss, *others), taken = whole.run([*closed.consts, *values], given)
            return loss, (others, taken)

        zeros = [jnp.zeros(s.shape, s.dtype) for s, is_one in zip(whole.shapes, reached, strict=True) if is_one]
        differentiated = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (loss, (leaves, taken)), (by, at_places) = differentiated([arrays[i] for i in moved], zeros)
        aux, states = jax.tree.unflatten(structures[-1], leaves)
        for each, value, state in zip(plain, (*args, kwargs), states, strict=True):
            each.update(value, state)
        gradients = _by_argument(plain, dict(zip(moved, by, strict=True)), positions)
        seen = what.seen(whole, taken, reached, at_places)
        seen.parameters.update(_named_gradients(what, plain, positions, dict(zip(moved, by, strict=True))))
        value = (loss, aux) if has_aux else loss
        return value, gradients[0] if isinstance(argnums, int) else tuple(gradients), seen

    return run


def _is_marked_within(graph: JaxprGraph, name: str) -> bool:
    found = [False]

    def look(node: Any) -> Place | None:
        found[0] |= node.name == "name" and node.eqn.params["name"] == name
        return None

    PerturbedGraph(graph, look)
    return found[0]


def _model_in(model: Any, arguments: Sequence[Any]) -> Any:
    """Return the model among a loss's arguments that has the same structure; the model itself where none is.

    Raises:
        InputError: an Equinox module without its static parts is there, as `eqx.partition` returns it.
    """
    library = library_of(model)
    if library not in (NNX, EQUINOX):
        return model
    for argument in arguments:
        if type(argument) is type(model) and _structure(argument) == _structure(model):
            if library == EQUINOX and len(jax.tree.leaves(argument)) != len(jax.tree.leaves(model)):
                raise InputError(
                    "an Equinox module was passed in parts, as eqx.partition returns it; pass the module itself: only "
                    "its arrays of floating point are differentiated, as in eqx.filter_value_and_grad"
                )
            return argument
    return model


def _structure(model: Any) -> list[tuple[str, str]]:
    return sorted((name, type(module).__qualname__) for name, module in instances(model))


def _refuse_no_scalar(function: Callable[..., Any], aval: Any) -> None:
    if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        name = getattr(function, "__name__", type(function).__name__)
        raise TargetError(f"{name} returned {aval.str_short()}; value_and_grad needs one number, the loss")


def _nothing_met(what: Watching, function: Callable[..., Any]) -> str:
    names = ", ".join(list(dict.fromkeys(what.names.values()))[:4])
    name = getattr(function, "__name__", type(function).__name__)
    return (
        f"{name} calls none of the recorded sites ({names}): pass the recorded module, or one of its structure, to it "
        "as an argument of its own, and call it there"
    )


def _differentiated(arguments: Sequence[Argument], positions: Sequence[int]) -> list[int]:
    """Return the positions, among all arrays, of those that a gradient is asked for by."""
    moved, start = [], 0
    for number, each in enumerate(arguments):
        if number in positions:
            moved += [start + i for i, own in enumerate(each.differentiable) if own]
        start += len(each.arrays)
    return moved


def _by_argument(arguments: Sequence[Argument], by: Mapping[int, Any], positions: Sequence[int]) -> list[Any]:
    starts = [sum(len(each.arrays) for each in arguments[:number]) for number in range(len(arguments))]
    return [arguments[p].gradients([by.get(starts[p] + i) for i in range(len(arguments[p].arrays))]) for p in positions]


def _named_gradients(
    what: Watching, arguments: Sequence[Argument], positions: Sequence[int], by: Mapping[int, Any]
) -> dict[str, Any]:
    """Return the gradients of recorded parameters, by the names of the model's own tree."""
    if not what.parameters:
        return {}
    found: dict[str, Any] = {}
    start = 0
    for number, each in enumerate(arguments):
        if number in positions:
            paths: Sequence[str] = each.paths
            if library_of(what.model) == KERAS and len(paths) == len(own_model(what.model).trainable_variables):
                paths = [named.name for named in named_parameters(what.model)]  # the list that Keras itself takes
            found |= {path: by[start + i] for i, path in enumerate(paths) if start + i in by}
        start += len(each.arrays)
    missing = sorted(what.parameters - set(found))
    if missing:
        raise ModelError(
            f"no differentiated argument of the loss holds {missing[0]!r}; pass the model, or its parameters, first, "
            "or say which argument they are by argnums="
        )
    return {name: found[name] for name in sorted(what.parameters)}
