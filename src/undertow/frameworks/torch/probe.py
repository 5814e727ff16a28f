"""Reads a PyTorch network while it runs: hooks for one batch, small results on the device, one copy to the host.

A forward hook takes the module's output, and a *tensor* hook on that output takes the gradient that arrives. Put there
before a following in-place operation, it still receives the gradient of the value before that operation.
"""

import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self

import numpy.typing as npt
import torch
from torch import nn

from ...errors import ModelError
from ...measures import Measure
from ...sites import Part
from ..inside import Reading
from . import kernels  # and what the measures are made of
from .kernels import Walked, arranged
from .modules import ACTIVATIONS
from .weights import weights_sha256
from .witness import Point, Witness

_POOLS = tuple(
    getattr(nn, f"{prefix}{kind}Pool{axes}d")
    for prefix in ("", "Adaptive")
    for kind in ("Max", "Avg")
    for axes in (1, 2, 3)
)
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.modules.conv._ConvNd,),
    "linear": (nn.Linear, nn.Bilinear),
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    "relu": ACTIVATIONS["relu-like"],
    "pool": (*_POOLS, nn.LPPool1d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
}
_LARGE = 1 << 22  # bytes from which a result is copied by itself


def network(model: Any) -> nn.Module:
    """Return the module whose parts have the names that its author gave them.

    Raises:
        ModelError: it is no module, or compiled: hooks set now would never fire.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    root: nn.Module = model
    while isinstance(root, nn.parallel.DistributedDataParallel | nn.DataParallel):
        root = root.module
    for name, module in root.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its part {name!r} is" if name else "it is"
            raise ModelError(
                f"the model cannot be read: {where} compiled, and hooks set after torch.compile never fire; "
                "record the module that was given to torch.compile, and run that one"
            )
    return root


def parts(model: Any) -> list[Part]:
    """List every module that can be a site, in the order of definition, each once with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network(model).named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    alone = len(names) == 1
    return [
        Part(tuple(called), _kind(module), _types(module), module)
        for module, called in names.items()
        if alone or "" not in called
    ]


def _kind(module: nn.Module) -> str:
    return next((kind for kind, types in _KINDS.items() if isinstance(module, types)), type(module).__name__.lower())


def _types(module: nn.Module) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object))


def visits(model: Any, example: Any) -> dict[str, list[Any]]:
    """Run the network on an example; return the shapes of the outputs of each module that was called, in order.

    Modes stay, and buffers and the random state are put back.
    """
    root = network(model)
    seen: dict[str, list[Any]] = {}

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        shapes = tuple(tuple(tensor.shape) for _, tensor in tensors_in(output))
        seen.setdefault(name, []).append(shapes[0] if len(shapes) == 1 else shapes)

    inputs = example if isinstance(example, tuple) else (example,)
    with _as_before(root), torch.no_grad(), ExitStack() as stack:
        for part in parts(model):
            stack.callback(part.module.register_forward_hook(partial(after, part.name)).remove)
        model(*inputs)
    return seen


@contextmanager
def _as_before(root: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def identity(model: Any) -> dict[str, Any]:
    """Return what tells a network from others: its class, the shape of its structure, its weights, its precision."""
    root = network(model)
    digest = hashlib.sha256()
    for name, module in root.named_modules():
        digest.update(f"{name}\0{type(module).__qualname__}\0{module.extra_repr()}\0".encode())
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in root.parameters()})
    return {
        "class": f"{type(root).__module__}.{type(root).__qualname__}",
        "structure_sha256": digest.hexdigest(),
        "weights_sha256": weights_sha256(root),
        "mode": "training" if root.training else "evaluation",
        "parameters": sum(p.numel() for p in root.parameters()),
        "precision": ", ".join(dtypes),
        "device": ", ".join(sorted({str(p.device) for p in root.parameters()})),
        "framework": f"torch {torch.__version__}",
    }


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def tensors_in(output: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating-point tensors of a module's output with their places: "" for one alone, "0", "1.hidden"."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield key, output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            yield from tensors_in(value, f"{key}.{name}" if key else str(name))
    elif isinstance(output, tuple | list):
        for place, value in enumerate(output):
            yield from tensors_in(value, f"{key}.{place}" if key else str(place))
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in(vars(output), key)


# found once: in a hook, to look these up takes as long as to call them
_graph_task, _has_graph, _thread = torch._C._current_graph_task_id, torch.is_grad_enabled, threading.get_ident
_Tensor, _FLOAT16 = torch.Tensor, torch.float16

_Facts = tuple[str, int, str, str]
_Taken = tuple[_Facts, tuple[Any, ...] | None, tuple[torch.dtype, int, list[Any]] | None]
"""What a hook takes of a tensor: site, call, output and phase; what a walk found; if that is not all: dtype, number of
samples, states."""


@lru_cache(64)
def _read_by(measures: tuple[Measure, ...]) -> tuple[frozenset[str], bool]:
    """Return what measures read of a walk, and whether none needs more."""
    return frozenset(name for measure in measures for name in measure.reads), all(m.reads for m in measures)


@dataclass(eq=False)
class Probe:
    """Reads the sites of one batch between `with` and its end; hooks are on the modules only in between.

    Attributes:
        watched: the whole network, where this batch is also watched for a diagnosis.
        order: the sites in the order in which they first gave an output.
        views: the sites whose output is a view, on which an in-place operation hides the gradient.
        unscaled: float16 came out of autocast, and there is no scaler.
        scale: of the AMP scaler when the first gradient came; None without one.
        taken: of each tensor, in order of arrival; `Landing` makes readings of it.
    """

    modules: Mapping[str, nn.Module]
    measures: Sequence[Measure]
    phases: frozenset[str]
    scaler: Any = None
    watched: Any = None
    order: dict[str, None] = field(default_factory=dict)
    views: set[str] = field(default_factory=set)
    unscaled: bool = False
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._handles: list[Any] = []
        self._hooks: list[OrderedDict[Any, Any]] = []
        self._calls: dict[str, int] = {}
        self._ungraphed: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._replayed: dict[tuple[int, str], int] = defaultdict(int)
        self.taken: list[_Taken] = []
        self._reads, self._walk_is_all = _read_by(tuple(self.measures))
        self._how: Any = None
        self._thread, self._threads = 0, 1
        self._witness = None if self.watched is None else Witness(network(self.watched), self._unscaled)

    def __enter__(self) -> Self:
        self._thread, self._threads = _thread(), torch.get_num_threads()
        if self._walk_is_all and self.scaler is None:
            self._how = kernels.hooking(self._reads, self._threads, self.taken, self._arrived)
        try:
            for name, module in self.modules.items():
                self._keep(module._forward_hooks, partial(self._after, name))
            if self._witness is not None:
                self._witness.__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._witness is not None:
            self._witness.__exit__(*_)
        for handle in self._handles:
            handle.remove()
        for hooks in self._hooks:
            hooks.pop(self, None)
        self._handles.clear()
        self._hooks.clear()
        self._how = None

    def points(self, names: Sequence[str]) -> list[Point]:
        """Return what was seen for a diagnosis of the sites named; nothing where this batch was not watched."""
        return [] if self._witness is None else self._witness.close(names)

    @property
    def arrived(self) -> set[str]:
        """The sites at which a gradient has come."""
        return {name for (name, _, _, phase), *_ in self.taken if phase == "backward"}

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._witness is None:
            self._take(name, module, output)
            return
        with torch._C.DisableTorchFunction():  # it must not see what we do
            self._take(name, module, output)

    def _take(self, name: str, module: nn.Module, output: Any) -> None:
        again = _graph_task() != -1  # inside a backward pass: checkpointing runs it once more
        if not again and _thread() != self._thread:
            return
        call = self._replayed_call(name) if again else self._calls.get(name, 0)
        if call is None:
            return
        if not again:
            self._calls[name] = call + 1
        if not _has_graph():
            self._ungraphed[name].append((_sequence(), call))
        self.order[name] = None
        alone = type(output) is _Tensor and output.is_floating_point()
        for key, tensor in (("", output),) if alone else tensors_in(output):
            if "forward" in self.phases and not again:
                self._read((name, call, key, "forward"), module, tensor.detach())
            view = tensor._is_view()
            place = _before_views(module, tensor) if view else tensor
            if self._witness is not None and not again:
                self._witness.begin(name, call, key, module, tensor, place)
            if "backward" in self.phases and tensor.requires_grad:
                if self.scaler is None and tensor.dtype is _FLOAT16:
                    self.unscaled |= torch.is_autocast_enabled(tensor.device.type)
                if view and place is tensor:
                    self.views.add(name)
                facts = (name, call, key, "backward")
                if place is tensor and self._how is not None:
                    self._listen(place, kernels.hook(self._how, facts, module))
                else:
                    self._listen(
                        place, partial(self._arrived, facts, module, None if place is tensor else tensor.shape)
                    )

    def _listen(self, tensor: torch.Tensor, hook: Any) -> None:
        """Put a hook on a tensor as `register_hook` does, but for its handle, which takes longer than all the rest."""
        node = tensor.grad_fn
        if type(tensor) is not _Tensor or tensor._backward_hooks is not None or node is None:
            self._handles.append(tensor.register_hook(hook))
            return
        hooks: OrderedDict[Any, Any] = OrderedDict()
        tensor._backward_hooks = hooks
        node._register_hook_dict(tensor)
        self._keep(hooks, hook)

    def _keep(self, hooks: Any, hook: Any) -> None:
        hooks[self] = hook
        self._hooks.append(hooks)

    def _replayed_call(self, name: str) -> int | None:
        """Return the number of the call that reentrant checkpointing now repeats, this time with a graph.

        Such a call was first made without one, after its Checkpoint node: nodes are numbered as they are made. What
        non-reentrant checkpointing repeats has its graph, and its hooks, from the first time: None.
        """
        node = torch._C._current_autograd_node()
        if node is None or "Checkpoint" not in node.name():
            return None
        made = node._sequence_nr()
        of_segment = [call for number, call in self._ungraphed[name] if number > made]
        place = self._replayed[made, name]
        self._replayed[made, name] += 1
        return of_segment[place] if place < len(of_segment) else None

    def _arrived(self, facts: _Facts, module: nn.Module, shape: torch.Size | None, gradient: torch.Tensor) -> None:
        ours = gradient.detach() if gradient.requires_grad else gradient
        ours = ours if shape is None else ours.reshape(shape)
        ours = ours if self.scaler is None else self._unscaled(ours)
        self._read(facts, module, ours)

    def _unscaled(self, gradient: torch.Tensor) -> Any:
        """Divide by the AMP scaler's scale, in float32, without waiting for the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return gradient
        scale = self.scaler._get_scale_async()
        if scale is None:  # the scaler has not been used yet, so nothing is scaled
            return gradient
        if self.scale is None:
            self.scale = scale.detach().clone()  # the scaler changes it in place
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale.to(gradient.device)

    def _read(self, facts: _Facts, module: nn.Module, tensor: torch.Tensor) -> None:
        """Take what must be taken before the tensor changes; all else can wait until the pass is over."""
        seen = kernels.walk(module, tensor, self._reads, self._threads) if self._reads else None
        if seen is not None and self._walk_is_all:
            self.taken.append((facts, seen, None))
            return
        x = arranged(module, tensor)
        states = [None if seen is not None and measure.reads else measure.reduce(x) for measure in self.measures]
        self.taken.append((facts, seen, (x.dtype, x.shape[0], states)))


def _before_views(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return the tensor to put a hook on: an in-place operation on a view takes the view's hooks out of the graph.

    A linear layer with more axes than two returns a view of a product that nobody else can read: that one will do.
    """
    base = output._base
    ours = type(module).forward is nn.Linear.forward and base is not None and base.numel() == output.numel()
    return base if ours and base is not None and base.grad_fn is not None else output


def _sequence() -> int:
    return int(torch._C._autograd._get_sequence_nr())


class Landing:
    """Small results on their way from a device to the host, in a few large copies that the caller does not wait for."""

    def __init__(self, probe: Probe, points: Sequence[Point]) -> None:
        self._taken, self._measures, self._points = probe.taken, probe.measures, points
        made = [state for *_, rest in self._taken if rest for state in rest[2] if state is not None]
        made += [state for point in points for state in point.states]
        self._places = [(state, key) for state in made for key in state]
        self._copies: list[tuple[list[tuple[dict[str, Any], str]], torch.Tensor]] = []
        self._events: list[Any] = []
        for together in self._grouped():
            self._send(together)

    @property
    def nbytes(self) -> int:
        """How much memory all takes."""
        walks = sum(kernels.held(seen) for _, seen, _ in self._taken if seen is not None)
        return walks + sum(getattr(state[key], "nbytes", 0) for state, key in self._places)

    def wait(self) -> list[Reading]:
        """Wait for the copies, put NumPy arrays in the places of tensors, bfloat16 as its bits, and return readings.

        Columns of what was walked over are made only now: in a hook, code and tables come from memory, and it takes ten
        times as long.
        """
        for event in self._events:
            event.synchronize()
        for places, landed in self._copies:
            start = 0
            for state, key in places:
                shape = state[key].shape
                state[key] = _numpy(landed[start : start + shape.numel()].view(shape))
                start += shape.numel()
        for state, key in self._places:
            if isinstance(state[key], torch.Tensor):
                state[key] = _numpy(state[key].cpu())
        return self._readings()

    def _readings(self) -> list[Reading]:
        readings = []
        repeats: dict[_Facts, int] = {}
        for facts, seen, rest in self._taken:
            found = None if seen is None else Walked(*seen)
            dtype, size, given = rest or (torch.float32, len(found or ()), [None] * len(self._measures))
            columns = [
                m.finished(found) if state is None else m.finish(state)
                for m, state in zip(self._measures, given, strict=True)
            ]
            repeat = repeats.get(facts, 0)
            readings.append(Reading(*facts, repeat, str(dtype).removeprefix("torch."), size, tuple(columns)))
            repeats[facts] = repeat + 1
        return readings

    def _grouped(self) -> list[list[tuple[dict[str, Any], str]]]:
        """Group what lies on CUDA devices, by device and dtype; large tensors go alone."""
        groups: dict[Any, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        for place, (state, key) in enumerate(self._places):
            tensor = state[key]
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                alone = place if tensor.nbytes >= _LARGE else -1
                groups[tensor.device, tensor.dtype, alone].append((state, key))
        return list(groups.values())

    def _send(self, together: list[tuple[dict[str, Any], str]]) -> None:
        tensors = [state[key].reshape(-1) for state, key in together]
        packed = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        landed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        landed.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(packed.device))
        self._events.append(event)
        self._copies.append((together, landed))


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    host = tensor.detach()
    array: npt.NDArray[Any] = host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
    return array


def number(value: Any) -> float:
    """Return a tensor of one element as a number; waits for its device."""
    return float(value)
