"""Watches one batch so that the causes of zeros can be proved: what reads each site's output, and what comes back.

While a batch runs, every call of a torch function is seen. From a site's output the activations, poolings and
normalisations that alone read it are followed, up to the next reader. Each leaves a **point**: which elements its
forward pass closed to the gradient, and which zeros came. `undertow.diagnosis` compares the two.
"""

import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ....measures import stats
from ...diagnosis_rows import AT_SITES, has_arrived, row_of
from ..hooks import ModuleHook
from ..internals import unseen_by_function_modes
from ..submodules import named_modules, own_parameters, submodule
from .cuts import Cut, Cuts
from .site_graph import END, first_readers
from .stats import arranged, count_true
from .zero_causes import Forecast, forecast, l1, l2, operand, weight_statistics, wide_dtype

_JOINS = frozenset(("add", "__add__", "__radd__", "__iadd__", "cat", "concat", "concatenate"))
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_LABELLED = ("cross_entropy", "nll_loss")
_HOOKED = "BackwardHookFunctionBackward"  # the node that a full backward hook of the user's puts around a tensor


@dataclass(eq=False)
class Point:
    """One step from a site to its next reader: the site's output (step 0), or that of a function behind it.

    Attributes:
        facts: what is known of it from the forward pass; columns of its row.
        module: the site's, which says where the channels are.
        state: what was measured, on the tensor's device.
        node: of the autograd graph, for a site's output.
        cut: what a site's output without a gradient was computed from.
        readers: the functions that read it and let a gradient through.
        read_by: the numbers of the site outputs that read a site's output first, `END` for the end of the graph.
    """

    facts: dict[str, Any]
    module: nn.Module
    state: dict[str, Any] = field(default_factory=dict)
    node: Any = None
    cut: Cut | None = None
    readers: list[str] = field(default_factory=list)
    read_by: list[int] = field(default_factory=list)

    @property
    def site(self) -> str:
        """The site's name."""
        return str(self.facts["site"])

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come."""
        return has_arrived(self.state)

    def row(self) -> dict[str, Any]:
        """Return its row, once its state is on the host; what was not measured is NaN, -1 or an empty list."""
        return row_of(self.facts, self.state, self.readers, self.read_by)


@final
class OpRecorder(TorchFunctionMode):
    """Records the functions called between `with` and its end, in this thread, and the gradients that come back.

    Args:
        network: all modules by name, so that each call can be told where it was made.
        unscaled: undoes the AMP scale of a gradient.
        sites: names of the modules that are observed.

    Attributes:
        points: in the order in which they were made.
    """

    def __init__(self, network: nn.Module, unscaled: Callable[[Tensor], Any], sites: Container[str]) -> None:
        super().__init__()
        self.points: list[Point] = []
        self._network, self._unscaled, self._sites = network, unscaled, sites
        self._points_of: Any = WeakTensorKeyDictionary()  # the points whose value a tensor is
        self._points_at: dict[tuple[Any, int], list[Point]] = {}  # the same, by the graph's node and its output
        self._running: list[tuple[nn.Module, str, list[Tensor]]] = []  # calls with their inputs, the innermost last
        self._cuts = Cuts()
        self._broken_data: Any = None
        self._ignored_labels: Any = None
        self._used: set[int] = set()
        self._roots: list[Any] = []
        self._ran_backward = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, module in named_modules(self._network):
                before, after = ModuleHook(partial(self._call_begins, name)), ModuleHook(self._call_ends)
                stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
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
        tensors = [*_tensors((args, kwargs))]
        self._used.update(id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter))
        if func in _BACKWARD:
            self._ran_backward = True
            self._roots += [tensor.grad_fn for tensor in tensors]
            for point in [point for tensor in tensors for point in self._points(tensor)]:
                point.readers.append("backward")
            return func(*args, **kwargs)
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        if func is Tensor.view_as and args[0] is args[1]:  # what returns its input as it is, such as a hook's wrapper
            return func(*args, **kwargs)
        if not inputs:
            result = func(*args, **kwargs)
            self._cuts.follow(tensors, _tensors(result), self._in_layer)
            return result
        name = str(getattr(func, "__name__", "")).rstrip("_") or str(func)
        before = [point for tensor in inputs for point in self._points(tensor)]
        expected = self._forecast(func, name, args, kwargs) if before else None
        other = operand(name, args, kwargs) if before else None
        self._cuts.take_flat(name, inputs, self._caller)
        if name in _LABELLED:
            self._take_labels(args, kwargs)
        result = func(*args, **kwargs)
        outputs = [tensor for tensor in _tensors(result) if tensor.requires_grad]
        if outputs and not any(tensor.is_leaf for tensor in outputs):
            self._cuts.follow(tensors, outputs, self._in_layer)
            self._follow(name, inputs, outputs, before, expected, other)
        else:
            self._cuts.take(func, str(getattr(func, "__name__", name)), tensors, inputs, result, self._caller)
        return result

    def begin(self, site: str, call: int, position: str, module: nn.Module, output: Tensor, hooked: Tensor) -> None:
        """Record a site's output; `hooked` is the tensor that its gradient arrives at."""
        facts = {"site": site, "call": call, "output": position, "phase": "backward", "repeat": 0}
        facts |= {"step": 0, "op": "", "module": site, "settings": "{}", "flat": ""}
        shape = arranged(module, output.detach()).shape
        facts |= {"shape": list(shape), "dtype": str(output.dtype).removeprefix("torch."), "joins": 0}
        facts |= {"number": len(self.points), "trainable": _trainable(module)}
        state = weight_statistics(module) | {"broken_output": _broken([output])}
        if self._running and self._running[-1][0] is module and _may_be_any(state["broken_output"]):
            state["broken_input"] = _broken(self._running[-1][2])
        point = Point(facts | {"arrival": self._why_none(module, output)}, module, state, hooked.grad_fn)
        point.cut = None if output.requires_grad else self._cuts.at(output)
        self.points.append(point)
        if output.requires_grad:
            self._add_point(output, point)
            self._await_gradient(point, hooked)

    def replayed(self, site: str) -> None:
        """Take note that checkpointing runs a site's module again, so that what was seen of it had no gradient yet."""
        for point in self.points:
            if point.site == site and point.facts["arrival"] == "no_grad":
                point.facts["arrival"] = "checkpointed"

    def _add_point(self, output: Tensor, point: Point) -> None:
        self._points_of[output] = [*self._points_of.get(output, ()), point]
        self._points_at.setdefault((output.grad_fn, output.output_nr), []).append(point)

    def _points(self, tensor: Tensor) -> Sequence[Point]:
        """Return the points whose value a tensor is, also where a user's full backward hook has wrapped it."""
        points: Sequence[Point] | None = self._points_of.get(tensor)
        if points is not None:
            return points
        node, output = tensor.grad_fn, tensor.output_nr
        if node is None or node.name() != _HOOKED:
            return ()
        while node is not None and node.name() == _HOOKED:
            node, output = node.next_functions[output]
        return self._points_at.get((node, output), ())

    def close(self, names: Sequence[str]) -> list[Point]:
        """Return the points of the named sites, each with the reason where no gradient came."""
        called = {point.site for point in self.points}
        chosen = set(names)
        points = [point for point in self.points if point.site in chosen]
        anything_arrived = any(point.arrived for point in self.points)
        for point in points:
            if point.facts["step"] == 0:
                if point.facts["arrival"] == "":
                    point.facts["arrival"] = "arrived" if point.arrived else self._lost(point, anything_arrived)
                if point.facts["arrival"] == "no_grad":
                    point.facts["arrival"] = _without_grad(point)
                point.facts["flat"] = self._cuts.flat(point.node)
                point.state["broken_data"] = self._broken_data
                point.state["ignored_labels"] = self._ignored_labels
                point.state = {key: value for key, value in point.state.items() if value is not None}
        self._link([point for point in points if point.facts["step"] == 0])
        return points + [self._uncalled(name) for name in names if name not in called]

    def _link(self, outputs: Sequence[Point]) -> None:
        """Find which site outputs read which, and let go of the graph."""
        numbers: dict[Any, int] = {}
        for point in outputs:
            if point.node is not None:
                point.facts["number"] = numbers.setdefault(point.node, point.facts["number"])
        readers = first_readers(numbers, self._roots)
        for point in self.points:
            point.read_by = readers.get(point.facts["number"], [END]) if point.facts["step"] == 0 else []
            point.node = point.cut = None
        self._roots, self._points_at = [], {}
        self._cuts.clear()

    def _uncalled(self, name: str) -> Point:
        module = submodule(self._network, name)
        weights = [id(parameter) for parameter in module.parameters()]
        by_another = bool(weights) and self._used.issuperset(weights)  # as attention does with its last layer
        return Point({**_UNCALLED, "site": name} | ({"arrival": "used unseen"} if by_another else {}), module)

    def _call_begins(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [*_tensors((args, kwargs))] if module is self._network or name in self._sites else []
        if module is self._network and self._broken_data is None:
            with unseen_by_function_modes():
                self._broken_data = _broken(inputs)
        self._running.append((module, name, inputs))

    def _take_labels(self, args: Any, kwargs: Any) -> None:
        """Take the share of labels that a loss ignores, of those that are class indices."""
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if isinstance(target, Tensor) and not target.is_floating_point() and target.numel():
            ignored = count_true(target == kwargs.get("ignore_index", -100))
            self._ignored_labels = ignored / target.numel()

    def _call_ends(self, module: nn.Module, _: Any, __: Any) -> None:
        while self._running and self._running.pop()[0] is not module:
            pass  # calls that ended in an exception, which somebody caught

    @property
    def _caller(self) -> str | None:
        """The name of the module whose forward runs; None outside the network."""
        return self._running[-1][1] if self._running else None

    @property
    def _in_layer(self) -> bool:
        """Whether the innermost call is of a module with parameters of its own that learn."""
        own = own_parameters(self._running[-1][0]) if self._running else {}
        return any(parameter.requires_grad for parameter in own.values())

    def _follow(
        self,
        name: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        before: list[Point],
        expected: Forecast | None,
        other: Any,
    ) -> None:
        """Record who was read by one call and what it joined, and go on behind it where it is followed."""
        if name in _JOINS and sum(not tensor.is_leaf for tensor in inputs) > 1:
            for point in self.points:
                point.facts["joins"] += 1
        for point in before:
            point.readers.append(name)
            if other is not None:
                point.state["operand"] = other
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
        facts |= {"joins": 0, "arrival": "", "flat": "", "settings": json.dumps(expected.settings)}
        facts["shape"] = list(arranged(before.module, output.detach()).shape)
        after = Point(facts, before.module, expected.state(before.module))
        self.points.append(after)
        self._add_point(output, after)
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
                point.state["absolute"], point.state["norm"] = l1(statistics.x), l2(statistics.x)
                if point.facts["step"] == 0:
                    for measure in AT_SITES:
                        point.state |= measure.pick(statistics)
                point.state["zeros"] = statistics.zeros

        self._stack.callback(hooked.register_hook(arrived).remove)

    def _forecast(self, func: Any, name: str, args: Any, kwargs: Any) -> Forecast | None:
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if not isinstance(x, Tensor) or not self._points(x):
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
        cut = self._cuts.first()
        return cut.description if cut is not None and not trainable else "frozen"

    def _lost(self, point: Point, anything_arrived: bool) -> str:
        """Say where a gradient was lost that did not arrive."""
        if not self._ran_backward:
            return "no backward"
        cut = self._cuts.of(point.node, anything_arrived)
        return "unread" if cut is None else cut.description


def _without_grad(point: Point) -> str:
    """Tell what ran under no_grad on its way to a trained layer from what stands aside, as a target network does."""
    if point.cut is None:
        return "no_grad" if point.facts["trainable"] == 1 else "frozen"
    return "no_grad" if point.cut.read_by_layer else "no_grad aside"


def _trainable(module: nn.Module) -> int:
    """Return whether any of a module's parameters is trained: 1, 0, or -1 where it has none."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return int(any(trained)) if trained else -1


def _broken(tensors: Iterable[Tensor]) -> Any:
    """Count the infinite elements and those that are not a number; None without floating-point tensors."""
    counts = [_nonfinite(tensor.detach()) for tensor in tensors if tensor.is_floating_point()]
    return sum(counts[1:], start=counts[0]) if counts else None


def _nonfinite(x: Tensor) -> Any:
    """Count what is not finite; on the CPU by way of a sum, which is finite only if all are, in a fifth of the time."""
    if x.device.type == "cpu" and math.isfinite(float(x.sum(dtype=wide_dtype(x)))):
        return np.zeros((), np.int64)
    return count_true(~torch.isfinite(x))


def _may_be_any(count: Any) -> bool:
    """Whether a count may be other than zero; on a device it is not known yet."""
    return count is not None and (isinstance(count, Tensor) or bool(count))


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
    "flat": "",
    "number": -1,
    "trainable": -1,
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
