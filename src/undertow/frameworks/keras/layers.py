"""The layers of a network: their dotted names and kinds; and what identifies a network."""

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

    A name joins the names of the layers on the way with dots, without the network's own: "backbone.conv1".

    Raises:
        ModelError: the model is no Keras layer.
        FrameworkError: Keras does not run on TensorFlow.
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
        name = path + child.name + (f"_again{count}" if count else "")  # siblings may share a name
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
    """Return what identifies a network: its class, the hashes of its structure and its weights, its precision.

    The mode of a frozen network (`trainable=False`) is "evaluation": its run is only continued with the same weights.
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
    """Return the SHA-256 of a network's weights, the same from whichever file they were loaded.

    Hashed are, in Keras's order, each variable's own name ("kernel"), dtype, shape and values; not the names of the
    layers, which Keras numbers anew in each process.
    """
    digest = hashlib.sha256()
    for variable in module.weights:
        value = np.ascontiguousarray(variable.numpy())
        shape = "x".join(map(str, value.shape))
        digest.update(f"{variable.name}\0{variable.dtype}\0{shape}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
