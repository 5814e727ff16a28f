"""Calls of a model's modules watched: from then until the context ends, each goes through a function of ours.

Modules of nnx and Equinox get another class, whose `__call__` does so, and which keeps their names where they are
taken apart and put together again, as in `nnx.jit`; linen has a context for it, and Keras's layers have their `call`
replaced. Each of these makes `jax.jit` trace anew, inside and afterwards.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from .models import own_model
from .modules import EQUINOX, KERAS, LINEN, NNX, instances, is_called, library_of

Around = Callable[[str, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""From a module's name, itself, its call, and the arguments, to what is returned."""

_SITES = "undertow_sites"
_arounds: dict[int, Around] = {}
_numbers = itertools.count(1)
_lock = threading.RLock()
_traces = jax.make_user_context(default_value=0) if hasattr(jax, "make_user_context") else None


def can_retrace(model: Any) -> bool:
    """Whether what `jax.jit` has compiled of a model before is not taken for what is watched, or the reverse."""
    return _traces is not None or library_of(model) in (NNX, EQUINOX)


@contextmanager
def watched(model: Any, names: Mapping[str, str], around: Around) -> Iterator[None]:
    """Inside, let the calls of a model's modules return `around(name, module, call, args, kwargs)`.

    Args:
        model: of nnx, linen, Equinox or Keras; of anything else nothing is watched.
        names: for the paths of modules the names to give; others are not watched. The network itself is "".
    """
    library, model = library_of(model), own_model(model)
    with ExitStack() as stack:
        number = next(_numbers)
        if _traces is not None:
            stack.enter_context(_traces(number))
        if library in (NNX, EQUINOX):
            stack.enter_context(_of_another_class(model, names, number, around))
        elif library == LINEN:
            stack.enter_context(_intercepted(model, names, around))
        elif library == KERAS:
            stack.enter_context(_layers_watched(model, names, around))
        yield


@contextmanager
def _of_another_class(model: Any, names: Mapping[str, str], number: int, around: Around) -> Iterator[None]:
    watched = {id(m): (m, names[path]) for path, m in instances(model) if path in names and is_called(m)}
    _arounds[number] = around
    try:
        with _lock:
            for module, name in watched.values():
                before = vars(module).get(_SITES, ())
                if not before:
                    cls: Any = type(module)
                    object.__setattr__(module, "__class__", _watched_class(cls))
                object.__setattr__(module, _SITES, ((number, name), *before))
        yield
    finally:
        del _arounds[number]
        with _lock:
            for module, _ in watched.values():
                left = tuple(site for site in vars(module)[_SITES] if site[0] != number)
                object.__setattr__(module, _SITES, left)
                if not left:
                    object.__delattr__(module, _SITES)
                    object.__setattr__(module, "__class__", type(module).__mro__[1])


@functools.cache
def _watched_class(cls: type) -> type:
    """Return a class whose calls are watched; its instances' names are static, so that they outlive `jax.jit`."""

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = functools.partial(cls.__call__, self)
        for number, name in reversed(getattr(self, _SITES, ())):
            if (around := _arounds.get(number)) is not None:
                call = functools.partial(_through, around, name, self, call)
        return call(*args, **kwargs)

    namespace: dict[str, Any] = {"__call__": called, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    equinox = sys.modules.get("equinox")
    if equinox is not None and issubclass(cls, equinox.Module):
        namespace |= {"__annotations__": {_SITES: tuple}, _SITES: equinox.field(static=True, default=())}
    return type(cls)(cls.__name__, (cls,), namespace)


def _through(around: Around, name: str, module: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return around(name, module, call, args, kwargs)


@contextmanager
def _intercepted(model: Any, names: Mapping[str, str], around: Around) -> Iterator[None]:
    linen = sys.modules["flax.linen"]
    whole = model.unbind()[0] if model.scope is not None else model

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = ".".join(context.module.path)
        if context.method_name != "__call__" or path not in names or not _is_within(context.module, linen, whole):
            return call(*args, **kwargs)
        return around(names[path], context.module, call, args, kwargs)

    with linen.intercept_methods(interceptor):
        yield


def _is_within(module: Any, linen: Any, whole: Any) -> bool:
    """Whether a module of linen is a network or a part of it: another one in the same function is passed over."""
    while isinstance(module.parent, linen.Module):
        module = module.parent
    return type(module) is type(whole) and bool(module.unbind()[0] == whole)


@contextmanager
def _layers_watched(model: Any, names: Mapping[str, str], around: Around) -> Iterator[None]:
    from ..keras_layers import named_layers

    layers = {"": model, **dict(reversed(list(named_layers(model))))}
    with ExitStack() as stack:
        for path, layer in layers.items():
            if path in names:
                before = vars(layer).get("call")
                call = functools.partial(_through, around, names[path], layer, layer.call)
                vars(layer)["call"] = call  # past Keras, which would track it as state
                stack.callback(_restore, layer, before)
        yield


def _restore(layer: Any, before: Any) -> None:
    if before is None:
        vars(layer).pop("call", None)
    else:
        vars(layer)["call"] = before
