"""Reads a PyTorch network for one batch: hooks that leave small results on the tensors' device.

A forward hook takes a module's output, and a *tensor* hook on that output takes the gradient that arrives. Put there
before a following in-place operation, it still receives the gradient of the value before that operation.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ....measures import Measure, reduce_all
from ...results import Observation, TensorKey
from ..hooks import ModuleHook
from ..internals import (
    base_of,
    current_node,
    in_backward_pass,
    is_view,
    next_sequence_number,
    scale_of,
    sequence_number,
    unseen_by_function_modes,
)
from .op_recorder import OpRecorder, Point
from .sites import network, tensors_in
from .stats import arranged
from .transfer import HostTransfer


def new_probe(
    modules: Mapping[str, nn.Module], measures: Sequence[Measure], phases: frozenset[str], scaler: Any, watched: Any
) -> "Probe":
    """Return a probe of modules; `watched` is the whole network where the batch is watched for a diagnosis."""
    return Probe(modules, measures, phases, scaler, watched)


@dataclass(eq=False)
class Probe:
    """Reads the sites of one batch between `with` and its end; hooks are on the modules only in between.

    Attributes:
        watched: the whole network, where this batch is also watched for a diagnosis.
        order: the sites in the order in which they first gave an output.
        views: the sites whose output is a view, on which an in-place operation hides the gradient.
        unscaled: float16 came out of autocast, and there is no scaler.
        scale: of the AMP scaler when the first gradient came; None without one.
        observations: in order of arrival.
    """

    modules: Mapping[str, nn.Module]
    measures: Sequence[Measure]
    phases: frozenset[str]
    scaler: Any = None
    watched: Any = None
    order: dict[str, None] = field(default_factory=dict)
    views: set[str] = field(default_factory=set)
    unscaled: bool = False
    scale: Tensor | None = None
    observations: list[Observation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._thread = 0
        self._calls: dict[str, int] = defaultdict(int)
        self._repeats: dict[TensorKey, int] = defaultdict(int)
        self._ungraphed: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._replayed: dict[tuple[int, str], int] = defaultdict(int)
        self._op_recorder = (
            None if self.watched is None else OpRecorder(network(self.watched), self._unscaled, self.modules)
        )

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(ModuleHook(partial(self._called, name))).remove)
            if self._op_recorder is not None:
                stack.enter_context(self._op_recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def arrived(self) -> set[str]:
        """The sites at which a gradient has come."""
        return {observation.key.site for observation in self.observations if observation.key.phase == "backward"}

    def diagnosis_points(self, names: Sequence[str]) -> list[Point]:
        """Return what was seen for a diagnosis of the named sites; nothing where this batch was not watched."""
        return [] if self._op_recorder is None else self._op_recorder.close(names)

    def transfer(self, points: Sequence[Point]) -> HostTransfer:
        """Begin to copy what was observed to the host."""
        return HostTransfer(self.observations, [point.state for point in points])

    def _called(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        with nullcontext() if self._op_recorder is None else unseen_by_function_modes():
            self._take(name, module, output)

    def _take(self, name: str, module: nn.Module, output: Any) -> None:
        """Observe the outputs of a call, and put hooks on them for their gradients."""
        replay = in_backward_pass()  # checkpointing runs it once more
        if not replay and threading.get_ident() != self._thread:
            return
        call = self._replayed_call(name) if replay else self._calls[name]
        if call is None:
            return
        if not replay:
            self._calls[name] += 1
        elif self._op_recorder is not None:
            self._op_recorder.replayed(name)
        if not torch.is_grad_enabled():
            self._ungraphed[name].append((next_sequence_number(), call))
        self.order[name] = None
        for position, tensor in tensors_in(output):
            if "forward" in self.phases and not replay:
                self._observe(TensorKey(name, call, position, "forward"), module, tensor.detach())
            hooked = _hookable(module, tensor)
            if self._op_recorder is not None and not replay:
                self._op_recorder.begin(name, call, position, module, tensor, hooked)
            if "backward" in self.phases and tensor.requires_grad:
                if is_view(hooked):
                    self.views.add(name)
                if self.scaler is None and tensor.dtype is torch.float16:
                    self.unscaled |= torch.is_autocast_enabled(tensor.device.type)
                key = TensorKey(name, call, position, "backward")
                hook = hooked.register_hook(partial(self._arrived, key, module, tensor.shape))
                self._stack.callback(hook.remove)

    def _replayed_call(self, name: str) -> int | None:
        """Return the number of the call that reentrant checkpointing now repeats, this time with a graph.

        Such a call was first made without one, after its Checkpoint node: nodes are numbered as they are made. What
        non-reentrant checkpointing repeats has its graph, and its hooks, from the first time: None.
        """
        node = current_node()
        if node is None or "Checkpoint" not in node.name():
            return None
        checkpoint = sequence_number(node)
        of_segment = [call for number, call in self._ungraphed[name] if number > checkpoint]
        index = self._replayed[checkpoint, name]
        self._replayed[checkpoint, name] += 1
        return of_segment[index] if index < len(of_segment) else None

    def _arrived(self, key: TensorKey, module: nn.Module, shape: torch.Size, gradient: Tensor) -> None:
        gradient = gradient.detach()
        self._observe(key, module, self._unscaled(gradient if gradient.shape == shape else gradient.reshape(shape)))

    def _unscaled(self, gradient: Tensor) -> Any:
        """Divide by the AMP scaler's scale, in float32, without waiting for the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return gradient
        scale = scale_of(self.scaler)
        if scale is None:  # the scaler has not been used yet, so nothing is scaled
            return gradient
        if self.scale is None:
            self.scale = scale.detach().clone()  # the scaler changes it in place
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale.to(gradient.device)

    def _observe(self, key: TensorKey, module: nn.Module, tensor: Tensor) -> None:
        """Let the measures reduce a tensor before anything changes it."""
        x = arranged(module, tensor)
        dtype = str(x.dtype).removeprefix("torch.")
        self.observations.append(Observation(key, self._repeats[key], dtype, x.shape[0], reduce_all(self.measures, x)))
        self._repeats[key] += 1


def _hookable(module: nn.Module, output: Tensor) -> Tensor:
    """Return the tensor to put a hook on: an in-place operation on a view takes the view's hooks out of the graph.

    A linear layer with more axes than two returns a view of a product that nobody else can read: that one will do.
    """
    if not is_view(output) or type(module).forward is not nn.Linear.forward:
        return output
    base = base_of(output)
    is_product = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    return base if is_product else output  # type: ignore[return-value]
