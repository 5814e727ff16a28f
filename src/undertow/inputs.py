"""What a model is given: positional or keyword arguments, nested as it takes them, and the tensors among them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .structures import is_tensor, map_tensors, tensors_with_paths


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of one call, taken from `x`.

    Attributes:
        x: as it was given; maps come back in its structure.
        args, kwargs: what the model is called with.
    """

    x: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors in `x`, however deep, in order."""
        return tuple(tensor for _, tensor in tensors_with_paths(self.x))

    @property
    def is_plain(self) -> bool:
        """Whether the model is called with floating-point tensors alone: batches, whose first axes must be as long.

        Integers may be edges of a graph, which have a first axis of their own, and a list of images in one argument
        has a batch that no first axis tells.
        """
        are_tensors = all(is_tensor(item) for item in self.args) and not self.kwargs
        return are_tensors and (len(self.args) == 1 or all("float" in str(item.dtype) for item in self.args))

    @property
    def structure(self) -> str:
        """A text that differs where the structure or anything but the tensors' values does."""
        return repr(self.fill(range(len(self.tensors))))

    def fill(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with other tensors in the places of `self.tensors`."""
        remaining = iter(tensors)
        args, kwargs = map_tensors((self.args, dict(self.kwargs)), lambda _: next(remaining))
        return args, kwargs

    def in_structure(self, values: Sequence[Any]) -> Any:
        """Return values, one for each tensor, in the structure of `x`; None in the place of anything else.

        >>> import numpy as np
        >>> ModelArguments({"a": np.ones(2), "b": [None, 3]}, (), {}).in_structure(["map of a"])
        {'a': 'map of a', 'b': [None, None]}
        """
        remaining = iter(values)
        return map_tensors(self.x, lambda _: next(remaining), others=lambda _: None)


def arguments_of(x: Any, model: Callable[..., Any]) -> ModelArguments:
    """Return the arguments that `x` stands for.

    A tuple is positional arguments, a mapping keyword arguments, a list either positional arguments or, for a model
    that takes a single one, that argument; anything else is the one argument.

    Raises:
        InputError: there is no tensor in it, or it looks like a loader's batch of images and labels.
    """
    if type(x) is tuple and not x:
        raise InputError("x is an empty tuple; pass a batch, or a tuple of batches")
    if isinstance(x, Mapping):
        arguments = ModelArguments(x, (), x)
    else:
        is_positional = type(x) is tuple or (type(x) is list and _n_required(model) == len(x) > 1)
        arguments = ModelArguments(x, tuple(x) if is_positional else (x,), {})
    if not arguments.tensors:
        holds = " without a tensor in it" if isinstance(x, tuple | list | Mapping) else ""
        raise InputError(f"x is a {type(x).__name__}{holds}, not a torch tensor or a tuple, list or dict of them")
    _refuse_loader_batch(x, model)
    return arguments


def _n_required(model: Callable[..., Any]) -> int:
    """Return how many positional arguments a model must be given; 1 where that cannot be told."""
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _refuse_loader_batch(x: Any, model: Callable[..., Any]) -> None:
    """Refuse images and labels in one, as a loader yields them, for a model that takes images alone."""
    if type(x) not in (tuple, list) or len(x) != 2 or not all(map(is_tensor, x)):
        return
    images, labels = x
    is_batch = len(images.shape) > 1 and tuple(labels.shape) == tuple(images.shape[:1])
    if is_batch and "int" in str(labels.dtype) and not _takes_two(model):
        raise InputError(
            "x looks like a loader's batch of images and labels; pass x[0], and target=x[1] to explain them"
        )


def _takes_two(model: Callable[..., Any]) -> bool:
    try:
        inspect.signature(getattr(model, "forward", model)).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
