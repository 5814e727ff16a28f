"""How a rule gets at the activations of one forward pass; the default way rewires the autograd graph itself."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, final

import torch
from torch.autograd.graph import Node

from ...errors import RuleError
from ...rules import Rule, guided, relu
from ..base import Met, Request
from .calls import eager, overwrites_a_view
from .nodes import SMOOTH, Kind, hidden_reason, name_of, walk

relu.register(torch.Tensor, torch.relu)

WANTED = {"relu-like": frozenset((Kind.RELU,)), "all": frozenset((Kind.RELU, Kind.SMOOTH))}


class Way(ABC):
    """One way for a rule to act on the activations of one call; entered before the forward pass."""

    network: Callable[..., Any]

    def __init__(self, request: Request) -> None:
        self.request = request
        self.met = Met()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def acts_on(self, node: Node, kind: Kind) -> bool:
        """Whether the rule acts on this node; where the way has yet to see to that, it does so now."""

    def met_all(self) -> None:  # noqa: B027  a way that can miss nothing has nothing to add
        """Look back when every node has been met."""

    def visit(self, nodes: Collection[tuple[Node, Kind]]) -> None:
        """Meet the nodes on the way from the scores to the inputs.

        Raises:
            RuleError: a node that cannot be seen into, an activation that this way missed, or nothing to rewire.
        """
        for node, kind in nodes:
            if kind is Kind.HIDDEN:
                raise RuleError(
                    f"rule {self.request.rule_name!r} cannot see into {name_of(node)}: {hidden_reason(node)}"
                )
        for node, kind in nodes:
            if kind is Kind.SWITCH:
                self.met.switches += 1
            elif self.acts_on(node, kind):
                self.met.rewired += 1
            else:
                seen = self.met.opaque if kind is Kind.OPAQUE else self.met.skipped
                seen[name_of(node)] = seen.get(name_of(node), 0) + 1
        self.met_all()
        if not self.met.rewired:
            raise RuleError(self._nothing_rewired())

    def _nothing_rewired(self) -> str:
        met = {**self.met.skipped, **self.met.opaque}
        listed = ", ".join(f"{name} x{count}" for name, count in sorted(met.items())) or "none"
        smooth = self.request.activations != "all" and any(name.startswith(SMOOTH) for name in met)
        remedies = ["activations='all' takes the smooth ones too"] if smooth else []
        remedies += ["no rule reaches into a user's own autograd.Function"] if self.met.opaque else []
        remedies += ["rule='gradient' needs none"]
        return (
            f"rule {self.request.rule_name!r} found no activation to rewire between the input and the scores "
            f"(met: {listed}); {'; '.join(remedies)}"
        )


@contextmanager
def visited(root: Node, way: Way) -> Iterator[None]:
    """Let `way` meet the nodes behind `root` that the backward passes run inside this context go through.

    Only the engine knows which nodes lead to the inputs that a gradient is asked for, and it knows when the first
    backward starts. Nodes that lead to the inputs of a call were made by that call: other threads, and graphs that
    outlive the call, are never touched.
    """
    nodes = list(walk(root))
    views = {node for node, kind in nodes if kind is Kind.HIDDEN and name_of(node) == "CopySlices"}
    if views and not overwrites_a_view(way.network, way.request):
        nodes = [(node, kind) for node, kind in nodes if node not in views]
    will_execute = torch._C._will_engine_execute_node
    waiting = True

    def start(_: Sequence[torch.Tensor]) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            way.visit([(node, kind) for node, kind in nodes if will_execute(node)])

    handle = root.register_prehook(start)
    try:
        yield
    finally:
        handle.remove()
        nodes.clear()


def _positive_part(g: torch.Tensor | None) -> torch.Tensor | None:
    return None if g is None else torch.relu(g)


# Rules of the form local(f(g)): f before the node's own backward is all there is to them, and costs half of the
# general hook. The tests hold each of them to the general one.
_BEFORE_LOCAL: dict[Rule, Callable[[torch.Tensor | None], torch.Tensor | None]] = {guided: _positive_part}


@final
class ThroughGraph(Way):
    """Hook the activations' own nodes: whatever was called, in whatever spelling, in place or not."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.network = eager(request.model)
        self._handles: list[Any] = []
        self._shared: torch.Tensor | None = None  # its dictionary of hooks serves all nodes, and empties at once
        before = _BEFORE_LOCAL.get(request.rule)
        if before is not None:
            self._shared = torch.empty(0, requires_grad=True)
            self._shared._backward_hooks = OrderedDict({0: before})

    def __exit__(self, *_: object) -> None:
        if self._shared is not None and self._shared._backward_hooks is not None:
            self._shared._backward_hooks.clear()
        for handle in self._handles:  # a hook that knows its node would keep both alive for ever
            handle.remove()

    def acts_on(self, node: Any, kind: Kind) -> bool:
        """Hook the node where it is wanted."""
        if kind not in WANTED[self.request.activations]:
            return False
        if self._shared is not None:
            node._register_hook_dict(self._shared)
        else:
            around = _Around(node, self.request.rule)
            self._handles += [node.register_prehook(around.before), node.register_hook(around.after)]
        return True


class _Asked(BaseException):
    """Carries what a rule gave to `local` out of the rule; no `except Exception` of a user's stops it."""

    def __init__(self, h: torch.Tensor) -> None:
        self.h = h


class _Around:
    """The rule at one node, as two hooks around the node's own backward.

    What a node saved may be readable only once (checkpointing). So the rule runs before the node until it asks for
    `local(h)`, the engine itself runs the node on that `h`, and afterwards the rule runs again with the answer.
    """

    def __init__(self, node: Any, rule: Rule) -> None:
        self._node = node
        self._rule = rule
        self._place = next(i for i, (behind, _) in enumerate(node.next_functions) if behind is not None)
        self._g: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def before(self, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        g = self._g = grad_outputs[0]
        self._result = None
        if g is None:
            return None

        def ask(h: torch.Tensor) -> torch.Tensor:
            raise _Asked(checked(self._rule, "gave local", h, g))

        try:
            self._result = ruled(self._rule, g, ask)
        except _Asked as asked:
            return (asked.h, *grad_outputs[1:])
        return None

    def after(self, grad_inputs: tuple[Any, ...], _: tuple[Any, ...]) -> tuple[Any, ...] | None:
        g, result, own = self._g, self._result, grad_inputs[self._place]
        self._g = self._result = None
        if g is None or own is None:
            return None
        if result is None:
            answers = [own]

            def local(h: torch.Tensor) -> torch.Tensor:
                return answers.pop() if answers else self._local(h)

            result = ruled(self._rule, g, local)
        return (*grad_inputs[: self._place], result, *grad_inputs[self._place + 1 :])

    def _local(self, h: torch.Tensor) -> torch.Tensor:
        try:
            given = self._node(h)
        except RuntimeError as error:
            name = getattr(self._rule, "__name__", type(self._rule).__name__)
            raise RuleError(
                f"rule {name!r} calls local more than once, and {name_of(self._node)} can be asked once only "
                "(checkpointed?); switch checkpointing off"
            ) from error
        return given[self._place] if isinstance(given, tuple) else given  # type: ignore[no-any-return]


def ruled(rule: Rule, g: torch.Tensor, local: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `rule(g, local)`.

    Raises:
        RuleError: the rule gave no tensor of the shape and dtype of `g`.
    """
    return checked(rule, "returned", rule(g, local), g)


def checked(rule: Rule, did: str, new: Any, g: torch.Tensor) -> torch.Tensor:
    """Return a tensor that a rule made of the gradient `g`.

    Raises:
        RuleError: it is no tensor of the shape and dtype of `g`.
    """
    if isinstance(new, torch.Tensor) and new.shape == g.shape and new.dtype == g.dtype:
        return new
    what = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, torch.Tensor) else f"a {type(new).__name__}"
    name = getattr(rule, "__name__", type(rule).__name__)
    raise RuleError(f"rule {name!r} {did} {what} where the gradient is {tuple(g.shape)} {g.dtype}")
