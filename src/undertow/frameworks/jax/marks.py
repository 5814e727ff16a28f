"""Marks in a trace: an equation that returns its operand and says which module's input or output that is.

A primitive of our own, since under `jax.vmap` a value may have its samples in any axis, and only the primitive's own
rule can put them first and count how many axes were put there.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

OUTPUT, INPUT, SOWN = "output", "input", "sown"

mark_p = Primitive("undertow_mark")
mark_p.def_impl(lambda x, **_: x)
mark_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(mark_p, lambda context, x, **_: [x])


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return mark_p.bind(*primals, **params), tangents[0]  # a gradient within the function is not marked


def _batch(operands: Any, axes: Any, **params: Any) -> Any:
    x = jnp.moveaxis(operands[0], axes[0], 0)
    return mark_p.bind(x, **{**params, "mapped": params["mapped"] + 1}), 0


ad.primitive_jvps[mark_p] = _jvp
batching.primitive_batchers[mark_p] = _batch


def is_float(value: Any) -> bool:
    """Whether a value is an array of floating point."""
    return hasattr(value, "dtype") and bool(jnp.issubdtype(value.dtype, jnp.floating))


def marked(tree: Any, site: str, role: str, taken: Callable[[Any], bool] = is_float) -> Any:
    """Mark the arrays in what a module was given or returned, those of floating point unless `taken` says otherwise.

    The positions are as `TensorKey.output`: "" for one array alone, "0", "1.hidden".

    >>> str(jax.make_jaxpr(lambda x: marked((x, x), "conv", OUTPUT))(1.0)).count("undertow_mark")
    2
    """
    with_paths, structure = jax.tree.flatten_with_path(tree, is_leaf=_is_module)
    leaves = [
        mark_p.bind(leaf, site=site, role=role, position=dotted(path), mapped=0) if taken(leaf) else leaf
        for path, leaf in with_paths
    ]
    return jax.tree.unflatten(structure, leaves)


def outputs_marked(
    name: str, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Mark what a module returns, as `calls.watched` takes it."""
    return marked(call(*args, **kwargs), name, SOWN if call is sown else OUTPUT)


def sown(value: Any) -> Any:
    """Stand for a call where a module of Flax sows a value, which goes on elsewhere too."""
    return value


def _is_module(value: Any) -> bool:
    """Whether a value is an object of nnx, such as random numbers, which is not to be taken apart."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Pytree)


def dotted(path: Any) -> str:
    """Return the path of a leaf as "block.0.kernel"; the value within a Flax variable is not named."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(words[:-1] if len(words) > 1 and words[-1] == "value" else words)
