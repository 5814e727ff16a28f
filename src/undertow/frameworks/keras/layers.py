"""The layers of a network: their dotted names and kinds; and what identifies a network."""

import hashlib
from typing import Any

import keras
import numpy as np

from ...errors import InputError, ModelError
from ..base import NamedModule
from ..keras_layers import kind, named_layers, types
from .calls import refuse_other_backends


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
    for name, layer in named_layers(model):
        names.setdefault(id(layer), (layer, []))[1].append(name)
    named = [NamedModule(tuple(own), kind(layer), types(layer), layer) for layer, own in names.values()]
    return named or [NamedModule(("",), kind(model), types(model), model)]


def identity(model: Any) -> dict[str, Any]:
    """Return what identifies a network: its class, the hashes of its structure and its weights, its precision.

    The mode of a frozen network (`trainable=False`) is "evaluation": its run is only continued with the same weights.

    Raises:
        InputError: it was not built yet: Keras would build it in a graph, on the first call.
    """
    if not model.built:
        raise InputError("the model has no weights yet; call it once on a batch, then record it")
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
