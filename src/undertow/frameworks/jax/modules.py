"""A model's modules by their paths, which are the paths of their weights too.

| model | modules |
|---|---|
| Flax nnx, Equinox | what its attributes hold, "blocks.0.conv" |
| Flax linen, bound | the paths of its variables, "Conv_0" |
| Keras on JAX | its layers, "block.conv" |
| the trace of a function, `jax.jit(f).trace(...)` | what `checkpoint_name` marks, and named scopes |
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend.core import jaxprs_in_params

from ...errors import InputError
from ..base import NamedModule, roots_of
from .graph import graph_of
from .internals import closed
from .models import network_of, own_model
from .places import words_of

NNX, LINEN, EQUINOX, KERAS, TRACE = "nnx", "linen", "equinox", "keras", "trace"
_KINDS = {"Conv": "conv", "Linear": "linear", "Dense": "linear", "Norm": "norm", "Pool": "pool", "ReLU": "relu"}
_NOT_CALLED = ("List", "Dict")  # of nnx: containers


@dataclass(frozen=True)
class FunctionPlace:
    """A place in a function: what `checkpoint_name` marks, or what leaves a named scope."""

    name: str


@dataclass(frozen=True)
class LinenPath:
    """A module of linen as its variables show it: the names and shapes of its own."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def library_of(model: Any) -> str:
    """Return what a model is of: "nnx", "linen", "equinox", "keras" or "trace"; "" for a function.

    A bound method of a module is none of its library's: its `__call__` is what is called.
    """
    model = own_model(model)
    roots = roots_of(model)
    if "keras" in roots:
        return KERAS
    for name, package in ((NNX, "flax.nnx"), (LINEN, "flax.linen"), (EQUINOX, "equinox")):
        module = sys.modules.get(package)
        if module is not None and isinstance(model, module.Module):
            return name
    return TRACE if hasattr(model, "jaxpr") and hasattr(model, "lower") else ""


def instances_by_name(model: Any) -> dict[str, Any]:
    """Return the modules that can be sites, by their first names."""
    return {named.name: named.module for named in named_modules(model)}


def named_modules(model: Any) -> list[NamedModule]:
    """List every module that can be a site, in the order of definition, each once with all its names.

    Raises:
        InputError: a function, whose places only its trace tells.
    """
    library, model = library_of(model), own_model(model)
    if library in (NNX, EQUINOX):
        named = [NamedModule(names, kind(m), types(m), m) for names, m in _grouped(model)]
    elif library == LINEN:
        named = _linen(model)
    elif library == KERAS:
        named = _keras(model)
    elif library == TRACE:
        named = [NamedModule((name,), "place", ("place",), FunctionPlace(name)) for name in _in_trace(model)]
    else:
        raise InputError(
            "a function has no modules; its places are known by its trace: pass jax.jit(function).trace(*arguments), "
            "and name them by jax.ad_checkpoint.checkpoint_name(h, 'here') or jax.named_scope('block')"
        )
    if library == TRACE and not named:
        raise InputError("the function names no place; h = jax.ad_checkpoint.checkpoint_name(h, 'here') makes one")
    return named or [NamedModule(("",), kind(model), types(model), model)]


def canonical_names(model: Any) -> dict[str, str]:
    """Return for each name of a module its first one; the network itself is ""."""
    return {"": ""} | {name: named.name for named in named_modules(model) for name in named.names}


def paths_of(model: Any, name: str) -> dict[str, str]:
    """Return the paths of the module of a name, each with that name; none where there is no such module."""
    if library_of(model) in ("", TRACE):
        return {}
    names = canonical_names(model)
    return {path: name for path, first in names.items() if first == names.get(name)}


def _grouped(model: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    by_id: dict[int, tuple[Any, list[str]]] = {}
    for name, module in instances(model):
        if name and is_called(module):
            by_id.setdefault(id(module), (module, []))[1].append(name)
    for module, names in by_id.values():
        yield tuple(names), module


def is_called(module: Any) -> bool:
    """Whether a module is one that can be called."""
    return "__call__" in dir(type(module)) and type(module).__name__ not in _NOT_CALLED


def instances(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield every module of nnx or Equinox within one, itself first, with its path; one in two places comes twice."""
    cls = sys.modules["flax.nnx" if library_of(model) == NNX else "equinox"].Module
    yield from _instances(own_model(model), "", cls, ())


def _instances(value: Any, path: str, cls: type, around: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    children: Any = ()
    if isinstance(value, cls):
        if id(value) in around:
            return
        yield path, value
        around = (*around, id(value))
        children = vars(value).items()
    elif isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    for key, child in children:
        if isinstance(child, cls | Mapping | list | tuple) and not str(key).startswith("_pytree__"):
            yield from _instances(child, f"{path}.{key}" if path else str(key), cls, around)


def kind(module: Any) -> str:
    """Return a module's kind, by its library's class: "conv", "linear", "norm", "pool", "relu", or its own class."""
    own = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] in ("flax", "equinox"))
    return next(filter(None, map(_kind_of_class, own)), type(module).__name__.lower())


def _kind_of_class(cls: str) -> str | None:
    return next((kind for part, kind in _KINDS.items() if part in cls), None)


def types(module: Any) -> tuple[str, ...]:
    """Return the names of a module's classes, up to that of the library."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return tuple(names[: names.index("Module")] if "Module" in names[1:] else names[:1])


def _linen(model: Any) -> list[NamedModule]:
    own: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    network = network_of(model)
    for path, weight in zip(network.paths, network.weights, strict=True):
        *modules, name = path.split(".")
        for n in range(1, len(modules) + 1):
            own.setdefault(".".join(modules[:n]), [])
        if modules:
            own[".".join(modules)].append((name, tuple(weight.shape)))
    named = []
    for path, shapes in own.items():
        guessed = re.fullmatch(r"([A-Za-z]\w*?)_\d+", path.rpartition(".")[2])
        cls = guessed[1] if guessed else ""
        named.append(NamedModule((path,), _linen_kind(cls, dict(shapes)), (cls or "Module",), LinenPath(tuple(shapes))))
    return named


def _linen_kind(cls: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the kind of a module of linen: by the class in a name that linen gave, else by its own weights."""
    if cls:
        return (_kind_of_class(cls) if hasattr(sys.modules["flax.linen"], cls) else None) or cls.lower()
    axes = len(shapes.get("kernel", ()))
    if axes in (2, 4, 5):
        return "linear" if axes == 2 else "conv"
    return "norm" if shapes and set(shapes) <= {"scale", "bias", "mean", "var"} else "module"


def _keras(model: Any) -> list[NamedModule]:
    from .. import keras_layers

    names: dict[int, tuple[Any, list[str]]] = {}
    for name, layer in keras_layers.named_layers(model):
        names.setdefault(id(layer), (layer, []))[1].append(name)
    return [
        NamedModule(tuple(own), keras_layers.kind(layer), keras_layers.types(layer), layer)
        for layer, own in names.values()
    ] or [NamedModule(("",), keras_layers.kind(model), keras_layers.types(model), model)]


def _in_trace(model: Any) -> list[str]:
    names: dict[str, None] = {}
    graphs = [graph_of(model.jaxpr)]
    while graphs:
        for node in graphs.pop(0).nodes:
            graphs += [graph_of(closed(body)) for body in jaxprs_in_params(node.eqn.params)]
            if node.name == "name":
                names[node.eqn.params["name"]] = None
            if words := words_of(node.scope):
                names[".".join(words)] = None
    return list(names)
