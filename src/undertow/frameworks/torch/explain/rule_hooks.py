"""A rule at one operation of a graph: hooks around the own backward of its node, or of its nodes."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ....errors import RuleError
from ....tables import ActivationRule
from ..internals import beside_the_engine, sequence_number
from ..nodes import name_of


class LocalRequested(BaseException):
    """Carries the argument of `local` out of a rule; a user's `except Exception` does not stop it."""

    def __init__(self, h: torch.Tensor) -> None:
        self.h = h


class RuleHooks:
    """A rule at one operation, as hooks around the own backward of its node, or of its nodes.

    A node's saved tensors may be readable only once (checkpointing). So the rule runs before the node until it calls
    `local(h)`, the engine runs the node on that `h`, and then the rule runs again, where `local` returns the result.

    Args:
        entry: the node that the gradient reaches first.
        operands: for each operand, the nodes and their inputs at which it leaves the operation; what arrives at
            several is added up, and the rule's result leaves by the last of them to run.
        inner: the operation's other nodes.
        name: the rule's, for messages.
    """

    def __init__(
        self,
        entry: Any,
        operands: Sequence[Sequence[tuple[Any, int]]],
        rule: Any,
        inner: Collection[Any] = (),
        name: str = "",
    ) -> None:
        self._entry = entry
        self._rule = rule
        self._operands = operands
        self._nodes = sorted({entry, *inner}, key=sequence_number, reverse=True)
        self._exits: dict[Any, list[tuple[int, int]]] = {}
        for operand, exits in enumerate(operands):
            for node, i in exits:
                self._exits.setdefault(node, []).append((i, operand))
        self._name = name or _name(rule)
        self._g: torch.Tensor | None = None
        self._result: Any = None
        self._own: list[torch.Tensor | None] = []
        self._left = 0

    def register(self) -> list[Any]:
        """Put the hooks on the nodes; return their handles."""
        handles = [self._entry.register_prehook(self.before)]
        return handles + [node.register_hook(self._after(slots)) for node, slots in self._exits.items()]

    def before(self, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Run the rule until it calls `local`, whose argument becomes the node's gradient."""
        g = self._g = grad_outputs[0]
        self._result = None
        self._own, self._left = [None] * len(self._operands), len(self._exits)
        if g is None:
            return None

        def request(h: torch.Tensor) -> torch.Tensor:
            raise LocalRequested(require_like(self._name, "gave local", h, g))

        try:
            self._result = self._rule(g, request)
        except LocalRequested as requested:
            return (requested.h, *grad_outputs[1:])
        return None

    def _after(self, slots: Sequence[tuple[int, int]]) -> Callable[[Any, Any], tuple[Any, ...] | None]:
        """Return the hook behind one of the nodes by which operands leave, given its inputs and their operands."""

        def after(grad_inputs: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._g is None:
                return None
            for i, operand in slots:
                own = grad_inputs[i]
                if own is not None:
                    before = self._own[operand]
                    self._own[operand] = own if before is None else before + own
            self._left -= 1
            results = [None] * len(self._operands) if self._left else self._results()
            new = list(grad_inputs)
            for i, operand in slots:
                if new[i] is not None:
                    result = results[operand]
                    new[i] = torch.zeros_like(new[i]) if result is None else result
                    results[operand] = None  # where an operand enters a node twice
            return tuple(new)

        return after

    def _results(self) -> list[Any]:
        """Run the rule again, where `local` returns what the nodes computed; return its result for each operand."""
        g, result, own = self._g, self._result, self._own
        self._g, self._result, self._own = None, None, []
        if g is None or all(part is None for part in own):
            return [None] * len(own)
        if result is None:
            computed = [own]  # for the first call of `local`, whose argument the node was run on

            def local(h: torch.Tensor) -> Any:
                parts = computed.pop() if computed else self._local(h)
                return parts[0] if len(parts) == 1 else tuple(parts)

            result = self._rule(g, local)
        given = [result] if len(own) == 1 or not isinstance(result, tuple | list) else result
        if len(given) != len(own):
            raise RuleError(
                f"rule {self._name!r} returned {len(given)} gradient(s) for the {len(own)} operands of "
                f"{name_of(self._entry)}; return one for each, as local does"
            )
        return [
            None if like is None else require_like(self._name, "returned", new, like)
            for new, like in zip(given, own, strict=True)
        ]

    def _local(self, h: torch.Tensor) -> list[torch.Tensor | None]:
        """Run the operation's own backward once more."""
        arriving = {self._entry: h}
        parts: list[torch.Tensor | None] = [None] * len(self._operands)
        reader = beside_the_engine()
        try:
            for node in self._nodes:
                with reader:
                    gradients = node(arriving.pop(node))
                gradients = gradients if isinstance(gradients, tuple) else (gradients,)
                leaving = dict(self._exits.get(node, ()))
                for i, gradient in enumerate(gradients):
                    behind = node.next_functions[i][0]
                    if gradient is None:
                        continue
                    if i in leaving:
                        before = parts[leaving[i]]
                        parts[leaving[i]] = gradient if before is None else before + gradient
                    elif behind in self._nodes:
                        arriving[behind] = arriving[behind] + gradient if behind in arriving else gradient
        except RuntimeError as error:
            raise RuleError(
                f"rule {self._name!r} calls local more than once, and {name_of(self._entry)} can be run once "
                "only (checkpointed?); switch checkpointing off"
            ) from error
        return parts


def _name(rule: Any) -> str:
    return getattr(rule, "__name__", type(rule).__name__)


def apply_rule(rule: ActivationRule, g: torch.Tensor, local: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `rule(g, local)`.

    Raises:
        RuleError: the rule gave no tensor of the shape and dtype of `g`.
    """
    return require_like(_name(rule), "returned", rule(g, local), g)


def require_like(rule: str, verb: str, new: Any, g: torch.Tensor) -> torch.Tensor:
    """Return what a rule computed from the gradient `g`; the verb says in a message what the rule did with it.

    Raises:
        RuleError: it is no tensor of the shape and dtype of `g`.
    """
    if isinstance(new, torch.Tensor) and new.shape == g.shape and new.dtype == g.dtype:
        return new
    given = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, torch.Tensor) else f"a {type(new).__name__}"
    raise RuleError(f"rule {rule!r} {verb} {given} where the gradient is {tuple(g.shape)} {g.dtype}")
