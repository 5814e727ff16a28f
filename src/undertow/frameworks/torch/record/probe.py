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

from ....errors import ModelError
from ....measures import Measure, reduce_all
from ...own_passes import in_own_pass
from ...results import Observation, TensorKey
from ..hooks import ModuleHook
from ..internals import (
    base_of,
    current_node,
    in_backward_pass,
    is_functorch_tensor,
    is_view,
    next_sequence_number,
    scale_of,
    sequence_number,
    unseen_by_function_modes,
)
from .axes import Layouts, arranged, dense
from .op_recorder import OpRecorder, Point
from .sites import network, tensors_in
from .transfer import HostTransfer


def new_probe(
    modules: Mapping[str, nn.Module],
    measures: Sequence[Measure],
    phases: frozenset[str],
    scaler: Any,
    watched: Any,
    layouts: Any = None,
    n_samples: int | None = None,
) -> "Probe":
    """Return a probe of modules; `watched` is the whole network where the batch is watched for a diagnosis."""
    return Probe(modules, measures, phases, scaler, watched, layouts, n_samples)


@dataclass(eq=False)
class Probe:
    """Reads the sites of one batch between `with` and its end; hooks are on the modules only in between.

    Attributes:
        watched: the whole network, where this batch is also watched for a diagnosis.
        layouts: the axes of all modules of the network; None takes them from the modules that are read alone.
        n_samples: how many there are, if that is known; time-first modules tell it when they run.
        inputs: how many samples the network may have been called with: the sizes of its inputs' first axes.
        order: the sites in the order in which they first gave an output.
        views: the sites whose output is a view, on which an in-place operation hides the gradient.
        unread: the sites with complex outputs, which no measure reads.
        unscaled: float16 came out of autocast, and there is no scaler.
        scale: of the AMP scaler when the first gradient came; None without one.
        observations: in order of arrival.
    """

    modules: Mapping[str, nn.Module]
    measures: Sequence[Measure]
    phases: frozenset[str]
    scaler: Any = None
    watched: Any = None
    layouts: Layouts | None = None
    n_samples: int | None = None
    inputs: set[int] = field(default_factory=set)
    order: dict[str, None] = field(default_factory=dict)
    views: set[str] = field(default_factory=set)
    unread: dict[str, str] = field(default_factory=dict)
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
        self._layouts = self.layouts or Layouts(self.modules, {})
        self._runs = 0
        self._op_recorder = (
            None if self.watched is None else OpRecorder(network(self.watched), self._unscaled, self.modules)
        )

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            if (root := self._layouts.root) is not None:
                stack.callback(root.register_forward_pre_hook(ModuleHook(self._run_begins), with_kwargs=True).remove)
            for name, module in self._layouts.time_first.items():
                stack.callback(module.register_forward_hook(ModuleHook(partial(self._count_samples, name))).remove)
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

    def transfer(self, points: Sequence[Point], others: Sequence[Observation] = ()) -> HostTransfer:
        """Begin to copy what was observed, here and by others, to the host."""
        return HostTransfer([*self.observations, *others], [point.state for point in points])

    def _run_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the calls of the whole network, and note what sizes it is given."""
        if threading.get_ident() == self._thread and not in_backward_pass() and not in_own_pass():
            self._runs += 1
            for _, tensor in tensors_in((args, kwargs), of_any_dtype=True):
                self.inputs.update(tensor.shape[: 2 if self._layouts.time_first else 1])

    def _count_samples(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note how many samples a module with time first was given."""
        if in_own_pass():
            return
        for position, tensor in tensors_in(output):
            axes = self._layouts.of(name, position, tensor.shape)
            if axes.samples is not None:
                self.n_samples = tensor.shape[axes.samples]

    def _called(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        with nullcontext() if self._op_recorder is None else unseen_by_function_modes():
            self._take(name, module, output)

    def _take(self, name: str, module: nn.Module, output: Any) -> None:
        """Observe the outputs of a call, and put hooks on them for their gradients."""
        replay = in_backward_pass()  # checkpointing runs it once more
        if in_own_pass() or (not replay and threading.get_ident() != self._thread):
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
        for _, tensor in tensors_in(output, of_any_dtype=True):
            if is_functorch_tensor(tensor):
                raise ModelError(
                    f"{name or 'the model'} was called inside torch.func.vmap or grad, whose gradients no hook sees; "
                    "record an ordinary backward pass instead"
                )
            if tensor.is_complex():
                self.unread[name] = f"its output is {_word(tensor)}, which no measure reads; take the module behind it"
        for position, tensor in tensors_in(output):
            if "forward" in self.phases and not replay:
                self._observe(TensorKey(name, call, position, "forward"), module, tensor.detach(), self._runs)
            hooked = _hookable(module, tensor)
            if self._op_recorder is not None and not replay:
                self._op_recorder.begin(name, call, position, module, tensor, hooked)
            if "backward" in self.phases and tensor.requires_grad:
                if is_view(hooked):
                    self.views.add(name)
                if self.scaler is None and tensor.dtype is torch.float16:
                    self.unscaled |= torch.is_autocast_enabled(tensor.device.type)
                key = TensorKey(name, call, position, "backward")
                hook = hooked.register_hook(partial(self._arrived, key, module, tensor.shape, self._runs))
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

    def _arrived(self, key: TensorKey, module: nn.Module, shape: torch.Size, run: int, gradient: Tensor) -> None:
        gradient = gradient.detach()
        gradient = gradient if gradient.shape == shape else gradient.reshape(shape)
        self._observe(key, module, self._unscaled(gradient), run)

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

    def _observe(self, key: TensorKey, module: nn.Module, tensor: Tensor, run: int) -> None:
        """Let the measures reduce a tensor before anything changes it."""
        original = dense(tensor)
        axes = self._layouts.of(key.site, key.output, original.shape, self.n_samples)
        x = arranged(module, original, axes)
        dtype = _word(x)
        states = reduce_all(self.measures, x, original, axes.samples)
        facts = axes.sampled, axes.certain, axes.letters(original.ndim), max(run - 1, 0)
        self.observations.append(Observation(key, self._repeats[key], dtype, x.shape[0], states, *facts))
        self._repeats[key] += 1


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hookable(module: nn.Module, output: Tensor) -> Tensor:
    """Return the tensor to put a hook on: an in-place operation on a view takes the view's hooks out of the graph.

    A linear layer with more axes than two returns a view of a product that nobody else can read: that one will do.
    """
    if not is_view(output) or type(module).forward is not nn.Linear.forward:
        return output
    base = base_of(output)
    is_product = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    return base if is_product else output  # type: ignore[return-value]
