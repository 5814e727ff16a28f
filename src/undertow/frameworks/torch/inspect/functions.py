"""Check of custom autograd functions: is the backward of each the derivative of its forward?

The graph of a pass names the functions but does not hold their arguments. So the pass runs once more while their
`forward` is wrapped to record its arguments; then each call runs alone, in float64 on copies, and its gradients are
compared with central differences along random directions.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import one_line
from ...results import CORRECT, UNCHECKED, WRONG, Checked
from ..internals import function_class, tree_leaves
from ..nodes import NodeKind, nodes_behind

STEP, DIRECTIONS, TOLERANCE = 1e-6, 4, 1e-4  # the error of a central difference in float64 is near 1e-9
_one_at_a_time = threading.Lock()  # recording replaces a method of the class, which all threads share


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function: copies of its arguments from before it ran, and the module call that it ran in."""

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    module_call: tuple[str, int]


def custom_functions(outputs: Sequence[Tensor]) -> list[type[torch.autograd.Function]]:
    """Return the classes of the user's own autograd functions in the graph behind some outputs."""
    roots = {output.grad_fn for output in outputs if output.grad_fn is not None}
    opaque = (node for root in roots for node, kind in nodes_behind(root) if kind is NodeKind.OPAQUE)
    classes = (function_class(node) for node in opaque)
    return list(dict.fromkeys(c for c in classes if c is not None and not c.__module__.startswith("torch.")))


@contextmanager
def recorded_calls(
    functions: Sequence[type[torch.autograd.Function]], module_call: Callable[[], tuple[str, int]]
) -> Iterator[list[FunctionCall]]:
    """Yield a list that fills with this thread's calls of some functions.

    Args:
        functions: the classes.
        module_call: returns the name and number of the module call under way.
    """
    calls: list[FunctionCall] = []
    thread = threading.get_ident()

    def recording(function: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = _takes_context(function)

        def recording_forward(*args: Any) -> Any:
            if threading.get_ident() == thread:
                arguments = args[1:] if takes_context else args
                calls.append(FunctionCall(function, tuple(map(_copy, arguments)), module_call()))
            return forward(*args)

        return recording_forward

    with _one_at_a_time:
        before = {function: function.__dict__.get("forward") for function in functions}
        try:
            for function in functions:
                wrapped = staticmethod(recording(function, function.forward))
                setattr(function, "forward", wrapped)  # noqa: B010  mypy refuses an assignment to a method
            yield calls
        finally:
            for function, own in before.items():
                if own is None:
                    del function.forward
                else:
                    setattr(function, "forward", own)  # noqa: B010


def check_backward(call: FunctionCall) -> Checked:
    """Compare the backward of one call with central differences of its forward.

    It is WRONG where they differ by more than 1e-4 of their size along some direction. A straight-through estimator or
    a gradient reversal is wrong in this sense, on purpose. A fault in a few of very many elements, or one that shows
    in float32 alone, can pass.
    """
    about = (call.function.__name__, *call.module_call)
    try:
        status, backward, differences, reason = _compare(call)
    except Exception as error:
        return Checked(*about, UNCHECKED, reason=f"it does not run alone in float64 ({one_line(error)})")
    return Checked(*about, status, backward, differences, reason)


def _compare(call: FunctionCall) -> tuple[str, float, float, str]:
    nan = float("nan")
    points = {
        i: argument.detach().double()
        for i, argument in enumerate(call.arguments)
        if isinstance(argument, Tensor) and argument.is_floating_point()
    }
    differentiable = [i for i in points if call.arguments[i].requires_grad]
    generator = torch.Generator().manual_seed(0)
    leaves = {i: point.clone().requires_grad_(i in differentiable) for i, point in points.items()}
    outputs = _run(call, {i: leaf.clone() for i, leaf in leaves.items()})
    if any(output.dtype != torch.float64 for output in outputs):
        return UNCHECKED, nan, nan, "its forward does not keep float64"
    weights = [_random_like(output, generator) for output in outputs]
    inputs = [leaves[i] for i in differentiable]
    gradients = torch.autograd.grad(
        outputs, inputs, weights, allow_unused=True, materialize_grads=True, retain_graph=True
    )

    def score(moved: dict[int, Tensor]) -> float:
        with torch.enable_grad():  # `_run` keeps only the outputs that require a gradient
            return sum(float((w * o.detach()).sum()) for w, o in zip(weights, _run(call, moved), strict=True))

    if score(points) != score(points):
        return UNCHECKED, nan, nan, "its forward gives other values, or NaN, each time it runs"
    size = sum(float((w * o.detach()).abs().sum()) for w, o in zip(weights, outputs, strict=True))
    worst: tuple[float, str, float, float, str] | None = None
    for i, gradient in zip(differentiable, gradients, strict=True):
        for _ in range(DIRECTIONS):
            direction = _random_like(points[i], generator)
            by_backward = float((gradient * direction).sum())
            wide, narrow = (_slope(score, points, i, direction, step) for step in (2, 1))
            scale = max(float((gradient * direction).norm()), abs(by_backward), abs(narrow))
            noise = 1e-15 * size / STEP
            if not abs(wide - narrow) <= 0.1 * TOLERANCE * scale + noise:
                continue  # there is a kink or a jump between; other directions may miss it
            difference, allowed = abs(by_backward - narrow), TOLERANCE * scale + noise
            excess = difference / allowed if allowed else float(difference > 0)
            status = WRONG if not excess <= 1 else CORRECT
            if worst is None or not excess <= worst[0]:
                worst = (excess, status, by_backward, narrow, _argument_name(call, i) if status == WRONG else "")
    if worst is None:
        return UNCHECKED, nan, nan, "its forward has a kink or a jump here, or rounds below float64"
    return worst[1:]


def _slope(
    score: Callable[[dict[int, Tensor]], float], points: dict[int, Tensor], i: int, direction: Tensor, factor: int
) -> float:
    """Return the central difference of the score when argument `i` moves along a direction."""
    step = factor * STEP * max(1.0, float(points[i].abs().amax()))
    above, below = (score({**points, i: points[i] + sign * step * direction}) for sign in (1, -1))
    return (above - below) / (2 * step)


def _run(call: FunctionCall, moved: dict[int, Tensor]) -> list[Tensor]:
    """Apply the function to its arguments, some of them moved; return the outputs that require a gradient."""
    copies = {
        i: t if t.requires_grad else t.clone().requires_grad_(call.arguments[i].requires_grad).clone()
        for i, t in moved.items()
    }
    arguments = (copies[i] if i in copies else _copy(a) for i, a in enumerate(call.arguments))
    outputs = tree_leaves(call.function.apply(*arguments))
    return [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]


def _copy(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def _random_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)


def _argument_name(call: FunctionCall, i: int) -> str:
    """Name an argument as `forward` does."""
    names = list(inspect.signature(call.function.forward).parameters)
    if _takes_context(call.function):
        names = names[1:]
    return f"argument {names[i] if i < len(names) else i}"


def _takes_context(function: Any) -> bool:
    """Whether `forward` takes `ctx` first, and no `setup_context` does so in its place."""
    return function.setup_context is torch.autograd.Function.setup_context
