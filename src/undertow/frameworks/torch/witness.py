"""Watches one batch so that the causes of zeros can be proved: what reads each site's output, and what comes back.

While a batch runs, every call of a torch function is seen. From a site's output the activations, poolings and
normalisations that alone read it are followed, up to the next reader. Each leaves a **point**: which elements its
forward pass closed to the gradient, and which zeros came. What is predicted from the one is held to the other.
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
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ... import measures
from ...measures import ChannelSums, Histogram
from ...run import DIAGNOSIS
from .kernels import arranged, counted_true, walked

_RELUS = ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "threshold", "clamp", "clamp_min", "clip")
_SMOOTH = ("elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "hardswish", "hardsigmoid")
_ACTIVATIONS = frozenset((*_RELUS, *_SMOOTH, "logsigmoid", "softsign"))
_NORMS = frozenset(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"))
_AXES = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)}
_GEOMETRY = ("kernel_size", "stride", "padding")
_JOINS = frozenset(("add", "__add__", "__radd__", "__iadd__", "cat", "concat", "concatenate"))
_CUTS = {Tensor.detach: "detach()", Tensor.detach_: "detach_()", torch.detach: "detach()"}
_CUTS[Tensor.data.__get__] = ".data"  # type: ignore[attr-defined]
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_AT_SITES = (Histogram(), ChannelSums())
_SCALARS = ("zeros", "expected_zeros", "closed", "absolute", "expected_absolute", "slope", "gain")


@dataclass(eq=False)
class Point:
    """A place on the way from a site to its next reader: the site's output (step 0), or that of a function behind it.

    Attributes:
        facts: what is known of it from the forward pass; columns of its row.
        module: the site's, which says where the channels are.
        states: what is on its device still, in one flat dict.
        node: of the autograd graph, for a site's output.
        readers: the functions that read it and let a gradient through.
    """

    facts: dict[str, Any]
    module: nn.Module
    states: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    node: Any = None
    readers: list[str] = field(default_factory=list)

    @property
    def site(self) -> str:
        return str(self.facts["site"])

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come."""
        return "zeros" in self.states[0]

    def row(self) -> dict[str, Any]:
        """Return its row, when all has landed on the host; what was not measured is NaN, 0 or an empty list."""
        state = self.states[0]
        found: dict[str, Any] = {"readers": json.dumps(self.readers), "active": [state.get("active", ())]}
        for measure in _AT_SITES:
            known = self.arrived and self.facts["step"] == 0
            found |= measure.finish(state) if known else {column: [()] for column in measure.columns}
        found |= {key: _number(state.get(key), DIAGNOSIS[key]) for key in _SCALARS}
        return {**self.facts, **found, "shape": [self.facts["shape"]]}


def _number(value: Any, kind: str) -> float | int:
    if kind == "int64":
        return -1 if value is None else int(value)
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Cut:
    """A call whose result left the autograd graph, with the node that it left from."""

    how: str
    module: str | None
    node: Any

    @property
    def said(self) -> str:
        """What is written of it."""
        if self.module is None:
            return f"{self.how} outside the network"
        return f"{self.how} in {self.module or 'the forward of the network itself'}"


@final
class Witness(TorchFunctionMode):
    """Sees the functions called between `with` and its end, in this thread, and the gradients that come back.

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
        self._at: Any = WeakTensorKeyDictionary()  # the points that a tensor is the value of
        self._under_way: list[tuple[nn.Module, str]] = []
        self._cuts: list[Cut] = []
        self._used: set[int] = set()
        self._ran_backward = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, module in self._network.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self._begins, name), prepend=True).remove)
                stack.callback(module.register_forward_hook(self._ends).remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._at.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._used.update(id(tensor) for tensor in _tensors((args, kwargs)) if isinstance(tensor, nn.Parameter))
        if func in _BACKWARD:
            self._ran_backward = True
            return func(*args, **kwargs)
        given = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        if not given:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", "")).rstrip("_") or str(func)
        before = [point for tensor in given for point in self._at.get(tensor, ())]
        node = given[0].grad_fn
        forward = self._foreseen(func, name, args, kwargs) if before else {}
        result = func(*args, **kwargs)
        self._note(func, name, given, before, node, forward, result)
        return result

    def begin(self, site: str, call: int, key: str, module: nn.Module, output: Tensor, place: Tensor) -> None:
        """Take note of a site's output; `place` is the tensor at which its gradient can be had."""
        facts = {"site": site, "call": call, "output": key, "phase": "backward", "repeat": 0}
        facts |= {"step": 0, "op": "", "module": site, "settings": "{}"}
        shape = arranged(module, output.detach()).shape
        facts |= {"shape": list(shape), "dtype": str(output.dtype).removeprefix("torch."), "joins": 0}
        point = Point(facts | {"arrival": self._why_none(module, output)}, module, node=place.grad_fn)
        point.states[0] |= _gain(module)
        self.points.append(point)
        if output.requires_grad:
            self._at[output] = [*self._at.get(output, ()), point]
            self._listen(point, place, None)

    def close(self, names: Sequence[str]) -> list[Point]:
        """Return the points of the sites named, each with the reason where no gradient came."""
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

    def _begins(self, name: str, module: nn.Module, _: Any) -> None:
        self._under_way.append((module, name))

    def _ends(self, module: nn.Module, _: Any, __: Any) -> None:
        while self._under_way and self._under_way.pop()[0] is not module:
            pass  # calls that ended in an exception, which somebody caught

    def _note(
        self, func: Any, name: str, given: list[Tensor], before: list[Point], node: Any, forward: Any, result: Any
    ) -> None:
        """Take note of one call: who was read, where the graph was cut or joined, and whether the way goes on."""
        where = self._under_way[-1][1] if self._under_way else None
        made = [tensor for tensor in _tensors(result) if tensor.requires_grad]
        if not made:
            if func in _CUTS or (not torch.is_grad_enabled() and any(True for _ in _tensors(result))):
                self._cuts.append(Cut(_CUTS.get(func, "no_grad"), where, node))
            return
        if name in _JOINS and sum(not tensor.is_leaf for tensor in given) > 1:
            for point in self.points:
                point.facts["joins"] += 1
        for point in before:
            point.readers.append(name)
        for tensor in given:
            if tensor in self._at and any(tensor is one for one in made):
                del self._at[tensor]  # it was changed in place
        if forward and len(made) == 1:
            for point in before:
                self._go_on(point, name, where or "", forward, made[0])

    def _go_on(self, before: Point, name: str, where: str, forward: Any, result: Tensor) -> None:
        """Make the next point behind another one."""
        if len(before.readers) > 1:
            return
        facts = {
            **before.facts,
            "step": before.facts["step"] + 1,
            "op": name,
            "module": where,
            "joins": 0,
            "arrival": "",
        }
        settings, state, predict = forward
        after = Point(facts | {"settings": json.dumps(settings)}, before.module)
        after.facts["shape"] = list(arranged(before.module, result.detach()).shape)
        after.states[0] |= state(before.module)
        self.points.append(after)
        self._at[result] = [*self._at.get(result, ()), after]
        self._listen(after, result, predict)

    def _listen(self, point: Point, place: Tensor, predict: Callable[[Tensor], dict[str, Any]] | None) -> None:
        def arrived(gradient: Tensor) -> None:
            if point.arrived:  # a second backward pass through the same graph
                return
            state, g = point.states[0], gradient.detach()
            with torch.no_grad():
                g = self._unscaled(g.reshape(place.shape))
                state |= {} if predict is None else predict(g)
                x = arranged(point.module, g)
                state["absolute"] = _l1(x)
                at_site = point.facts["step"] == 0
                wanted = {"zeros", *(name for measure in _AT_SITES for name in measure.reads if at_site)}
                walk = walked(x, frozenset(wanted))
                found = x if walk is None else walk
                for measure in _AT_SITES if at_site else ():
                    state |= measure.reduce(found)
                state["zeros"] = measures.zeros(found)

        self._stack.callback(place.register_hook(arrived).remove)

    def _foreseen(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Return what is known of a function that is followed: settings, its state, and a prediction of zeros."""
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if not isinstance(x, Tensor) or not self._at.get(x):
            return None
        # what is computed here must not be counted among the tensors that a checkpoint keeps
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            if name in _ACTIVATIONS:
                return _activation(func, x, args, kwargs)
            if name in _AXES and x.ndim == _AXES[name] + 2:
                return _pooling(name, x, args, kwargs)
        return ({}, lambda module: {}, None) if name in _NORMS else None

    def _why_none(self, module: nn.Module, output: Tensor) -> str:
        if output.requires_grad:
            return ""
        if not torch.is_grad_enabled():
            return "no_grad"
        wanted = [parameter.requires_grad for parameter in module.parameters()]
        if any(wanted):
            return "detached inside"
        return self._cuts[0].said if self._cuts and not wanted else "frozen"

    def _lost(self, point: Point) -> str:
        """Say where a gradient was lost that did not arrive."""
        if not self._ran_backward:
            return "no backward"
        for cut in self._cuts:
            if _leads_to(cut.node, point.node):
                return cut.said
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


def _activation(func: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
    """Take the derivative of a pointwise activation where it is about to be taken."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        value = func(leaf * 1, *args[1:], **{key: v for key, v in kwargs.items() if key != "input"})
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    closed = slope == 0

    def state(module: nn.Module) -> dict[str, Any]:
        active = arranged(module, ~closed).float()  # booleans add up slowly; over space alone, floats are exact
        active = (active.flatten(2).sum(2) if active.ndim > 2 else active).long().sum(0)
        return {"closed": counted_true(closed), "slope": _l1(slope) / max(slope.numel(), 1), "active": active}

    def predict(g: Tensor) -> dict[str, Any]:
        foretold = slope * g.reshape(slope.shape)
        return {
            "expected_zeros": counted_true(closed | (g.reshape(closed.shape) == 0)),
            "expected_absolute": _l1(foretold),
        }

    settings = {key: v for key, v in kwargs.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return settings, state, predict


def _pooling(name: str, x: Tensor, args: Any, kwargs: Any) -> Any:
    """Find which elements win a window, where pooling takes the largest."""
    settings = _geometry(name, args[1:], kwargs)
    if "max" not in name:
        return settings, lambda module: {}, None
    given = {key: v for key, v in kwargs.items() if key not in ("input", "return_indices")}
    with torch.no_grad():
        _, winners = getattr(F, name)(x.detach(), *args[1:6], **given, return_indices=True)
    size = math.prod(x.shape[2:])

    def reached(weights: Tensor) -> Tensor:
        hits = torch.zeros(*x.shape[:2], size, dtype=torch.int32, device=x.device)
        return hits.scatter_add_(2, winners.flatten(2), weights.flatten(2).int()) > 0

    def state(module: nn.Module) -> dict[str, Any]:
        return {"closed": counted_true(~reached(torch.ones_like(winners)))}

    return settings, state, lambda g: {"expected_zeros": counted_true(~reached(g.reshape(winners.shape) != 0))}


def _geometry(name: str, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pooling's settings, one number for each axis."""
    axes = _AXES[name]
    if name.startswith("adaptive"):
        return {"adaptive": True}
    later = ("dilation", "ceil_mode") if name.startswith("max") else ("ceil_mode", "count_include_pad")
    found = {"padding": 0, "dilation": 1, "ceil_mode": False, **dict(zip((*_GEOMETRY, *later), rest, strict=False))}
    found |= {key: v for key, v in kwargs.items() if key in (*_GEOMETRY, *later)}
    if found.get("stride") in (None, (), []):
        found["stride"] = found["kernel_size"]
    per_axis = (*_GEOMETRY, "dilation")
    return {key: list(_each(found[key], axes)) for key in per_axis} | {"ceil_mode": bool(found["ceil_mode"])}


def _each(value: Any, axes: int) -> Sequence[int]:
    if isinstance(value, int):
        return [value] * axes
    return list(value) * axes if len(value) == 1 else list(value)


def _gain(module: nn.Module) -> dict[str, Any]:
    """Return by what a convolution or linear layer multiplies the root mean square of a gradient of random signs.

    Each of its inputs is the sum of as many products as weights reach it, so it is ||W|| / sqrt(inputs x stride).
    """
    if isinstance(module, nn.Linear):
        inputs = module.in_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = module.in_channels * math.prod(module.stride)
    else:
        return {}
    weight = module.weight.detach()
    return {"gain": torch.linalg.vector_norm(weight, dtype=_wide(weight)) / math.sqrt(inputs)}


def _l1(x: Tensor) -> Any:
    return torch.linalg.vector_norm(x, 1, dtype=_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _leads_to(start: Any, wanted: Any) -> bool:
    """Whether a node of the autograd graph has another one behind it."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node is wanted:
            return True
        behind = [one for one, _ in getattr(node, "next_functions", ()) if one is not None and one not in seen]
        seen.update(behind)
        stack.extend(behind)
    return False
