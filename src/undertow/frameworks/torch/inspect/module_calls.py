"""The module calls of one forward pass: their inputs, their outputs, and the state in which to run them again."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..internals import is_view, tree_flatten, tree_leaves, tree_unflatten, version
from ..state import RngAndBuffers
from ..submodules import named_modules, own_parameters

Versions = dict[int, tuple[Tensor, int]]  # by id: tensors, which are held so that no id is reused, and their versions


class _TensorIndex(int):
    """Stands among arguments for a tensor, whose index in `Arguments.tensors` it is."""


class Arguments:
    """The arguments of a call.

    Attributes:
        tensors: a detached copy of each tensor among them; one that is passed twice is there once.
        requires_grad: whether each tensor required a gradient.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        indices = {key: _TensorIndex(i) for i, key in enumerate(tensors)}
        self._leaves = [indices.get(id(leaf), leaf) for leaf in leaves]
        self.tensors = [t.detach().clone() for t in tensors.values()]
        self.requires_grad = [t.requires_grad for t in tensors.values()]

    def with_tensors(self, tensors: list[Tensor]) -> Any:
        """Return args and kwargs with other tensors in the places of `self.tensors`."""
        leaves = [tensors[leaf] if isinstance(leaf, _TensorIndex) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)


@dataclass(eq=False)
class ModuleCall:
    """One module call, while it runs and after.

    Attributes:
        number: how often the module had been called before in this pass.
        state: random state, buffers and autocast settings when the call began.
        versions: of its inputs, while it runs.
        has_inner: another module was called inside and returned a tensor.
        outputs: detached copies of the tensors that it returned.
        edges: where each output stands in the graph; None where it has no gradient.
        gradients: of the objective by each output, once a backward pass gave them.
    """

    name: str
    module: nn.Module
    number: int
    arguments: Arguments
    state: RngAndBuffers
    versions: Versions
    has_inner: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    edges: list[Any] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def is_reported(self) -> bool:
        """Whether it returned a tensor, and either no module called inside did or it has parameters of its own."""
        return bool(self.outputs) and (not self.has_inner or bool(own_parameters(self.module)))


@final
class CallRecorder:
    """Records every module call of this thread from `__enter__` to `__exit__`.

    Attributes:
        calls: in the order in which they began.
        copied_outputs: some output was copied, to have a gradient of its own.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._names: dict[nn.Module, str] = {}
        self._call_counts: Counter[nn.Module] = Counter()
        self._open: list[ModuleCall] = []
        self.calls: list[ModuleCall] = []
        self.copied_outputs = False

    def __enter__(self) -> Self:
        try:
            for name, module in hookable_modules(self._network):
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

    def innermost(self) -> tuple[str, int]:
        """Return the name and number of the innermost call that has not ended; ("", 0) outside of all."""
        return (self._open[-1].name, self._open[-1].number) if self._open else ("", 0)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        versions = input_versions(args, kwargs)
        state = RngAndBuffers(module, [tensor for tensor, _ in versions.values()])
        number = self._call_counts[module]
        call = ModuleCall(self._names[module], module, number, Arguments(args, kwargs), state, versions)
        self._call_counts[module] += 1
        self._open.append(call)
        self.calls.append(call)

    def _after(self, module: nn.Module, _: Any, __: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        while self._open[-1].module is not module:  # a call inside raised an exception, and the model caught it
            self._open.pop()
        call = self._open.pop()
        leaves, new_output = with_own_gradients(output, call.versions)
        tensors = leaves or output_tensors(output)
        call.versions = {}
        if tensors and self._open:
            self._open[-1].has_inner = True
        call.outputs = [t.detach().clone() for t in tensors]
        call.edges = [get_gradient_edge(t) if t.requires_grad else None for t in tensors]
        self.copied_outputs |= new_output is not None
        return new_output


def hookable_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that run hooks, but no parametrization: it belongs to the module whose weights it computes."""
    for name, module in named_modules(network):
        if "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def input_versions(args: Any, kwargs: Any) -> Versions:
    """Return the tensors among a call's arguments, each with how often it was changed in place so far."""
    return {id(leaf): (leaf, version(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}


def with_own_gradients(output: Any, versions: Versions) -> tuple[list[Tensor], Any]:
    """Return the tensors in a module's output, copied where needed so that each has a gradient of its own.

    An output that is an unchanged input (Identity, Dropout in evaluation) shares its gradient with the input's other
    readers. One that is a view (Flatten) leaves the graph when a successor overwrites it.

    Args:
        output: what the module returned.
        versions: of its inputs, as `input_versions` gave them before it ran.

    Returns:
        The tensors; and what the module's forward hook must return: the output with the copies inside, or None where
        nothing was copied.
    """
    leaves, structure = tree_flatten(output)
    own = [_with_own_gradient(leaf, versions) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    copied = any(a is not b for a, b in zip(own, leaves, strict=True))
    return [leaf for leaf in own if isinstance(leaf, Tensor)], tree_unflatten(own, structure) if copied else None


def _with_own_gradient(output: Tensor, versions: Versions) -> Tensor:
    if not output.requires_grad:
        return output
    _, version_before = versions.get(id(output), (None, None))
    is_unchanged_input = version_before == version(output)
    return output.clone() if is_unchanged_input or is_view(output) else output


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a module's output, or its `.logits` where it is an object that torch cannot flatten."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return tensors or [t for t in [getattr(output, "logits", None)] if isinstance(t, Tensor)]
