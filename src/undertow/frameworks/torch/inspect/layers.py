"""A network's layers: which hold weights, a copy with some of them reinitialised, their values and gradients."""

import copy
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ....errors import InputError, ModelError, one_line
from ....outputs import Path
from ....rules import gradient
from ...base import Request
from ...own_passes import own_pass
from ...results import Explanation, LayerGradients, RewiringStats
from ..arrays import like, to_numpy
from ..batch_norm import readable_by_batch_norm
from ..calls import (
    eager,
    has_channels_last,
    leaves_and_copies,
    module_of,
    refuse_non_class_scores,
    refuse_training,
    run,
    scores_of,
    uncompiled,
)
from ..explain.acting import what_acts
from ..explain.cuts import cudnn_errors_named, nan_gradient, no_gradient
from ..explain.graph import ThroughGraph, rewired_backward
from ..heads import run_before_head, run_to_scores
from ..internals import reset_of
from ..layers import channel_axis, record_outputs
from ..state import unchanged
from ..submodules import is_keras, named_modules, own_parameters
from ..targets import target_scores, with_function


def channels_last(model: Any, x: Any) -> bool:
    """Whether a model takes images `(B, H, W, C)`: a Keras model on torch does, unless Keras is set otherwise."""
    return has_channels_last(model)


def scores(model: Callable[..., Any], x: torch.Tensor, output: Path | None = None) -> npt.NDArray[Any]:
    """Return the model's scores, `(B, classes)`, before a softmax or sigmoid at its end.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    with own_pass(), torch.no_grad():
        before, _ = run_before_head(eager(model), [x.clone()], output)
    return to_numpy(refuse_non_class_scores(before))


def layers(model: Any, x: torch.Tensor) -> list[str]:
    """List the modules that hold weights of their own and run, in the order in which they are first called.

    A plain function has none. The weights that a module's own forward uses count as the module's.
    """
    root = module_of(uncompiled(model))
    if root is None or isinstance(root, torch.jit.ScriptModule):
        return []
    names = {module: name for name, module in named_modules(root) if own_parameters(module) and not _is_scaling(module)}
    order: dict[str, None] = {}
    thread = threading.get_ident()

    def before(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            order.setdefault(names[module])

    with own_pass(), ExitStack() as stack, torch.no_grad():
        for module in names:
            stack.callback(module.register_forward_pre_hook(before).remove)
        run(eager(model), [x.clone()])
    return list(order)


def _is_scaling(module: nn.Module) -> bool:
    """Whether a module is Keras's `Normalization`, whose figures are of the data and were not trained."""
    return is_keras(module) and type(module).__name__ == "Normalization"


def reinitialized(model: Any, names: Sequence[str], seed: int) -> Any:
    """Return a copy in which the named layers are initialised anew, each from a seed of its own; the rest is shared.

    A layer is initialised by its own `reset_parameters`, which for batch norm resets the statistics too. The weights of
    a layer without that method are shuffled: the same values, at other positions.

    Raises:
        ModelError: the model cannot be copied.
    """
    network = uncompiled(model)
    root = module_of(network)
    if root is not None and is_keras(root):
        from ...keras_layers import cloned

        return cloned(root, names, seed).train(root.training)
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
        InputError: a layer is not there, or does not run as a module, or the request is not for the graph.
    """
    if request.through != "graph":
        raise InputError("layers are read through='graph' alone")
    if not request.training:
        refuse_training(request.model)
    with unchanged(request.model, request.inputs, request.training) as start, ExitStack() as stack:
        request = with_function(request, eager(request.model), stack)
        sources, fed = leaves_and_copies(request.inputs, request.is_plain)
        first = next(source for source in sources if source is not None)
        attachment = None if request.rule is gradient else stack.enter_context(ThroughGraph(request))
        outputs = record_outputs(request.model, layers, stack)
        with nullcontext() if attachment is None else attachment.forward():
            output, path, head = run_to_scores(request, fed, again=outputs.forget)
            scores, ids, single = _columns(output, path, request, directions)
        if scores.grad_fn is None:
            raise no_gradient(request, fed)
        _refuse_compiled(request.model, [name for name in layers if name.partition("@")[0] not in outputs])
        reached = {name: _reached(tensor, sources) for name, tensor in outputs.items()}
        if attachment is not None:
            stack.enter_context(rewired_backward(scores.grad_fn, attachment))
        acting = what_acts(request, scores.grad_fn, start)
        rows = [_gradient_row(scores, k, [*outputs.values(), first]) for k in range(scores.shape[1])]
        if any(np.isnan(gradients).any() for row in rows for gradients in row):
            raise nan_gradient(request, fed)
        stats = RewiringStats() if attachment is None else attachment.stats
    stacked = [np.stack(column, 1) for column in zip(*rows, strict=True)]
    at_input = stacked.pop()
    detached = scores.detach()
    if single:
        detached, ids = detached[:, 0], None if ids is None else ids[:, 0]
    return LayerGradients(
        explanation=Explanation(
            (None,) * len(sources), ids, detached, stats, has_channels_last(request.model), acting, head
        ),
        values={name: to_numpy(tensor) for name, tensor in outputs.items()},
        gradients=dict(zip(outputs, stacked, strict=True)),
        at_input=at_input,
        channel_axes={name: channel_axis(request.model, name, tensor.ndim) for name, tensor in outputs.items()},
        reached=reached,
    )


def _refuse_compiled(model: Any, missing: Sequence[str]) -> None:
    """Refuse a layer that did not run because its model is a graph, whose modules only hold the weights."""
    if any(isinstance(module_of(uncompiled(model)), kind) for kind in (torch.jit.ScriptModule, torch.fx.GraphModule)):
        for name in missing:
            raise InputError(
                f"layer {name!r} does not run as a module in TorchScript or an exported program; explain the Python "
                "module that it was made of"
            )


def _reached(tensor: torch.Tensor, sources: Sequence[torch.Tensor | None]) -> frozenset[int]:
    """Return which of the inputs a tensor depends on."""
    wanted = {i: source for i, source in enumerate(sources) if source is not None}
    gradients = torch.autograd.grad(tensor.sum(), list(wanted.values()), retain_graph=True, allow_unused=True)
    return frozenset(i for i, g in zip(wanted, gradients, strict=True) if g is not None)


def _columns(
    output: Any, path: Path | None, request: Request, directions: npt.NDArray[Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    if directions is None:
        return target_scores(output, request.target, request.batch, path)
    scores = scores_of(output, path)
    return scores @ like(directions, scores).T, None, False


def _gradient_row(scores: torch.Tensor, k: int, tensors: list[Any]) -> list[npt.NDArray[Any]]:
    with cudnn_errors_named(), readable_by_batch_norm(scores.grad_fn):
        gradients = torch.autograd.grad(scores[:, k].sum(), tensors, retain_graph=True, allow_unused=True)
    return [to_numpy(torch.zeros_like(t) if g is None else g) for g, t in zip(gradients, tensors, strict=True)]
