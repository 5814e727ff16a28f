"""The autograd graph of one pass, gathered into blocks: one for each module call at some depth of nesting.

Autograd numbers its nodes in the order in which a thread makes them, so the numbers between which a module ran tell
which nodes are its own. A step that a forward takes outside the modules at this depth is a block of its own where it
joins several others or is read by several; else it belongs to the block that reads it.
"""

import re
import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ....errors import InputError, ModelError
from ...results import END, Block, BlockGraph, Carried
from ..calls import chosen, leaves, output_of
from ..internals import next_sequence_number, sequence_number
from ..nodes import HIDDEN, hidden_reason, name_of
from ..record.sites import network
from .watch import state_restored, watched

Place = tuple[Any, int]  # a node and the number of one of its outputs: a tensor


@dataclass(eq=False)
class Span:
    """One module call, by the numbers of the nodes that it made."""

    module: str
    call: int
    kind: str
    depth: int
    begin: int
    end: int = 0
    has_inner: bool = False


@dataclass(eq=False)
class NodeGroup:
    """Nodes that make one block. Without a span and a name it is one step that a forward takes by itself."""

    kind: str
    span: Span | None = None
    name: str = ""
    nodes: list[Any] = field(default_factory=list)

    @property
    def is_step(self) -> bool:
        """Whether it is no module call, no input and not the objective."""
        return self.span is None and not self.name

    @property
    def newest(self) -> int:
        """The number of its newest node."""
        return max(sequence_number(node) for node in self.nodes)


def block_graph(model: Any, inputs: tuple[Any, ...], depth: int, target: Any) -> BlockGraph:
    """Run a network once and tell which blocks its gradient passes, and what each edge between them carries.

    Raises:
        InputError, ModelError, TargetError: as `undertow.derive.from_model` says.
    """
    module = network(model)
    _refuse_scripted(module)
    _, fed = leaves(inputs)
    with state_restored(module, fed):
        entries = {x.grad_fn: "x" if len(fed) == 1 else f"x[{i}]" for i, x in enumerate(fed) if x.requires_grad}
        with spans(module, depth) as calls:
            output = output_of(module, fed)
            finish = next_sequence_number()
        error = chosen(output, target, len(fed[0]))[0].sum()
        if error.grad_fn is None:
            raise InputError("the scores depend on nothing by any gradient (detached, or made under no_grad)")
        return Grouped(error, calls, entries, finish).block_graph()


def _refuse_scripted(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is scripted or traced, and calls inside TorchScript cannot be seen; "
                "pass the Python module that was scripted"
            )


@contextmanager
def spans(module: nn.Module, depth: int) -> Iterator[list[Span]]:
    """Give a list that fills with this thread's module calls down to this depth, in the order in which they begin."""
    thread, count = threading.get_ident(), Counter[nn.Module]()
    found: list[Span] = []
    opened: list[Span] = []

    def before(name: str, called: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread:
            return
        span = Span(name, count[called], type(called).__name__, len(opened), next_sequence_number())
        count[called] += 1
        if span.depth <= depth:
            found.append(span)
            if opened:
                opened[-1].has_inner = True
        opened.append(span)

    def after(called: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            opened.pop().end = next_sequence_number()

    with ExitStack() as stack:
        for name, part in watched(module):
            stack.callback(part.register_forward_pre_hook(partial(before, name)).remove)
            stack.callback(part.register_forward_hook(after, always_call=True).remove)
        yield found


@final
class Grouped:
    """The nodes behind an objective, each in its group.

    Args:
        error: the objective, a scalar.
        calls: every module call that was watched.
        entries: the nodes at which the inputs come in, and the inputs' names.
        finish: the first number that no node of the forward has.
    """

    def __init__(self, error: Tensor, calls: Sequence[Span], entries: Mapping[Any, str], finish: int) -> None:
        self._error = error
        self._calls = calls
        self._reserved = {END, *entries.values()}
        self._blocks = [span for span in calls if not span.has_inner]
        self._begins = [span.begin for span in self._blocks]
        self._of_span: dict[Span, NodeGroup] = {}
        self._end = NodeGroup("objective", name=END)
        self._group: dict[Any, NodeGroup] = {}
        self._readers: dict[Any, list[Any]] = defaultdict(list)
        self._gather(entries, finish)
        self._drop_constants()
        while self._merge_steps():
            pass
        self._name()

    def block_graph(self) -> BlockGraph:
        """Send the gradient back once, and tell what every edge carries."""
        sent, totals = self.sent()
        groups = sorted({*self._group.values()} - {self._end}, key=lambda group: group.newest)
        by_edge: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        by_block: dict[str, list[Tensor]] = defaultdict(list)
        differences: dict[str, list[float]] = defaultdict(list)
        for place, parts in sent.items():
            source = self._group[place[0]]
            outside = [(reader, g) for reader, g in parts.items() if reader is not source]
            for reader, g in outside:
                by_edge[source.name, reader.name].append(g)
            by_block[source.name].append(sum(g for _, g in outside))  # type: ignore[arg-type]
            differences[source.name].append(_apart(sum(parts.values()), totals[place]))
        place_of = {group.name: i for i, group in enumerate([*groups, self._end])}
        blocks = [Block(g.name, g.kind, _norm(by_block[g.name]), max(differences[g.name], default=0.0)) for g in groups]
        edges = [Carried(*pair, _norm(gradients)) for pair, gradients in by_edge.items()]
        edges.sort(key=lambda edge: (place_of[edge.source], place_of[edge.target]))
        silent = [self._called(span) for span in self._blocks if span not in self._of_span and span.begin == span.end]
        return BlockGraph(tuple(blocks), tuple(edges), tuple(silent))

    def sent(self) -> tuple[dict[Place, dict[NodeGroup, Tensor]], dict[Place, Tensor]]:
        """Return what each group sends to each tensor that leaves its group, and autograd's total there."""
        places = {
            (behind, i)
            for node, group in self._group.items()
            for behind, i in node.next_functions
            if behind in self._group and self._group[behind] is not group
        }
        sent: dict[Place, dict[NodeGroup, Tensor]] = {place: {} for place in places}

        def after(node: Any, grad_inputs: Sequence[Tensor | None], _: Any) -> None:
            for place, g in zip(node.next_functions, grad_inputs, strict=True):
                if g is not None and place in sent:
                    parts, reader = sent[place], self._group[node]
                    parts[reader] = parts[reader] + g if reader in parts else g

        readers = {reader for behind, _ in places for reader in self._readers[behind]}
        edges = [GradientEdge(*place) for place in places]
        with ExitStack() as stack:
            for reader in readers:
                stack.callback(reader.register_hook(partial(after, reader)).remove)
            found = torch.autograd.grad(self._error, edges, allow_unused=True) if edges else ()
        return sent, {place: g for place, g in zip(places, found, strict=True) if g is not None}

    def _gather(self, entries: Mapping[Any, str], finish: int) -> None:
        """Put every node that this forward made, back to the inputs, into a group."""
        begin = self._calls[0].begin
        stack: list[Any] = [self._error.grad_fn]
        self._group[stack[0]] = self._end
        while stack:
            node = stack.pop()
            group = self._group[node]
            group.nodes.append(node)
            _refuse(node, group)
            if node in entries:
                continue
            for behind, _ in node.next_functions:
                if behind is None or (behind not in entries and not begin <= sequence_number(behind) < _NEVER):
                    continue
                self._readers[behind].append(node)
                if behind not in self._group:
                    self._group[behind] = self._group_of(behind, entries, finish)
                    stack.append(behind)

    def _group_of(self, node: Any, entries: Mapping[Any, str], finish: int) -> NodeGroup:
        number = sequence_number(node)
        if node in entries:
            return NodeGroup("input", name=entries[node])
        if number >= finish:
            return self._end
        place = bisect_right(self._begins, number) - 1
        if place >= 0 and number < self._blocks[place].end:
            span = self._blocks[place]
            return self._of_span.setdefault(span, NodeGroup(span.kind, span))
        return NodeGroup(re.sub(r"Backward\d*$", "", name_of(node)).lower())

    def _drop_constants(self) -> None:
        """Forget the steps behind which there are parameters alone."""
        kept: set[Any] = set()
        for node in sorted(self._group, key=lambda node: sequence_number(node)):
            if not self._group[node].is_step or any(behind in kept for behind, _ in node.next_functions):
                kept.add(node)
        self._group = {node: group for node, group in self._group.items() if node in kept}
        self._readers = {node: [r for r in readers if r in kept] for node, readers in self._readers.items()}

    def _merge_steps(self) -> bool:
        """Give each step that reads one group and is read by one to its reader; say whether there was any."""
        steps = {group for group in self._group.values() if group.is_step}
        merged = False
        for step in sorted(steps, key=lambda group: -group.newest):
            reads = {self._group[b] for n in step.nodes for b, _ in n.next_functions if b in self._group} - {step}
            readers = {self._group[r] for n in step.nodes for r in self._readers[n]} - {step}
            if len(reads) == 1 and len(readers) == 1:
                (reader,) = readers
                reader.nodes += step.nodes
                self._group.update(dict.fromkeys(step.nodes, reader))
                merged = True
        return merged

    def _name(self) -> None:
        """Name the calls after their modules, and the steps after the call in which they were taken."""
        groups = sorted({*self._group.values()}, key=lambda group: group.newest)
        for group in groups:
            if group.span is not None:
                group.name = self._called(group.span)
        steps = [(group, self._step(group)) for group in groups if group.is_step]
        taken = {group.name for group in groups} | {span.module for span in self._calls}
        times, counts = Counter(name for _, name in steps), Counter[str]()
        for group, name in steps:
            group.name = f"{name}#{counts[name]}" if times[name] > 1 or name in taken else name
            counts[name] += 1

    def _called(self, span: Span) -> str:
        several = sum(other.module == span.module for other in self._blocks) > 1
        name = span.module or "(model)"
        return f"{name}#{span.call}" if several or name in self._reserved else name

    def _step(self, group: NodeGroup) -> str:
        around = [span for span in self._calls if span.begin <= group.newest < span.end]
        inside = max(around, key=lambda span: span.depth).module
        return f"{inside}.{group.kind}" if inside else group.kind


_NEVER = 1 << 62  # the numbers of nodes that accumulate a parameter's gradient lie above
_NOT_ALONE = ("Checkpoint",)  # refuses to be differentiated by anything but .backward()


def _refuse(node: Any, group: NodeGroup) -> None:
    """Refuse a node that holds several blocks, or parts of them, where that can be told."""
    name = name_of(node)
    hidden = [part for part in HIDDEN if part in name and part not in ("CopySlices", "CudnnRnn")]
    if hidden and (group.is_step or hidden[0] in _NOT_ALONE):
        raise ModelError(f"the blocks cannot be told apart at {name}: {hidden_reason(node)}")


def _norm(gradients: Sequence[Any]) -> float:
    return float(sum(float(g.detach().abs().double().pow(2).sum()) for g in gradients) ** 0.5)


def _apart(ours: Any, theirs: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value."""
    return float((ours - theirs).abs().max() / (theirs.abs().max() or 1.0)) if theirs.numel() else 0.0
