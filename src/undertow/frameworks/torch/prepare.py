"""Copies of a network that do the same with less: frozen, batch norm folded, channels last, in bfloat16."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from ...errors import InputError
from .state import unchanged

STEPS: tuple[str, ...] = ("batch norm folded", "channels last", "bfloat16")
"""What can be done to a copy, in the order in which it is tried and done."""


def prepared(model: Any, steps: Sequence[str], example: torch.Tensor) -> nn.Module:
    """Return a frozen copy of a module with some of the `STEPS` taken. Its modules have the names of the original's.

    Raises:
        InputError: a step cannot be taken; says why.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"only a torch.nn.Module can be prepared, not a {type(model).__name__}")
    module = copy.deepcopy(model).requires_grad_(False)
    if "batch norm folded" in steps:
        _fold(module, example)
    if "channels last" in steps:
        _put_channels_last(module)
    if "bfloat16" in steps:
        module.forward = _in_bfloat16(module.forward, example.device.type)
    return module


def _fold(module: nn.Module, example: torch.Tensor) -> None:
    """Fold each batch norm into the convolution or linear layer whose output it alone normalises.

    Raises:
        InputError: there is none.
    """
    pairs = _pairs(module, example)
    if not pairs:
        raise InputError("no batch norm in eval mode follows a convolution or a linear layer at once")
    modules = dict(module.named_modules())
    for name, of_norm in pairs:
        layer, norm = modules[name], modules[of_norm]
        fused = fuse_conv_bn_eval(layer, norm) if isinstance(layer, _ConvNd) else fuse_linear_bn_eval(layer, norm)
        _replace(module, name, fused.requires_grad_(False))
        _replace(module, of_norm, nn.Identity())


def _pairs(module: nn.Module, example: torch.Tensor) -> list[tuple[str, str]]:
    """Run the network once, and return the layers with the batch norm that is given their output; each called once.

    That nothing else reads it is not known here: who compares the maps finds out.
    """
    outputs: dict[int, tuple[str, torch.Tensor]] = {}  # tensors are kept, lest an id be used again
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            outputs[id(output)] = name, output

        return note

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def note(norm: nn.Module, inputs: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(inputs[0]) in outputs:
                found.append((outputs[id(inputs[0])][0], name))

        return note

    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            handles.append(layer.register_forward_hook(after(name)))
        elif isinstance(layer, _BatchNorm) and not layer.training and layer.running_var is not None:
            handles.append(layer.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad(), unchanged(module, (example,), False):
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    read_by = [name for name, _ in found]
    return [(a, b) for a, b in found if calls[a] == calls[b] == 1 and read_by.count(a) == 1]


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, by)


def _put_channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions out with their channels last; what they return follows.

    Raises:
        InputError: there are none.
    """
    weights = [p for p in module.parameters() if p.dim() == 4]
    if not weights:
        raise InputError("no convolution of images has weights to lay out")
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _in_bfloat16(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a forward pass under autocast, whose scores are float32."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            output = forward(*args, **kwargs)
        return output.float() if isinstance(output, torch.Tensor) else output

    return run
