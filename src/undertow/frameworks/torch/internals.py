"""Every private name of torch that undertow uses, once, with the reason for it.

`tests/frameworks/torch/test_internals.py` checks that the installed torch has each of them and that it does what
is said here, so an upgrade of torch that removes or changes one fails there.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees in-place calls on views
from torch.utils._pytree import tree_flatten as tree_flatten  # nested arguments and outputs, as torch nests them
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils.hooks import RemovableHandle

# Base classes without a public name, so that subclasses of users count too.
CONVOLUTION = nn.modules.conv._ConvNd
NORM = nn.modules.batchnorm._NormBase
DROPOUT = nn.modules.dropout._DropoutNd

# What `torch.compile` puts before each name in a module's state dict.
COMPILED_PREFIX = "_orig_mod."

# Hides calls from a `TorchFunctionMode` that must not see them.
unseen_by_function_modes = torch._C.DisableTorchFunction


def compiled_from(model: Any) -> Any:
    """Return the module or function that `torch.compile` wrapped; None for anything else."""
    return getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)


def reset_of(module: nn.Module) -> Callable[[], None] | None:
    """Return what initialises a module's own weights anew, if anything does; MultiheadAttention's is private."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, by `torch.compile` or in place by `module.compile()`."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def eager_call(module: nn.Module) -> Callable[..., Any]:
    """Return what calls a module without the compiled form that `module.compile()` gave it."""
    return module if getattr(module, "_compiled_call_impl", None) is None else module._call_impl


def in_backward_pass() -> bool:
    """Whether this code runs inside a backward pass, where checkpointing calls modules again."""
    return torch._C._current_graph_task_id() != -1


def backward_pass() -> int:
    """Return the number of the backward pass that this code runs in, -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_backward_pass(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended; DistributedDataParallel averages in such a call.

    Such calls are made in the order in which they were asked for; this one asks again in its turn, to be the last.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(function))


def current_node() -> Any:
    """Return the graph node whose backward runs now, or None."""
    return torch._C._current_autograd_node()


def will_execute(node: Any) -> bool:
    """Whether the backward pass that runs now will run a node: only the engine knows."""
    return torch._C._will_engine_execute_node(node)


def next_sequence_number() -> int:
    """Return the number of the next graph node: nodes are numbered in the order in which a thread creates them."""
    return int(torch._C._autograd._get_sequence_nr())


def sequence_number(node: Any) -> int:
    """Return a graph node's number; nodes that accumulate a parameter's gradient have the largest number there is."""
    return int(node._sequence_nr())


def function_class(node: Any) -> type[torch.autograd.Function] | None:
    """Return the `autograd.Function` behind a graph node; None for a node in C++."""
    return getattr(type(node), "_forward_cls", None)


def beside_the_engine() -> AbstractContextManager[Any]:
    """Return a context in which what checkpointed segments saved is read by another than the backward pass that runs.

    A segment is run anew once for each reader, and gives each tensor to each reader once. Torch before 2.10 knows no
    readers: there the backward pass fails for want of what was read here.
    """
    is_read_by_another = getattr(torch._C, "_get_graph_exec_group", lambda: True)() is not None
    return nullcontext() if is_read_by_another else checkpoint.GraphExecGroup()


def saved(node: Any, name: str, reader: AbstractContextManager[Any] | None = None) -> Any:
    """Return what a graph node saved in the forward pass under a name, such as "self" or "min".

    Args:
        reader: a context of `beside_the_engine` that serves several reads; None runs a checkpointed segment for this.
    """
    with beside_the_engine() if reader is None else reader:
        return getattr(node, f"_saved_{name}")


class SharedPrehook:
    """One hook that runs before any number of graph nodes, and is removed from all of them at once.

    `Node.register_prehook` creates a Python handle for each node, which doubles the cost on a network of small layers.
    Any node can take a tensor's dictionary of hooks: `Tensor.register_hook` itself works that way.
    """

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._holder = torch.empty(0, requires_grad=True)
        self._hooks = self._holder._backward_hooks = OrderedDict({0: hook})

    def attach(self, node: Any) -> None:
        """Make the hook run before a node."""
        node._register_hook_dict(self._holder)

    def clear(self) -> None:
        """Remove the hook from every node."""
        self._hooks.clear()


def is_of_freed_tensor(handle: RemovableHandle) -> bool:
    """Whether the tensor that a hook was on is freed, in the graph too: the handle refers to its hooks weakly."""
    return handle.hooks_dict_ref() is None


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view: an in-place operation on one takes the view's hooks out of the graph."""
    return tensor._is_view()


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that a view is of; None for one that is no view."""
    return tensor._base


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of those that `torch.func` transforms wrap, which have no values of their own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: torch may negate or zero lazily, which NumPy does not see."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def scale_of(scaler: Any) -> Tensor | None:
    """Return the scale of a `torch.amp.GradScaler` on its device; its public `get_scale` waits for the device."""
    return scaler._get_scale_async()  # type: ignore[no-any-return]
