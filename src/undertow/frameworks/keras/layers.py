"""The layers of a network: their dotted paths, their kinds, and what tells one network from another."""

import hashlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from ...errors import ModelError
from ..base import NamedModule
from .calls import refuse_other_backends
from .internals import children

_POOLS = tuple(
    getattr(keras.layers, f"{kind}Pooling{n}D")
    for kind in ("Max", "Average", "GlobalMax", "GlobalAverage")
    for n in (1, 2, 3)
)
_CONVS = (
    *("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    *("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
)
_NORMS = ("BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization")
_KINDS: dict[str, tuple[type, ...]] = {
    "conv": tuple(getattr(keras.layers, name) for name in _CONVS),
    "linear": (keras.layers.Dense, keras.layers.EinsumDense),
    "norm": tuple(getattr(keras.layers, name) for name in _NORMS),
    "relu": (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.PReLU),
    "pool": _POOLS,
}
_RELUS = (keras.activations.relu, keras.activations.relu6, keras.activations.leaky_relu)


def named_modules(model: Any) -> list[NamedModule]:
    """List every layer that can be a site, in the order of definition, each once with all its names.

    A name is the path of layer names, with dots: "backbone.conv1". The network's own name is not part of it.

    Raises:
        ModelError: it is no layer.
        FrameworkError: Keras runs on something else than TensorFlow.
    """
    refuse_other_backends()
    if not isinstance(model, keras.Layer):
        raise ModelError(f"model is a {type(model).__name__}, not a keras.Model or keras.Layer")
    names: dict[int, tuple[Any, list[str]]] = {}
    for name, layer in _layers_within(model, ""):
        names.setdefault(id(layer), (layer, []))[1].append(name)
    named = [NamedModule(tuple(own), _kind(layer), _types(layer), layer) for layer, own in names.values()]
    return named or [NamedModule(("",), _kind(model), _types(model), model)]


def _layers_within(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
    name_counts: dict[str, int] = {}
    for child in children(layer):
        if isinstance(child, keras.layers.InputLayer):
            continue
        count = name_counts.get(child.name, 0)
        name_counts[child.name] = count + 1
        name = path + child.name + (f"_again{count}" if count else "")  # of siblings with one name
        yield name, child
        yield from _layers_within(child, f"{name}.")


def _kind(layer: Any) -> str:
    if isinstance(layer, keras.layers.Activation) and layer.activation in _RELUS:
        return "relu"
    return next((kind for kind, types in _KINDS.items() if isinstance(layer, types)), type(layer).__name__.lower())


def _types(layer: Any) -> tuple[str, ...]:
    mro = type(layer).__mro__
    return tuple(cls.__name__ for cls in mro[: mro.index(keras.Layer)]) or (type(layer).__name__,)


def identity(model: Any) -> dict[str, Any]:
    """Return what tells a network from others: its class, the shape of its structure, its weights, its precision.

    A frozen network (`trainable=False`) counts as one in evaluation: going on with its run takes the same weights.
    """
    digest = hashlib.sha256()
    for named in named_modules(model):
        digest.update(f"{named.name}\0{named.types[0]}\0".encode())
    for variable in model.weights:
        digest.update(f"{variable.name}\0{tuple(variable.shape)}\0{variable.dtype}\0".encode())
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "structure_sha256": digest.hexdigest(),
        "weights_sha256": weights_sha256(model),
        "mode": "training" if model.trainable_weights else "evaluation",
        "parameters": sum(int(np.prod(variable.shape)) for variable in model.weights),
        "precision": ", ".join(sorted({variable.dtype for variable in model.weights})),
        "device": ", ".join(sorted({variable.value.device for variable in model.weights})),
        "framework": f"keras {keras.__version__} on {keras.backend.backend()}",
    }


def weights_sha256(module: Any) -> str:
    """The SHA-256 of a network's weights, the same whatever file they came from.

    For each in Keras's order: its own name ("kernel"), dtype and shape as for PyTorch, then its values. Layers' names
    are left out, since Keras numbers them anew in each process.
    """
    digest = hashlib.sha256()
    for variable in module.weights:
        value = np.ascontiguousarray(variable.numpy())
        shape = "x".join(map(str, value.shape))
        digest.update(f"{variable.name}\0{variable.dtype}\0{shape}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
