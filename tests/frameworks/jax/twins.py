"""Independent twins: the same network with each activation written as a `jax.custom_vjp` whose backward is a formula.

Nothing here reads a jaxpr or imports the library. A swap is told the activation's derivative by hand, and applies one
of the three rules by masks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RULES = ("gradient", "deconvnet", "guided")


def ruled(rule: str, g: Any, derivative: Any) -> Any:
    """Apply a rule by masks."""
    positive = jnp.where(g > 0, g, 0)
    return {"gradient": g * derivative, "deconvnet": positive, "guided": positive * derivative}[rule]


def swap(function: Callable[[Any], Any], derivative: Callable[[Any], Any], rule: str) -> Callable[[Any], Any]:
    """Return an activation whose backward is a rule."""
    swapped = jax.custom_vjp(lambda x: function(x))
    swapped.defvjp(lambda x: (function(x), x), lambda x, g: (ruled(rule, g, derivative(x)).astype(x.dtype),))
    return swapped


def above(x: Any, low: float = 0.0, high: float = np.inf, slope: float = 0.0) -> Any:
    """Return the derivative of a piecewise linear activation that never meets its edges."""
    return jnp.where(x > low, jnp.where(x < high, 1.0, 0.0), slope)


@jax.custom_jvp
def own_jvp(x: Any) -> Any:
    """Return max(x, 0), with a derivative that passes a half where x is negative."""
    return jnp.maximum(x, 0)


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), tangents[0] * jnp.where(primals[0] > 0, 1.0, 0.5)))


@jax.custom_vjp
def own_vjp(x: Any) -> Any:
    """Return max(x, 0), with a derivative that passes a quarter where x is negative."""
    return jnp.where(x > 0, x, 0)


own_vjp.defvjp(lambda x: (own_vjp(x), x), lambda x, g: (g * jnp.where(x > 0, 1.0, 0.25),))

SLOPES = np.linspace(0.1, 0.3, 6, dtype=np.float32)

RELUS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "jax.nn.relu": (jax.nn.relu, above),
    "jax.nn.relu6": (jax.nn.relu6, lambda x: above(x, high=6)),
    "jax.nn.leaky_relu": (jax.nn.leaky_relu, lambda x: above(x, slope=0.01)),
    "jax.nn.hard_tanh": (jax.nn.hard_tanh, lambda x: above(x, -1, 1)),
    "jnp.maximum(x, 0)": (lambda x: jnp.maximum(x, 0), above),
    "jnp.maximum(0, x)": (lambda x: jnp.maximum(0, x), above),
    "lax.max": (lambda x: lax.max(x, jnp.zeros((), x.dtype)), above),
    "maximum with zeros_like": (lambda x: jnp.maximum(x, jnp.zeros_like(x)), above),
    "maximum with captured zeros": (lambda x: jnp.maximum(x, np.zeros(6, np.float32)), above),
    "maximum of x and ax": (lambda x: jnp.maximum(x, x * 0.1), lambda x: above(x, slope=0.1)),
    "jnp.clip(x, 0)": (lambda x: jnp.clip(x, 0), above),
    "jnp.clip(x, 0, 6)": (lambda x: jnp.clip(x, 0, 6), lambda x: above(x, high=6)),
    "x.clip(0)": (lambda x: x.clip(0), above),
    "minimum of maximum": (lambda x: jnp.minimum(jnp.maximum(x, 0), 2.5), lambda x: above(x, high=2.5)),
    "maximum of minimum": (lambda x: jnp.maximum(jnp.minimum(x, 2.5), 0), lambda x: above(x, high=2.5)),
    "minimum of relu": (lambda x: jnp.minimum(jax.nn.relu(x), 2.5), lambda x: above(x, high=2.5)),
    "clip of relu": (lambda x: jnp.clip(jax.nn.relu(x), 0, 2.5), lambda x: above(x, high=2.5)),
    "lax.clamp": (lambda x: lax.clamp(jnp.zeros((), x.dtype), x, jnp.asarray(6, x.dtype)), lambda x: above(x, high=6)),
    "where(x > 0, x, 0)": (lambda x: jnp.where(x > 0, x, 0), above),
    "where(x >= 0, x, 0)": (lambda x: jnp.where(x >= 0, x, 0), above),
    "where(0 < x, x, 0)": (lambda x: jnp.where(x > 0, x, 0), above),
    "where(x < 0, 0, x)": (lambda x: jnp.where(x < 0, 0, x), above),
    "where(x <= 0, 0, x)": (lambda x: jnp.where(x <= 0, 0, x), above),
    "where(x > 0.3, x, 0)": (lambda x: jnp.where(x > 0.3, x, 0), lambda x: above(x, 0.3)),
    "where(x > 0, x, ax)": (lambda x: jnp.where(x > 0, x, 0.2 * x), lambda x: above(x, slope=0.2)),
    "where(x < 0, ax, x)": (lambda x: jnp.where(x < 0, x * 0.2, x), lambda x: above(x, slope=0.2)),
    "PReLU, learnt slopes": (lambda x: jnp.where(x >= 0, x, SLOPES * x), lambda x: jnp.where(x > 0, 1.0, SLOPES)),
    "PReLU of two ReLUs": (
        lambda x: jax.nn.relu(x) - SLOPES * jax.nn.relu(-x),
        lambda x: jnp.where(x > 0, 1.0, SLOPES),
    ),
    "PReLU of two ReLUs, as Keras": (
        lambda x: jax.nn.relu(x) + jnp.negative(SLOPES) * jax.nn.relu(-x),
        lambda x: jnp.where(x > 0, 1.0, SLOPES),
    ),
    "x * (x > 0)": (lambda x: x * (x > 0), above),
    "(0 < x) * x": (lambda x: (x > 0) * x, above),
    "a custom_jvp of one's own": (own_jvp, lambda x: above(x, slope=0.5)),
    "a custom_vjp of one's own": (own_vjp, lambda x: above(x, slope=0.25)),
    "of a reshaped array": (lambda x: jax.nn.relu(x.reshape(-1)).reshape(x.shape), above),
}


def derivative_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a smooth function's derivative, by JAX's forward mode."""
    return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


SMOOTH: dict[str, Callable[[Any], Any]] = {
    "gelu": jax.nn.gelu,
    "gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu, by erf": lambda x: 0.5 * x * (1 + lax.erf(x / np.sqrt(2).astype(x.dtype))),
    "silu": jax.nn.silu,
    "silu, by hand": lambda x: x * jax.nn.sigmoid(x),
    "quick gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "elu, alpha": lambda x: jax.nn.elu(x, 0.5),
    "celu": lambda x: jax.nn.celu(x, 0.7),
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "hard_silu": jax.nn.hard_silu,
    "squareplus": jax.nn.squareplus,
}
OTHER: dict[str, Callable[[Any], Any]] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "soft_sign": jax.nn.soft_sign,
    "clip": lambda x: jnp.clip(x, -1, 1),
}
