"""What Captum's methods have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attribution.explain import warn_if_left_alone
from ..errors import InputError
from ..frameworks.base import Request, capability
from ..tables import Rule
from .arguments import Tensors, as_tuple, baselines_like, more_arguments, request_for, selected


class Method:
    """A method of attribution.

    Args:
        forward_func: a module in eval mode, or any function from tensors to scores `(B, ...)`.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        if not callable(forward_func):
            raise InputError(f"forward_func is a {type(forward_func).__name__}; pass a module or a function")
        self.forward_func = forward_func

    def attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Return the attributions, in the structure of the inputs."""
        raise NotImplementedError

    def attribute_future(self) -> None:
        """Raise NotImplementedError: no result is a future."""
        raise NotImplementedError(f"{type(self).__name__}.attribute_future is not there; call attribute")

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the attributions are multiplied by the inputs."""
        return False

    def has_convergence_delta(self) -> bool:
        """Whether `attribute` takes `return_convergence_delta`."""
        return False

    @classmethod
    def get_name(cls) -> str:
        """Return the class's name as words.

        >>> Method.get_name()
        'Method'
        """
        return "".join(c if c.islower() or not i else f" {c}" for i, c in enumerate(cls.__name__))

    def compute_convergence_delta(
        self,
        attributions: Tensors,
        start_point: Any,
        end_point: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Return what the attributions add up to, less the scores' difference between both points: `(B,)`."""
        ends, maps = as_tuple(end_point), as_tuple(attributions)
        starts = baselines_like(start_point, ends)
        more = more_arguments(additional_forward_args)
        with torch.no_grad():
            first, last = (
                selected(self.forward_func(*point, *more), target, len(ends[0])).detach() for point in (starts, ends)
            )
        total = sum(m.reshape(len(m), -1).sum(1) for m in maps)
        delta: Tensor = total - (last - first)
        return delta


def maps_of(request: Request) -> tuple[Tensor, ...]:
    """Return the map of each input.

    Raises:
        InputError: the scores do not depend on an input, or it is of integers.
    """
    explanation = capability("torch", "explain").explain(request)
    warn_if_left_alone(explanation, request.rule_name, "all" if isinstance(request.rule, Rule) else "relu-like")
    for i, (m, x) in enumerate(zip(explanation.maps, request.inputs, strict=True)):
        if m is None:
            why = "does not reach the scores" if x.is_floating_point() else f"is {x.dtype}, which has no gradient"
            raise InputError(f"input {i} {why}; pass it in additional_forward_args, or take a layer's method")
    return explanation.maps


def gradients(
    forward_func: Callable[..., Any], inputs: tuple[Tensor, ...], target: Any, more: Any, rule: str = "gradient"
) -> tuple[Tensor, ...]:
    """Return the gradients under a rule, one like each input."""
    return maps_of(request_for(forward_func, inputs, target, more, rule))
