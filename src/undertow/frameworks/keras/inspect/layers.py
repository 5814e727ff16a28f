"""A network's layers: which hold weights, a copy with some of them initialised anew, their values and gradients."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from ....errors import InputError
from ....outputs import Path
from ....rules import gradient
from ...base import BEFORE, Request
from ...keras_layers import channel_axis, own_variables
from ...own_passes import own_pass
from ...results import Explanation, LayerGradients, RewiringStats
from ..arrays import channels_last as config_channels_last
from ..arrays import to_numpy
from ..calls import refuse_non_class_scores, refuse_non_finite, refuse_other_backends, restored, tensors
from ..explain.forward import Forward, run_forward
from ..explain.switching import switched_rule, switches_of
from ..explain.tracing import cached, keep, key_of, under_rule
from ..internals import call_with
from ..layers import named_modules
from ..outputs import layer_named, reached, recorded_outputs, refuse_unseen
from ..targets import Chosen
from ..weights import Reinitialized, on_network
from ..weights import reinitialized as reinitialized


def channels_last(model: Any, x: Any) -> bool:
    """Whether a model takes images `(B, H, W, C)`, as in Keras unless it is set otherwise."""
    return config_channels_last()


def scores(model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores, `(B, classes)`, before a softmax or sigmoid at its end.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    returned = _forward_graph(model, x, output)[1]
    refuse_non_class_scores(returned, len(x))
    return to_numpy(returned)


def layers(model: Any, x: Any) -> list[str]:
    """List the layers that hold weights of their own and run, in the order in which the pass first reads those.

    What a `Normalization` has learnt of the data is no weight. A plain function has no layers.
    """
    network = model.network if isinstance(model, Reinitialized) else model
    if not isinstance(network, keras.Layer):
        return []
    names = {
        id(variable.handle): named.name
        for named in named_modules(network)
        if not isinstance(named.module, keras.layers.Normalization)
        for variable in own_variables(named.module)
    }
    read = (names.get(id(capture)) for capture in _forward_graph(network, x, None)[0].captured_inputs)
    return list(dict.fromkeys(name for name in read if name is not None))


def _forward_graph(model: Any, x: Any, output: Path | None) -> tuple[Any, Any]:
    """Return the graph of a model's scores before its head, and the scores of one batch."""
    refuse_other_backends()
    (batch,) = tensors((x,))
    request, values = on_network(_request(model, batch, output))
    key = key_of(request, (batch[:1],), "scores")
    traced: _TracedScores | None = None if key is None else cached(request, key)
    with own_pass():
        if traced is None:
            traced = _trace_scores(request, batch)
            if key is not None:
                keep(request, key, traced)
        try:
            return traced.function, _run_scores(traced, batch, values)
        except tf.errors.InvalidArgumentError:  # a model for batches of one size alone
            traced = _traced_scores(request, batch.shape)
            return traced.function, _run_scores(traced, batch, values)


def _request(model: Any, batch: Any, output: Path | None) -> Request:
    return Request(model, (batch,), gradient, "gradient", None, "graph", "relu-like", False, output, BEFORE)


@dataclass(frozen=True, eq=False)
class _TracedScores:
    """A graph that gives the scores of a batch before a head."""

    function: Any
    writes: bool
    is_switched: bool = False


def _trace_scores(request: Request, batch: Any) -> _TracedScores:
    """Trace a model's scores for batches of any size, or, where its code needs the number, of this one's."""
    try:
        return _traced_scores(request, [None, *batch.shape[1:]])
    except (TypeError, ValueError):
        return _traced_scores(request, batch.shape)


def _traced_scores(request: Request, shape: Any) -> _TracedScores:
    writes: list[bool] = []

    def run(x: Any) -> Any:
        passed = run_forward(request, request.model, [x], _all_scores)
        writes.append(passed.writes)
        return passed.chosen.scores

    spec = tf.TensorSpec(shape, request.inputs[0].dtype)
    return _TracedScores(tf.function(run, autograph=False).get_concrete_function(spec), writes[-1])


def _run_scores(traced: _TracedScores, batch: Any, values: Mapping[int, Any]) -> Any:
    with restored(traced.function.graph.variables if traced.writes else ()):
        return call_with(traced.function, [batch], values)


def _all_scores(output: Any) -> Chosen:
    return Chosen(output, None, [(output, tf.ones_like(output))])


@dataclass(frozen=True, eq=False)
class _TracedLayers:
    """A graph that gives scores, ids, layers' values, and gradients there and at the first input."""

    function: Any
    passed: Forward
    stats: RewiringStats
    reached: dict[str, frozenset[int]]
    is_switched: bool


def layer_gradients(
    request: Request, layers: Sequence[str], directions: npt.NDArray[Any] | None = None
) -> LayerGradients:
    """Explain, and return what the named layers returned and the gradients that flowed back to them.

    A layer that does not run between the input and the scores, or returns no tensor, is left out.

    Args:
        directions: `(K, classes)`: explain these weighted sums of the scores in place of the request's targets.

    Raises:
        InputError: a layer is not there, or runs out of sight, or the request is not for the graph.
    """
    refuse_other_backends()
    _ = request.activation_rule  # a table is refused before anything is traced
    if request.through != "graph":
        raise InputError("layers are read through='graph' alone")
    inputs = tensors(request.inputs, request.is_plain)
    request, values = on_network(request)
    for layer in layers:
        layer_named(request.model, layer)
    with own_pass():
        graph = _layers_graph(request, inputs, tuple(layers), directions)
        extra = [] if directions is None else [tf.constant(directions)]
        with restored(graph.function.graph.variables if graph.passed.writes else ()):
            found, ids, *rest = call_with(graph.function, [*inputs, *extra, *switches_of(request)], values)
    refuse_non_finite(found)
    passed, names = graph.passed, list(graph.reached)
    n = len(names)
    single = directions is None and passed.chosen.single
    explained = found[:, 0] if single else found
    targets = None if passed.chosen.ids is None else (ids[:, 0] if single else ids)
    stats = RewiringStats() if request.rule is gradient else deepcopy(graph.stats)
    arrays = [to_numpy(tensor) for tensor in rest]
    return LayerGradients(
        Explanation(
            (None,) * len(inputs), targets, explained, stats, config_channels_last(), dict(passed.acting), passed.head
        ),
        values=dict(zip(names, arrays[:n], strict=True)),
        gradients=dict(zip(names, arrays[n : 2 * n], strict=True)),
        at_input=arrays[2 * n],
        channel_axes={name: channel_axis(layer_named(request.model, name)) for name in names},
        reached=graph.reached,
    )


def _layers_graph(
    request: Request, inputs: Sequence[Any], layers: tuple[str, ...], directions: npt.NDArray[Any] | None
) -> _TracedLayers:
    key = key_of(request, inputs, (_label(request.target), layers, None if directions is None else directions.shape))
    if key is None:
        return _trace_layers(request, inputs, layers, directions)
    graph: _TracedLayers = cached(request, key) or _trace_layers(request, inputs, layers, directions)
    keep(request, key, graph)
    return graph


def _label(target: Any) -> str:
    """Return a text that differs where class ids do."""
    return repr(target if target is None or isinstance(target, str) else np.asarray(target).tolist())


def _trace_layers(
    request: Request, inputs: Sequence[Any], layers: tuple[str, ...], directions: npt.NDArray[Any] | None
) -> _TracedLayers:
    told: dict[str, Any] = {}
    switches = [tf.TensorSpec(flag.shape, flag.dtype) for flag in switches_of(request)]

    def run(*arguments: Any) -> Any:
        sources, outputs = arguments[: len(inputs)], dict[str, Any]()
        choose = None if directions is None else partial(_weighted, arguments[len(inputs)])
        with recorded_outputs(request.model, layers, outputs):
            passed = told["passed"] = run_forward(request, request.model, sources, choose)
        first = next(source for source in sources if source.dtype.is_floating)
        rule = switched_rule(*arguments[-2:]) if switches else request.rule
        differentiate = partial(_gradients, passed.chosen.columns, [*outputs.values(), first])
        gradients, told["stats"] = under_rule(request, rule, passed, sources, differentiate)
        told["reached"] = {name: reached(tensor, sources) for name, tensor in outputs.items()}
        ids = tf.zeros((), tf.int64) if passed.chosen.ids is None else passed.chosen.ids
        return passed.chosen.scores, ids, *map(tf.identity, outputs.values()), *gradients

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    specs += [] if directions is None else [tf.TensorSpec(directions.shape, directions.dtype)]
    function = tf.function(run, autograph=False).get_concrete_function(*specs, *switches)
    unseen = [layer for layer in layers if layer.partition("@")[0] not in told["reached"]]
    refuse_unseen(request.model, unseen, function.captured_inputs)
    stats, is_switched = told["stats"], bool(switches) and told["stats"] is not None
    return _TracedLayers(function, told["passed"], stats or RewiringStats(), told["reached"], is_switched)


def _weighted(directions: Any, scores: Any) -> Chosen:
    sums = tf.matmul(scores, tf.cast(directions, scores.dtype), transpose_b=True)
    columns = [(sums[:, k], tf.ones_like(sums[:, k])) for k in range(directions.shape[0])]
    return Chosen(sums, None, columns, single=False)


def _gradients(columns: Sequence[tuple[Any, Any]], tensors: Sequence[Any]) -> list[Any]:
    """Return the gradients at each tensor, `(B, K, ...)`, zeros where there are none."""
    rows = [tf.gradients(y, tensors, grad_ys=begin, unconnected_gradients="zero") for y, begin in columns]
    return [tf.stack([tf.convert_to_tensor(g) for g in gradients], 1) for gradients in zip(*rows, strict=True)]
