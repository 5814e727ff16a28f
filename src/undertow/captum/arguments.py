"""What Captum's methods are given: inputs, targets and further arguments, as one `Request`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TargetError
from ..frameworks.base import AS_IS, Request
from ..outputs import head_of
from ..rules import resolve
from ..tables import ActivationRule, Rule

Tensors = Tensor | tuple[Tensor, ...]


class UnfitTargetError(TargetError, AssertionError):
    """A target that does not fit the scores; an AssertionError too, as Captum's is."""


def as_tuple(inputs: Tensors) -> tuple[Tensor, ...]:
    """Return inputs as a tuple of tensors.

    Raises:
        InputError: they are something else.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    for x in given:
        if not isinstance(x, Tensor):
            raise InputError(f"inputs hold a {type(x).__name__}; pass a tensor or a tuple of tensors")
    if not given:
        raise InputError("inputs are an empty tuple; pass a tensor or a tuple of tensors")
    return given


def like(inputs: Any, values: tuple[Tensor, ...]) -> Any:
    """Return values as a tuple where the inputs were one, else the single value."""
    return values if isinstance(inputs, tuple) else values[0]


def more_arguments(additional_forward_args: Any) -> tuple[Any, ...]:
    """Return `additional_forward_args` as positional arguments."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def request_for(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    target: Any,
    additional_forward_args: Any,
    rule: str | ActivationRule | Rule = "gradient",
) -> Request:
    """Return one explanation as Captum's arguments ask for it: of the output as it is, whatever it ends in."""
    name, function = resolve(rule)
    more = more_arguments(additional_forward_args)
    batch = inputs[0].shape[0] if inputs[0].ndim else 1
    return Request(
        forward_func,
        inputs,
        function,
        name,
        partial(selected, target=target, batch=batch),
        through="graph",
        activations="relu-like",
        training=False,
        head=AS_IS,
        fill=lambda tensors: ((*tensors, *more), {}),
        structure=repr(len(more)),
        is_plain=all(x.is_floating_point() and x.ndim and len(x) == batch for x in inputs),
    )


def selected(output: Any, target: Any, batch: int) -> Tensor:
    """Return the score `(B,)` of each sample that a target of Captum's means.

    Args:
        output: of the model, `(B, ...)`; of a mapping or tuple the part that holds the scores.
        target: None for one score a sample; an int, a tuple of positions behind the batch axis, a tensor of one or B
            integers, or a list of B integers or tuples.

    Raises:
        TargetError: the target is something else, does not fit, or leaves several scores a sample.

    >>> selected(torch.arange(6.0).view(2, 3), [0, 2], 2)
    tensor([0., 5.])
    """
    scores = output if isinstance(output, Tensor) else head_of(output, None)
    if not isinstance(scores, Tensor) or not scores.ndim:
        raise UnfitTargetError("the model must return a tensor with one row a sample, or of a single number")
    try:
        chosen = scores if target is None else _chosen(scores, target)
    except IndexError as error:
        raise UnfitTargetError(
            f"target {target!r} is out of range: the scores have shape {tuple(scores.shape)}"
        ) from error
    if chosen.numel() != len(chosen):
        what = "no target is given" if target is None else f"target {target!r} leaves several"
        raise UnfitTargetError(
            f"{what}, and the model returns {tuple(scores.shape)}; name one score a sample, as in target=0, or "
            f"target=({', '.join('0' * (scores.ndim - 1))}{',' * (scores.ndim == 2)})"
        )
    flat = chosen.reshape(-1)
    # one score for the whole batch: each sample has an equal part of it, and the gradient is the same
    return flat.expand(batch) / batch if len(flat) == 1 < batch else flat


def _chosen(scores: Tensor, target: Any) -> Tensor:
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.dtype == torch.bool or target.ndim > 1:
            raise UnfitTargetError(f"target is {target.dtype} of shape {tuple(target.shape)}; pass one or B integers")
        target = int(target) if target.numel() == 1 else target.tolist()
    if isinstance(target, list):
        if len(target) != len(scores):
            raise UnfitTargetError(f"there are {len(target)} targets for {len(scores)} samples; pass one for each")
        return torch.stack([scores[(i, *_place(place, scores))] for i, place in enumerate(target)])
    return scores[(slice(None), *_place(target, scores))]


def _place(target: Any, scores: Tensor) -> tuple[Any, ...]:
    """Return a target as positions behind the batch axis."""
    place = target if isinstance(target, tuple) else (target,)
    if not all(isinstance(i, int | slice) and not isinstance(i, bool) for i in place):
        raise UnfitTargetError(
            f"target {target!r} is not understood: pass an int, a tuple, a list of these, or integers"
        )
    if len(place) >= scores.ndim:
        raise UnfitTargetError(f"target {target!r} names more axes than scores of shape {tuple(scores.shape)} have")
    return place


def repeated(value: Any, times: int, batch: int) -> Any:
    """Return a further argument or target for so many copies of a batch, one behind the other."""
    if isinstance(value, list):
        return value * times
    if isinstance(value, Tensor) and value.ndim and len(value) == batch and value.numel() > 1:
        return torch.cat([value] * times)
    return value


def repeated_all(additional_forward_args: Any, times: int, batch: int) -> Any:
    """Return all further arguments for so many copies of a batch."""
    return tuple(repeated(value, times, batch) for value in more_arguments(additional_forward_args)) or None


def baselines_like(baselines: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a baseline of each input's shape; None is zero.

    Raises:
        InputError: there are more or fewer than inputs, or one does not fit.
    """
    given = baselines if isinstance(baselines, tuple) else (baselines,) * (1 if baselines is not None else len(inputs))
    if len(given) != len(inputs):
        raise InputError(f"there are {len(given)} baselines for {len(inputs)} inputs; pass one for each")
    return tuple(_baseline_like(baseline, x) for baseline, x in zip(given, inputs, strict=True))


def _baseline_like(baseline: Any, x: Tensor) -> Tensor:
    if isinstance(baseline, int | float):
        return torch.full_like(x, baseline)
    if baseline is None:
        return torch.zeros_like(x)
    if not isinstance(baseline, Tensor) or (baseline.shape != x.shape and baseline.shape != (1, *x.shape[1:])):
        shape = tuple(baseline.shape) if isinstance(baseline, Tensor) else type(baseline).__name__
        raise InputError(
            f"a baseline of {shape} does not fit {tuple(x.shape)}; pass a number or a tensor like the input"
        )
    return baseline.to(x.device).expand_as(x)
