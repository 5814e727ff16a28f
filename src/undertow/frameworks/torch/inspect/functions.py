"""Custom autograd functions under test: is the backward of each the derivative of its forward?

The graph of a pass names the functions but does not hold their arguments. So the pass is run once more while their
`forward` notes what it is given; then each call is run alone, in float64 on copies, against central differences along
random directions.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...results import CORRECT, UNCHECKED, WRONG, Checked
from ..internals import function_class, tree_leaves
from ..nodes import NodeKind, nodes_behind

STEP, DIRECTIONS, TOLERANCE = 1e-6, 4, 1e-4  # the error of a central difference in float64 is near 1e-9
_one_at_a_time = threading.Lock()  # noting changes the class, which all threads share


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function: what it was given, copied before it ran, and the module call that it ran in."""

    function: type[torch.autograd.Function]
    arguments: tuple[Any, ...]
    place: tuple[str, int]


def custom(outputs: Sequence[Tensor]) -> list[type[torch.autograd.Function]]:
    """Return the classes of somebody's own autograd functions in the graph behind some outputs, without torch's own."""
    roots = {output.grad_fn for output in outputs if output.grad_fn is not None}
    opaque = (node for root in roots for node, kind in nodes_behind(root) if kind is NodeKind.OPAQUE)
    classes = (function_class(node) for node in opaque)
    return list(dict.fromkeys(c for c in classes if c is not None and not c.__module__.startswith("torch.")))


@contextmanager
def noted(functions: Sequence[type[torch.autograd.Function]], place: Callable[[], Any]) -> Iterator[list[FunctionCall]]:
    """Note the calls that this thread makes of some functions inside the context; `place` says in which module call."""
    calls: list[FunctionCall] = []
    me = threading.get_ident()

    def noting(function: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        own_context = function.setup_context is torch.autograd.Function.setup_context

        def noting_forward(*given: Any) -> Any:
            if threading.get_ident() == me:
                arguments = given[1:] if own_context else given
                calls.append(FunctionCall(function, tuple(map(_copied, arguments)), place()))
            return forward(*given)

        return noting_forward

    with _one_at_a_time:
        before = {function: function.__dict__.get("forward") for function in functions}
        try:
            for function in functions:
                setattr(function, "forward", staticmethod(noting(function, function.forward)))  # noqa: B010  or mypy objects
            yield calls
        finally:
            for function, own in before.items():
                if own is None:
                    del function.forward
                else:
                    setattr(function, "forward", own)  # noqa: B010


def checked(call: FunctionCall) -> Checked:
    """Hold the backward of one call to central differences of its forward.

    It is WRONG where they lie apart by more than 1e-4 of their size along some direction. A straight-through estimator
    or a gradient reversal is wrong in this sense, as it means to be. A fault in a few of very many elements, or one
    that shows in float32 alone, can pass.
    """
    function, (name, number) = call.function, call.place
    about = (function.__name__, name, number)
    try:
        status, backward, differences, reason = _held(call)
    except Exception as error:
        return Checked(*about, UNCHECKED, reason=f"it does not run alone in float64 ({' '.join(str(error).split())})")
    return Checked(*about, status, backward, differences, reason)


def _held(call: FunctionCall) -> tuple[str, float, float, str]:
    nan = float("nan")
    places = [i for i, a in enumerate(call.arguments) if isinstance(a, Tensor) and a.is_floating_point()]
    by = [i for i in places if call.arguments[i].requires_grad]
    points = {i: call.arguments[i].detach().double() for i in places}
    generator = torch.Generator().manual_seed(0)
    leaves = {i: point.clone().requires_grad_(i in by) for i, point in points.items()}
    outputs = _run(call, {i: leaf.clone() for i, leaf in leaves.items()})
    if any(output.dtype != torch.float64 for output in outputs):
        return UNCHECKED, nan, nan, "its forward does not keep float64"
    weights = [_random_like(output, generator) for output in outputs]
    found = torch.autograd.grad(
        outputs, [leaves[i] for i in by], weights, allow_unused=True, materialize_grads=True, retain_graph=True
    )

    def score(moved: dict[int, Tensor]) -> float:
        with torch.enable_grad():  # outputs that carry no gradient are told apart by that alone
            return sum(float((w * o.detach()).sum()) for w, o in zip(weights, _run(call, moved), strict=True))

    if score(points) != score(points):
        return UNCHECKED, nan, nan, "its forward gives other values, or NaN, each time it runs"
    size = sum(float((w * o.detach()).abs().sum()) for w, o in zip(weights, outputs, strict=True))
    worst: tuple[float, str, float, float, str] | None = None
    for i, gradient in zip(by, found, strict=True):
        for _ in range(DIRECTIONS):
            way = _random_like(points[i], generator)
            ours = float((gradient * way).sum())
            wide, narrow = (_slope(score, points, i, way, points[i].abs().amax(), step) for step in (2, 1))
            scale = max(float((gradient * way).norm()), abs(ours), abs(narrow))
            noise = 1e-15 * size / STEP
            if not abs(wide - narrow) <= 0.1 * TOLERANCE * scale + noise:
                continue  # a kink or a jump lies between; other directions may miss it
            apart, allowed = abs(ours - narrow), TOLERANCE * scale + noise
            excess = apart / allowed if allowed else float(apart > 0)
            status = WRONG if not excess <= 1 else CORRECT
            if worst is None or not excess <= worst[0]:
                worst = (excess, status, ours, narrow, _argument(call, i) if status == WRONG else "")
    if worst is None:
        return UNCHECKED, nan, nan, "its forward has a kink or a jump here, or rounds below float64"
    return worst[1:]


def _slope(
    score: Callable[[dict[int, Tensor]], float], points: dict[int, Tensor], i: int, way: Tensor, size: Any, factor: int
) -> float:
    step = factor * STEP * max(1.0, float(size))
    above, below = (score({**points, i: points[i] + sign * step * way}) for sign in (1, -1))
    return (above - below) / (2 * step)


def _run(call: FunctionCall, moved: dict[int, Tensor]) -> list[Tensor]:
    """Apply the function to its arguments, some replaced; return the outputs that have a gradient."""
    wants = {i for i, a in enumerate(call.arguments) if isinstance(a, Tensor) and a.requires_grad}
    fresh = {i: t if t.requires_grad else t.clone().requires_grad_(i in wants).clone() for i, t in moved.items()}
    arguments = (fresh[i] if i in fresh else _copied(a) for i, a in enumerate(call.arguments))
    made = tree_leaves(call.function.apply(*arguments))
    return [output for output in made if isinstance(output, Tensor) and output.requires_grad]


def _copied(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad)


def _random_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)


def _argument(call: FunctionCall, place: int) -> str:
    """Name an argument as `forward` does."""
    names = list(inspect.signature(call.function.forward).parameters)
    if call.function.setup_context is torch.autograd.Function.setup_context:
        names = names[1:]
    return f"argument {names[place] if place < len(names) else place}"
