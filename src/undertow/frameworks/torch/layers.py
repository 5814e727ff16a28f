"""A network's layers: which carry weights, a copy with some of them drawn anew, and what flows at them in one pass."""

import copy
import threading
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...errors import InputError, ModelError, near
from ...rules import gradient
from ..base import Answer, Inside, Met, Request
from .calls import chosen, eager, leaves, module_of, output_of, refuse_training, uncompiled, untouched
from .graph import ThroughGraph, visited


def layers(model: Any, x: torch.Tensor) -> list[str]:
    """List the modules that hold weights of their own and run, in the order in which they are first called.

    A plain function has none. The weights that a module's own forward uses count as the module's.
    """
    root = module_of(uncompiled(model))
    if root is None or isinstance(root, torch.jit.ScriptModule):
        return []
    names = {module: name for name, module in root.named_modules() if module._parameters}
    order: dict[str, None] = {}
    here = threading.get_ident()

    def note(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == here:
            order.setdefault(names[module])

    with ExitStack() as stack, torch.no_grad():
        for module in names:
            stack.callback(module.register_forward_pre_hook(note).remove)
        output_of(eager(model), [x.clone()])
    return list(order)


def redrawn(model: Any, names: Sequence[str], seed: int) -> Any:
    """Return a copy in which the named layers are initialised anew, each from a seed of its own; the rest is shared.

    A layer is initialised as its kind is: by its own `reset_parameters`, which for batch norm resets the statistics
    too. The weights of a layer without one are shuffled: the same values, at other places.

    Raises:
        ModelError: the model cannot be copied.
    """
    network = uncompiled(model)
    root = module_of(network)
    fresh = set() if root is None else {module for name in names for module in _whole(root.get_submodule(name))}
    own = {id(t) for module in fresh for t in (*module.parameters(False), *module.buffers(False))}
    kept = () if root is None else (*root.parameters(), *root.buffers())
    try:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in kept if id(tensor) not in own}
        twin = copy.deepcopy(network, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied ({error}), so its weights cannot be drawn anew") from error
    copied = module_of(twin)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in names:
            torch.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            for module in _whole(copied.get_submodule(name)):  # type: ignore[union-attr]
                _draw(module)
    return twin


def _whole(module: nn.Module) -> list[nn.Module]:
    """A layer and its part that never runs by itself: attention reads its output projection's weights directly."""
    return [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]


def _draw(module: nn.Module) -> None:
    """Draw on the CPU, so that every device gets the same values; a container's own weights are shuffled."""
    tensors = [*module.parameters(False), *module.buffers(False)]
    device = tensors[0].device
    for tensor in tensors:
        tensor.data = tensor.data.cpu()
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is not None and (isinstance(module, nn.MultiheadAttention) or not list(module.children())):
        reset()
    else:
        for parameter in module.parameters(False):
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def inside(request: Request, names: Sequence[str], directions: npt.NDArray[Any] | None = None) -> Inside:
    """Explain, and keep what the named layers returned and what flowed back to them.

    A layer that does not run on the way from the input, or returns no tensor, is left out.

    Args:
        directions: `(K, classes)`: explain these weighted sums of the scores in place of the request's targets.

    Raises:
        InputError: a layer is not there, or the request is not for the graph of a single input.
    """
    if request.through != "graph" or len(request.inputs) != 1:
        raise InputError("layers are read with one input and through='graph' alone")
    if not request.training:
        refuse_training(request.model)
    with untouched(request), ExitStack() as stack:
        (source,), fed = leaves(request.inputs)
        way = None if request.rule is gradient else stack.enter_context(ThroughGraph(request))
        seen = _watched(request.model, names, stack)
        output = output_of(eager(request.model), fed)
        scores, ids, single = _asked(output, request, directions)
        if way is not None and scores.grad_fn is not None:
            stack.enter_context(visited(scores.grad_fn, way))
        rows = [_row(scores, k, [*seen.values(), source]) for k in range(scores.shape[1])]
        met = Met() if way is None else way.met
    stacked = [np.stack(column, 1) for column in zip(*rows, strict=True)]
    at_input = stacked.pop()
    detached = scores.detach()
    if single and ids is not None:
        detached, ids = detached[:, 0], ids[:, 0]
    return Inside(
        answer=Answer((None,), ids, detached, met),
        values={name: _numpy(tensor) for name, tensor in seen.items()},
        gradients=dict(zip(seen, stacked, strict=True)),
        at_input=at_input,
    )


def _asked(
    output: torch.Tensor, request: Request, directions: npt.NDArray[Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    if directions is None:
        return chosen(output, request.target, len(request.inputs[0]))
    return output @ torch.from_numpy(directions).to(output).T, None, False


def _watched(model: Any, names: Sequence[str], stack: ExitStack) -> dict[str, torch.Tensor]:
    """Keep each named module's output, of its last call in this thread, until the stack closes.

    What flows on is a copy, so that a successor that works in place does not reach what is kept.
    """
    root = module_of(uncompiled(model))
    if not names:
        return {}
    if root is None:
        raise InputError(f"model is a {type(model).__name__}; layers are those of a torch.nn.Module")
    known = dict(root.named_modules())
    seen: dict[str, torch.Tensor] = {}
    here = threading.get_ident()
    for name in names:
        if name not in known or not name:
            some = ", ".join(each for each, _ in root.named_children())
            raise InputError(f"no layer {name!r}{near(name, known) or f'; at the top there are {some}'}")

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            if threading.get_ident() != here or not isinstance(output, torch.Tensor) or not output.requires_grad:
                return None
            seen[name] = output
            return output.clone()

        stack.callback(known[name].register_forward_hook(after).remove)
    return seen


def _row(scores: torch.Tensor, k: int, wanted: list[Any]) -> list[npt.NDArray[Any]]:
    found = torch.autograd.grad(scores[:, k].sum(), wanted, retain_graph=True, allow_unused=True)
    return [_numpy(torch.zeros_like(at) if g is None else g) for g, at in zip(found, wanted, strict=True)]


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy().copy()
