"""Reads parameters where they learn: what the backward passes leave in `.grad`, and what an optimizer makes of it.

Public hooks alone: a parameter's post-accumulate-grad hook tells that a backward pass has reached it, an optimizer's
step hooks run before and after each of its steps. Nothing is attached that outlives a batch.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ....errors import InputError
from ....measures import Measure, State, reduce_all
from ...base import NamedParameter
from ...results import Observation, TensorKey
from .. import submodules
from ..internals import after_backward_pass, backward_pass, scale_of, version
from .axes import dense
from .sites import network

Named = dict[str, nn.Parameter]


def named_parameters(model: Any) -> list[NamedParameter]:
    """List every parameter, in the order of definition, each once with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in submodules.named_parameters(network(model), remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [NamedParameter(tuple(own), parameter) for parameter, own in names.items()]


def optimizers_of(optimizer: Any) -> tuple[Optimizer, ...]:
    """Return the torch optimizers in one optimizer, a wrapper around one, or several of them.

    Raises:
        InputError: something else is among them.
    """
    several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    several = several if isinstance(several, list | tuple) else [several]
    plain = []
    for one in several:
        inner = getattr(one, "optimizer", None)  # as Accelerate and Lightning wrap it
        plain.append(inner if isinstance(inner, Optimizer) else one)
        if not isinstance(plain[-1], Optimizer):
            raise InputError(f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer, or a list of them")
    return tuple(dict.fromkeys(plain))


def optimizer_groups(parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return for each name the position of its optimizer and of its group there; None where it is in none."""
    places: dict[int, tuple[int, int]] = {}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                places.setdefault(id(parameter), (i, j))
    return {name: places.get(id(parameter)) for name, parameter in parameters.items()}


def new_parameter_probe(
    parameters: Mapping[str, nn.Parameter],
    measures: Sequence[Measure],
    optimizers: Sequence[Optimizer],
    scaler: Any,
) -> "StepProbe":
    """Return a probe of parameters for one batch and the steps that follow it."""
    return StepProbe(parameters, measures, optimizers, scaler)


@dataclass(frozen=True)
class _Accumulated:
    """What a parameter's gradient was when a backward pass ended; `unscaled` where the AMP scale is divided out."""

    gradient: "weakref.ref[Tensor]"
    version: int
    unscaled: bool
    dtype: str
    states: list[State]

    def still_is(self, gradient: Tensor) -> bool:
        """Whether nothing has changed the gradient since."""
        return self.gradient() is gradient and self.version == version(gradient)


@dataclass(eq=False)
class StepProbe:
    """Reads the parameters of one batch: backward passes until `__exit__`, steps of the optimizers until `close`.

    Without optimizers the phase "gradient" is what the last backward pass left. With them it is what a step was given,
    "accumulated" is what the backward pass had left, before anything clipped it, and "weight" and "update" are the
    parameter before the step and by how much the step changed it.

    Attributes:
        observations: in order of arrival; `call` counts the steps of a parameter, `repeat` the evaluations of a
            step's closure.
        steps: a row for each group of parameters in each step of an optimizer.
    """

    parameters: Mapping[str, nn.Parameter]
    measures: Sequence[Measure]
    optimizers: Sequence[Optimizer] = ()
    scaler: Any = None
    observations: list[Observation] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._while_batch, self._while_steps = ExitStack(), ExitStack()
        self._readable = {name: p for name, p in self.parameters.items() if p.is_floating_point()}
        self._names = {id(parameter): name for name, parameter in self._readable.items()}
        self._passes: set[int] = set()
        self._reached: Named = {}
        self._accumulated: dict[str, _Accumulated] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._stepped: dict[int, int] = defaultdict(int)
        self._before: dict[int, dict[str, Tensor]] = {}
        self._seen: set[str] = set()
        self._repeats: dict[str, int] = defaultdict(int)

    def __enter__(self) -> Self:
        with ExitStack() as batch, ExitStack() as steps:
            for name, parameter in self._readable.items():
                if parameter.requires_grad:
                    batch.callback(parameter.register_post_accumulate_grad_hook(partial(self._arrived, name)).remove)
            for i, optimizer in enumerate(self.optimizers):
                steps.callback(optimizer.register_step_pre_hook(partial(self._before_step, i)).remove)
                steps.callback(optimizer.register_step_post_hook(partial(self._after_step, i)).remove)
            self._while_batch, self._while_steps = batch.pop_all(), steps.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._while_batch.close()
        for name, left in {} if self.optimizers else self._accumulated.items():
            self._add(TensorKey(name, 0, "", "gradient"), left.dtype, left.states)

    @property
    def arrived(self) -> bool:
        """Whether a gradient has come to any of them."""
        return bool(self._accumulated or self.observations)

    def close(self) -> None:
        """Watch the optimizers no longer."""
        self._while_batch.close()
        self._while_steps.close()
        self._before.clear()

    # --- backward passes

    def _arrived(self, name: str, parameter: nn.Parameter) -> None:
        """Note that a backward pass has reached a parameter, and read its gradient when that pass has ended.

        Not now: DistributedDataParallel averages over the processes when the last gradients are there.
        """
        number = backward_pass()
        if number not in self._passes:
            self._passes.add(number)
            after_backward_pass(self._backward_ended)
        self._reached[name] = parameter

    def _backward_ended(self) -> None:
        reached, self._reached = self._reached, {}
        with torch.no_grad():
            for name, parameter in (reached | self._emptied()).items():
                if parameter.grad is not None:  # an optimizer may have stepped and emptied it within the pass
                    gradient, unscaled = parameter.grad, self._unscaled(parameter.grad)
                    facts = weakref.ref(gradient), version(gradient), unscaled is not gradient
                    self._accumulated[name] = _Accumulated(*facts, *self._reduced(unscaled))

    def _emptied(self) -> Named:
        """Return what was read after an earlier pass, and whose gradient holds nothing but zeros since.

        `zero_grad(set_to_none=False)` keeps the tensor, and a pass that does not reach it leaves those zeros.
        """
        return {name: self._readable[name] for name, left in self._accumulated.items() if self._is_emptied(name, left)}

    def _is_emptied(self, name: str, left: _Accumulated) -> bool:
        gradient = self._readable[name].grad
        return gradient is not None and not left.still_is(gradient) and not dense(gradient).any()

    def _unscaled(self, gradient: Tensor) -> Tensor:
        """Multiply by the reciprocal of the AMP scale, rounded as `GradScaler.unscale_` rounds it."""
        scale = scale_of(self.scaler) if self.scaler is not None and self.scaler.is_enabled() else None
        if scale is None:
            return gradient
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide * scale.double().reciprocal().float().to(gradient.device)

    # --- steps

    def _before_step(self, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Keep the weights, and read the gradients: now, or each time that the step has evaluated its closure."""
        own = self._of(optimizer)
        self._note_step(i, optimizer)
        closure = kwargs.get("closure") if len(args) < 2 else args[1]  # args[0] is the optimizer
        if closure is None:
            own = {name: parameter for name, parameter in own.items() if parameter.grad is not None}
            self._keep(i, own)
            self._read_gradients(optimizer, own)
            return None
        self._keep(i, own)
        evaluated = partial(self._evaluate, closure, optimizer, own)
        if len(args) < 2:
            return args, {**kwargs, "closure": evaluated}
        return (args[0], evaluated, *args[2:]), kwargs

    def _evaluate(self, closure: Callable[[], Any], optimizer: Optimizer, own: Named) -> Any:
        loss = closure()
        with torch.no_grad():
            self._read_gradients(optimizer, own)
        return loss

    def _after_step(self, i: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for name, before in self._before.pop(i, {}).items():
                if self.parameters[name].grad is not None or name in self._seen:
                    self._observe(name, "weight", before)
                    before = before.to(torch.promote_types(before.dtype, torch.float32))
                    update = torch.sub(_values(self.parameters[name]), before, out=before)  # spares the memory
                    self._observe(name, "update", update)
                    self._calls[name] += 1

    def _of(self, optimizer: Optimizer) -> Named:
        """The parameters of an optimizer that are sites, those added since included."""
        everything = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return {self._names[id(p)]: p for p in everything if id(p) in self._names}

    def _keep(self, i: int, own: Named) -> None:
        self._seen.clear()
        self._repeats.clear()
        self._before[i] = {name: _values(parameter).clone() for name, parameter in own.items()}

    def _note_step(self, i: int, optimizer: Optimizer) -> None:
        row = {"optimizer": i, "class": type(optimizer).__name__, "step": self._stepped[i]}
        self._stepped[i] += 1
        for j, group in enumerate(optimizer.param_groups):
            rates = {key: float(group.get(key, float("nan"))) for key in ("lr", "weight_decay")}
            self.steps.append({**row, "group": j, **rates})

    def _read_gradients(self, optimizer: Optimizer, own: Named) -> None:
        """Read what the optimizer is about to use, and what the backward pass had left of it."""
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler sets it where a fused step unscales by itself
        for name, parameter in own.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            left = self._accumulated.pop(name, None)
            if left is not None and left.still_is(gradient) and left.unscaled == (scale is not None):
                dtype, states = left.dtype, [dict(state) for state in left.states]
            else:
                dtype, states = self._reduced(gradient if scale is None else gradient / scale.to(gradient.device))
            call, repeat = self._calls[name], self._repeats[name]
            if left is not None:
                self._add(TensorKey(name, call, "", "accumulated"), left.dtype, left.states, repeat)
            self._add(TensorKey(name, call, "", "gradient"), dtype, states, repeat)
            self._repeats[name] += 1
            self._seen.add(name)

    # --- measuring

    def _observe(self, name: str, phase: str, tensor: Tensor) -> None:
        self._add(TensorKey(name, self._calls[name], "", phase), *self._reduced(tensor))

    def _reduced(self, tensor: Tensor) -> tuple[str, list[State]]:
        """Let the measures reduce a tensor, as one sample whose channels are its first axis."""
        x = dense(tensor.detach())
        rows = x.reshape(1, -1) if x.ndim == 0 else x.unsqueeze(0)
        return str(x.dtype).removeprefix("torch."), reduce_all(self.measures, rows, x, samples=None)

    def _add(self, key: TensorKey, dtype: str, states: list[State], repeat: int = 0) -> None:
        self.observations.append(Observation(key, repeat, dtype, 1, states, sampled=False, first=-1))


def _values(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values; of a sharded one, those that this process holds."""
    return dense(parameter.detach())
