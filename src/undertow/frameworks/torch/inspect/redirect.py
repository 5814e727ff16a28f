"""Gradients changed at modules' outputs while a context is open: hooks on the modules, and on their output tensors."""

import fnmatch
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from ....errors import InputError, RuleError, did_you_mean
from ..calls import module_of, uncompiled
from ..internals import is_of_freed_tensor
from ..submodules import named_modules, top_names
from .module_calls import Versions, input_versions, with_own_gradients

Change = Callable[[Any], Any]


@final
class RedirectHooks:
    """The sites of one `redirect`, with hooks on them from `__enter__` to `__exit__`; see `undertow.redirect`.

    Attributes:
        changed: how many gradients each site's function was given, by the site's name.
    """

    def __init__(self, model: Any, sites: Mapping[str, Change]) -> None:
        self._network = _network(model)
        self._sites = _matched_modules(self._network, sites)
        self.changed: Counter[str] = Counter({name: 0 for name, _ in self._sites.values()})
        self._thread = 0
        self._ran = False
        self._calls: Counter[str] = Counter()
        self._versions: defaultdict[nn.Module, list[Versions]] = defaultdict(list)
        self._module_handles: list[Any] = []
        self._tensor_handles: list[Any] = []
        self._prune_at = 64

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        try:
            self._module_handles.append(self._network.register_forward_pre_hook(self._begin))
            for module in self._sites:
                self._module_handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._module_handles.append(module.register_forward_hook(self._after))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hooked = len(self._tensor_handles)
        self._remove()
        if kind is not None or self.changed.total() or not self._ran:
            return
        names = ", ".join(repr(name) for name in self.changed)
        if hooked:
            raise RuleError(f"no gradient came back through {names}: call backward() inside the with")
        raise RuleError(f"the network ran without a gradient at {names}: never called, frozen, or under no_grad")

    def _remove(self) -> None:
        for handle in (*self._module_handles, *self._tensor_handles):
            handle.remove()
        self._module_handles.clear()
        self._tensor_handles.clear()
        self._versions.clear()

    def _begin(self, _: nn.Module, __: Any) -> None:
        if threading.get_ident() == self._thread:
            self._ran = self._ran or torch.is_grad_enabled()
            self._calls.clear()
            self._versions.clear()  # left over from calls that raised an exception

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self._thread:
            self._versions[module].append(input_versions(args, kwargs))

    def _after(self, module: nn.Module, _: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        name, changes = self._sites[module]
        number = self._calls[name]
        self._calls[name] += 1
        tensors, new_output = with_own_gradients(output, self._versions[module].pop())
        for tensor in tensors:
            if tensor.requires_grad:
                self._hook(tensor, name, number, changes)
        return new_output

    def _hook(self, output: Tensor, name: str, number: int, changes: list[Change]) -> None:
        def changed(g: Tensor | None) -> Tensor | None:
            if g is None:
                return None
            self.changed[name] += 1
            for change in changes:
                g = _fitting(change(g), g, name, number)
            return g

        self._tensor_handles.append(output.register_hook(changed))
        if len(self._tensor_handles) >= self._prune_at:  # else a long loop would keep a handle for each output
            self._tensor_handles = [handle for handle in self._tensor_handles if not is_of_freed_tensor(handle)]
            self._prune_at = 2 * len(self._tensor_handles) + 64


def redirected(model: Any, sites: Mapping[str, Change]) -> RedirectHooks:
    """Return the context in which each site's function changes the gradient there; see `undertow.redirect`."""
    return RedirectHooks(model, sites)


def zero(g: Tensor) -> Tensor:
    """Return zeros like `g`, even where it is NaN."""
    return torch.zeros_like(g)


def clip(g: Tensor, norm: float) -> Tensor:
    """Return `g`, `(B, ...)`, each sample shortened to an ℓ2 norm of at most `norm`."""
    rows = g.reshape(len(g), math.prod(g.shape[1:])) if g.ndim else g.reshape(1, 1)
    wide = rows.to(torch.promote_types(g.dtype, torch.float32))  # squares overflow in float16
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide * (norm / lengths).clamp(max=1)).to(g.dtype).reshape(g.shape)  # type: ignore[no-any-return]


def noisy(std: float, seed: int) -> Change:
    """Return a function that adds normal noise; it has its own generator for each device."""
    generators: dict[torch.device, torch.Generator] = {}

    def noise(g: Tensor) -> Tensor:
        generator = generators.get(g.device)
        if generator is None:
            generator = generators[g.device] = torch.Generator(g.device).manual_seed(seed)
        normal = torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device)
        return g + std * normal

    return noise


def _network(model: Any) -> nn.Module:
    """Return the module whose submodules can be hooked.

    Raises:
        InputError: it is no module, or compiled or scripted, where hooks would not run.
    """
    module = module_of(model)
    if uncompiled(model) is not model:
        raise InputError("model is compiled, and hooks put on it now would never run; redirect the module behind it")
    if module is None or isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"model is a {type(model).__name__}; redirect works at the parts of an nn.Module")
    return module


def _matched_modules(network: nn.Module, sites: Mapping[str, Change]) -> dict[nn.Module, tuple[str, list[Change]]]:
    """Return the modules that the keys match, each with its name and its functions in the order of the keys.

    Raises:
        InputError: there is no key, or one matches no module or has no function.
    """
    if not isinstance(sites, Mapping) or not sites:
        raise InputError('sites is empty or no mapping; pass {"layer2": function}')
    modules = dict(named_modules(network, remove_duplicate=False))
    matched: dict[nn.Module, tuple[str, list[Change]]] = {}
    for key, change in sites.items():
        if not callable(change):
            raise InputError(f"the value for {key!r} is a {type(change).__name__}, not a function of the gradient")
        names = [key] if key in modules else [n for n in modules if n and fnmatch.fnmatchcase(n, str(key))]
        if not names:
            children = ", ".join(top_names(network))
            hint = did_you_mean(str(key), modules) or f"; at the top there are {children}"
            raise InputError(f"no module matches {key!r}{hint}")
        for module in dict.fromkeys(modules[name] for name in names):
            name = next(name for name in names if modules[name] is module)
            matched.setdefault(module, (name, []))[1].append(change)
    return matched


def _fitting(new: object, g: Tensor, name: str, number: int) -> Tensor:
    if isinstance(new, Tensor) and (new.shape, new.dtype, new.device) == (g.shape, g.dtype, g.device):
        return new
    given = f"{tuple(new.shape)} {new.dtype} on {new.device}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
    raise InputError(
        f"the function for {name!r} (call {number}) returned {given} "
        f"where the gradient is {tuple(g.shape)} {g.dtype} on {g.device}"
    )
