"""Attachment of a rule to the activations of one call; by default, to the nodes of its autograd graph."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, final

import torch
from torch.autograd.graph import Node

from ....errors import RuleError
from ....rules import Rule, guided, relu
from ...base import Request
from ...results import RewiringStats
from ..calls import eager, overwrites_a_view
from ..internals import SharedPrehook, will_execute
from ..nodes import SMOOTH, NodeKind, hidden_reason, name_of, nodes_behind

relu.register(torch.Tensor, torch.relu)

WANTED = {"relu-like": frozenset((NodeKind.RELU,)), "all": frozenset((NodeKind.RELU, NodeKind.SMOOTH))}


class RuleAttachment(ABC):
    """Attaches a rule to the activations of one call; entered before the forward pass.

    Attributes:
        network: what to call in place of the model.
        stats: counts of the activations that the rule met.
    """

    network: Callable[..., Any]

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stats = RewiringStats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def attach(self, node: Node, kind: NodeKind) -> bool:
        """Make the rule act on a node; return whether it does."""

    def refuse_missed(self) -> None:  # noqa: B027  an attachment that misses nothing has nothing to refuse
        """Raise RuleError for activations that the rule should have acted on and did not."""

    def attach_all(self, nodes: Collection[tuple[Node, NodeKind]]) -> None:
        """Attach the rule to the nodes between the scores and the inputs.

        Raises:
            RuleError: a node that cannot be seen into, a missed activation, or nothing to rewire.
        """
        for node, kind in nodes:
            if kind is NodeKind.HIDDEN:
                raise RuleError(
                    f"rule {self.request.rule_name!r} cannot see into {name_of(node)}: {hidden_reason(node)}"
                )
        for node, kind in nodes:
            if kind is NodeKind.SWITCH:
                self.stats.switches += 1
            elif self.attach(node, kind):
                self.stats.rewired += 1
            else:
                counts = self.stats.opaque if kind is NodeKind.OPAQUE else self.stats.skipped
                counts[name_of(node)] = counts.get(name_of(node), 0) + 1
        self.refuse_missed()
        if not self.stats.rewired:
            raise RuleError(self._nothing_rewired())

    def _nothing_rewired(self) -> str:
        counts = {**self.stats.skipped, **self.stats.opaque}
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(counts.items())) or "none"
        has_smooth = self.request.activations != "all" and any(name.startswith(SMOOTH) for name in counts)
        remedies = ["activations='all' takes the smooth ones too"] if has_smooth else []
        remedies += ["no rule reaches into a user's own autograd.Function"] if self.stats.opaque else []
        remedies += ["rule='gradient' needs none"]
        return (
            f"rule {self.request.rule_name!r} found no activation to rewire between the input and the scores "
            f"(met: {listed}); {'; '.join(remedies)}"
        )


@contextmanager
def rewired_backward(root: Node, attachment: RuleAttachment) -> Iterator[None]:
    """Attach a rule to the nodes behind `root` that the backward passes inside this context run.

    Only the engine knows which nodes lead to the inputs that a gradient is asked for, and only once the first backward
    pass has started. Nodes that lead to the inputs of a call were created by that call: other threads, and graphs that
    outlive the call, are not affected.
    """
    nodes = list(nodes_behind(root))
    views = {node for node, kind in nodes if kind is NodeKind.HIDDEN and name_of(node) == "CopySlices"}
    if views and not _overwrites_a_view(attachment):
        nodes = [(node, kind) for node, kind in nodes if node not in views]
    attached = False

    def attach_once(_: Sequence[torch.Tensor]) -> None:
        nonlocal attached
        if not attached:
            attached = True
            attachment.attach_all([(node, kind) for node, kind in nodes if will_execute(node)])

    handle = root.register_prehook(attach_once)
    try:
        yield
    finally:
        handle.remove()
        nodes.clear()


def _overwrites_a_view(attachment: RuleAttachment) -> bool:
    request = attachment.request
    return overwrites_a_view(request.bind(attachment.network), request.inputs, request.is_plain)


def _positive_part(g: torch.Tensor | None) -> torch.Tensor | None:
    return None if g is None else torch.relu(g)


# A rule local(f(g)) needs only f before the node's own backward, at half the cost of `RuleHooks`. The tests compare
# each with `RuleHooks`.
_BEFORE_LOCAL: dict[Rule, Callable[[torch.Tensor | None], torch.Tensor | None]] = {guided: _positive_part}


@final
class ThroughGraph(RuleAttachment):
    """Hooks the activations' graph nodes: those of modules, functions and methods, in place or not."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.network = eager(request.model)
        self._handles: list[Any] = []
        before = _BEFORE_LOCAL.get(request.rule)
        self._shared = None if before is None else SharedPrehook(before)

    def __exit__(self, *_: object) -> None:
        if self._shared is not None:
            self._shared.clear()
        for handle in self._handles:  # a hook that refers to its node would keep both alive for ever
            handle.remove()

    def attach(self, node: Any, kind: NodeKind) -> bool:
        """Hook the node where its kind is wanted."""
        if kind not in WANTED[self.request.activations]:
            return False
        if self._shared is not None:
            self._shared.attach(node)
        else:
            hooks = RuleHooks(node, self.request.rule)
            self._handles += [node.register_prehook(hooks.before), node.register_hook(hooks.after)]
        return True


class LocalRequested(BaseException):
    """Carries the argument of `local` out of a rule; a user's `except Exception` does not stop it."""

    def __init__(self, h: torch.Tensor) -> None:
        self.h = h


class RuleHooks:
    """A rule at one node, as two hooks around the node's own backward.

    A node's saved tensors may be readable only once (checkpointing). So the rule runs before the node until it calls
    `local(h)`, the engine runs the node on that `h`, and then the rule runs again, where `local` returns the result.
    """

    def __init__(self, node: Any, rule: Rule) -> None:
        self._node = node
        self._rule = rule
        self._input = next(i for i, (behind, _) in enumerate(node.next_functions) if behind is not None)
        self._g: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def before(self, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Run the rule until it calls `local`, whose argument becomes the node's gradient."""
        g = self._g = grad_outputs[0]
        self._result = None
        if g is None:
            return None

        def request(h: torch.Tensor) -> torch.Tensor:
            raise LocalRequested(require_like(self._rule, "gave local", h, g))

        try:
            self._result = apply_rule(self._rule, g, request)
        except LocalRequested as requested:
            return (requested.h, *grad_outputs[1:])
        return None

    def after(self, grad_inputs: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Run the rule again, where `local` returns what the node computed; return the rule's result."""
        g, result, own = self._g, self._result, grad_inputs[self._input]
        self._g = self._result = None
        if g is None or own is None:
            return None
        if result is None:
            computed = [own]  # for the first call of `local`, whose argument the node was run on

            def local(h: torch.Tensor) -> torch.Tensor:
                return computed.pop() if computed else self._local(h)

            result = apply_rule(self._rule, g, local)
        return (*grad_inputs[: self._input], result, *grad_inputs[self._input + 1 :])

    def _local(self, h: torch.Tensor) -> torch.Tensor:
        try:
            gradients = self._node(h)
        except RuntimeError as error:
            name = getattr(self._rule, "__name__", type(self._rule).__name__)
            raise RuleError(
                f"rule {name!r} calls local more than once, and {name_of(self._node)} can be run once only "
                "(checkpointed?); switch checkpointing off"
            ) from error
        return gradients[self._input] if isinstance(gradients, tuple) else gradients  # type: ignore[no-any-return]


def apply_rule(rule: Rule, g: torch.Tensor, local: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `rule(g, local)`.

    Raises:
        RuleError: the rule gave no tensor of the shape and dtype of `g`.
    """
    return require_like(rule, "returned", rule(g, local), g)


def require_like(rule: Rule, verb: str, new: Any, g: torch.Tensor) -> torch.Tensor:
    """Return what a rule computed from the gradient `g`; the verb says in a message what the rule did with it.

    Raises:
        RuleError: it is no tensor of the shape and dtype of `g`.
    """
    if isinstance(new, torch.Tensor) and new.shape == g.shape and new.dtype == g.dtype:
        return new
    given = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, torch.Tensor) else f"a {type(new).__name__}"
    name = getattr(rule, "__name__", type(rule).__name__)
    raise RuleError(f"rule {name!r} {verb} {given} where the gradient is {tuple(g.shape)} {g.dtype}")
