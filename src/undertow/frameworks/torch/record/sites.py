"""The modules of a PyTorch network: which can be sites, and what tells one network from another."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ....errors import ModelError
from ...base import NamedModule
from ...own_passes import own_pass
from .. import submodules
from ..explain.modules import ACTIVATIONS
from ..internals import CONVOLUTION, NORM, is_compiled
from ..weights import weights_sha256
from .axes import Layouts, is_linear

_POOLS = tuple(
    getattr(nn, f"{prefix}{kind}Pool{axes}d")
    for prefix in ("", "Adaptive")
    for kind in ("Max", "Avg")
    for axes in (1, 2, 3)
)
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (CONVOLUTION,),
    "norm": (NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    "relu": ACTIVATIONS["relu-like"],
    "pool": (*_POOLS, nn.LPPool1d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
}


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
    for name, module in submodules.named_modules(root):
        if is_compiled(module):
            where = f"its part {name!r} is" if name else "it is"
            raise ModelError(
                f"the model cannot be read: {where} compiled, and hooks set after torch.compile never fire; "
                "record the module that was given to torch.compile, and run that one"
            )
    return root


def named_modules(model: Any) -> list[NamedModule]:
    """List every module that can be a site, in the order of definition, each once with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in submodules.named_modules(network(model), remove_duplicate=False):
        names.setdefault(module, []).append(name)
    alone = len(names) == 1
    return [
        NamedModule(tuple(own_names), _kind(module), _types(module), module)
        for module, own_names in names.items()
        if alone or "" not in own_names
    ]


def layouts(model: Any, given: Mapping[str, str]) -> Layouts:
    """Return the axes of all modules' outputs; `given` has letters for some of them, as in "tbc".

    Raises:
        ModelError: a weight has no values yet.
    """
    root = network(model)
    _refuse_empty(root)
    return Layouts(dict(submodules.named_modules(root)), given)


def _refuse_empty(root: nn.Module) -> None:
    """Refuse weights without values: of a lazy module that has not run, or on the device "meta"."""
    tensors = (*root.named_parameters(), *root.named_buffers())
    empty = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor) or tensor.is_meta]
    if empty:
        others = f" and {len(empty) - 1} more have" if len(empty) > 1 else " has"
        raise ModelError(
            f"{empty[0]}{others} no values yet; run the model once on an input if it has lazy modules, or load its "
            "weights, and record then"
        )


def _kind(module: nn.Module) -> str:
    if submodules.is_keras(module):
        from ...keras_layers import kind

        return kind(module)
    if is_linear(module):
        return "linear"
    return next((kind for kind, types in _KINDS.items() if isinstance(module, types)), type(module).__name__.lower())


def _types(module: nn.Module) -> tuple[str, ...]:
    if submodules.is_keras(module):
        from ...keras_layers import types

        return types(module)
    return tuple(cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object))


def visits(model: Any, example: Any) -> dict[str, list[Any]]:
    """Run the network on an example; return the shapes of the outputs of each module that was called, in order.

    Modes stay, and buffers and the random state are put back.
    """
    root = network(model)
    visited: dict[str, list[Any]] = {}

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        shapes = tuple(tuple(tensor.shape) for _, tensor in tensors_in(output))
        visited.setdefault(name, []).append(shapes[0] if len(shapes) == 1 else shapes)

    inputs = example if isinstance(example, tuple) else (example,)
    with own_pass(), _buffers_restored(root), torch.no_grad(), ExitStack() as stack:
        for named in named_modules(model):
            stack.callback(named.module.register_forward_hook(partial(after, named.name)).remove)
        model(*inputs)
    return visited


@contextmanager
def _buffers_restored(root: nn.Module) -> Iterator[None]:
    copies = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)


def identity(model: Any) -> dict[str, Any]:
    """Return what tells a network from others: its class, the shape of its structure, its weights, its precision.

    Sharded weights have no digest, since this process has not all of them.
    """
    root = network(model)
    digest = hashlib.sha256()
    for name, module in submodules.named_modules(root):
        digest.update(f"{name}\0{type(module).__qualname__}\0{module.extra_repr()}\0".encode())
    for name, tensor in (*submodules.named_parameters(root), *root.named_buffers()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in root.parameters()})
    return {
        "class": f"{type(root).__module__}.{type(root).__qualname__}",
        "structure_sha256": digest.hexdigest(),
        "weights_sha256": None if is_sharded(root) else weights_sha256(root),
        "mode": "training" if root.training else "evaluation",
        "parameters": sum(p.numel() for p in root.parameters()),
        "precision": ", ".join(dtypes),
        "device": ", ".join(sorted({str(p.device) for p in root.parameters()})),
        "framework": f"torch {torch.__version__}",
    }


def is_sharded(root: nn.Module) -> bool:
    """Whether this process holds only a part of some parameter, as under `fully_shard`."""
    return any(hasattr(parameter, "to_local") for parameter in root.parameters())


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def tensors_in(output: Any, key: str = "", of_any_dtype: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating-point tensors of a module's output with their positions: "" for one alone, "0", "1.hidden"."""
    if isinstance(output, torch.Tensor):
        if of_any_dtype or output.is_floating_point():
            yield key, output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            yield from tensors_in(value, f"{key}.{name}" if key else str(name), of_any_dtype)
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from tensors_in(value, f"{key}.{i}" if key else str(i), of_any_dtype)
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in(vars(output), key, of_any_dtype)
