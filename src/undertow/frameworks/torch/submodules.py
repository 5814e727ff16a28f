"""The parts of a network by name: torch's modules, and the layers of Keras where it runs on torch.

A Keras model on torch is a `torch.nn.Module` that runs hooks, but keeps its layers in lists of its own, so torch finds
only a dictionary of parameters in it. Keras's names are those of its layers, joined with dots.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def is_keras(module: Any) -> bool:
    """Whether a module is a layer or model of Keras on torch."""
    return any(cls.__module__.partition(".")[0] == "keras" for cls in type(module).__mro__)


def named_modules(root: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network and its parts with their dotted names, as `nn.Module.named_modules` does."""
    if not is_keras(root):
        yield from root.named_modules(remove_duplicate=remove_duplicate)
        return
    from ..keras_layers import named_layers

    seen: set[int] = set()
    for name, module in (("", root), *named_layers(root)):
        if not remove_duplicate or id(module) not in seen:
            seen.add(id(module))
            yield name, module


def submodule(root: nn.Module, name: str) -> nn.Module:
    """Return a part by its dotted name. Raises AttributeError or KeyError: there is none."""
    if not is_keras(root):
        return root.get_submodule(name)
    return dict(named_modules(root, remove_duplicate=False))[name]


def top_names(root: nn.Module) -> list[str]:
    """Return the names of the parts at the top."""
    return [name for name, _ in named_modules(root) if name and "." not in name]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module holds itself, by name; of Keras, moving averages too, as Keras has them."""
    if not is_keras(module):
        return dict(module.named_parameters(recurse=False))
    from ..keras_layers import own_variables

    return {variable.name: variable.value for variable in own_variables(module)}


def named_parameters(root: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters with their dotted names, as `nn.Module.named_parameters` does."""
    if not is_keras(root):
        yield from root.named_parameters(remove_duplicate=remove_duplicate)
        return
    seen: set[int] = set()
    for name, module in named_modules(root, remove_duplicate=remove_duplicate):
        for own, parameter in own_parameters(module).items():
            if not remove_duplicate or id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{own}" if name else own), parameter
