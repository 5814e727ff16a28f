"""One explanation as a compiled program, and a cache of such programs.

A model is traced once for all rules, and a program compiled once for each: compiling takes seconds where a run takes
milliseconds. Weights are arguments of a program, so new values count at once. Programs of the last 32 networks are kept
between calls where their key tells what they depend on (`models.py`); else for one call of the user's alone, in which
an estimator may run a program many times.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ....outputs import head_of
from ....rules import gradient
from ....tables import Rule
from ....targets import Target
from ...base import AS_IS, Request
from ...results import RewiringStats
from ..graph import CALLS, JaxprGraph, JaxprValue, Route, graph_of, route
from ..internals import trace_context
from ..models import JaxNetwork
from ..patterns import head_of_scores
from ..places import unmarked
from ..targets import chosen_scores, is_function, scores_of
from .acting import what_acts
from .bodies import Runner
from .rewiring import JaxprRewiring, refuse_unseen
from .table import TableRewiring

MAX_NETWORKS = 32


@dataclass(eq=False)
class TracedCall:
    """One forward pass, up to the scores or to what a target function returned.

    Attributes:
        graph: its arguments are the constants, the weights and the inputs.
        constants: hoisted out of the trace.
        inputs: the values of the inputs.
        output: the scores; before a head, `before`.
        head: the softmax or sigmoid that the model ends in; "" where it does not, or the target is a function.
        programs: compiled, by what they depend on beside this.
        forward: what gives the scores alone, compiled, by the head.
        ways: of gradients, by the head: to find one takes as long as some networks run.
    """

    graph: JaxprGraph
    constants: tuple[Any, ...]
    inputs: tuple[JaxprValue, ...]
    output: JaxprValue
    before: JaxprValue
    head: str
    programs: dict[Hashable, "CompiledProgram"] = field(default_factory=dict)
    forward: dict[str, Callable[..., Any]] = field(default_factory=dict)
    ways: dict[str, Route] = field(default_factory=dict)

    def scores(self, head: str) -> JaxprValue:
        """Return the value that is explained."""
        return self.output if head == AS_IS else self.before

    def way(self, head: str) -> Route:
        """Return the way of a gradient from the scores to the inputs."""
        if head not in self.ways:
            self.ways[head] = route(self.graph.nodes, self.inputs, [self.scores(head)])
        return self.ways[head]

    def reached(self, head: str) -> tuple[int, ...]:
        """Return which inputs the scores depend on by a derivative."""
        wanted = self.way(head).wanted
        return tuple(i for i, value in enumerate(self.inputs) if value in wanted)


@dataclass(frozen=True, eq=False)
class CompiledProgram:
    """One explanation.

    Attributes:
        run: takes constants, weights, inputs, and class ids `(B, K)` or None; returns scores and ids `(B, K)`, and for
            each input of floating point that the scores depend on a map `(B, K, ...)`, and whether NaN is in it.
        reached: which inputs have such a map.
        single: each sample has one target.
        classes: how many there are; None where the target is none of classes.
    """

    run: Callable[..., Any]
    reached: tuple[int, ...]
    single: bool
    classes: int | None
    stats: RewiringStats
    acting: dict[str, int]


cache: OrderedDict[Hashable, TracedCall] = OrderedDict()
_lock = threading.RLock()  # reentrant: a garbage collection while it is held may call `_forget`


def traced_call(request: Request, network: JaxNetwork, inputs: Sequence[Any]) -> TracedCall:
    """Return the forward pass of a request, from the cache where it is there."""
    shapes = tuple((x.shape, str(x.dtype), x.weak_type) for x in inputs)
    arrays = tuple((w.shape, str(w.dtype)) for w in network.weights)
    target = request.target if is_function(request.target) else None
    options = (request.structure, repr(request.output), request.training, target, trace_context())
    kept = network.key is not None and target is None
    key = (network.key if kept else id(request.model), shapes, arrays, *options)
    store = cache if kept else request.memory
    if not kept:
        request.memory[id(request.model)] = request.model  # so that no other gets its id meanwhile
    with _lock:
        if key in store:
            if kept:
                cache.move_to_end(key)
            found: TracedCall = store[key]
            return found
    call = trace(request, network, inputs)
    with _lock:
        store[key] = call
        if kept:
            for owner in network.dies_with:
                weakref.finalize(owner, _forget, key)
            while len(cache) > MAX_NETWORKS:
                cache.popitem(last=False)
    return call


def _forget(key: Hashable) -> None:
    with _lock:
        cache.pop(key, None)


def trace(request: Request, network: JaxNetwork, inputs: Sequence[Any], calls: frozenset[str] = CALLS) -> TracedCall:
    """Trace the forward pass of a request.

    Args:
        calls: equations in whose place their bodies are put.

    Raises:
        ModelError: the output holds no scores. The model's own errors pass.
    """
    n_weights = len(network.weights)

    def forward(*values: Any) -> Any:
        args, kwargs = request.fill(values[n_weights:])
        output = network.run(values[:n_weights], args, kwargs, request.training)
        if is_function(request.target):
            chosen = request.target(output if request.output is None else head_of(output, request.output))
            return chosen_scores(chosen, request.target, None, request.batch).scores
        return scores_of(output, request.output)

    # a new function each time: JAX keeps traces by function, and what this one captured may have changed
    closed = jax.make_jaxpr(lambda *values: forward(*values))(*network.weights, *inputs)
    graph = graph_of(closed, calls=calls)
    output = graph.outputs[0]
    head, before = ("", output) if is_function(request.target) else head_of_scores(unmarked(output))
    own = tuple(graph.arguments[len(graph.arguments) - len(inputs) :])
    return TracedCall(graph, tuple(closed.consts), own, output, before, head)


def compiled_program(request: Request, call: TracedCall, arguments: tuple[Any, ...]) -> CompiledProgram:
    """Return the program of a request, compiled when it first runs.

    Args:
        arguments: of its `run`.

    Raises:
        ModelError, RuleError, TargetError: as `undertow.explain` says.
    """
    k = 0 if arguments[-1] is None else arguments[-1].shape[1]
    special = isinstance(request.target, Target) or (k == 0 and not isinstance(request.target, str | None))
    key = (request.rule, request.activations, request.head, request.training, k or repr(request.target))
    if special:  # its repr may leave out what it holds
        return _program(request, call, arguments)
    with _lock:
        program = call.programs.get(key)
    if program is None:
        program = _program(request, call, arguments)
        with _lock:
            call.programs[key] = program
    return program


def _program(request: Request, call: TracedCall, arguments: tuple[Any, ...]) -> CompiledProgram:
    scores = call.scores(request.head)
    graph = call.graph
    way, reached = call.way(request.head), call.reached(request.head)
    refuse_unseen(graph.nodes, way)
    acting = what_acts([scores], way, request.training)
    rewiring = TableRewiring(request) if isinstance(request.rule, Rule) else JaxprRewiring(request)
    runner = _plain(graph, scores) if request.rule is gradient else rewiring.runner(graph, call.inputs, [scores])
    facts: dict[str, Any] = {}
    target, batch = request.target, request.batch  # a kept program must not keep the model, which the request has

    def explain(constants: Any, weights: Any, inputs: Any, ids: Any) -> tuple[Any, ...]:
        def chosen(*moved: Any) -> tuple[Any, Any]:
            filled = list(inputs)
            for i, x in zip(reached, moved, strict=True):
                filled[i] = x
            (output,) = runner(*constants, *weights, *filled)
            if is_function(target):
                return output, None
            picked = chosen_scores(output, target, ids, batch)
            facts["single"] = picked.single
            facts["classes"] = None if picked.ids is None else output.shape[1]
            return picked.scores, picked.ids

        values, pull, chosen_ids = jax.vjp(chosen, *(inputs[i] for i in reached), has_aux=True)
        maps = _maps(pull, values)
        return values, chosen_ids, maps, [jnp.isnan(m).any() for m in maps]

    run = jax.jit(explain)
    run.trace(*arguments)  # for the facts, and for errors before anything is compiled; `run` has it in its cache
    single = facts.get("single", True)
    return CompiledProgram(run, reached, single, facts.get("classes"), rewiring.stats, acting)


def _plain(graph: JaxprGraph, scores: JaxprValue) -> Runner:
    return lambda *values: [graph.run(values)[scores]]


def _maps(pull: Callable[..., Any], scores: Any) -> tuple[Any, ...]:
    """Return for each input a map for each target, `(B, K, ...)`; the targets in turn, which takes no more memory."""
    count = scores.shape[1]

    def of_target(column: Any) -> Any:
        return pull(jnp.broadcast_to(column, scores.shape))

    columns = jnp.eye(count, dtype=scores.dtype)
    if count == 1:
        return tuple(m[:, None] for m in of_target(columns[0]))
    return tuple(jnp.moveaxis(m, 0, 1) for m in jax.lax.map(of_target, columns))
