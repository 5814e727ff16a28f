"""A network's layers in one call: what they return, what is put in its place, and where they have their channels."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import InputError, did_you_mean
from ...structures import map_tensors, tensors_with_paths
from ..base import Request
from ..own_passes import own_pass
from .calls import eager, module_of, run, uncompiled
from .internals import CONVOLUTION, NORM
from .submodules import is_keras, named_modules, top_names

CHANNELS_FIRST = (CONVOLUTION, NORM, nn.GroupNorm)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def submodule(model: Any, layer: str) -> nn.Module:
    """Return a module by its dotted name, `@` and a call's number aside.

    Raises:
        InputError: there is none of that name, or the model is no module.
    """
    root = module_of(uncompiled(model))
    if root is None:
        raise InputError(f"model is a {type(model).__name__}; layers are those of a torch.nn.Module")
    name = layer.partition("@")[0]
    modules: dict[str, nn.Module] = dict(named_modules(root))
    if name not in modules or not name:
        children = ", ".join(top_names(root))
        raise InputError(f"no layer {name!r}{did_you_mean(name, modules) or f'; at the top there are {children}'}")
    return modules[name]


def call_number(layer: str) -> int | None:
    """Return the call that a layer's name asks for, as in `layer@1`; None for all.

    Raises:
        InputError: what stands behind the `@` is no number.
    """
    _, at, number = layer.partition("@")
    if at and not number.isdecimal():
        raise InputError(f"layer {layer!r}: behind @ stands the number of a call, as in {layer.partition('@')[0]}@1")
    return int(number) if at else None


class RecordedOutputs(dict[str, torch.Tensor]):
    """Modules' outputs by name; `layer@1` is that of a second call.

    Attributes:
        calls: how often each module was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def forget(self) -> None:
        """Forget a run, before the network runs once more."""
        self.clear()
        self.calls.clear()


def record_outputs(model: Any, names: Sequence[str], stack: ExitStack) -> RecordedOutputs:
    """Return a dict that fills with the named modules' outputs in this thread, `layer@1` being those of a second call.

    All calls of a module are recorded, whichever a name asks for.
    Of an output of several tensors the first one with a gradient is recorded. The hooks are removed when the stack
    closes. The network goes on with a copy of what is recorded, so that a successor in place does not change it.

    Raises:
        InputError: as `submodule`.
    """
    outputs = RecordedOutputs()
    thread = threading.get_ident()
    for name in dict.fromkeys(name.partition("@")[0] for name in names):

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> Any:
            first = next((t for _, t in tensors_with_paths(output) if t.requires_grad), None)
            if threading.get_ident() != thread or first is None:
                return None
            call, outputs.calls[name] = outputs.calls[name], outputs.calls[name] + 1
            outputs[f"{name}@{call}" if call else name] = first
            return map_tensors(output, lambda tensor: tensor.clone() if tensor is first else tensor)

        stack.callback(submodule(model, name).register_forward_hook(after).remove)
    return outputs


def channel_axis(model: Any, name: str, ndim: int) -> int | None:
    """Return where a layer's modules have their channels, by its name; see `channel_axis_of`."""
    return channel_axis_of(submodule(model, name), ndim)


def channel_axis_of(layer: nn.Module, ndim: int) -> int | None:
    """Return where a layer's modules have their channels, 1 or -1, if all that tell agree.

    Args:
        ndim: of the layer's output, of which a module of another number of axes tells nothing: a patch embedding's
            convolution of planes, say, of the tokens that are made of them.
    """
    if is_keras(layer):
        from ..keras_layers import channel_axis as of_keras

        return of_keras(layer)
    tell = {
        1 if isinstance(module, CHANNELS_FIRST) else -1
        for module in layer.modules()
        if (isinstance(module, CHANNELS_FIRST) and _own_ndim(module) in (None, ndim))
        or type(module) in CHANNELS_LAST  # subclasses of LayerNorm permute
    }
    return tell.pop() if len(tell) == 1 else None


def channel_axis_by_sizes(model: Any, name: str, shape: Sequence[int]) -> int | None:
    """Return where a layer's output has its channels: where its modules tell, or by how many channels they make.

    Args:
        shape: of the output. A patch embedding's convolution of planes makes as many channels as its tokens have.
    """
    if (told := channel_axis(model, name, len(shape))) is not None or len(shape) < 3 or shape[1] == shape[-1]:
        return told
    counts = {m.out_channels for m in submodule(model, name).modules() if isinstance(m, CONVOLUTION)}
    fitting = [axis for axis in (1, -1) if shape[axis] in counts]
    return fitting[0] if len(fitting) == 1 else None


def _own_ndim(module: nn.Module) -> int | None:
    """Return how many axes a convolution's or norm's output has; None where it may have any."""
    if isinstance(module, CONVOLUTION):
        return len(module.kernel_size) + 2
    kinds = enumerate(((nn.BatchNorm1d, nn.InstanceNorm1d), (nn.BatchNorm2d, nn.InstanceNorm2d)), 3)
    return next((ndim for ndim, kind in kinds if isinstance(module, kind)), None)


def layer_outputs(request: Request, layer: str) -> list[Any]:
    """Run the model; return what each call of a layer returned, its tensors detached, or of the one call asked for.

    Raises:
        InputError: as `submodule`, or the layer did not run.
    """
    number, outputs, thread = call_number(layer), list[Any](), threading.get_ident()

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            outputs.append(map_tensors(output, lambda tensor: tensor.detach().clone()))

    handle = submodule(request.model, layer).register_forward_hook(after)
    try:
        with own_pass(), torch.no_grad():
            run(request.bind(eager(request.model)), [x.clone() for x in request.inputs])
    finally:
        handle.remove()
    if not outputs or (number or 0) >= len(outputs):
        raise InputError(f"layer {layer!r} runs {len(outputs)} time(s) for this x; name one that runs")
    return outputs if number is None else [outputs[number]]


@contextmanager
def replaced_output(network: Any, layer: str, call: int, output: Any) -> Iterator[None]:
    """Let one call of a layer return something else, in this thread."""
    count, thread = 0, threading.get_ident()

    def after(_: nn.Module, __: Any, ___: Any) -> Any:
        nonlocal count
        if threading.get_ident() != thread:
            return None
        count += 1
        return output if count == call + 1 else None

    handle = submodule(network, layer).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def from_layer(request: Request, layer: str, call: int) -> Callable[[Any], Callable[..., Any]]:
    """Return what makes of a network a function of one layer's output, for the request's inputs."""

    def around(network: Any) -> Callable[..., Any]:
        def run_on(output: Any) -> Any:
            with replaced_output(network, layer, call, output):
                return request.bind(network)(*(x.clone() for x in request.inputs))

        return run_on

    return around
