"""The autograd graph of one pass, gathered into blocks: one for each module call at some depth of nesting.

Autograd numbers its nodes in the order in which a thread creates them, so the numbers at a module call's begin and end
tell which nodes the call created. An operation outside the modules at this depth is a block of its own where it reads
several blocks or several read it; else it belongs to the block that reads it.
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
from ..calls import leaves_and_copies, run
from ..internals import next_sequence_number, sequence_number
from ..nodes import HIDDEN, hidden_reason, name_of
from ..record.sites import network
from ..state import unchanged
from ..submodules import named_modules
from ..targets import target_scores
from .module_calls import hookable_modules

NodeOutput = tuple[Any, int]  # a graph node and the index of one of its outputs, which together name a tensor


@dataclass(eq=False)
class Span:
    """One module call, and the sequence numbers from `begin` to before `end` of the graph nodes that it created."""

    module: str
    call: int
    kind: str
    depth: int
    begin: int
    end: int = 0
    has_inner: bool = False


@dataclass(eq=False)
class NodeGroup:
    """The nodes of one block. Without a span and a name it is a single operation outside all module calls."""

    kind: str
    span: Span | None = None
    name: str = ""
    nodes: list[Any] = field(default_factory=list)

    @property
    def is_operation(self) -> bool:
        """Whether it is no module call, no input and not the objective."""
        return self.span is None and not self.name

    @property
    def newest(self) -> int:
        """The sequence number of its newest node."""
        return max(sequence_number(node) for node in self.nodes)


def block_graph(model: Any, inputs: tuple[Any, ...], depth: int, target: Any) -> BlockGraph:
    """Run a network once; return the blocks on its gradient's way, and what each edge between them carries.

    Raises:
        InputError, ModelError, TargetError: as `undertow.derive.from_model` says.
    """
    module = network(model)
    _refuse_scripted(module)
    _, fed = leaves_and_copies(inputs)
    with unchanged(module, fed, buffers=True):
        input_nodes = {x.grad_fn: "x" if len(fed) == 1 else f"x[{i}]" for i, x in enumerate(fed) if x.requires_grad}
        with record_spans(module, depth) as spans:
            output = run(module, fed)
            forward_end = next_sequence_number()
        error = target_scores(output, target, len(fed[0]))[0].sum()
        if error.grad_fn is None:
            raise InputError("the scores depend on nothing by any gradient (detached, or made under no_grad)")
        return NodeGrouping(error, spans, input_nodes, forward_end).block_graph()


def _refuse_scripted(module: nn.Module) -> None:
    for name, submodule in named_modules(module):
        if isinstance(submodule, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is scripted or traced, and calls inside TorchScript cannot be seen; "
                "pass the Python module that was scripted"
            )


@contextmanager
def record_spans(module: nn.Module, depth: int) -> Iterator[list[Span]]:
    """Yield a list that fills with this thread's module calls down to a depth, in the order in which they begin."""
    thread, call_counts = threading.get_ident(), Counter[nn.Module]()
    spans: list[Span] = []
    open_spans: list[Span] = []

    def before(name: str, called: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread:
            return
        span = Span(name, call_counts[called], type(called).__name__, len(open_spans), next_sequence_number())
        call_counts[called] += 1
        if span.depth <= depth:
            spans.append(span)
            if open_spans:
                open_spans[-1].has_inner = True
        open_spans.append(span)

    def after(called: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            open_spans.pop().end = next_sequence_number()

    with ExitStack() as stack:
        for name, submodule in hookable_modules(module):
            stack.callback(submodule.register_forward_pre_hook(partial(before, name)).remove)
            stack.callback(submodule.register_forward_hook(after, always_call=True).remove)
        yield spans


@final
class NodeGrouping:
    """The graph nodes behind an objective, each in the group of its block.

    Args:
        error: the objective, a scalar.
        spans: the module calls of the forward pass.
        input_nodes: the inputs' names, by the nodes at which they enter the graph.
        forward_end: the first sequence number after those of the forward pass.
    """

    def __init__(self, error: Tensor, spans: Sequence[Span], input_nodes: Mapping[Any, str], forward_end: int) -> None:
        self._error = error
        self._spans = spans
        self._reserved = {END, *input_nodes.values()}
        self._innermost = [span for span in spans if not span.has_inner]
        self._begins = [span.begin for span in self._innermost]
        self._group_of_span: dict[Span, NodeGroup] = {}
        self._objective = NodeGroup("objective", name=END)
        self._group_of_node: dict[Any, NodeGroup] = {}
        self._readers: dict[Any, list[Any]] = defaultdict(list)
        self._gather(input_nodes, forward_end)
        self._drop_constants()
        while self._merge_operations():
            pass
        self._set_names()

    def block_graph(self) -> BlockGraph:
        """Run one backward pass, and return the blocks with what every edge carries."""
        sent, totals = self.sent_gradients()
        groups = sorted({*self._group_of_node.values()} - {self._objective}, key=lambda group: group.newest)
        by_edge: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        by_block: dict[str, list[Tensor]] = defaultdict(list)
        differences: dict[str, list[float]] = defaultdict(list)
        for node_output, by_reader in sent.items():
            source = self._group_of_node[node_output[0]]
            from_others = [(reader, g) for reader, g in by_reader.items() if reader is not source]
            for reader, g in from_others:
                by_edge[source.name, reader.name].append(g)
            by_block[source.name].append(sum(g for _, g in from_others))  # type: ignore[arg-type]
            difference = _relative_difference(sum(by_reader.values()), totals[node_output])
            differences[source.name].append(difference)
        order = {group.name: i for i, group in enumerate([*groups, self._objective])}
        blocks = [Block(g.name, g.kind, _norm(by_block[g.name]), max(differences[g.name], default=0.0)) for g in groups]
        edges = [Carried(*pair, _norm(gradients)) for pair, gradients in by_edge.items()]
        edges.sort(key=lambda edge: (order[edge.source], order[edge.target]))
        without_nodes = [s for s in self._innermost if s not in self._group_of_span and s.begin == s.end]
        return BlockGraph(tuple(blocks), tuple(edges), tuple(map(self._call_name, without_nodes)))

    def sent_gradients(self) -> tuple[dict[NodeOutput, dict[NodeGroup, Tensor]], dict[NodeOutput, Tensor]]:
        """Return the gradient that each group sends to each tensor of another group, and autograd's total there."""
        read_by_others = {
            (behind, i)
            for node, group in self._group_of_node.items()
            for behind, i in node.next_functions
            if behind in self._group_of_node and self._group_of_node[behind] is not group
        }
        sent: dict[NodeOutput, dict[NodeGroup, Tensor]] = {node_output: {} for node_output in read_by_others}

        def after(node: Any, grad_inputs: Sequence[Tensor | None], _: Any) -> None:
            for node_output, g in zip(node.next_functions, grad_inputs, strict=True):
                if g is not None and node_output in sent:
                    by_reader, reader = sent[node_output], self._group_of_node[node]
                    by_reader[reader] = by_reader[reader] + g if reader in by_reader else g

        readers = {reader for behind, _ in read_by_others for reader in self._readers[behind]}
        edges = [GradientEdge(*node_output) for node_output in read_by_others]
        with ExitStack() as stack:
            for reader in readers:
                stack.callback(reader.register_hook(partial(after, reader)).remove)
            gradients = torch.autograd.grad(self._error, edges, allow_unused=True) if edges else ()
        return sent, {key: g for key, g in zip(read_by_others, gradients, strict=True) if g is not None}

    def _gather(self, input_nodes: Mapping[Any, str], forward_end: int) -> None:
        """Put every node that this forward pass created, back to the inputs, into a group."""
        forward_begin = self._spans[0].begin
        stack: list[Any] = [self._error.grad_fn]
        self._group_of_node[stack[0]] = self._objective
        while stack:
            node = stack.pop()
            group = self._group_of_node[node]
            group.nodes.append(node)
            _refuse_hidden(node, group)
            if node in input_nodes:
                continue
            for behind, _ in node.next_functions:
                if behind is None or (
                    behind not in input_nodes and not forward_begin <= sequence_number(behind) < _ACCUMULATORS_BEGIN
                ):
                    continue
                self._readers[behind].append(node)
                if behind not in self._group_of_node:
                    self._group_of_node[behind] = self._choose_group(behind, input_nodes, forward_end)
                    stack.append(behind)

    def _choose_group(self, node: Any, input_nodes: Mapping[Any, str], forward_end: int) -> NodeGroup:
        number = sequence_number(node)
        if node in input_nodes:
            return NodeGroup("input", name=input_nodes[node])
        if number >= forward_end:
            return self._objective
        i = bisect_right(self._begins, number) - 1
        if i >= 0 and number < self._innermost[i].end:
            span = self._innermost[i]
            return self._group_of_span.setdefault(span, NodeGroup(span.kind, span))
        return NodeGroup(re.sub(r"Backward\d*$", "", name_of(node)).lower())

    def _drop_constants(self) -> None:
        """Drop the operations that depend on parameters alone."""
        dependent: set[Any] = set()
        for node in sorted(self._group_of_node, key=lambda node: sequence_number(node)):
            is_operation = self._group_of_node[node].is_operation
            if not is_operation or any(behind in dependent for behind, _ in node.next_functions):
                dependent.add(node)
        self._group_of_node = {node: group for node, group in self._group_of_node.items() if node in dependent}
        self._readers = {node: [r for r in readers if r in dependent] for node, readers in self._readers.items()}

    def _merge_operations(self) -> bool:
        """Merge each operation that reads one group and has one reader into its reader; say whether there was any."""
        group_of = self._group_of_node
        operations = {group for group in group_of.values() if group.is_operation}
        merged = False
        for operation in sorted(operations, key=lambda group: -group.newest):
            nodes = operation.nodes
            reads = {group_of[b] for node in nodes for b, _ in node.next_functions if b in group_of} - {operation}
            readers = {group_of[reader] for node in nodes for reader in self._readers[node]} - {operation}
            if len(reads) == 1 and len(readers) == 1:
                (reader,) = readers
                reader.nodes += nodes
                group_of.update(dict.fromkeys(nodes, reader))
                merged = True
        return merged

    def _set_names(self) -> None:
        """Name the calls after their modules, and the operations after the innermost call around them."""
        groups = sorted({*self._group_of_node.values()}, key=lambda group: group.newest)
        for group in groups:
            if group.span is not None:
                group.name = self._call_name(group.span)
        operations = [(group, self._operation_name(group)) for group in groups if group.is_operation]
        taken = {group.name for group in groups} | {span.module for span in self._spans}
        totals, counts = Counter(name for _, name in operations), Counter[str]()
        for group, name in operations:
            group.name = f"{name}#{counts[name]}" if totals[name] > 1 or name in taken else name
            counts[name] += 1

    def _call_name(self, span: Span) -> str:
        is_reused = sum(other.module == span.module for other in self._innermost) > 1
        name = span.module or "(model)"
        return f"{name}#{span.call}" if is_reused or name in self._reserved else name

    def _operation_name(self, group: NodeGroup) -> str:
        around = [span for span in self._spans if span.begin <= group.newest < span.end]
        module = max(around, key=lambda span: span.depth).module
        return f"{module}.{group.kind}" if module else group.kind


_ACCUMULATORS_BEGIN = 1 << 62  # the nodes that accumulate parameters' gradients have numbers above
_BACKWARD_ONLY = ("Checkpoint",)  # reentrant: it can be differentiated by .backward() alone


def _refuse_hidden(node: Any, group: NodeGroup) -> None:
    """Refuse a node that may hold several blocks, or a part of one."""
    name = name_of(node)
    hidden = [part for part in HIDDEN if part in name and part not in ("CopySlices", "CudnnRnn")]
    if hidden and (group.is_operation or hidden[0] in _BACKWARD_ONLY):
        raise ModelError(f"the blocks cannot be told apart at {name}: {hidden_reason(node)}")


def _norm(gradients: Sequence[Any]) -> float:
    return float(sum(float(g.detach().abs().double().pow(2).sum()) for g in gradients) ** 0.5)


def _relative_difference(ours: Any, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value expected."""
    return float((ours - expected).abs().max() / (expected.abs().max() or 1.0)) if expected.numel() else 0.0
