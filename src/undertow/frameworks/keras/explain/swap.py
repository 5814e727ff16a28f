"""The classical way: a clone of the model in which each activation is a `tf.custom_gradient` version of itself.

The clone has the model's structure and a copy of its weights. Only layers and the `activation=` of layers are replaced;
an activation that is called as a function is found in the traced graph afterwards and raises an error.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from ....errors import RuleError, one_line
from ....tables import ActivationRule
from ...base import Request
from ..internals import all_layers
from .gradients import apply_rule

MARK = "undertow_ruled"  # in the names of the operations that a swapped activation makes

_RELU_LIKE = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.PReLU)
_SMOOTH = (keras.layers.ELU,)
_RELU_FUNCTIONS = ("relu", "relu6", "leaky_relu")
_SMOOTH_FUNCTIONS = ("elu", "selu", "celu", "softplus", "silu", "gelu", "mish", "hard_silu")


def swapped(request: Request) -> Any:
    """Return a clone of a model whose activations follow a rule.

    Raises:
        RuleError: Keras cannot clone the model.
    """
    clone = _clone(request.model)
    smooth_too = request.activations == "all"
    layers = _RELU_LIKE + (_SMOOTH if smooth_too else ())
    names = _RELU_FUNCTIONS + (_SMOOTH_FUNCTIONS if smooth_too else ())
    functions = {getattr(keras.activations, name) for name in names}
    for layer in all_layers(clone):
        if isinstance(layer, layers):
            # past Keras, which would track an ordinary attribute as state
            object.__setattr__(layer, "call", ruled_activation(layer.call, request.activation_rule))
        elif vars(layer).get("activation") in functions:  # not the property of a recurrent layer, its cell's
            layer.activation = ruled_activation(layer.activation, request.activation_rule)
    return clone


def _clone(model: Any) -> Any:
    if not isinstance(model, keras.Model):
        kind = type(model).__name__
        raise RuleError(f"through='swap' needs a keras.Model that can be cloned, not a {kind}; use through='graph'")
    try:
        clone = keras.models.clone_model(model)
        if not clone.built:
            clone.build(model.inputs[0].shape)
        clone.set_weights(model.get_weights())
    except Exception as error:
        reason = one_line(error)[:200]
        raise RuleError(f"through='swap' could not clone the model ({reason}); use through='graph'") from error
    return clone


def ruled_activation(activation: Callable[[Any], Any], rule: ActivationRule) -> Callable[..., Any]:
    """Return an activation with the same values whose backward pass follows a rule."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def apply(x: Any) -> Any:
        y = activation(x)

        def backward(g: Any, variables: Any = None) -> Any:
            result = apply_rule(rule, g, lambda h: tf.gradients(y, x, grad_ys=h)[0])
            return result if variables is None else (result, [None] * len(variables))

        return y, backward

    def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with tf.name_scope(MARK):
            return apply(inputs)

    return call
