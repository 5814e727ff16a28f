"""A network with some of its layers initialised anew, which shares everything else with the network itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from ..base import Request
from ..keras_layers import own_variables, redrawn
from .calls import run
from .internals import call_with
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
    """Return the network with the named layers initialised anew, each from a seed of its own; see `redrawn`."""
    layers = {name: named.module for named in named_modules(model) for name in named.names}
    variables: dict[int, Any] = {}
    for name in names:
        for variable, value in zip(own_variables(layers[name]), redrawn(layers[name], name, seed), strict=True):
            variables[id(variable.handle)] = tf.Variable(tf.cast(value, variable.dtype), trainable=variable.trainable)
    return Reinitialized(model, variables)
