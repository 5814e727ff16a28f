"""The traced graph of one explanation, forward and backward, and a cache of such graphs.

A trace takes seconds where a call takes milliseconds, so the last 32 graphs of Keras models and `tf.function`s are
cached, and one serves gradient, deconvnet and guided (`switching.py`). The key has the model (weakly), the shapes and
dtypes of the inputs, the kind of target, and the plain attributes of every layer, on which a graph depends too. Weights
are read when a graph runs, so new values count at once. A plain Python function, as model or as target, can close over
anything and is traced for each call; that is why no graph is kept on disk either.
"""

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from ....errors import RuleError
from ....rules import gradient
from ....targets import Target
from ...base import Request
from ...results import RewiringStats
from ..internals import all_layers, call_with
from .forward import Forward, maps_of, run_forward
from .gradients import FUNCTION_CALLS, Rewiring
from .swap import MARK, swapped
from .switching import switched_rule, switches_of

MAX_GRAPHS = 32
_ALL_RULES = "all rules"
_PLAIN_TYPES = frozenset((bool, int, float, str, bytes, type(None)))


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """One explanation as a graph.

    Attributes:
        function: takes the inputs, class ids `(B, K)` int64 where the target is such, and two switches where it serves
            several rules; returns scores and ids `(B, K)`, then a map `(B, K, ...)` for each input of floating point.
        passed: what its forward pass told.
        rewired: what a rule meets.
        written: the variables that it may write, to be put back afterwards.
        is_switched: it serves gradient, deconvnet and guided.
    """

    function: Any
    passed: Forward
    rewired: RewiringStats
    written: tuple[Any, ...]
    is_switched: bool

    def run(self, request: Request, tensors: Sequence[Any], values: Mapping[int, Any]) -> Any:
        """Run it under the rule of a request, with values in the places of variables, see `call_with`."""
        return call_with(self.function, [*tensors, *switches_of(request)], values)

    def stats(self, request: Request) -> RewiringStats:
        """Return what the rule of a request meets."""
        return RewiringStats() if request.rule is gradient else self.rewired


cache: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
_lock = threading.RLock()  # reentrant: a garbage collection while it is held may call `_forget`


def traced_graph(request: Request, inputs: Sequence[Any], k: int) -> TracedGraph:
    """Return the graph of one explanation, from the cache where it is there.

    Args:
        inputs: eager tensors.
        k: the number of class ids for each sample; 0 where the target is None, "top:K" or a function.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    key = key_of(request, inputs, k or repr(request.target))
    if key is None:
        return trace(request, inputs, k)
    graph: TracedGraph = cached(request, key) or trace(request, inputs, k)
    if graph.passed.chosen.is_general:
        keep(request, key, graph)
    return graph


def cached(request: Request, key: tuple[Hashable, ...]) -> Any:
    """Return the graph that the cache has under a key for the rule of a request; None where it has none."""
    rules: tuple[Hashable, ...] = (_ALL_RULES, request.rule) if switches_of(request) else (request.rule,)
    with _lock:
        for rule in rules:
            if (rule, *key) in cache:
                cache.move_to_end((rule, *key))
                return cache[rule, *key][1]
    return None


def keep(request: Request, key: tuple[Hashable, ...], graph: Any) -> None:
    """Put a graph into the cache, for as long as its model lives; `graph.is_switched` tells whether for all rules."""
    whole_key = (_ALL_RULES if graph.is_switched else request.rule, *key)
    with _lock:
        cache[whole_key] = weakref.ref(request.model, lambda _: _forget(whole_key)), graph
        while len(cache) > MAX_GRAPHS:
            cache.popitem(last=False)


def _forget(key: Hashable) -> None:
    with _lock:
        cache.pop(key, None)


def key_of(request: Request, inputs: Sequence[Any], target: Hashable) -> tuple[Hashable, ...] | None:
    """Return the cache's key of a graph, its rule aside; None where the graph depends on what no key can tell."""
    model = request.model
    is_function = isinstance(model, tf.types.experimental.PolymorphicFunction)
    if callable(request.target) or isinstance(request.target, Target) or request.is_inside:
        return None
    if not is_function and not isinstance(model, keras.Layer):
        return None
    shapes = tuple((tuple(x.shape), x.dtype.name) for x in inputs)
    options = (request.through, request.activations, request.training)
    arguments = (request.structure, repr(request.output), request.head)
    return (id(model), _attributes(model) if not is_function else (), shapes, target, *options, *arguments)


def _attributes(model: Any) -> tuple[Hashable, ...]:
    """Return all layers with their plain attributes and functions: `layer.activation = ...` makes another graph."""
    attributes: list[Hashable] = []
    for layer in all_layers(model):
        attributes.append(weakref.ref(layer))
        for name, value in vars(layer).items():
            kind = type(value)
            if kind in _PLAIN_TYPES:
                if name[0] != "_":
                    attributes += name, value
            elif kind is types.FunctionType:
                attributes += name, weakref.ref(value)
    return tuple(attributes)


def trace(request: Request, inputs: Sequence[Any], k: int) -> TracedGraph:
    """Trace the graph of one explanation; arguments and errors as for `traced_graph`."""
    properties: dict[str, Any] = {}
    swap = request.through == "swap" and request.rule is not gradient
    network = swapped(request) if swap else request.model
    switches = [tf.TensorSpec(flag.shape, flag.dtype) for flag in switches_of(request)]

    def explain_batch(*arguments: Any) -> tuple[Any, ...]:
        sources, ids = arguments[: len(inputs)], arguments[len(inputs)] if k else None
        passed = properties["passed"] = run_forward(request, network, sources, ids=ids)

        def maps() -> list[Any]:
            return maps_of(passed.chosen.columns, sources)

        rule = switched_rule(*arguments[-2:]) if switches else request.rule
        values, properties["stats"] = under_rule(request, rule, passed, sources, maps, MARK if swap else None)
        explained = tf.zeros((), tf.int64) if passed.chosen.ids is None else passed.chosen.ids
        return passed.chosen.scores, explained, *values

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    specs += [tf.TensorSpec((inputs[0].shape[0], k), tf.int64)] if k else []
    graph = tf.function(explain_batch, autograph=False).get_concrete_function(*specs, *switches)
    passed, stats = properties["passed"], properties["stats"]
    written = tuple(graph.graph.variables) if passed.writes else ()
    return TracedGraph(graph, passed, stats or RewiringStats(), written, bool(switches) and stats is not None)


def under_rule(
    request: Request,
    rule: Any,
    passed: Forward,
    sources: Sequence[Any],
    differentiate: Callable[[], list[Any]],
    mark: str | None = None,
) -> tuple[list[Any], RewiringStats | None]:
    """Differentiate under a rule in the graph that is being traced; return the gradients, and what the rule met.

    For the plain gradient that is nothing, None, where a rule could not act.

    Args:
        rule: the request's own, or a switched one.
        mark: see `Rewiring`.

    Raises:
        RuleError: nothing was rewired, or something cannot be seen into.
    """
    if rule is gradient or (request.rule is gradient and any(op.type in FUNCTION_CALLS for op in passed.operations)):
        return differentiate(), None  # the body of a called function would be computed twice for a rule
    rewiring = Rewiring(request, rule, mark)
    try:
        rewiring.attach(passed.operations, sources)
        gradients = differentiate()
        rewiring.finish()
    except RuleError:
        rewiring.detach()
        if request.rule is not gradient:
            raise
        return differentiate(), None
    return gradients, rewiring.stats
