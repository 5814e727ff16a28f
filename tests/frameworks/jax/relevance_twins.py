"""Independent twins of AttnLRP and CP-LRP in JAX: the rules written into the functions that networks are made of.

Nothing here reads a jaxpr or imports the library. `Plain` are the functions as everybody writes them, `Twin` the same
with other derivatives, by `jax.custom_vjp` and `stop_gradient`. A network is a function of one of them and an array.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

stop = lax.stop_gradient


def identity_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an elementwise function whose relevance is its input's: g·f(x)/x."""
    passed = jax.custom_vjp(lambda x: function(x))
    passed.defvjp(lambda x: (function(x), x), lambda x, g: (g * function(x) / x,))
    return passed


def half(x: Any) -> Any:
    """Return the same value with half the gradient."""
    return 0.5 * x + 0.5 * stop(x)


class Plain:
    """Functions as they are."""

    def activation(self, function: Callable[[Any], Any], x: Any) -> Any:
        return function(x)

    def product(self, a: Any, b: Any) -> Any:
        return a * b

    def gated(self, gate: Any, value: Any) -> Any:
        return gate * value

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def mixed(self, weights: Any, values: Any) -> Any:
        """Return what attention weights make of values."""
        return weights @ values

    def softmax(self, x: Any) -> Any:
        return jax.nn.softmax(x)

    def layer_norm(self, x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def rms_norm(self, x: Any) -> Any:
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


class Twin(Plain):
    """The same under AttnLRP, or CP-LRP where `cp`."""

    def __init__(self, cp: bool) -> None:
        self.cp = cp

    def activation(self, function: Callable[[Any], Any], x: Any) -> Any:
        return identity_of(function)(x)

    def product(self, a: Any, b: Any) -> Any:
        return half(a) * half(b)

    def gated(self, gate: Any, value: Any) -> Any:
        return stop(gate) * value if self.cp else half(gate) * half(value)

    def matmul(self, a: Any, b: Any) -> Any:
        return half(a) @ half(b)

    def mixed(self, weights: Any, values: Any) -> Any:
        return stop(weights) @ values if self.cp else half(weights) @ half(values)

    def softmax(self, x: Any) -> Any:
        return stop(jax.nn.softmax(x)) if self.cp else jax.nn.softmax(x)

    def layer_norm(self, x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * stop(lax.rsqrt(x.var(-1, keepdims=True) + 1e-5))

    def rms_norm(self, x: Any) -> Any:
        return x * stop(lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5))


def relevance(network: Callable[[Any, Any], Any], kit: Plain, x: Any, target: int) -> Any:
    """Return x·g of a network's score."""
    return x * jax.jit(jax.grad(lambda x: network(kit, x)[:, target].sum()))(x)
