"""A network's layers: which hold weights, a copy with some of them shuffled, their values and gradients.

A layer's name is the path of its weights: an attribute's in nnx and Equinox, a module's in linen, a key's in a
dictionary of parameters. Its output is what its call gives, see `places.py`.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ....outputs import Path
from ....rules import gradient
from ...base import BEFORE, Request
from ...own_passes import own_pass
from ...results import LayerGradients
from ..arrays import to_numpy
from ..explain import arrays, calls_of, carried_back, forward_scores, has_channels_last
from ..explain.program import trace
from ..explain.rewiring import NothingRewired
from ..graph import CALLS, REMATERIALISED
from ..models import JaxNetwork, network_of
from ..targets import Directions


def channels_last(model: Any, x: Any) -> bool:
    """Whether a model takes images `(B, H, W, C)`: as its library does, or as the sizes of `x` say; else it does."""
    return has_channels_last(network_of(model), x)


def scores(model: Callable[..., Any], x: Any, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores, `(B, classes)`, before a softmax or sigmoid at its end.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return forward_scores(model, x, output, BEFORE)


def layers(model: Any, x: Any) -> list[str]:
    """List the layers that hold weights and run, in the order in which their weights are first read.

    A function that is closed over its weights has none.
    """
    network, request = network_of(model), _plain_request(model, x)
    inputs = arrays(request)
    with own_pass():
        graph = trace(request, network, inputs, CALLS | REMATERIALISED).graph
    weights = graph.arguments[-len(network.weights) - len(inputs) : -len(inputs)]
    names = {v: layer_of(path) for v, path in zip(weights, network.paths, strict=True) if v.is_float}
    read = (value for node in graph.nodes for value in node.inputs)
    return list(dict.fromkeys(names[value] for value in read if value in names))


def _plain_request(model: Any, x: Any) -> Request:
    return Request(model, (x,), gradient, "gradient", None, "graph", "relu-like", True)


def layer_of(path: str) -> str:
    """Return the layer that a weight belongs to.

    >>> layer_of("block.conv.kernel"), layer_of("kernel")
    ('block.conv', 'kernel')
    """
    return path.rpartition(".")[0] or path


def reinitialized(model: Any, names: Sequence[str], seed: int) -> JaxNetwork:
    """Return the model with the weights of the named layers shuffled, each from a seed of its own; the rest is shared.

    JAX's modules do not keep how their weights were drawn, so these are the same values at other positions.
    """
    network = network_of(model)
    weights = list(network.weights)
    for i, path in enumerate(network.paths):
        if layer_of(path) in names and jnp.issubdtype(weights[i].dtype, jnp.floating):
            generator = np.random.default_rng(zlib.crc32(f"{seed}:{path}".encode()))
            values = np.asarray(weights[i])
            weights[i] = jnp.asarray(generator.permutation(values.reshape(-1)).reshape(values.shape))
    return network.with_weights(weights)


def layer_gradients(
    request: Request, layers: Sequence[str], directions: npt.NDArray[Any] | None = None
) -> LayerGradients:
    """Explain, and return what the named layers returned and the gradients that flowed back to them.

    A layer without a scope or a checkpoint of its name on the way is left out, unless it is the only one.

    Args:
        directions: `(K, classes)`: explain these weighted sums of the scores in place of the request's targets.

    Raises:
        InputError: the only layer is not there.
    """
    if directions is not None:
        request = replace(request, target=Directions(directions))
    explanation = carried_back(request)
    single = explanation.scores.ndim == 1
    values: dict[str, npt.NDArray[Any]] = {}
    gradients: dict[str, npt.NDArray[Any]] = {}
    reached: dict[str, frozenset[int]] = {}
    for layer in layers:
        with suppress(InputError) if len(layers) > 1 else nullcontext():
            for _, inside, inputs in calls_of(request, layer):
                key = inside.structure.removesuffix("@0")
                values[key] = to_numpy(jnp.asarray(inside.inputs[0]))
                gradients[key] = _with_targets(_gradient_at(inside), single)
                reached[key] = inputs
    at_input = next(m for m in explanation.maps if m is not None)
    network = network_of(request.model)
    axis = -1 if network.channels_last else None
    return LayerGradients(
        explanation=replace(explanation, maps=(None,) * len(request.inputs)),
        values=values,
        gradients=gradients,
        at_input=_with_targets(at_input, single),
        channel_axes=dict.fromkeys(values, axis),
        reached=reached,
    )


def _gradient_at(request: Request) -> Any:
    """Return the gradient at a place under the rule, which acts on what there is between the place and the scores."""
    try:
        return carried_back(request).maps[0]
    except NothingRewired:
        return carried_back(replace(request, rule=gradient, rule_name="gradient")).maps[0]


def _with_targets(values: Any, single: bool) -> npt.NDArray[Any]:
    """Return a map as `(B, K, ...)`."""
    array = to_numpy(jnp.asarray(values))
    return array[:, None] if single else array
