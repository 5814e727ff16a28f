"""An error of the model that a batch axis before its input would have spared."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ..errors import InputError, ModelError, UndertowError
from ..frameworks.base import Request, capability
from ..rules import gradient
from ..structures import tensors_with_paths


@contextmanager
def unbatched_named(framework: str, request: Request) -> Iterator[None]:
    """Where an explanation fails and would not with `x[None]`, say so.

    Raises:
        InputError: instead of the model's own error.
    """
    try:
        yield
    except Exception as error:
        is_about_shapes = isinstance(error, ModelError) or not isinstance(error, UndertowError)
        if is_about_shapes and _works_as_batch_of_one(framework, request):
            shape = tuple(request.inputs[0].shape)
            raise InputError(
                f"x of shape {shape} looks like one sample without a batch axis; pass x[None], of shape {(1, *shape)}"
            ) from error
        raise


def _works_as_batch_of_one(framework: str, request: Request) -> bool:
    """Whether a single input gets scores with a batch axis before it alone, and without it no row for each sample."""
    if len(request.inputs) != 1 or not request.is_plain or _gives_rows(framework, request):
        return False
    batch = replace(request, inputs=(request.inputs[0][None],), rule=gradient, rule_name="gradient", target=None)
    try:
        capability(framework, "explain").explain(batch)
    except Exception:
        return False
    return True


def _gives_rows(framework: str, request: Request) -> bool:
    """Whether the model, given the input as it is, returns as many rows as that has."""
    outputs: list[Any] = []
    with suppress(Exception):  # a target that returns None ends the explanation
        capability(framework, "explain").explain(replace(request, rule=gradient, target=outputs.append))
    shapes = [tensor.shape for output in outputs for _, tensor in tensors_with_paths(output)]
    return any(len(shape) and shape[0] == request.batch for shape in shapes)
