"""What given modules take or return in one pass, and the gradients there, as tensors of the framework."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import InputError
from ....structures import map_tensors
from ...base import Request
from ..batch_norm import readable_by_batch_norm
from ..calls import eager, refuse_training, run
from ..explain.acting import what_acts
from ..heads import run_to_scores
from ..state import unchanged
from ..targets import target_scores


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors that one call of a module took or returned, in order, detached, and the gradients there.

    Attributes:
        tensors: `(B, ...)` each.
        gradients: of the summed scores by each; None where the scores do not depend on it. Empty without scores.
    """

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()


def module_tensors(
    request: Request, modules: Sequence[nn.Module], at_input: bool = False, grad_kwargs: Mapping[str, Any] | None = None
) -> list[list[ModuleTensors]]:
    """Return for each module its calls, in order, in one forward and one backward pass.

    Args:
        modules: each of them is called by the request's model, whatever that is.
        at_input: take what the modules are given, not what they return.
        grad_kwargs: for `torch.autograd.grad`.

    Raises:
        InputError: a module does not run, or has no floating-point tensor.
        ModelError, TargetError: as `undertow.explain`.
    """
    if not request.training:
        refuse_training(request.model)
    with unchanged(request.model, request.inputs, request.training) as start, ExitStack() as stack:
        calls = stack.enter_context(_watched(modules, at_input, with_gradients=True))
        output, path, _ = run_to_scores(request, [x.clone().detach() for x in request.inputs])
        scores, _, _ = target_scores(output, request.target, request.batch, path)
        _refuse_silent(modules, calls)
        what_acts(request, scores.grad_fn, start)
        flat = [tensor for of_module in calls for call in of_module for tensor in call]
        options = {"allow_unused": True, **(grad_kwargs or {})}
        with readable_by_batch_norm(scores.grad_fn):
            found = iter(torch.autograd.grad(scores.sum(), flat, **options))
        return [[_of_call(call, [next(found) for _ in call]) for call in of_module] for of_module in calls]


def module_values(request: Request, modules: Sequence[nn.Module], at_input: bool = False) -> list[list[ModuleTensors]]:
    """Return the same without scores and gradients: one forward pass, of inputs of any dtype."""
    with unchanged(request.model, request.inputs, True), torch.no_grad():
        with _watched(modules, at_input, with_gradients=False) as calls:
            run(request.bind(eager(request.model)), [x.clone().detach() for x in request.inputs])
        _refuse_silent(modules, calls)
        return [[_of_call(call, []) for call in of_module] for of_module in calls]


def _of_call(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> ModuleTensors:
    found = tuple(None if g is None else g.detach() for g in gradients)
    return ModuleTensors(tuple(tensor.detach() for tensor in tensors), found)


def _refuse_silent(modules: Sequence[nn.Module], calls: Sequence[Sequence[Sequence[Tensor]]]) -> None:
    for module, of_module in zip(modules, calls, strict=True):
        if not any(of_module):
            raise InputError(
                f"layer {type(module).__name__} does not run in this pass, or has no floating-point tensor"
            )


@contextmanager
def _watched(modules: Sequence[nn.Module], at_input: bool, with_gradients: bool) -> Iterator[list[list[list[Tensor]]]]:
    """Collect each module's tensors in this thread; the network goes on with copies, so that they stay as they are."""
    calls: list[list[list[Tensor]]] = [[] for _ in modules]
    thread = threading.get_ident()

    def seen(of_module: list[list[Tensor]], value: Any) -> Any:
        if threading.get_ident() != thread:
            return value
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, Tensor) or (with_gradients and not tensor.is_floating_point()):
                return tensor
            if with_gradients and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            tensors.append(tensor)
            return tensor.clone()

        copied = map_tensors(value, keep)
        if tensors:
            of_module.append(tensors)
        return copied

    with ExitStack() as stack:
        for module, of_module in zip(modules, calls, strict=True):
            if at_input:
                handle = module.register_forward_pre_hook(lambda _, args, of=of_module: seen(of, args))
            else:
                handle = module.register_forward_hook(lambda _, __, out, of=of_module: seen(of, out))
            stack.callback(handle.remove)
        yield calls
