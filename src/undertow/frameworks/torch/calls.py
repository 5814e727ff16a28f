"""One call of a user's model: its inputs, its output, the scores to explain, and its state as before afterwards."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import InputError, ModelError
from ...outputs import Path, described, head_of
from ..own_passes import own_pass
from .internals import DROPOUT, NORM, TorchDispatchMode, compiled_from, eager_call, is_view


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module or function behind `torch.compile`: a compiled call is one node without activations.

    Raises:
        ModelError: it is an exported program, which is not called itself.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise ModelError("an ExportedProgram cannot be called; pass its module, as in program.module()")
    while (inner := compiled_from(model)) is not None:
        model = inner
    return model


def eager(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls a model without its compiled form, one that `model.compile()` made in place included."""
    model = uncompiled(model)
    return eager_call(model) if isinstance(model, nn.Module) else model


def module_of(model: Any) -> nn.Module | None:
    """Return the module behind a callable: itself, a bound method's or a partial's; None where there is none."""
    if isinstance(model, functools.partial):
        return module_of(model.func)
    if inspect.ismethod(model):
        return module_of(model.__self__)
    return model if isinstance(model, nn.Module) else None


def has_channels_last(model: Callable[..., Any]) -> bool:
    """Whether a model takes images `(B, H, W, C)`: a Keras model on torch does, unless Keras is set otherwise."""
    module = module_of(uncompiled(model))
    if all(cls.__module__.partition(".")[0] != "keras" for cls in type(module).__mro__):
        return False
    return bool(sys.modules["keras"].config.image_data_format() == "channels_last")


def refuse_training(model: Callable[..., Any]) -> None:
    """Refuse a module whose batch norms are in training mode: a pass would change their statistics.

    What else acts in training only the pass itself tells, see `explain.acting`.

    Raises:
        ModelError: naming the layers that would make the map depend on chance, or on the rest of the batch.
    """
    module = module_of(model)
    if module is None or (isinstance(module, torch.fx.GraphModule) and "train" in vars(module)):
        return  # an exported program says training=True always, and has no eval()
    training = list(modules_in_training(module))
    if not any(isinstance(m, NORM) and m.running_mean is not None for m in training):
        return
    kinds = sorted({type(m).__name__ for m in training if _depends_on_mode(m)})
    raise ModelError(
        f"the model is in training mode: {', '.join(kinds)} would act as in training; "
        "call model.eval() first, or pass training=True"
    )


def modules_in_training(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those in it that are in training mode."""
    stack = [module]  # Module.modules() takes longer than a small network's forward pass
    while stack:
        current = stack.pop()
        if getattr(current, "training", False):  # frozen TorchScript has no such attribute
            yield current
        stack.extend(current.children())


def _depends_on_mode(module: nn.Module) -> bool:
    return isinstance(module, (NORM, DROPOUT, nn.RReLU)) or (isinstance(module, nn.RNNBase) and module.dropout > 0)


def leaves_and_copies(
    inputs: Sequence[Any], is_plain: bool = True
) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """Return the leaves to differentiate by, None for integers, and copies for the model, which it may overwrite.

    Args:
        is_plain: the inputs are batches, whose first axes must be as long.

    Raises:
        InputError: an input is no tensor, is complex or has another batch size, or none is of floating point.
    """
    for i, x in enumerate(inputs):
        if not isinstance(x, torch.Tensor):
            raise InputError(f"input {i} is a {type(x).__name__}, not a torch tensor")
        if x.is_nested:
            raise InputError(f"input {i} is a nested tensor; pass torch.nested.to_padded_tensor(x, 0.0) and a mask")
        if is_plain and (x.ndim == 0 or x.shape[0] != inputs[0].shape[0]):
            raise InputError(f"input {i} has shape {tuple(x.shape)}; every input needs the same first (batch) axis")
        if x.is_complex():
            raise InputError(f"input {i} is complex ({x.dtype}); pass its real view, torch.view_as_real(x)")
    if not any(x.is_floating_point() for x in inputs):
        raise InputError(
            f"x is {inputs[0].dtype}; a map needs floating point: pass x.float(), or at='LAYER' of embeddings"
        )
    ordinary = [x.clone() if x.is_inference() else x.detach() for x in inputs]
    sources = [x.requires_grad_() if x.is_floating_point() else None for x in ordinary]
    fed = [x.clone() for x in ordinary]
    return sources, fed


def run(call: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Any:
    """Run the model; an exception of its own is raised with the shapes of its input."""
    try:
        return call(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        error.add_note(f"while the model ran on an input of shape {shapes}")
        raise


def scores_of(output: Any, path: Path | None = None) -> torch.Tensor:
    """Return the part of a model's output that holds its scores, `(B, ...)`.

    Raises:
        ModelError: there is no such part, or it is no float tensor.
    """
    scores = head_of(output, path)
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        returned = f"{scores.dtype} scores" if isinstance(scores, torch.Tensor) else described(output)
        remedy = "" if path is not None else "name the part that holds the scores, as in output='out', or "
        raise ModelError(
            f"the model returned {returned}; it must be a float tensor, a tuple of them, or have .logits; {remedy}"
            "pass target=lambda output: ... that returns one score for each sample"
        )
    return scores


def output_of(call: Callable[..., Any], inputs: Sequence[torch.Tensor], path: Path | None = None) -> torch.Tensor:
    """Run the model and return its scores, `(B, ...)`; errors as of `scores_of`."""
    return scores_of(run(call, inputs), path)


def class_scores(call: Callable[..., Any], x: torch.Tensor, path: Path | None = None) -> torch.Tensor:
    """Return a model's scores, `(B, classes)`, without a graph.

    Raises:
        ModelError: the output has another number of axes.
    """
    with own_pass(), torch.no_grad():
        return refuse_non_class_scores(output_of(call, [x], path))


def refuse_non_class_scores(scores: torch.Tensor) -> torch.Tensor:
    """Return scores `(B, classes)` as they are.

    Raises:
        ModelError: they have another number of axes.
    """
    if scores.ndim != 2:
        raise ModelError(f"the model returned shape {tuple(scores.shape)}, not (batch, classes)")
    return scores


def overwrites_a_view(call: Callable[..., Any], inputs: tuple[Any, ...], is_plain: bool = True) -> bool:
    """Whether the model applies an activation in place to a view, which hides the activation from the graph.

    Autograd leaves one node (CopySlices), which is the same for every in-place call, so the model runs once more.
    """
    mode = _InPlaceOnViews()
    _, fed = leaves_and_copies(inputs, is_plain)
    with mode:
        call(*fed)
    return mode.seen


class _InPlaceOnViews(TorchDispatchMode):
    """Sees whether an activation is applied in place to a view."""

    activations = frozenset(
        getattr(torch.ops.aten, f"{name}_")
        for name in (
            *("relu", "hardtanh", "leaky_relu", "rrelu_with_noise", "threshold", "clamp", "clamp_min"),
            *("elu", "celu", "gelu", "silu", "mish", "hardswish"),
        )
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.activations and is_view(args[0]):
            self.seen = True
        return func(*args, **(kwargs or {}))
