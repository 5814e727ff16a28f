"""Calls of a model's modules watched: from then until the context ends, each goes through a function of ours.

Modules of nnx and Equinox get another class, whose `__call__` does so, and which keeps their names where they are
taken apart and put together again, as in `nnx.jit`; linen has a context for it, and Keras's layers have their `call`
replaced; a module's `perturb` and `sow` are watched with it. Each of these makes `jax.jit` trace anew, inside and
afterwards.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import jax

from .marks import sown
from .models import own_model
from .modules import EQUINOX, KERAS, LINEN, NNX, instances, is_called, library_of

Around = Callable[[str, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""From a module's name, itself, its call, and the arguments, to what is returned."""

_SITES = "undertow_sites"
_WORDS = "perturb", "sow"
_arounds: dict[int, tuple[Around, Mapping[str, str]]] = {}
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
        names: for the paths of modules the names to give; others are not watched. The network itself is "". A path may
            also be that of what a module of Flax perturbs or sows, "block.h".
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
    modules = list(instances(model))
    holders = {name.rpartition(".")[0] for name in set(names).difference(path for path, _ in modules)}
    watched = {id(m): (m, path) for path, m in modules if (path in names and is_called(m)) or path in holders}
    _arounds[number] = around, names
    try:
        with _lock:
            for module, path in watched.values():
                before = vars(module).get(_SITES, ())
                if not before:
                    cls: Any = type(module)
                    object.__setattr__(module, "__class__", _watched_class(cls))
                object.__setattr__(module, _SITES, ((number, path), *before))
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
        for around, names, path in _watching(self):
            if path in names:
                call = functools.partial(_through, around, names[path], self, call)
        return call(*args, **kwargs)

    namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if "__call__" in dir(cls):
        namespace["__call__"] = called
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and issubclass(cls, nnx.Module):
        namespace |= {word: _word_watched(cls, word) for word in _WORDS}
    equinox = sys.modules.get("equinox")
    if equinox is not None and issubclass(cls, equinox.Module):
        namespace |= {"__annotations__": {_SITES: tuple}, _SITES: equinox.field(static=True, default=())}
    return type(cls)(cls.__name__, (cls,), namespace)


def _watching(module: Any) -> Iterator[tuple[Around, Mapping[str, str], str]]:
    """Yield what watches a module of nnx or Equinox, with its path there, the last one first."""
    for number, path in reversed(getattr(module, _SITES, ())):
        if number in _arounds:
            yield *_arounds[number], path


def _word_watched(cls: Any, word: str) -> Callable[..., Any]:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = functools.partial(getattr(cls, word), self)
        for around, names, path in _watching(self):
            call = functools.partial(_named, word, around, names, path, self, call)
        return call(*args, **kwargs)

    return called


def _named(
    word: str, around: Around, names: Mapping[str, str], path: str, module: Any, call: Callable[..., Any],
    /, *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    """Perturb or sow a value; where its name is watched, what is handed on, or sown, goes through `around`."""
    first = ("name", "value") if word == "perturb" else ("collection", "name", "value")
    given = dict(zip(first, args, strict=False)) | kwargs
    site = names.get(f"{path}.{given.get('name')}" if path else str(given.get("name")))
    if site is None or "value" not in given:
        return call(*args, **kwargs)
    if word == "perturb":
        return around(site, module, call, args, kwargs)
    value = around(site, module, sown, (given["value"],), {})
    if "value" in kwargs:
        return call(*args, **{**kwargs, "value": value})
    return call(*args[:2], value, *args[3:], **kwargs)


def _through(around: Around, name: str, module: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return around(name, module, call, args, kwargs)


@contextmanager
def _intercepted(model: Any, names: Mapping[str, str], around: Around) -> Iterator[None]:
    linen, holders = sys.modules["flax.linen"], {path.rpartition(".")[0] for path in names}
    whole = model.unbind()[0] if model.scope is not None else model
    within = [False]  # of each call under way, whether it is one of the network

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path, module = ".".join(context.module.path), context.module
        called = context.method_name == "__call__" and path in names
        looked_at = called or path in holders or not path
        within.append(_is_within(module, linen, whole, within[-1]) if looked_at else within[-1])
        try:
            if not looked_at or not within[-1]:
                return call(*args, **kwargs)
            with _words_watched(module, path, names, around) if path in holders else nullcontext():
                return around(names[path], module, call, args, kwargs) if called else call(*args, **kwargs)
        finally:
            within.pop()

    with linen.intercept_methods(interceptor):
        yield


@contextmanager
def _words_watched(module: Any, path: str, names: Mapping[str, str], around: Around) -> Iterator[None]:
    """Inside, watch what one module of linen perturbs and sows, in a method, and in those that it calls, once."""
    before = {word: vars(module)[word] for word in _WORDS if word in vars(module)}
    if any(getattr(call, "args", (None,) * 3)[2] is names for call in before.values()):
        yield
        return
    try:
        for word in _WORDS:
            call = functools.partial(_named, word, around, names, path, module, getattr(module, word))
            object.__setattr__(module, word, call)  # past linen, which would take it for a submodule
        yield
    finally:
        for word in _WORDS:
            object.__delattr__(module, word)
        for word, call in before.items():
            object.__setattr__(module, word, call)


def _is_within(module: Any, linen: Any, whole: Any, around: bool) -> bool:
    """Whether a module of linen is a network or a part of it: another one in the same function is passed over.

    In `linen.remat` and `linen.scan` a module has no parent but a path, and is what the call around it is.
    """
    while isinstance(module.parent, linen.Module):
        module = module.parent
    if module.path:
        return around
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
