"""Every name of JAX that it does not export, or whose form it does not promise, once, with its reason.

`tests/frameworks/jax/test_internals.py` asks the installed JAX for each of them, so that an upgrade which takes one
away fails there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import config
from jax.extend.core import ClosedJaxpr

_LIBRARY = str(Path(jax.__file__).parent)


def trace_context() -> Any:
    """Return all settings that a trace depends on, hashable: `jax.jit` has them in the key of its own cache."""
    return config.trace_context()


def bind(eqn: Any, operands: Sequence[Any], params: dict[str, Any] | None = None, scope: str = "") -> list[Any]:
    """Apply an equation's primitive to other operands, as the interpreters of JAX do, in the equation's own context."""
    given = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    with eqn.ctx.manager, jax.named_scope(scope or "undertow"):
        results = eqn.primitive.bind(*operands, **given)
    return list(results) if eqn.primitive.multiple_results else [results]


def scope_of(eqn: Any) -> str:
    """Return the names around an equation, "block/Dense_0": of `jax.named_scope`, Flax linen and Keras."""
    return str(eqn.source_info.name_stack)


def function_name(jaxpr: Any) -> str:
    """Return the name of the function that a jaxpr was traced from."""
    return str(jaxpr.debug_info.func_name)


def is_of_jax(jaxpr: Any) -> bool:
    """Whether a jaxpr was traced from a function of JAX itself, such as `jax.nn.logsumexp`."""
    return _LIBRARY in str(jaxpr.debug_info.func_src_info)


def closed(jaxpr: Any) -> ClosedJaxpr:
    """Return a jaxpr with its constants; some equations hold theirs without."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def body_of_custom(eqn: Any) -> ClosedJaxpr:
    """Return the forward body of a `custom_jvp` or `custom_vjp` call."""
    return closed(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["fun_jaxpr"])


def body_of_call(eqn: Any) -> ClosedJaxpr:
    """Return the body of a `jax.jit` call."""
    return closed(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
