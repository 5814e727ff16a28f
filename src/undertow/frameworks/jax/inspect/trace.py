"""One pass, call by call: each module call's inputs, outputs and gradients.

The modules' calls are watched while the network is traced, and what each is given and returns is marked. A mark is a
value of its own, so the gradient at one of an input is that by way of this call alone, whoever else reads the input.
One compiled program gives them all. For Keras's layers closed formulas are computed beside them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ....errors import InputError
from ...own_passes import own_pass
from ...results import Call, Pass
from ..arrays import to_numpy
from ..calls import watched
from ..graph import JaxprGraph, graph_of, route
from ..marks import INPUT, OUTPUT, is_float, marked
from ..models import JaxNetwork, network_of, own_model
from ..modules import KERAS, canonical_names, instances_by_name, library_of
from ..perturbing import PerturbedGraph, Place, marked_place
from ..record.parameters import named_parameters
from ..record.seen import calls_of_places

NOT_REACHED = "the objective does not depend on its output"
_SHARED = "its weights are read by several calls, so no gradient of them is that by way of this call alone"


@dataclass(eq=False)
class _Module:
    """A module that was called: its kind, whether others were called inside, and itself."""

    kind: str
    module: Any
    has_inner: bool = False


@dataclass(eq=False)
class _TracedModuleCall:
    """One call of one module: where its tensors are among the places, and in which step of the loops around."""

    name: str
    number: int
    inputs: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    outputs: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Tensors:
    """What one run of the program gave.

    Attributes:
        values: at each place.
        gradients: at each place; None where none comes.
        weights: gradients by the network's weights; None where they are no parameters.
    """

    values: Sequence[Any]
    gradients: Sequence[Any]
    weights: Sequence[Any]

    def at(self, places: Sequence[tuple[int, tuple[int, ...]]], what: Sequence[Any]) -> tuple[Any, ...]:
        """Return what is at places; None where there is none."""
        return tuple(None if what[i] is None else what[i][step] for i, step in places)


def trace(model: Any, inputs: tuple[Any, ...], gradient: Any = None) -> Pass:
    """Trace one pass of a network as it is; see `undertow.trace`.

    Raises:
        InputError: the model is a function, or a module runs where it cannot be seen; or as `undertow.trace` says.
    """
    if not library_of(model) or library_of(model) == "trace":
        raise InputError(
            "a function has no module calls to trace; pass the Flax, Equinox or Keras module itself, or record the "
            "function's named places by ut.record"
        )
    arrays = tuple(map(jnp.asarray, inputs))
    modules: dict[str, _Module] = {}
    with own_pass():
        with watched(model, canonical_names(model), _marking(modules)):
            network = network_of(model).anew()
            closed = jax.make_jaxpr(lambda weights, *x: _leaves(network.with_weights(weights)(*x)))(
                network.weights, *arrays
            )
        graph = graph_of(closed)
        whole = PerturbedGraph(graph, marked_place)
        begin = _output_gradients(closed.out_avals, gradient)
        tensors = _run(network, closed.consts, graph, whole, arrays, begin, _learned(model, network))
        calls = _calls(whole.places)
        own = _own_weights(model, network, modules)
        several = Counter(call.name for call in calls)
        readers = Counter(i for call in calls for i in own.get(call.name, {}).values())
        reported = [c for c in calls if c.outputs and (not modules[c.name].has_inner or own.get(c.name))]
        results = tuple(_result(c, modules[c.name], tensors, network, own.get(c.name, {}), readers) for c in reported)
    within = {i for call in reported for i in own.get(call.name, {}).values()}
    unreached = tuple(
        name
        for name, weights in _direct_weights(model, network).items()
        if name and weights and not several[name] and not within.issuperset(weights.values())
    )
    return Pass(calls=results, functions=(), unreached=unreached)


def _marking(modules: dict[str, _Module]) -> Callable[..., Any]:
    running: list[_Module] = []

    def around(name: str, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        this = modules.setdefault(name, _Module(type(module).__name__, module))
        for outer in running[-1:]:
            outer.has_inner = True
        running.append(this)
        try:
            args, kwargs = marked((args, kwargs), name, INPUT, is_array)
            return marked(call(*args, **kwargs), name, OUTPUT)
        finally:
            running.pop()

    return around


def is_array(value: Any) -> bool:
    """Whether a value is an array of numbers."""
    return isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _leaves(output: Any) -> list[Any]:
    leaves = [leaf for leaf in jax.tree.leaves(output) if is_float(leaf)]
    if not leaves:
        raise InputError("the model returned no array of floating point, so there is no gradient to trace")
    return leaves


def _output_gradients(avals: Sequence[Any], gradient: Any) -> list[Any]:
    """Return the gradient at each output: ones where none is given. Raises InputError: it does not fit."""
    if gradient is None:
        return [jnp.ones(aval.shape, aval.dtype) for aval in avals]
    parts = list(gradient) if isinstance(gradient, tuple) else [gradient]
    if len(parts) != len(avals):
        raise InputError(f"gradient has {len(parts)} part(s) for {len(avals)} output(s); pass a tuple, one for each")
    for part, aval in zip(parts, avals, strict=True):
        if np.shape(part) != tuple(aval.shape):
            raise InputError(f"gradient has shape {np.shape(part)} where the output has {tuple(aval.shape)}")
    return [jnp.asarray(part, aval.dtype) for part, aval in zip(parts, avals, strict=True)]


def _learned(model: Any, network: JaxNetwork) -> list[int]:
    """Return which weights are parameters."""
    names = {named.name for named in named_parameters(model)}
    return [i for i, path in enumerate(network.paths) if path in names and is_float(network.weights[i])]


def _run(
    network: JaxNetwork,
    constants: Sequence[Any],
    graph: JaxprGraph,
    whole: PerturbedGraph,
    inputs: Sequence[Any],
    begin: Sequence[Any],
    learned: Sequence[int],
) -> _Tensors:
    reached = _reached(graph, whole)
    zeros = [jnp.zeros(s.shape, s.dtype) for s, is_one in zip(whole.shapes, reached, strict=True) if is_one]

    @jax.jit
    def program(zeros: Any, weights: Any, inputs: Any, begin: Any) -> Any:
        def outputs(perturbations: Any, parameters: Any) -> Any:
            values = list(weights)
            for i, parameter in zip(learned, parameters, strict=True):
                values[i] = parameter
            remaining = iter(perturbations)
            given = [next(remaining) if is_one else None for is_one in reached]
            return whole.run([*constants, *values, *inputs], given)

        _, pull, taken = jax.vjp(outputs, zeros, [weights[i] for i in learned], has_aux=True)
        return taken, pull(list(begin))

    taken, (at_places, by_parameters) = program(zeros, list(network.weights), list(inputs), list(begin))
    remaining = iter(at_places)
    gradients = [next(remaining) if is_one else None for is_one in reached]
    by_weight: list[Any] = [None] * len(network.weights)
    for i, g in zip(learned, by_parameters, strict=True):
        by_weight[i] = g
    return _Tensors(taken, gradients, by_weight)


def _reached(graph: JaxprGraph, whole: PerturbedGraph) -> list[bool]:
    if route(graph.nodes, graph.arguments, graph.outputs).wanted.isdisjoint(graph.arguments):
        raise InputError("the output depends on nothing by any gradient (stop_gradient, or rounding)")
    way = route(graph.nodes, [*graph.arguments, *chain(*whole.sources)], graph.outputs)
    return [
        not way.wanted.isdisjoint(values) and bool(jnp.issubdtype(shape.dtype, jnp.floating))
        for values, shape in zip(whole.sources, whole.shapes, strict=True)
    ]


def _calls(places: Sequence[Place]) -> list[_TracedModuleCall]:
    """Return the calls, in the order in which they began."""
    found: dict[tuple[str, int], _TracedModuleCall] = {}
    for i, number, step in calls_of_places(places):
        place = places[i]
        call = found.setdefault((place.site, number), _TracedModuleCall(place.site, number))
        (call.inputs if place.role == INPUT else call.outputs).append((i, step))
    return list(found.values())


def _own_weights(model: Any, network: JaxNetwork, modules: Mapping[str, _Module]) -> dict[str, dict[str, int]]:
    """Return for each module that was called its weights by name: all below it, unless others were called inside."""
    direct = _direct_weights(model, network)
    own: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        own[name] = dict(direct.get(name, {}))
        for other, weights in direct.items() if not module.has_inner else ():
            if other != name and (not name or other.startswith(f"{name}.")):
                prefix = other.removeprefix(f"{name}.") if name else other
                own[name] |= {f"{prefix}.{path}": i for path, i in weights.items()}
    return own


def _direct_weights(model: Any, network: JaxNetwork) -> dict[str, dict[str, int]]:
    """Return for each module the weights that it holds itself: their names, and where they are in the network's."""
    if library_of(model) == KERAS:
        from ...keras_layers import own_variables

        keras = own_model(model)
        at = {id(v): i for i, v in enumerate([*keras.trainable_variables, *keras.non_trainable_variables])}
        layers = {"": keras, **instances_by_name(model)}
        return {
            name: {v.name: at[id(v)] for v in own_variables(layer) if id(v) in at} for name, layer in layers.items()
        }
    names = canonical_names(model)
    direct: dict[str, dict[str, int]] = defaultdict(dict, {name: {} for name in names.values()})
    for i, path in enumerate(network.paths):
        parts = path.split(".")
        around = next(".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in names)
        direct[names[around]][path.removeprefix(f"{around}.") if around else path] = i
    return {name: {p: i for p, i in own.items() if is_float(network.weights[i])} for name, own in direct.items()}


def _result(
    call: _TracedModuleCall,
    module: _Module,
    tensors: _Tensors,
    network: JaxNetwork,
    weights: Mapping[str, int],
    readers: Mapping[int, int],
) -> Call:
    inputs, outputs = (tensors.at(places, tensors.values) for places in (call.inputs, call.outputs))
    by_input, at_outputs = (tensors.at(places, tensors.gradients) for places in (call.inputs, call.outputs))
    shared = any(readers[i] > 1 for i in weights.values())
    arrived = any(g is not None for g in at_outputs)
    by_weight = {name: None if shared or not arrived else tensors.weights[i] for name, i in weights.items()}
    formula = {}
    single = len(inputs) == len(outputs) == 1 and by_input[0] is not None
    if single and not module.has_inner and library_of(module.module) == KERAS:
        from ...keras_formulas import formula_differences

        gradients: dict[str, Any] = {"input": to_numpy(by_input[0])}
        gradients |= {name: to_numpy(g) for name, g in by_weight.items() if g is not None}
        x, y, g = (to_numpy(tensor) for tensor in (inputs[0], outputs[0], at_outputs[0]))
        formula = formula_differences(module.module, x, y, g, gradients, str(outputs[0].dtype))
    return Call(
        name=call.name,
        kind=module.kind,
        call=call.number,
        inputs=inputs,
        outputs=outputs,
        input_gradients=by_input,
        output_gradients=at_outputs,
        parameters={name: jnp.asarray(network.weights[i]) for name, i in weights.items()},
        parameter_gradients=by_weight,
        formula=formula,
        note=NOT_REACHED if not arrived else _SHARED if shared else "",
    )
