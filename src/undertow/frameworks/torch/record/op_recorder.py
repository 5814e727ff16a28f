"""Watches one batch so that the causes of zeros can be proved: what reads each site's output, and what comes back.

While a batch runs, every call of a torch function is seen. From a site's output the activations, poolings and
normalisations that alone read it are followed, up to the next reader. Each leaves a **point**: which elements its
forward pass closed to the gradient, and which zeros came. `undertow.diagnosis` compares the two.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ....measures import ChannelSums, Histogram, stats
from ..hooks import ModuleHook
from .stats import arranged
from .zero_causes import Forecast, forecast, gain, l1

_JOINS = frozenset(("add", "__add__", "__radd__", "__iadd__", "cat", "concat", "concatenate"))
_CUTS = {Tensor.detach: "detach()", Tensor.detach_: "detach_()", torch.detach: "detach()"}
_CUTS[Tensor.data.__get__] = ".data"  # type: ignore[attr-defined]
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_AT_SITES = (Histogram(), ChannelSums())
_COUNTS = ("zeros", "expected_zeros", "closed")
_AMOUNTS = ("absolute", "expected_absolute", "slope", "gain")


@dataclass(eq=False)
class Point:
    """One step from a site to its next reader: the site's output (step 0), or that of a function behind it.

    Attributes:
        facts: what is known of it from the forward pass; columns of its row.
        module: the site's, which says where the channels are.
        state: what was measured, on the tensor's device.
        node: of the autograd graph, for a site's output.
        readers: the functions that read it and let a gradient through.
    """

    facts: dict[str, Any]
    module: nn.Module
    state: dict[str, Any] = field(default_factory=dict)
    node: Any = None
    readers: list[str] = field(default_factory=list)

    @property
    def site(self) -> str:
        """The site's name."""
        return str(self.facts["site"])

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come."""
        return "zeros" in self.state

    def row(self) -> dict[str, Any]:
        """Return its row, once its state is on the host; what was not measured is NaN, -1 or an empty list."""
        columns: dict[str, Any] = {"readers": json.dumps(self.readers), "active": [self.state.get("active", ())]}
        for measure in _AT_SITES:
            measured = self.arrived and self.facts["step"] == 0
            columns |= measure.finish(self.state) if measured else {column: [()] for column in measure.columns}
        columns |= {key: int(self.state.get(key, -1)) for key in _COUNTS}
        columns |= {key: float(self.state.get(key, math.nan)) for key in _AMOUNTS}
        return {**self.facts, **columns, "shape": [self.facts["shape"]]}


@dataclass(frozen=True)
class Cut:
    """A call whose result left the autograd graph, with the node that it left from."""

    how: str
    module: str | None
    node: Any

    @property
    def arrival(self) -> str:
        """What the column `arrival` says of a gradient that was lost here."""
        if self.module is None:
            return f"{self.how} outside the network"
        return f"{self.how} in {self.module or 'the forward of the network itself'}"


@final
class OpRecorder(TorchFunctionMode):
    """Records the functions called between `with` and its end, in this thread, and the gradients that come back.

    Args:
        network: all modules by name, so that each call can be told where it was made.
        unscaled: undoes the AMP scale of a gradient.

    Attributes:
        points: in the order in which they were made.
    """

    def __init__(self, network: nn.Module, unscaled: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.points: list[Point] = []
        self._network, self._unscaled = network, unscaled
        self._points_of: Any = WeakTensorKeyDictionary()  # the points whose value a tensor is
        self._running: list[tuple[nn.Module, str]] = []  # module calls, the innermost last
        self._cuts: list[Cut] = []
        self._used: set[int] = set()
        self._ran_backward = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, module in self._network.named_modules():
                before, after = ModuleHook(partial(self._call_begins, name)), ModuleHook(self._call_ends)
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._points_of.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._used.update(id(tensor) for tensor in _tensors((args, kwargs)) if isinstance(tensor, nn.Parameter))
        if func in _BACKWARD:
            self._ran_backward = True
            return func(*args, **kwargs)
        inputs = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        if not inputs:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", "")).rstrip("_") or str(func)
        before = [point for tensor in inputs for point in self._points_of.get(tensor, ())]
        node = inputs[0].grad_fn
        expected = self._forecast(func, name, args, kwargs) if before else None
        result = func(*args, **kwargs)
        outputs = [tensor for tensor in _tensors(result) if tensor.requires_grad]
        if outputs:
            self._follow(name, inputs, outputs, before, expected)
        elif func in _CUTS or (not torch.is_grad_enabled() and any(True for _ in _tensors(result))):
            self._cuts.append(Cut(_CUTS.get(func, "no_grad"), self._caller, node))
        return result

    def begin(self, site: str, call: int, position: str, module: nn.Module, output: Tensor, hooked: Tensor) -> None:
        """Record a site's output; `hooked` is the tensor that its gradient arrives at."""
        facts = {"site": site, "call": call, "output": position, "phase": "backward", "repeat": 0}
        facts |= {"step": 0, "op": "", "module": site, "settings": "{}"}
        shape = arranged(module, output.detach()).shape
        facts |= {"shape": list(shape), "dtype": str(output.dtype).removeprefix("torch."), "joins": 0}
        point = Point(facts | {"arrival": self._why_none(module, output)}, module, gain(module), hooked.grad_fn)
        self.points.append(point)
        if output.requires_grad:
            self._points_of[output] = [*self._points_of.get(output, ()), point]
            self._await_gradient(point, hooked)

    def close(self, names: Sequence[str]) -> list[Point]:
        """Return the points of the named sites, each with the reason where no gradient came."""
        called = {point.site for point in self.points}
        for point in self.points:
            if point.facts["step"] == 0 and point.facts["arrival"] == "":
                point.facts["arrival"] = "arrived" if point.arrived else self._lost(point)
        never = [self._uncalled(name) for name in names if name not in called]
        return [point for point in self.points if point.site in set(names)] + never

    def _uncalled(self, name: str) -> Point:
        module = self._network.get_submodule(name)
        weights = [id(parameter) for parameter in module.parameters()]
        by_another = bool(weights) and self._used.issuperset(weights)  # as attention does with its last layer
        return Point({**_UNCALLED, "site": name} | ({"arrival": "used unseen"} if by_another else {}), module)

    def _call_begins(self, name: str, module: nn.Module, _: Any) -> None:
        self._running.append((module, name))

    def _call_ends(self, module: nn.Module, _: Any, __: Any) -> None:
        while self._running and self._running.pop()[0] is not module:
            pass  # calls that ended in an exception, which somebody caught

    @property
    def _caller(self) -> str | None:
        """The name of the module whose forward runs; None outside the network."""
        return self._running[-1][1] if self._running else None

    def _follow(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], before: list[Point], expected: Forecast | None
    ) -> None:
        """Record who was read by one call and what it joined, and go on behind it where it is followed."""
        if name in _JOINS and sum(not tensor.is_leaf for tensor in inputs) > 1:
            for point in self.points:
                point.facts["joins"] += 1
        for point in before:
            point.readers.append(name)
        for tensor in inputs:
            if tensor in self._points_of and any(tensor is output for output in outputs):
                del self._points_of[tensor]  # it was changed in place
        if expected is not None and len(outputs) == 1:
            for point in before:
                if len(point.readers) == 1:
                    self._add_step(point, name, expected, outputs[0])

    def _add_step(self, before: Point, name: str, expected: Forecast, output: Tensor) -> None:
        """Add the point behind another one."""
        facts = {**before.facts, "step": before.facts["step"] + 1, "op": name, "module": self._caller or ""}
        facts |= {"joins": 0, "arrival": "", "settings": json.dumps(expected.settings)}
        facts["shape"] = list(arranged(before.module, output.detach()).shape)
        after = Point(facts, before.module, expected.state(before.module))
        self.points.append(after)
        self._points_of[output] = [*self._points_of.get(output, ()), after]
        self._await_gradient(after, output, expected.predict)

    def _await_gradient(
        self, point: Point, hooked: Tensor, predict: Callable[[Tensor], dict[str, Any]] = lambda gradient: {}
    ) -> None:
        shape = hooked.shape

        def arrived(gradient: Tensor) -> None:
            if point.arrived:  # a second backward pass through the same graph
                return
            with torch.no_grad():
                g = self._unscaled(gradient.detach().reshape(shape))
                point.state |= predict(g)
                statistics = stats(arranged(point.module, g))
                point.state["absolute"] = l1(statistics.x)
                if point.facts["step"] == 0:
                    for measure in _AT_SITES:
                        point.state |= measure.pick(statistics)
                point.state["zeros"] = statistics.zeros

        self._stack.callback(hooked.register_hook(arrived).remove)

    def _forecast(self, func: Any, name: str, args: Any, kwargs: Any) -> Forecast | None:
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if not isinstance(x, Tensor) or not self._points_of.get(x):
            return None
        # what is computed here must not be counted among the tensors that a checkpoint keeps
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return forecast(func, name, x, args, kwargs)

    def _why_none(self, module: nn.Module, output: Tensor) -> str:
        if output.requires_grad:
            return ""
        if not torch.is_grad_enabled():
            return "no_grad"
        trainable = [parameter.requires_grad for parameter in module.parameters()]
        if any(trainable):
            return "detached inside"
        return self._cuts[0].arrival if self._cuts and not trainable else "frozen"

    def _lost(self, point: Point) -> str:
        """Say where a gradient was lost that did not arrive."""
        if not self._ran_backward:
            return "no backward"
        for cut in self._cuts:
            if _leads_to(cut.node, point.node):
                return cut.arrival
        return "unread"


_UNCALLED: dict[str, Any] = {
    "call": -1,
    "output": "",
    "phase": "backward",
    "repeat": 0,
    "step": 0,
    "op": "",
    "module": "",
    "settings": "{}",
    "shape": [],
    "dtype": "",
    "joins": 0,
    "arrival": "never called",
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _leads_to(start: Any, target: Any) -> bool:
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
