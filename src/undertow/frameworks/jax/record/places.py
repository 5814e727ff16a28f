"""Places that Flax's modules name themselves: what `self.perturb("name", h)` returns, and what `self.sow` is given.

linen's are the variables of the collections "perturbations", which `init` makes, and "intermediates"; those of nnx are
read in the source of the modules' classes, since a variable comes only with a call.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import jax

from ...base import NamedModule
from ..marks import dotted
from ..models import own_model
from ..modules import LINEN, NNX, FunctionPlace, instances, library_of

_COLLECTIONS = {"perturbations": "perturb", "intermediates": "sow"}
_NAME_AT = {"perturb": 0, "sow": 1}  # the argument that is the name


def named_places(model: Any) -> list[NamedModule]:
    """List the places that a model of Flax names itself, as "block.h", of kind "perturb" or "sow"."""
    library, model = library_of(model), own_model(model)
    if library == LINEN:
        return [_named((name,), kind) for name, kind in _in_variables(model)]
    return _in_classes(model) if library == NNX else []


def _named(names: tuple[str, ...], kind: str) -> NamedModule:
    return NamedModule(names, kind, (kind,), FunctionPlace(names[0]))


def _in_variables(model: Any) -> Iterator[tuple[str, str]]:
    for collection, kind in _COLLECTIONS.items():
        tree = model.variables.get(collection, {}) if model.scope is not None else {}
        leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: not hasattr(node, "items"))
        paths = [dotted(path) for path, _ in leaves]
        yield from ((path, kind) for path in paths if not path.endswith("__call__"))  # of capture_intermediates


def _in_classes(model: Any) -> list[NamedModule]:
    by_place: dict[tuple[int, str], tuple[str, list[str]]] = {}
    for path, module in instances(model):
        cls: Any = type(module)
        for name, kind in _in_class(cls):
            by_place.setdefault((id(module), name), (kind, []))[1].append(f"{path}.{name}" if path else name)
    return [_named(tuple(names), kind) for kind, names in by_place.values()]


@functools.cache
def _in_class(cls: Any) -> tuple[tuple[str, str], ...]:
    """Return each name that a class's own methods write out in `self.perturb` or `self.sow`, and which of these."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("flax", "builtins"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # typed at a prompt, say
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _NAME_AT:
                kind, at = node.func.attr, _NAME_AT[node.func.attr]
                named = [word.value for word in node.keywords if word.arg == "name"]
                for argument in [*node.args[at : at + 1], *named]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        found.setdefault(argument.value, kind)
    return tuple(found.items())
