"""Attachment of a rule to the operations of one call; by default, to the nodes of its autograd graph."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self, cast, final

import torch
from torch.autograd.graph import Node

from ....errors import RuleError
from ....lrp import EPSILON, stabilized
from ....rules import guided, halve, identity, relu
from ....tables import FIRST, Rule
from ...base import Request
from ...results import RewiringStats
from ..calls import eager, overwrites_a_view
from ..internals import SharedPrehook, will_execute
from ..nodes import SMOOTH, NodeKind, all_nodes_behind, hidden_reason, name_of, nodes_behind
from .expansion import write_out
from .folding import in_entrys_order, in_layers_order
from .kinds import stem
from .notes import ForwardNotes
from .operations import NodeOperation
from .recognition import is_layer, listed, recognize
from .relevance import first_layers
from .rule_hooks import RuleHooks

relu.register(torch.Tensor, torch.relu)


@stabilized.register
def _(z: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    return torch.where(z < 0, z - epsilon, z + epsilon)


WANTED = {"relu-like": frozenset((NodeKind.RELU,)), "all": frozenset((NodeKind.RELU, NodeKind.SMOOTH))}


class RuleAttachment(ABC):
    """Attaches a rule to the activations of one call; entered before the forward pass.

    Attributes:
        network: what to call in place of the model.
        stats: counts of the activations that the rule met.
        reads_every_node: it is given all nodes on the way, by `attach_operations`.
    """

    network: Callable[..., Any]
    reads_every_node = False

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stats = RewiringStats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def forward(self) -> AbstractContextManager[Any]:
        """Return what the forward pass runs in."""
        return nullcontext()

    @abstractmethod
    def attach(self, node: Node, kind: NodeKind) -> bool:
        """Make the rule act on a node; return whether it does."""

    def refuse_missed(self) -> None:  # noqa: B027  an attachment that misses nothing has nothing to refuse
        """Raise RuleError for activations that the rule should have acted on and did not."""

    def attach_operations(self, nodes: Collection[Any]) -> None:  # noqa: B027  most act on activations alone
        """Attach the rule to operations of any kind among all nodes on the way."""

    def attach_all(self, nodes: Collection[tuple[Node, NodeKind]]) -> None:
        """Attach the rule to the nodes between the scores and the inputs.

        Raises:
            RuleError: a node that cannot be seen into, a missed activation, or nothing to rewire.
        """
        self.refuse_hidden(nodes)
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

    def refuse_hidden(self, nodes: Collection[tuple[Node, NodeKind]]) -> None:
        """Raise RuleError for a node that cannot be seen into."""
        for node, kind in nodes:
            if kind is NodeKind.HIDDEN:
                raise RuleError(
                    f"rule {self.request.rule_name!r} cannot see into {name_of(node)}: {hidden_reason(node)}"
                )

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
    everything = [n for n in all_nodes_behind(root) if n.next_functions] if attachment.reads_every_node else []
    views = {node for node, kind in nodes if kind is NodeKind.HIDDEN and name_of(node) == "CopySlices"}
    if views and not _overwrites_a_view(attachment):
        nodes = [(node, kind) for node, kind in nodes if node not in views]
    attached = False

    def attach_once(_: Sequence[torch.Tensor]) -> None:
        nonlocal attached
        if not attached:
            attached = True
            attachment.attach_all([(node, kind) for node, kind in nodes if will_execute(node)])
            attachment.attach_operations([node for node in everything if will_execute(node)])

    handle = root.register_prehook(attach_once)
    try:
        yield
    finally:
        handle.remove()
        nodes.clear()
        everything.clear()


def _overwrites_a_view(attachment: RuleAttachment) -> bool:
    request = attachment.request
    return overwrites_a_view(request.bind(attachment.network), request.inputs, request.is_plain)


def _positive_part(g: torch.Tensor | None) -> torch.Tensor | None:
    return None if g is None else torch.relu(g)


def _half(g: torch.Tensor | None) -> torch.Tensor | None:
    return None if g is None else g / 2


def _pass_relevance(g: torch.Tensor, local: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return g


def _conjugate(parts: Any) -> Any:
    """Return a gradient conjugated, or each of several; a real one is itself."""
    if isinstance(parts, torch.Tensor):
        return parts.conj().resolve_conj()
    return parts if parts is None else tuple(_conjugate(part) for part in parts)


def _read_kinds(table: Rule) -> set[str]:
    """Return the kinds whose operands the rows read; f(x) / x of a ReLU is its derivative, for which x is not read."""
    return {kind for kind, row in table.rows.items() if kind != "relu" or row is not identity}


def _relevance_of(row: Any) -> Any:
    """Return the row of a first layer that gives relevance, of one that gives relevance by value."""

    def relevance(g: torch.Tensor, local: Callable[[torch.Tensor], Any], op: NodeOperation) -> Any:
        return op.input * row(g, local, op)

    return relevance


_RECURRENT = {"MkldnnRnnLayer": "torch.backends.mkldnn", "CudnnRnn": "torch.backends.cudnn"}

# A row local(f(g)) needs only f before the node's own backward, at half the cost of `RuleHooks`. The tests compare
# each with `RuleHooks`.
_BEFORE_LOCAL: dict[Any, Callable[[torch.Tensor | None], torch.Tensor | None]] = {guided: _positive_part, halve: _half}


@final
class ThroughGraph(RuleAttachment):
    """Hooks graph nodes: of activations, in place or not, of modules and functions; by a table, of all kinds."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.network = eager(request.model)
        self._table = request.rule if isinstance(request.rule, Rule) else None
        self._notes = None if self._table is None else ForwardNotes(_read_kinds(self._table))
        self._handles: list[Any] = []
        self._shared: dict[Any, SharedPrehook] = {}
        self.reads_every_node = self._table is not None

    def __exit__(self, *_: object) -> None:
        for shared in self._shared.values():
            shared.clear()
        for handle in self._handles:  # a hook that refers to its node would keep both alive for ever
            handle.remove()
        if self._notes is not None:
            self._notes.clear()

    def forward(self) -> AbstractContextManager[Any]:
        """Note what a table's rows need and nodes do not save."""
        return nullcontext() if self._notes is None else self._notes

    def attach(self, node: Any, kind: NodeKind) -> bool:
        """Hook the node where its kind is wanted."""
        if kind not in WANTED[self.request.activations]:
            return False
        rule: Any = self.request.rule
        if rule in _BEFORE_LOCAL:
            self._share(node, rule)
        else:
            i = next(i for i, (behind, _) in enumerate(node.next_functions) if behind is not None)
            self._hook(RuleHooks(node, (((node, i),),), rule))
        return True

    def attach_all(self, nodes: Collection[tuple[Node, NodeKind]]) -> None:
        """Attach a rule for activations; of a table, only refuse what cannot be seen into."""
        if self._table is None:
            super().attach_all(nodes)
            return
        self.refuse_hidden(nodes)
        self.stats.switches = sum(kind is NodeKind.SWITCH for _, kind in nodes)

    def attach_operations(self, nodes: Collection[Any]) -> None:
        """Attach a table to the operations among all nodes on the way.

        Raises:
            RuleError: the table needs to know every operation, and one is none that is known; or there is none at all.
        """
        table, notes = self._table, self._notes
        if table is None or notes is None:
            return
        found = recognize(nodes, table.rows, notes, table.rows.get("relu") is identity)
        self.stats.skipped, self.stats.opaque = dict(listed(found.unknown)), dict(listed(found.opaque))
        for node in found.unknown:
            if stem(node) in _RECURRENT:
                raise RuleError(
                    f"rule {table.name!r} cannot see into {name_of(node)}: a recurrent layer holds its gates inside "
                    f"one node; run it under {_RECURRENT[stem(node)]}.flags(enabled=False)"
                )
        if table.strict and (found.unknown or found.opaque):
            names = ", ".join(f"{name} x{n}" for name, n in {**self.stats.skipped, **self.stats.opaque}.items())
            raise RuleError(
                f"rule {table.name!r} has no row for {names} on the way; rule='attnlrp' passes what it does not know"
            )
        first, passing = set[Any](), set[Any]()
        if table.values == "relevance" and not self.request.is_inside:
            first, passing = first_layers(nodes, found.operations)
        for node in passing:
            i = next(i for i, (behind, _) in enumerate(node.next_functions) if behind is not None)
            self._hook(RuleHooks(node, (((node, i),),), _pass_relevance))
        for operation in found.fused:
            self._hook(RuleHooks(operation.entry, operation.operands, self._apart(operation), name=table.name))
        self.stats.rewired += len(found.fused)
        for operation in found.operations:
            if operation.entry in passing:
                continue
            row = table.rows[operation.kind]
            if is_layer(operation) and operation.layer in first:
                row = table.rows.get(FIRST, _relevance_of(row))
            self._attach_operation(operation, row)
            self.stats.rewired += 1
        if not self.stats.rewired:
            met = ", ".join(f"{name} x{n}" for name, n in {**self.stats.skipped, **self.stats.opaque}.items())
            raise RuleError(
                f"rule {table.name!r} found no operation of its kinds ({', '.join(table.rows)}) between the input and "
                f"the scores{f' (met: {met})' if met else ''}; rule='gradient' needs none"
            )

    def _attach_operation(self, operation: NodeOperation, row: Any) -> None:
        if row is identity and operation.is_proportional:
            return
        if row in _BEFORE_LOCAL:
            self._share(operation.entry, row)
            return

        def rule(g: torch.Tensor, local: Callable[[torch.Tensor], Any]) -> Any:
            operation.shape = g.shape
            with torch.no_grad():
                if g.is_complex() and cast(Rule, self._table).values == "difference":
                    raise RuleError(
                        f"rule {self.request.rule_name!r} compares real numbers; {operation.name} is complex"
                    )
                if g.is_complex():  # torch's gradients are conjugates: g·conj(f(x) / x)
                    return _conjugate(row(_conjugate(g), lambda h: _conjugate(local(_conjugate(h))), operation))
                if operation.is_turned:
                    return row(g.mT, lambda h: local(h.mT).mT, operation).mT
                if operation.folded is not None:
                    order = operation.folded.order
                    return row(in_layers_order(g, order), lambda h: local(in_entrys_order(h, order)), operation)
                return row(g, local, operation)

        self._hook(RuleHooks(operation.entry, operation.operands, rule, operation.inner, self.request.rule_name))

    def _apart(self, operation: NodeOperation) -> Callable[..., Any]:
        """Return the rule of a node of several operations: the table's, on a small graph of those."""
        table = cast(Rule, self._table)

        def rule(g: torch.Tensor, local: Callable[[torch.Tensor], Any]) -> Any:
            own = local(g)
            parts = dict(enumerate(own if isinstance(own, tuple) else (own,)))
            with ForwardNotes(_read_kinds(table)) as notes:
                wanted = [i for i, part in parts.items() if part is not None]
                factors, sources, y = write_out(operation.entry, wanted, operation.notes.saved.read)
            known = {node: operation.weights[i] for i, node in sources.items()}
            nodes = [node for node in all_nodes_behind(cast(Node, y.grad_fn)) if node.next_functions]
            for part in recognize(nodes, table.rows, notes, known=known).operations:
                self._attach_operation(part, table.rows[part.kind])
            parts |= zip(factors, torch.autograd.grad(y, list(factors.values()), g), strict=True)
            return parts[0] if len(parts) == 1 else tuple(parts.values())

        return rule

    def _share(self, node: Any, rule: Any) -> None:
        shared = self._shared.get(rule)
        if shared is None:
            shared = self._shared[rule] = SharedPrehook(_BEFORE_LOCAL[rule])
        shared.attach(node)

    def _hook(self, hooks: RuleHooks) -> None:
        self._handles += hooks.register()
