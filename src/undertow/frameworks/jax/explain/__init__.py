"""Maps of networks in JAX: a rule acts on the jaxpr of one call."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ....errors import InputError, ModelError, RuleError
from ....inputs import ModelArguments
from ....outputs import Path
from ....rules import gradient
from ....tables import AttentionRule, Rule
from ...base import AS_IS, Request
from ...own_passes import own_pass
from ...results import Explanation
from ...targets import refuse_missing
from ..arrays import to_numpy
from ..calls import watched
from ..graph import CALLS, REMATERIALISED, JaxprValue, route
from ..marks import outputs_marked
from ..models import JaxNetwork, network_of
from ..modules import paths_of
from ..places import values_at
from ..targets import given_ids, is_function, refuse_non_class_scores
from .cuts import nan_gradient, without_gradient
from .program import TracedCall, compiled_program, trace, traced_call


def explain(request: Request) -> Explanation:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    explanation = carried_back(request)
    if isinstance(request.rule, Rule) and _is_by_value(request.rule, request.is_inside):
        single = explanation.scores.ndim == 1
        maps = (
            None if m is None else m * (x if single else x[:, None])
            for m, x in zip(explanation.maps, request.inputs, strict=True)
        )
        return replace(explanation, maps=tuple(maps))
    return explanation


def _is_by_value(rule: Rule, is_inside: bool) -> bool:
    """Whether what a table carries back is relevance by value, which the input turns into relevance."""
    return rule.values == "input-times" or (rule.values == "relevance" and is_inside)


def carried_back(request: Request) -> Explanation:
    """Do what `explain` does, but for the product with the input that relevance by value needs."""
    _refuse_rule(request)
    if request.through != "graph":
        raise RuleError(f"through={request.through!r} is PyTorch's: JAX has no modules to change; leave it out")
    inputs = arrays(request)
    network = network_of(request.model)
    with own_pass():
        call = traced_call(request, network, inputs)
        _refuse_unreached(request, call)
        batch = request.batch if request.batch is not None else call.output.aval.shape[0]
        ids, single = given_ids(request.target, batch)
        arguments = call.constants, network.weights, inputs, _int32(ids)
        program = compiled_program(request, call, arguments)
        if ids is not None and program.classes is not None:
            refuse_missing(ids, program.classes)
        scores, explained, maps, broken = program.run(*arguments)
        _refuse_non_finite(scores)
        if any(map(bool, broken)):
            raise nan_gradient(request, call, (*call.constants, *network.weights, *inputs))
    single = single if ids is not None and program.classes is not None else program.single
    by_input: list[Any] = [None] * len(inputs)
    for i, values in zip(program.reached, maps, strict=True):
        by_input[i] = _like_input(request.inputs[i], _first_target(values) if single else values)
    first = request.inputs[0]
    if single:
        scores, explained = _first_target(scores), None if explained is None else _first_target(explained)
    return Explanation(
        tuple(by_input),
        None if explained is None else _like_input(first, jnp.asarray(explained)),
        _like_input(first, scores),
        replace(program.stats, skipped=dict(program.stats.skipped), opaque=dict(program.stats.opaque)),
        has_channels_last(network, inputs[0]),
        dict(program.acting),
        call.head,
    )


def _refuse_rule(request: Request) -> None:
    """Refuse rules that are not there, before anything is traced.

    Raises:
        RuleError: naming those that are.
    """
    rule = request.rule
    if isinstance(rule, AttentionRule) or (isinstance(rule, Rule) and rule.values == "difference"):
        raise RuleError(
            f"rule {request.rule_name!r} is not there for JAX, only for PyTorch; there are gradient, deconvnet, "
            "guided, attnlrp, cp-lrp, the LRP composites, excitation, functions (g, local) -> g and other tables"
        )


def _int32(ids: npt.NDArray[Any] | None) -> Any:
    return None if ids is None else jnp.asarray(ids, jnp.int32)


def arrays(request: Request) -> tuple[jax.Array, ...]:
    """Return the inputs as arrays of JAX.

    Raises:
        InputError: an input is no array, is complex or has another batch size, or none is of floating point.
    """
    for i, x in enumerate(request.inputs):
        if isinstance(x, jax.core.Tracer):
            raise InputError(f"{request.describe(i)} is traced: explain outside jax.jit, jax.grad and jax.vmap")
        if not isinstance(x, jax.Array | np.ndarray) or x.dtype == object:
            raise InputError(f"{request.describe(i)} is a {type(x).__name__}, not a JAX or NumPy array of numbers")
        if np.issubdtype(x.dtype, np.complexfloating):
            raise InputError(f"{request.describe(i)} is complex ({x.dtype}); pass its parts, x.real and x.imag")
    converted = tuple(map(jnp.asarray, request.inputs))
    for i, x in enumerate(converted):
        if request.is_plain and (x.ndim == 0 or len(x) != len(converted[0])):
            raise InputError(f"input {i} has shape {x.shape}; every input needs the same first (batch) axis")
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in converted):
        raise InputError(f"x is {converted[0].dtype}; a map needs floating point, as in x.astype(jnp.float32)")
    return converted


def has_channels_last(network: JaxNetwork, x: Any) -> bool:
    """Whether images are `(B, H, W, C)`: as the model's library has it, unless the sizes speak for the other."""
    last = True if network.channels_last is None else network.channels_last
    if x.ndim != 4:
        return last
    is_first, is_last = x.shape[1] <= 4 < x.shape[-1], x.shape[-1] <= 4 < x.shape[1]
    return is_last or (last and not is_first)


def _first_target(values: Any) -> Any:
    """Return `(B, 1, ...)` as `(B, ...)`, in a tenth of the time that indexing takes."""
    return jax.lax.squeeze(values, (1,))


def _refuse_unreached(request: Request, call: TracedCall) -> None:
    floating = [i for i, value in enumerate(call.inputs) if value.is_float]
    reached = call.reached(request.head)
    missing = [i for i in floating if i not in reached]
    if missing and (request.is_plain or len(missing) == len(floating)):
        raise without_gradient(request, call, missing[0])


def _refuse_non_finite(scores: Any) -> None:
    values = to_numpy(scores)
    if not np.isfinite(values).all():
        sample, column = np.argwhere(~np.isfinite(values))[0]
        raise ModelError(
            f"the score of sample {sample} is {values[sample, column]}; check its pixels and the model's weights for "
            "NaN"
        )


def _like_input(x: Any, value: Any) -> Any:
    return to_numpy(value) if isinstance(x, np.ndarray) else value


def at_layer(request: Request, layer: str) -> list[tuple[ModelArguments, Request]]:
    """Return, for each call of a place, what it gives as arguments, and the request to explain by that.

    Args:
        layer: a name of `places.py`.

    Raises:
        InputError: there is no such place on the way.
    """
    return [(arguments, inside) for arguments, inside, _ in calls_of(request, layer)]


def calls_of(request: Request, layer: str) -> list[tuple[ModelArguments, Request, frozenset[int]]]:
    """Return what `at_layer` does, and which inputs each call of the place depends on."""
    inputs = arrays(request)
    with own_pass():
        with watched(request.model, paths_of(request.model, layer.partition("@")[0]), outputs_marked):
            network = network_of(request.model).anew()
            call = trace(request, network, inputs, CALLS | REMATERIALISED)
        at = values_at(call.graph, call.way(request.head), layer)
        values = (*call.constants, *network.weights, *inputs)
        results = jax.jit(lambda *values: _at(call, values, at))(*values)
    first = int(layer.partition("@")[2] or 0)
    calls = []
    for number, (value, result) in enumerate(zip(at, results, strict=True), first):
        reached = (i for i, x in enumerate(call.inputs) if value in route(call.graph.nodes, [x], [value]).wanted)
        calls.append((*_inside(request, call, values, f"{layer}@{number}", value, result), frozenset(reached)))
    return calls


def _at(call: TracedCall, values: Sequence[Any], at: Sequence[JaxprValue]) -> list[Any]:
    environment = call.graph.run(values)
    return [environment[value] for value in at]


def _inside(
    request: Request, call: TracedCall, values: Sequence[Any], layer: str, at: JaxprValue, result: Any
) -> tuple[ModelArguments, Request]:
    """Return one place's output as arguments, and the request to explain by it, in the rest of the traced call."""

    def rest(weights: Sequence[Any], args: Sequence[Any], kwargs: Any, training: bool) -> Any:
        return call.graph.run(weights, given={at: args[0]})[call.output]

    given = _like_input(request.inputs[0], result)
    arguments = ModelArguments(given, (given,), {})
    inside = replace(
        request,
        model=JaxNetwork(rest, tuple(values)),
        inputs=arguments.tensors,
        fill=arguments.fill,
        structure=layer,
        output=None,  # chosen in the traced call, as a target function was called there
        target=_first_column if is_function(request.target) else request.target,
        is_plain=False,
        noun=f"the output of layer {layer.partition('@')[0]!r}",
    )
    return arguments, inside


def _first_column(scores: Any) -> Any:
    return scores[:, 0]


def scores(model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return forward_scores(model, x, output, AS_IS).astype(np.float64)


def forward_scores(model: Any, x: Any, output: Path | None, head: str) -> npt.NDArray[Any]:
    """Run the model alone; return its scores, before a softmax or as they are."""
    request = Request(model, (x,), gradient, "gradient", None, "graph", "relu-like", True, output, head)
    inputs, network = arrays(request), network_of(model)
    with own_pass():
        call = traced_call(request, network, inputs)
        value = call.scores(head)
        if head not in call.forward:
            call.forward[head] = jax.jit(lambda *values: call.graph.run(values)[value])
        result = call.forward[head](*call.constants, *network.weights, *inputs)
    refuse_non_class_scores(result, len(inputs[0]))
    return to_numpy(result)
