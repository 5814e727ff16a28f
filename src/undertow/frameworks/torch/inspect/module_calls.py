"""Watching one forward pass: every module call, what it was given and what it made, and how to run it again."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..calls import unchanged
from ..internals import is_view, tree_flatten, tree_leaves, tree_unflatten, version

Versions = dict[int, tuple[Tensor, int]]  # tensors with their versions, by id; the tensor keeps its id from reuse


class RngAndBuffers:
    """The random state, a module's buffers and the autocast settings; `restored` goes back to them."""

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        devices = {t.device for t in tensors}
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        kinds = {d.type for d in devices} & {"cpu", "cuda"}
        self._casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run what follows with the random state, buffers and autocast settings of then."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        self.put_back()
        before = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind, _, _ in self._casts]
        try:
            self._set(self._casts)
            yield
        finally:
            self._set(before)

    def put_back(self) -> None:
        """Give the buffers that have changed their values of then."""
        for buffer, kept in self._buffers:
            if not torch.equal(buffer, kept):  # a write, even of the same, spoils what some graph may have saved
                buffer.data.copy_(kept)

    @staticmethod
    def _set(casts: list[tuple[str, torch.dtype, bool]]) -> None:
        for kind, dtype, enabled in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def state_restored(module: nn.Module, tensors: Sequence[Tensor]) -> Iterator[RngAndBuffers]:
    """Put the random state and the buffers back at the end; yield what goes back to them earlier."""
    with unchanged(module, tensors, training=False):
        start = RngAndBuffers(module, tensors)
        try:
            yield start
        finally:
            start.put_back()


class _Slot(int):
    """Where a tensor stood among arguments."""


class Arguments:
    """The arguments of a call, with its tensors taken out and copied, each once."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        found, self._shape = tree_flatten((args, kwargs))
        given = {id(leaf): leaf for leaf in found if isinstance(leaf, Tensor)}
        slots = {key: _Slot(place) for place, key in enumerate(given)}
        self._leaves = [slots.get(id(leaf), leaf) for leaf in found]
        self.tensors = [t.detach().clone() for t in given.values()]
        self.wanted = [t.requires_grad for t in given.values()]

    def filled(self, tensors: list[Tensor]) -> Any:
        """Return args and kwargs around other tensors."""
        leaves = [tensors[leaf] if isinstance(leaf, _Slot) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._shape)


@dataclass(eq=False)
class Seen:
    """One module call, while it runs and after."""

    name: str
    module: nn.Module
    number: int
    arguments: Arguments
    state: RngAndBuffers
    versions: Versions
    inner: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    edges: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether it made a tensor, and no other module did so inside, or it has parameters of its own."""
        return bool(self.outputs) and (not self.inner or any(True for _ in self.module.parameters(recurse=False)))


@final
class Watch:
    """Notes every module call of this thread while it is open."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._names: dict[nn.Module, str] = {}
        self._count: Counter[nn.Module] = Counter()
        self._open: list[Seen] = []
        self.calls: list[Seen] = []
        self.separated = False

    def __enter__(self) -> Self:
        try:
            for name, module in watched(self._network):
                self._names[module] = name
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True, prepend=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def place(self) -> tuple[str, int]:
        """Return the name and number of the innermost call under way."""
        return (self._open[-1].name, self._open[-1].number) if self._open else ("", 0)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        versions = input_versions(args, kwargs)
        state = RngAndBuffers(module, [tensor for tensor, _ in versions.values()])
        call = Seen(self._names[module], module, self._count[module], Arguments(args, kwargs), state, versions)
        self._count[module] += 1
        self._open.append(call)
        self.calls.append(call)

    def _after(self, module: nn.Module, _: Any, __: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        while self._open[-1].module is not module:  # calls that ended in an exception, which somebody caught
            self._open.pop()
        call = self._open.pop()
        tensors, new_output = with_own_gradients(output, call.versions)
        made = tensors or tensors_in(output)
        call.versions = {}
        if made and self._open:
            self._open[-1].inner = True
        call.outputs = [t.detach().clone() for t in made]
        call.edges = [get_gradient_edge(t) if t.requires_grad else None for t in made]
        self.separated |= new_output is not None
        return new_output


def watched(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose calls can be seen; a parametrization belongs to the module that it makes weights for."""
    for name, module in network.named_modules():
        if "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def input_versions(args: Any, kwargs: Any) -> Versions:
    """Return the tensors among a call's arguments, each with the number of changes in place that it had seen."""
    return {id(leaf): (leaf, version(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}


def with_own_gradients(output: Any, versions: Versions) -> tuple[list[Tensor], Any]:
    """Return the tensors in a module's output, copied where needed so that each has a gradient of its own.

    An output that is an input untouched (Identity, Dropout in evaluation) shares its gradient with the input's other
    readers. One that is a view (Flatten) leaves the graph when a successor overwrites it.

    Args:
        output: what the module returned.
        versions: of its inputs, as `input_versions` gave them before it ran.

    Returns:
        The tensors, and what the module's forward hook has to return: the output with them inside, or None where
        nothing was copied.
    """
    leaves, shape = tree_flatten(output)
    own = [_with_own_gradient(leaf, versions) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    copied = any(a is not b for a, b in zip(own, leaves, strict=True))
    return [leaf for leaf in own if isinstance(leaf, Tensor)], tree_unflatten(own, shape) if copied else None


def _with_own_gradient(output: Tensor, versions: Versions) -> Tensor:
    if not output.requires_grad:
        return output
    given = versions.get(id(output))
    passed_on = given is not None and given[1] == version(output)
    return output.clone() if passed_on or is_view(output) else output


def tensors_in(output: Any) -> list[Tensor]:
    """Return the tensors in what a module returned, or its `.logits` where it is some object of its own."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return found or [t for t in [getattr(output, "logits", None)] if isinstance(t, Tensor)]
