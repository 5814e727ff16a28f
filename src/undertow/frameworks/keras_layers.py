"""Keras's layers, whatever Keras runs on: their dotted names, their kinds, their own weights, and these drawn anew."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from ..errors import ModelError, one_line

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


def children(layer: Any) -> list[Any]:
    """Return the layers directly within one; of those that are no model, Keras has no public list."""
    return list(layer.layers if isinstance(layer, keras.Model) else layer._layers)


def own_variables(layer: Any) -> list[Any]:
    """Return the weights that a layer holds itself, not those of the layers within; in public both come in one list."""
    return list(layer._trainable_variables) + list(layer._non_trainable_variables)


def value_of(variable: Any) -> npt.NDArray[Any]:
    """Copy a variable to NumPy. Keras's own ways do so by what NumPy 2 warns of."""
    value = variable.value
    value = value.detach().cpu() if hasattr(value, "detach") else value
    return np.array(value.numpy() if hasattr(value, "numpy") else value)


def named_layers(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every layer within one, with its dotted name, such as "backbone.conv1"; one in two places comes twice."""
    counts: dict[str, int] = {}
    for child in children(layer):
        if isinstance(child, keras.layers.InputLayer):
            continue
        count = counts.get(child.name, 0)
        counts[child.name] = count + 1
        name = path + child.name + (f"_again{count}" if count else "")  # siblings may share a name
        yield name, child
        yield from named_layers(child, f"{name}.")


def kind(layer: Any) -> str:
    """Return a layer's kind: "conv", "linear", "norm", "relu", "pool", or its class in small letters."""
    if isinstance(layer, keras.layers.Activation) and layer.activation in _RELUS:
        return "relu"
    return next((kind for kind, types in _KINDS.items() if isinstance(layer, types)), type(layer).__name__.lower())


def types(layer: Any) -> tuple[str, ...]:
    """Return the names of a layer's classes, up to `keras.Layer`."""
    mro = type(layer).__mro__
    return tuple(cls.__name__ for cls in mro[: mro.index(keras.Layer)]) or (type(layer).__name__,)


def channel_axis(layer: Any) -> int:
    """Return where a layer's output has its channels, 1 or -1: as it says itself, else as Keras is set."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return 1 if layer.axis == 1 else -1
    first = getattr(layer, "data_format", None) or keras.config.image_data_format()
    return 1 if first == "channels_first" else -1


def cloned(model: Any, names: Sequence[str], seed: int) -> Any:
    """Return a clone of a model, with the same weights but for those of the named layers, which are redrawn.

    Raises:
        ModelError: Keras cannot clone it.
    """
    try:
        clone = keras.models.clone_model(model)
        for variable, weight in zip(clone.weights, model.weights, strict=True):
            variable.assign(value_of(weight))
    except Exception as error:
        raise ModelError(
            f"Keras cannot clone the model ({one_line(error)[:200]}), so its weights cannot be initialised anew"
        ) from error
    for (name, layer), (_, twin) in zip(named_layers(model), named_layers(clone), strict=True):
        if name in names:
            for variable, value in zip(own_variables(twin), redrawn(layer, name, seed), strict=True):
                variable.assign(value)
    return clone


def redrawn(layer: Any, name: str, seed: int) -> list[npt.NDArray[Any]]:
    """Return a layer's own weights as they would be in a network initialised anew, from a seed of the layer's own.

    The layer is built once more from its own configuration, by its own initialisers. What a layer that cannot be built
    so holds is shuffled: the same values, at other positions.
    """
    values = _of_a_new_layer(layer, f"{seed}:{name}")
    if values is not None:
        return values
    numbers = np.random.default_rng(zlib.crc32(f"{seed}:{name}".encode()))
    old = [value_of(variable) for variable in own_variables(layer)]
    return [numbers.permutation(value.ravel()).reshape(value.shape) for value in old]


def _of_a_new_layer(layer: Any, seed: str) -> list[npt.NDArray[Any]] | None:
    """Return the own weights of a new layer of the same configuration; None where there cannot be one."""
    try:
        fresh = type(layer).from_config(_with_seeds(layer.get_config(), seed))
        fresh.build_from_config(layer.get_build_config())
        values = [value_of(variable) for variable in own_variables(fresh)]
    except Exception:  # a class of the user's own, which may need anything
        return None
    shapes = [tuple(variable.shape) for variable in own_variables(layer)]
    return values if values and [value.shape for value in values] == shapes else None


def _with_seeds(config: Any, seed: str) -> Any:
    """Return a configuration in which each initialiser draws from a seed of its own."""
    if isinstance(config, Mapping):
        return {
            key: zlib.crc32(seed.encode()) >> 1 if key == "seed" else _with_seeds(value, f"{seed}/{key}")
            for key, value in config.items()
        }
    return config
