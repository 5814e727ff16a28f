"""Gradients changed at modules' outputs while a context is open: each output goes through an identity of ours, whose
derivative is a linear equation of ours, and the transpose of that is the change.

Primitives, not `jax.custom_vjp`, since under `jax.vmap` their own rule puts the samples first, so that a change is
given the gradients of the whole batch.
"""

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ....errors import InputError, RuleError, did_you_mean
from ...own_passes import in_own_pass
from ..calls import can_retrace, watched
from ..marks import is_float
from ..modules import EQUINOX, canonical_names, library_of

Change = Callable[[Any], Any]

passed_p, changed_p = Primitive("undertow_passed"), Primitive("undertow_changed")
for _primitive in (passed_p, changed_p):
    _primitive.def_impl(lambda x, **_: x)
    _primitive.def_abstract_eval(lambda x, **_: x)
    mlir.register_lowering(_primitive, lambda context, x, **_: [x])


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    (tangent,) = tangents
    is_zero = type(tangent) is ad.Zero
    return passed_p.bind(*primals, **params), tangent if is_zero else changed_p.bind(tangent, **params)


def _transpose(g: Any, _: Any, change: Callable[[Any, int], Any], mapped: int) -> Any:
    return [g if type(g) is ad.Zero else change(g, mapped)]


def _batch(primitive: Any, operands: Any, axes: Any, change: Callable[[Any, int], Any], mapped: int) -> Any:
    return primitive.bind(jnp.moveaxis(operands[0], axes[0], 0), change=change, mapped=mapped + 1), 0


ad.primitive_jvps[passed_p] = _jvp
ad.deflinear2(changed_p, _transpose)
for _primitive in (passed_p, changed_p):
    batching.primitive_batchers[_primitive] = partial(_batch, _primitive)


@final
class RedirectedCalls:
    """The sites of one `redirect`; calls are watched from `__enter__` to `__exit__`; see `undertow.redirect`.

    Attributes:
        changed: how often each site's function was given a gradient, by the site's name: of what `jax.jit` compiles
            that is once, while it is traced.
    """

    def __init__(self, model: Any, sites: Mapping[str, Change]) -> None:
        self._model = model
        self._changes = _matched(model, sites)
        self._takes_one_sample = library_of(model) == EQUINOX
        self.changed: Counter[str] = Counter(dict.fromkeys(self._changes, 0))
        self._stack = ExitStack()
        self._ran: set[str] = set()

    def __enter__(self) -> Self:
        names = {path: name for path, name in canonical_names(self._model).items() if name in self._changes}
        self._stack.enter_context(watched(self._model, names, self._around))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None and self._ran and not self.changed.total():
            names = ", ".join(map(repr, self.changed))
            raise RuleError(f"no gradient came back through {names}: differentiate inside the with, as by jax.grad")

    def _around(self, name: str, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if in_own_pass():
            return output
        self._ran.add(name)
        change = partial(self._change, name)
        return jax.tree.map(lambda x: passed_p.bind(x, change=change, mapped=0) if is_float(x) else x, output)

    def _change(self, name: str, g: Any, mapped: int) -> Any:
        self.changed[name] += 1
        alone = self._takes_one_sample and not mapped  # one sample, `(1, ...)`
        g = g[None] if alone else g
        for change in self._changes[name]:
            g = _fitting(change(g), g, name)
        return g[0] if alone else g


def _matched(model: Any, sites: Mapping[str, Change]) -> dict[str, list[Change]]:
    """Return the functions of the modules that the keys match, by name, in the order of the keys.

    Raises:
        InputError: the model is a function; there is no key, or one matches no module or has no function.
    """
    if library_of(model) in ("", "trace"):
        raise InputError(
            "redirect works at the calls of modules, and a function has none; pass the Flax, Equinox or Keras module "
            "itself, or write the change into the function by jax.custom_vjp"
        )
    if not isinstance(sites, Mapping) or not sites:
        raise InputError('sites is empty or no mapping; pass {"block2": function}')
    if not can_retrace(model):
        raise InputError("jax.jit would keep the change: this JAX has no jax.make_user_context; install a newer one")
    names = canonical_names(model)
    changes: dict[str, list[Change]] = {}
    for key, change in sites.items():
        if not callable(change):
            raise InputError(f"the value for {key!r} is a {type(change).__name__}, not a function of the gradient")
        matching = [key] if key in names else [n for n in names if n and fnmatch.fnmatchcase(n, str(key))]
        if not matching:
            top = ", ".join(name for name in names if name and "." not in name)
            raise InputError(
                f"no module matches {key!r}{did_you_mean(str(key), names) or f'; at the top there are {top}'}"
            )
        for name in dict.fromkeys(names[one] for one in matching):
            changes.setdefault(name, []).append(change)
    return changes


def _fitting(new: Any, g: Any, name: str) -> Any:
    if isinstance(new, jax.Array) and (new.shape, new.dtype) == (g.shape, g.dtype):
        return new
    given = f"{new.shape} {new.dtype}" if isinstance(new, jax.Array) else f"a {type(new).__name__}"
    raise InputError(f"the function for {name!r} returned {given} where the gradient is {g.shape} {g.dtype}")


def redirected(model: Any, sites: Mapping[str, Change]) -> RedirectedCalls:
    """Return the context in which each site's function changes the gradient there; see `undertow.redirect`."""
    return RedirectedCalls(model, sites)


def zero(g: Any) -> Any:
    """Return zeros like `g`, even where it is NaN."""
    return jnp.zeros_like(g)


def clip(g: Any, norm: float) -> Any:
    """Return `g`, `(B, ...)`, each sample shortened to an ℓ2 norm of at most `norm`."""
    rows = g.reshape(len(g) if g.ndim else 1, -1)
    wide = rows if rows.dtype == jnp.float64 else rows.astype(jnp.float32)  # squares overflow in float16
    lengths = jnp.linalg.norm(wide, axis=1, keepdims=True)
    return (wide * jnp.minimum(norm / lengths, 1)).astype(g.dtype).reshape(g.shape)


def noisy(std: float, seed: int) -> Change:
    """Return a function that adds normal noise, drawn from a key of the seed and of the bits of the gradient itself.

    A function that `jax.jit` compiled has no generator to go on, so the gradient tells one step from another.
    """

    def noise(g: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(np.uint32(seed)), _digest(g))
        return g + std * jax.random.normal(key, g.shape, g.dtype)

    return noise


def _digest(g: Any) -> Any:
    """Return a number, uint32, of the bits of an array and of their order; the steps are MurmurHash3's last ones."""
    words = jax.lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32).reshape(-1)
    words = words + jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)
