"""A network with some of its layers initialised anew, which shares everything else with the network itself."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..base import Request
from .calls import run
from .internals import call_with, own_variables
from .layers import named_modules


class Reinitialized(keras.Layer):  # type: ignore[misc]
    """A network that reads other variables in the places of some of its own.

    It is called as the network is, out of training, and can be differentiated. A graph that was traced of the network
    serves it as well: only what the graph reads when it runs is another.
    """

    network: Any
    _variables: dict[int, Any]

    def __init__(self, network: Any, variables: Mapping[int, Any]) -> None:
        """Take a network, and by the id of each variable's handle the variable to read in its place."""
        super().__init__()
        object.__setattr__(self, "network", network)  # past Keras, which would track it as a part of this one
        object.__setattr__(self, "_variables", dict(variables))

    @property
    def values(self) -> dict[int, Any]:
        """By the id of a variable's handle, the handle of the variable that is read in its place."""
        return {key: variable.handle for key, variable in self._variables.items()}

    def call(self, *args: Any, training: bool = False) -> Any:
        """Run the network."""
        inputs = [tf.convert_to_tensor(x) for x in args]
        function = tf.function(lambda *xs: run(self.network, xs, {}, training), autograph=False)
        concrete = function.get_concrete_function(*(tf.TensorSpec(x.shape, x.dtype) for x in inputs))
        return call_with(concrete, inputs, self.values)


def on_network(request: Request) -> tuple[Request, Mapping[int, Any]]:
    """Return a request on the network itself, and what is read in the places of some of its variables."""
    if isinstance(request.model, Reinitialized):
        return replace(request, model=request.model.network), request.model.values
    return request, {}


def reinitialized(model: Any, names: Sequence[str], seed: int) -> Reinitialized:
    """Return the network with the named layers initialised anew, each from a seed of its own.

    A layer is built once more from its own configuration, by its own initialisers. What a layer that cannot be built so
    holds is shuffled: the same values, at other positions.
    """
    layers = {name: named.module for named in named_modules(model) for name in named.names}
    variables: dict[int, Any] = {}
    for name in names:
        own = own_variables(layers[name])
        drawn = _drawn_anew(layers[name], f"{seed}:{name}")
        if drawn is None:
            numbers = np.random.default_rng(zlib.crc32(f"{seed}:{name}".encode()))
            drawn = [numbers.permutation(v.numpy().ravel()).reshape(v.shape) for v in own]
        for variable, value in zip(own, drawn, strict=True):
            variables[id(variable.handle)] = tf.Variable(tf.cast(value, variable.dtype), trainable=variable.trainable)
    return Reinitialized(model, variables)


def _drawn_anew(layer: Any, seed: str) -> list[Any] | None:
    """Return the values of a layer's own weights in a new layer of the same configuration; None where there is none."""
    try:
        config = _with_seeds(layer.get_config(), seed)
        fresh = type(layer).from_config(config)
        fresh.build_from_config(layer.get_build_config())
        values = [variable.numpy() for variable in own_variables(fresh)]
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
