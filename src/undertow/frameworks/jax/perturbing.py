"""Gradients at places of one call: each place's value is given out and takes a perturbation of zeros, whose gradient is
that at the place, for all that reads it. Loops and rematerialised blocks are run again around bodies in which the same
was done; a value in a loop has one for each step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from ...errors import InputError
from .graph import REMATERIALISED, JaxprGraph, JaxprNode, JaxprValue, graph_of
from .internals import bind, closed
from .marks import OUTPUT, SOWN

_REMEDY = {
    "cond": "a branch, of which only one runs; mark a value before or after it",
    "while": "a while loop, through which no gradient passes; use lax.scan, or lax.fori_loop with fixed bounds",
}


@dataclass(frozen=True)
class Loop:
    """A `jax.lax.scan` around a place.

    Attributes:
        length: how many steps it has.
        backwards: it runs from its end.
        first: tells loops of one graph apart.
    """

    length: int
    backwards: bool
    first: int


@dataclass(frozen=True)
class Place:
    """One value of one call that is looked at.

    Attributes:
        site: the module's or the place's name.
        role: "output", or "input" of a module; "sown" where the place is what was marked, for all that reads it.
        position: of the tensor in what the module returned or was given, as `TensorKey.output`.
        mapped: how many axes `jax.vmap` put in front; -1 where nobody can tell.
        loops: those around it, the outermost first: its value has an axis for each, in front.
    """

    site: str
    role: str
    position: str
    mapped: int
    loops: tuple[Loop, ...] = ()


Wanted = Callable[[JaxprNode], Place | None]
"""From an equation to what its output is, if that is looked at."""


@dataclass(frozen=True, eq=False)
class _Body:
    """A loop or a rematerialised block with places in it."""

    inner: "PerturbedGraph"
    node: JaxprNode
    constants: tuple[Any, ...]

    def run(self, operands: Sequence[Any], given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the outputs, and the values at the places."""
        params = self.node.eqn.params
        if self.node.name != "scan":

            def block(operands: Any, given: Any) -> Any:
                return self.inner.run([*self.constants, *operands], given)

            policy = {key: params[key] for key in ("policy", "prevent_cse") if key in params}
            outputs, taken = jax.checkpoint(block, **policy)(list(operands), list(given))
            return list(outputs), list(taken)
        n_consts, n_carry = params["num_consts"], params["num_carry"]
        fixed = operands[:n_consts]
        first, slices = operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]

        def step(carry: Any, x: Any) -> Any:
            own, given = x
            outputs, taken = self.inner.run([*self.constants, *fixed, *carry, *own], given)
            return outputs[:n_carry], (outputs[n_carry:], taken)

        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        last, (stacked, taken) = jax.lax.scan(step, list(first), (list(slices), list(given)), **options)
        return [*last, *stacked], list(taken)


class PerturbedGraph:
    """A graph with places.

    Args:
        graph: of a call, with `jax.jit` calls in line.
        wanted: tells the places that equations make.
        at: further places, by their values.
        within: it is the body of a loop or of a rematerialised block.

    Attributes:
        places: in the order in which they get their values.
        shapes: of these values, with their dtypes.
        sources: for each place the value of this graph that it is, or those of the loop or block that it is in.

    Raises:
        InputError: a place is where it cannot be looked at.
    """

    def __init__(
        self,
        graph: JaxprGraph,
        wanted: Wanted,
        at: Mapping[JaxprValue, Place] | None = None,
        within: bool = False,
    ) -> None:
        self._graph, self._within = graph, within
        self._at: dict[JaxprValue, list[int]] = {}
        self._bodies: dict[JaxprNode, tuple[_Body, slice]] = {}
        self.places: list[Place] = []
        self.shapes: list[jax.ShapeDtypeStruct] = []
        self.sources: list[tuple[JaxprValue, ...]] = []
        for value in graph.arguments:
            if at is not None and value in at:
                self._add(value, at[value])
        for node in graph.nodes:
            place = wanted(node)
            if place is not None:
                self._add(self._sown(node, place) if place.role == SOWN else node.outputs[0], place)
            for value in node.outputs:
                if at is not None and value in at:
                    self._add(value, at[value])
            self._look_into(node, wanted)

    def _sown(self, node: JaxprNode, place: Place) -> JaxprValue:
        """Return the value that is sown, whose gradient is that of all that reads it."""
        value, body = node.inputs[0], self._within and node.inputs[0].node is None
        if place.mapped or body:
            where = "inside jax.vmap" if place.mapped else "in a loop or a block of jax.checkpoint that it came into"
            raise InputError(
                f"{place.site!r} is sown {where}, where not all that reads it is seen, so its gradient is not known; "
                f"write h = self.perturb({place.site.rpartition('.')[2]!r}, h), or record with phase='forward'"
            )
        return value if value.node is not None or value in self._graph.arguments else node.outputs[0]

    def _add(self, value: JaxprValue, place: Place) -> None:
        self._at.setdefault(value, []).append(len(self.places))
        self.places.append(place)
        self.shapes.append(jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype))
        self.sources.append((value,))

    def _look_into(self, node: JaxprNode, wanted: Wanted) -> None:
        if node.name != "scan" and node.name not in REMATERIALISED:
            for body in jaxprs_in_params(node.eqn.params):
                _refuse_places(node, graph_of(closed(body)), wanted)
            return
        whole = closed(node.eqn.params["jaxpr"])
        names_refused = _refusing_names(wanted) if "vmap(" in node.scope else wanted
        inner = PerturbedGraph(graph_of(whole), names_refused, within=True)
        if inner.places:
            start = len(self.places)
            places, shapes = inner.places, inner.shapes
            if node.name == "scan":
                loop = Loop(node.eqn.params["length"], node.eqn.params["reverse"], start)
                places = [replace(place, loops=(loop, *place.loops)) for place in places]
                shapes = [jax.ShapeDtypeStruct((loop.length, *shape.shape), shape.dtype) for shape in shapes]
            self.places += places
            self.shapes += shapes
            self.sources += [tuple(node.outputs)] * len(places)
            self._bodies[node] = _Body(inner, node, tuple(whole.consts)), slice(start, len(self.places))

    def run(
        self, values: Sequence[Any], given: Sequence[Any], outputs: Sequence[JaxprValue] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Run it.

        Args:
            values: for the graph's arguments.
            given: a perturbation for each place; None for none.
            outputs: what to return; None is the graph's own outputs.

        Returns:
            The outputs, and each place's value, not perturbed.
        """
        taken: list[Any] = [None] * len(self.places)
        environment: dict[JaxprValue, Any] = {}

        def put(value: JaxprValue, result: Any) -> None:
            at = self._at.get(value, ())
            for i in at:
                taken[i] = result
            for i in at:
                result = result if given[i] is None else result + given[i]
            environment[value] = result

        def get(value: JaxprValue) -> Any:
            return environment.get(value, value.known)

        for value, result in zip(self._graph.arguments, values, strict=True):
            put(value, result)
        for node in self._graph.nodes:
            operands = [get(value) for value in node.inputs]
            if node in self._bodies:
                body, part = self._bodies[node]
                results, taken[part] = body.run(operands, given[part])
            elif node.name == "undertow_mark":
                results = operands
            else:
                results = bind(node.eqn, operands, scope=node.scope)
            for value, result in zip(node.outputs, results, strict=True):
                put(value, result)
        return [get(value) for value in (self._graph.outputs if outputs is None else outputs)], taken


def marked_place(node: JaxprNode) -> Place | None:
    """Return what a mark says, see `marks.py`; None for any other equation."""
    if node.name != "undertow_mark":
        return None
    params = node.eqn.params
    return Place(params["site"], params["role"], params["position"], params["mapped"])


def named_place(node: JaxprNode) -> Place | None:
    """Return the place that `checkpoint_name` marks.

    Raises:
        InputError: it does so under `jax.vmap`, where the samples may be in any axis.
    """
    if node.name != "name":
        return None
    name = str(node.eqn.params["name"])
    if "vmap(" in node.scope:
        raise _mapped(name)
    return Place(name, OUTPUT, "", -1)


def _refusing_names(wanted: Wanted) -> Wanted:
    """Return the same for a body under `jax.vmap`, where `checkpoint_name` is refused."""

    def inside(node: JaxprNode) -> Place | None:
        place = wanted(node)
        if place is not None and node.name == "name":
            raise _mapped(place.site)
        return place

    return inside


def _mapped(name: str) -> InputError:
    return InputError(
        f"{name!r} is marked inside jax.vmap, which may put the samples into any axis; mark the value outside of it, "
        "or record a module of Flax or Equinox, whose own calls are seen there"
    )


def _refuse_places(node: JaxprNode, graph: JaxprGraph, wanted: Wanted) -> None:
    for inner in graph.nodes:
        if (place := wanted(inner)) is not None:
            where = _REMEDY.get(node.name, f"{node.name}, which holds its values to itself; leave it out there")
            raise InputError(f"{place.site!r} is inside {where}")
        for body in jaxprs_in_params(inner.eqn.params):
            _refuse_places(inner if inner.name in _REMEDY else node, graph_of(closed(body)), wanted)
