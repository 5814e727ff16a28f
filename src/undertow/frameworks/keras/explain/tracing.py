"""The traced graph of one explanation, forward and backward, and a cache of such graphs.

A trace takes seconds where a call takes milliseconds, so the last 32 graphs of Keras models and `tf.function`s are
cached. The key has the model (weakly), the shapes and dtypes of the inputs, the rule, the kind of target, and the plain
attributes of every layer, on which a graph depends too. Weights are read when a graph runs, so new values count at
once. A plain Python function, as model or as target, can close over anything and is traced for each call.
"""

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from ....errors import InputError
from ....outputs import head_of
from ....rules import gradient
from ....targets import Target
from ...base import AS_IS, Request
from ...results import RewiringStats
from ..calls import run, scores_of
from ..internals import all_layers
from ..targets import chosen_scores
from .acting import what_acts
from .gradients import Rewiring
from .heads import before_head
from .swap import MARK, swapped

MAX_GRAPHS = 32
_WRITING_OPS = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "ResourceScatterUpdate")
_PLAIN_TYPES = frozenset((bool, int, float, str, bytes, type(None)))


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """One explanation as a graph.

    Attributes:
        run: takes the inputs, and class ids `(B, K)` int64 where the target is such; returns scores and ids `(B, K)`,
            then a map `(B, K, ...)` for each input of floating point.
        classes: how many scores the model gives; None where the target is none of classes.
        stats: what the rule met.
        written: the variables that it may write, to be put back afterwards.
        head: the softmax or sigmoid that the model ends in; "" where it does not, or the target is a function.
        single: each sample has one target.
        is_general: it serves other class ids too.
        acting: what acts in it as in training, by name and how often.
    """

    run: Any
    classes: int | None
    stats: RewiringStats
    written: tuple[Any, ...]
    head: str
    single: bool
    is_general: bool
    acting: dict[str, int]


cache: OrderedDict[Hashable, tuple[Any, TracedGraph]] = OrderedDict()
_lock = threading.RLock()  # reentrant: a garbage collection while it is held may call `_forget`


def traced_graph(request: Request, inputs: Sequence[Any], k: int) -> TracedGraph:
    """Return the graph of one explanation, from the cache where it is there.

    Args:
        inputs: eager tensors.
        k: the number of class ids for each sample; 0 where the target is None, "top:K" or a function.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    key = _key(request, inputs, k)
    if key is None:
        return trace(request, inputs, k)
    with _lock:
        if key in cache:
            cache.move_to_end(key)
            return cache[key][1]
    graph = trace(request, inputs, k)
    if not graph.is_general:
        return graph
    with _lock:
        cache[key] = weakref.ref(request.model, lambda _: _forget(key)), graph
        while len(cache) > MAX_GRAPHS:
            cache.popitem(last=False)
    return graph


def _forget(key: Hashable) -> None:
    with _lock:
        cache.pop(key, None)


def _key(request: Request, inputs: Sequence[Any], k: int) -> Hashable | None:
    """Return the cache's key of a graph; None where the graph depends on what no key can tell."""
    model = request.model
    is_function = isinstance(model, tf.types.experimental.PolymorphicFunction)
    if callable(request.target) or isinstance(request.target, Target):
        return None
    if not is_function and not isinstance(model, keras.Layer):
        return None
    shapes = tuple((tuple(x.shape), x.dtype.name) for x in inputs)
    target = k or repr(request.target)
    options = (request.rule, request.through, request.activations, request.training)
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
    properties: dict[str, Any] = {"stats": RewiringStats()}
    swap = request.through == "swap" and request.rule is not gradient
    network = swapped(request) if swap else request.model

    def explain_batch(*arguments: Any) -> tuple[Any, ...]:
        sources, ids = arguments[: len(inputs)], arguments[len(inputs)] if k else None
        output = run(network, *request.fill(sources), request.training)
        if callable(request.target):
            output = output if request.output is None else head_of(output, request.output)
        else:
            output = scores_of(output, request.output)
            before, properties["head"] = before_head(output)
            output = output if request.head == AS_IS else before
        chosen = properties["chosen"] = chosen_scores(output, request.target, ids, request.batch)
        if chosen.ids is not None:
            properties["classes"] = output.shape[1]
        rewiring = None
        properties["acting"] = what_acts([begin for begin, _ in chosen.columns], request.training)
        operations = tf.compat.v1.get_default_graph().get_operations()
        if request.rule is not gradient:
            rewiring = Rewiring(request, MARK if swap else None)
            rewiring.attach(operations, sources)
        maps = _maps(chosen.columns, sources)
        if rewiring is not None:
            rewiring.finish()
            properties["stats"] = rewiring.stats
        properties["writes"] = any(op.type in _WRITING_OPS for op in operations)
        return chosen.scores, tf.zeros((), tf.int64) if chosen.ids is None else chosen.ids, *maps

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    specs += [tf.TensorSpec((inputs[0].shape[0], k), tf.int64)] if k else []
    graph = tf.function(explain_batch, autograph=False).get_concrete_function(*specs)
    written = tuple(graph.graph.variables) if properties["writes"] else ()
    head, chosen = properties.get("head", ""), properties["chosen"]
    return TracedGraph(
        graph,
        properties.get("classes"),
        properties["stats"],
        written,
        head,
        chosen.single,
        chosen.is_general,
        properties["acting"],
    )


def _maps(columns: Sequence[tuple[Any, Any]], sources: Sequence[Any]) -> list[Any]:
    """Return, for each input of floating point, a map for each target: `(B, K, ...)`."""
    wanted = [source for source in sources if source.dtype.is_floating]
    rows = [tf.gradients(scores, wanted, grad_ys=begin) for scores, begin in columns]
    if all(values is None for values in rows[0]) and len(sources) == 1:
        raise InputError("the scores do not depend on x by any gradient (tf.stop_gradient, or rounding, on the way)")
    for index, source in enumerate(sources):
        if source.dtype.is_floating and rows[0][[s is source for s in wanted].index(True)] is None:
            raise InputError(f"input {index} does not influence the scores; bind it, as with functools.partial")
    return [tf.stack([tf.convert_to_tensor(values) for values in maps], 1) for maps in zip(*rows, strict=True)]
