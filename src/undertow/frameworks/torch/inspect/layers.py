"""A network's layers: which hold weights, a copy with some of them reinitialised, their values and gradients."""

import copy
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ....errors import InputError, ModelError, did_you_mean, one_line
from ....rules import gradient
from ...base import Request
from ...results import Explanation, LayerGradients, RewiringStats
from ..arrays import like, to_numpy
from ..calls import (
    class_scores,
    eager,
    has_channels_last,
    leaves_and_copies,
    module_of,
    output_of,
    refuse_training,
    run,
    scores_of,
    target_scores,
    uncompiled,
)
from ..explain.acting import what_acts
from ..explain.graph import ThroughGraph, rewired_backward
from ..internals import CONVOLUTION, NORM, reset_of
from ..state import unchanged

CHANNELS_FIRST = (CONVOLUTION, NORM, nn.GroupNorm)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def scores(model: Callable[..., Any], x: torch.Tensor) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)`.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    return to_numpy(class_scores(eager(model), x.clone()))


def layers(model: Any, x: torch.Tensor) -> list[str]:
    """List the modules that hold weights of their own and run, in the order in which they are first called.

    A plain function has none. The weights that a module's own forward uses count as the module's.
    """
    root = module_of(uncompiled(model))
    if root is None or isinstance(root, torch.jit.ScriptModule):
        return []
    names = {module: name for name, module in root.named_modules() if any(True for _ in module.parameters(False))}
    order: dict[str, None] = {}
    thread = threading.get_ident()

    def before(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            order.setdefault(names[module])

    with ExitStack() as stack, torch.no_grad():
        for module in names:
            stack.callback(module.register_forward_pre_hook(before).remove)
        output_of(eager(model), [x.clone()])
    return list(order)


def reinitialized(model: Any, names: Sequence[str], seed: int) -> Any:
    """Return a copy in which the named layers are initialised anew, each from a seed of its own; the rest is shared.

    A layer is initialised by its own `reset_parameters`, which for batch norm resets the statistics too. The weights of
    a layer without that method are shuffled: the same values, at other positions.

    Raises:
        ModelError: the model cannot be copied.
    """
    network = uncompiled(model)
    root = module_of(network)
    fresh = (
        set() if root is None else {module for name in names for module in _with_projection(root.get_submodule(name))}
    )
    own = {id(t) for module in fresh for t in (*module.parameters(False), *module.buffers(False))}
    tensors = () if root is None else (*root.parameters(), *root.buffers())
    try:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
        network_copy = copy.deepcopy(network, memo)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({one_line(error)}), so its weights cannot be initialised anew"
        ) from error
    root_copy = module_of(network_copy)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in names:
            torch.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            for module in _with_projection(root_copy.get_submodule(name)):  # type: ignore[union-attr]
                _initialize(module)
    return network_copy


def _with_projection(module: nn.Module) -> list[nn.Module]:
    """Return a layer, and an attention's output projection, whose weights it reads without calling it."""
    return [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]


def _initialize(module: nn.Module) -> None:
    """Initialise on the CPU, so that every device gets the same values; a container's own weights are shuffled."""
    tensors = [*module.parameters(False), *module.buffers(False)]
    device = tensors[0].device
    for tensor in tensors:
        tensor.data = tensor.data.cpu()
    reset = reset_of(module)
    if reset is not None and (isinstance(module, nn.MultiheadAttention) or not list(module.children())):
        reset()
    else:
        for parameter in module.parameters(False):
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


def layer_gradients(
    request: Request, layers: Sequence[str], directions: npt.NDArray[Any] | None = None
) -> LayerGradients:
    """Explain, and return what the named layers returned and the gradients that flowed back to them.

    A layer that does not run between the input and the scores, or returns no tensor, is left out.

    Args:
        directions: `(K, classes)`: explain these weighted sums of the scores in place of the request's targets.

    Raises:
        InputError: a layer is not there, or the request is not for the graph of a single input.
    """
    if request.through != "graph" or len(request.inputs) != 1:
        raise InputError("layers are read with one input and through='graph' alone")
    if not request.training:
        refuse_training(request.model)
    with unchanged(request.model, request.inputs, request.training) as start, ExitStack() as stack:
        (source,), fed = leaves_and_copies(request.inputs, request.is_plain)
        attachment = None if request.rule is gradient else stack.enter_context(ThroughGraph(request))
        outputs = _record_outputs(request.model, layers, stack)
        output = run(request.bind(eager(request.model)), fed)
        scores, ids, single = _columns(output, request, directions)
        if attachment is not None and scores.grad_fn is not None:
            stack.enter_context(rewired_backward(scores.grad_fn, attachment))
        acting = what_acts(request, scores.grad_fn, start)
        rows = [_gradient_row(scores, k, [*outputs.values(), source]) for k in range(scores.shape[1])]
        stats = RewiringStats() if attachment is None else attachment.stats
    stacked = [np.stack(column, 1) for column in zip(*rows, strict=True)]
    at_input = stacked.pop()
    detached = scores.detach()
    if single and ids is not None:
        detached, ids = detached[:, 0], ids[:, 0]
    return LayerGradients(
        explanation=Explanation((None,), ids, detached, stats, has_channels_last(request.model), acting),
        values={name: to_numpy(tensor) for name, tensor in outputs.items()},
        gradients=dict(zip(outputs, stacked, strict=True)),
        at_input=at_input,
        channel_axes={name: _channel_axis(request.model, name) for name in outputs},
    )


def _columns(
    output: Any, request: Request, directions: npt.NDArray[Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    if directions is None:
        return target_scores(output, request.target, request.batch, request.output)
    scores = scores_of(output, request.output)
    return scores @ like(directions, scores).T, None, False


def _record_outputs(model: Any, names: Sequence[str], stack: ExitStack) -> dict[str, torch.Tensor]:
    """Return a dict that fills with the named modules' outputs in this thread, `layer@1` being those of a second call.

    All calls of a module are recorded, whichever a name asks for.
    The hooks are removed when the stack closes. The network goes on with a copy of each output, so that a successor
    that works in place does not change what is recorded.
    """
    root = module_of(uncompiled(model))
    if not names:
        return {}
    if root is None:
        raise InputError(f"model is a {type(model).__name__}; layers are those of a torch.nn.Module")
    modules = dict(root.named_modules())
    outputs: dict[str, torch.Tensor] = {}
    calls: Counter[str] = Counter()
    thread = threading.get_ident()
    for name in dict.fromkeys(name.partition("@")[0] for name in names):
        if name not in modules or not name:
            children = ", ".join(child for child, _ in root.named_children())
            raise InputError(f"no layer {name!r}{did_you_mean(name, modules) or f'; at the top there are {children}'}")

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            if threading.get_ident() != thread or not isinstance(output, torch.Tensor) or not output.requires_grad:
                return None
            call, calls[name] = calls[name], calls[name] + 1
            outputs[f"{name}@{call}" if call else name] = output
            return output.clone()

        stack.callback(modules[name].register_forward_hook(after).remove)
    return outputs


def _channel_axis(model: Any, name: str) -> int | None:
    """Return where a layer's modules have their channels, if all that tell agree."""
    root = module_of(uncompiled(model))
    assert root is not None  # its outputs were recorded
    tell = {
        1 if isinstance(module, CHANNELS_FIRST) else -1
        for module in root.get_submodule(name.partition("@")[0]).modules()
        if isinstance(module, CHANNELS_FIRST) or type(module) in CHANNELS_LAST  # subclasses of LayerNorm permute
    }
    return tell.pop() if len(tell) == 1 else None


def _gradient_row(scores: torch.Tensor, k: int, tensors: list[Any]) -> list[npt.NDArray[Any]]:
    gradients = torch.autograd.grad(scores[:, k].sum(), tensors, retain_graph=True, allow_unused=True)
    return [to_numpy(torch.zeros_like(t) if g is None else g) for g, t in zip(gradients, tensors, strict=True)]
