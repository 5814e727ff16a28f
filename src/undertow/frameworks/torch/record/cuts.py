"""Where tensors leave the autograd graph during a watched batch: detach, no_grad, argmax, `.item()` and their like."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_EXPLICIT = {Tensor.detach: "detach()", Tensor.detach_: "detach_()", torch.detach: "detach()"}
_EXPLICIT[Tensor.data.__get__] = ".data"  # type: ignore[attr-defined]
_NUMBERS = {"item": ".item()", "tolist": ".tolist()", "__float__": "float()", "__int__": "int()"}
_FROM_NUMBERS = {"tensor": "torch.tensor(...)", "as_tensor": "torch.as_tensor(...)"}
_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne", "__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__")
_METHODS = ("long", "int", "short", "bool", "byte", "char")
_FLAT = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn")
"""Functions whose derivative is zero everywhere: what goes through them gets a gradient, and it is zero."""


@dataclass(eq=False)
class Cut:
    """A call whose result is no longer in the graph, or gets a gradient of zero.

    Attributes:
        how: what was called.
        module: the name of the module whose forward made the call; None outside the network.
        nodes: of the graph, that the result was computed from.
        explicit: whether it was asked for, by `detach`, `.data` or `no_grad`.
        used: whether something with a gradient was computed from the result.
        read_by_layer: whether a module with parameters of its own computed it.
        parents: the cuts that the result was computed from.
    """

    how: str
    module: str | None
    nodes: tuple[Any, ...]
    explicit: bool = False
    used: bool = False
    read_by_layer: bool = False
    parents: tuple["Cut", ...] = ()

    def join(self, in_layer: bool) -> None:
        """Take note that something with a gradient was computed from the result."""
        cuts = [self]
        while cuts:
            cut = cuts.pop()
            if not cut.used or (in_layer and not cut.read_by_layer):
                cut.used, cut.read_by_layer = True, cut.read_by_layer or in_layer
                cuts += cut.parents

    @property
    def description(self) -> str:
        """The call and where it was made."""
        if self.module is None:
            return f"{self.how} outside the network"
        return f"{self.how} in {self.module or 'the forward of the network itself'}"

    def cuts_off(self, target: Any) -> bool:
        """Whether the result was computed from a node of the graph."""
        return any(node is not None and leads_to(node, target) for node in self.nodes)


class Cuts:
    """The cuts of one batch, and what became of their results."""

    def __init__(self) -> None:
        self._cuts: list[Cut] = []
        self._flat: list[Cut] = []
        self._numbers: list[Cut] = []
        self._cut_of: Any = WeakTensorKeyDictionary()  # what a tensor outside the graph was computed from

    def take(
        self,
        function: Any,
        name: str,
        tensors: Iterable[Tensor],
        inputs: Iterable[Tensor],
        result: Any,
        module: str | None,
    ) -> None:
        """Take note of a call among whose tensors are inputs that have a gradient, and whose result has none."""
        results = [result] if isinstance(result, Tensor) else [*_tensors_of(result)]
        nodes = tuple(tensor.grad_fn for tensor in inputs)
        if name in _NUMBERS:
            self._numbers.append(Cut(_NUMBERS[name], module, nodes))
            return
        if not results or (name == "__get__" and function not in _EXPLICIT):
            return
        explicit = function in _EXPLICIT or not torch.is_grad_enabled()
        if not explicit and (name.endswith("_like") or name.startswith("new_")):
            return  # of its size, not of its values
        how = _EXPLICIT.get(function, name if torch.is_grad_enabled() else "no_grad")
        how = _FROM_NUMBERS.get(how, f".{how}()" if how in _METHODS else how)
        how = f"a comparison ({how.strip('_')})" if how in _COMPARISONS else how
        parents = tuple(self._cut_of[tensor] for tensor in tensors if tensor in self._cut_of)
        cut = Cut(how, module, nodes, explicit, parents=parents)
        if any(tensor.requires_grad for tensor in results):  # a leaf that begins a graph of its own
            cut.join(False)
        self._cuts.append(cut)
        for tensor in results:
            self._cut_of[tensor] = cut

    def take_flat(self, name: str, inputs: Iterable[Tensor], module: str | None) -> None:
        """Take note of a call whose inputs have a gradient, if its derivative is zero everywhere."""
        if name in _FLAT:
            self._flat.append(Cut(name, module, tuple(tensor.grad_fn for tensor in inputs)))

    def follow(self, tensors: Iterable[Tensor], outputs: Iterable[Tensor], in_layer: bool) -> None:
        """Follow what was computed from the results of cuts, up to where it joins the graph again."""
        cuts = [self._cut_of[tensor] for tensor in tensors if tensor in self._cut_of]
        for output in outputs if cuts else ():
            if output.requires_grad:
                for cut in cuts:
                    cut.join(in_layer)
            else:
                self._cut_of[output] = cuts[0]

    def at(self, tensor: Tensor) -> Cut | None:
        """Return the cut that a tensor was computed from."""
        cut: Cut | None = self._cut_of.get(tensor)
        return cut

    def first(self) -> Cut | None:
        """Return the first that was asked for."""
        return next((cut for cut in self._cuts if cut.explicit), None)

    def of(self, node: Any, anything_arrived: bool) -> Cut | None:
        """Return what cut off a node that no gradient reached; None where nothing was computed from it.

        Numbers are read for logging too, so they count inside the network, or where no gradient arrived anywhere.
        """
        inside = [cut for cut in self._numbers if cut.module is not None or not anything_arrived]
        groups: tuple[list[Cut], ...] = (
            [cut for cut in self._cuts if cut.used],
            [cut for cut in self._cuts if cut.explicit or not anything_arrived],
            inside,
        )
        return next((cut for cuts in groups for cut in cuts if cut.cuts_off(node)), None)

    def flat(self, node: Any) -> str:
        """Return what makes the gradient of a node zero wherever it leads; empty where nothing is known."""
        return next((cut.description for cut in self._flat if cut.cuts_off(node)), "")

    def clear(self) -> None:
        """Let go of the graph."""
        self._cuts, self._flat, self._numbers = [], [], []
        self._cut_of.clear()


def _tensors_of(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return (item for item in value if isinstance(item, Tensor)) if isinstance(value, tuple | list) else ()


def leads_to(start: Any, target: Any) -> bool:
    """Whether a node of the autograd graph has another one behind it."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node is target:
            return True
        behind = [n for n, _ in getattr(node, "next_functions", ()) if n is not None and n not in seen]
        seen.update(behind)
        stack.extend(behind)
    return False
