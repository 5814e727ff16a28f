"""One pass of a Keras network as a graph of blocks: one for each layer call at some depth of nesting.

The pass runs eagerly and each of its operations is seen, with the layer's call that it ran in. An operation outside the
layers at this depth is a block of its own where it reads several blocks or several read it; else it belongs to the
block that reads it. What each block sends back is computed operation by operation; the totals come of a tape.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import keras
import numpy as np
import tensorflow as tf

from ....errors import InputError, ModelError
from ....structures import tensors_with_paths
from ...keras_layers import children
from ...own_passes import own_pass
from ...results import END, Block, BlockGraph, Carried
from ..arrays import to_numpy
from ..calls import refuse_other_backends, restored, run, scores_of, tensors
from ..internals import custom_gradient_around, gradients_of_operation, operations_seen
from ..layers import named_modules
from ..record.op_graph import LayerCall, OpGraph, SeenOp, SeenTensor
from ..targets import chosen_scores
from ..watching import wrapped

_INPUT, _OBJECTIVE = "input", "objective"
_WRITTEN_BY_TENSORFLOW = ("swish_impl",)  # its operations have the gradients that it gives


@dataclass(eq=False)
class BlockCall(LayerCall):
    """One layer call at a depth of nesting, `number` among the calls of its layer."""

    number: int = 0
    depth: int = 0
    around: "BlockCall | None" = None
    has_inner: bool = False


@dataclass(eq=False)
class OpGroup:
    """The operations of one block. Without a span and a name it is a single operation outside all layer calls."""

    kind: str
    span: BlockCall | None = None
    name: str = ""
    ops: list[SeenOp] = field(default_factory=list)

    @property
    def is_operation(self) -> bool:
        """Whether it is no layer call, no input and not the objective."""
        return self.span is None and not self.name


def block_graph(model: Any, inputs: tuple[Any, ...], depth: int, target: Any) -> BlockGraph:
    """Run a network once; return the blocks on its gradient's way, and what each edge between them carries.

    Raises:
        InputError, ModelError, TargetError: as `undertow.derive.from_model` says.
    """
    refuse_other_backends()
    if not isinstance(model, keras.Layer):
        raise InputError(f"model is a {type(model).__name__}; its blocks are the calls of a keras.Model's layers")
    sources = tensors(inputs)
    with own_pass(), restored(model.variables), tf.GradientTape(persistent=True) as tape:
        tape.watch([x for x in sources if x.dtype.is_floating])
        seen = _SeenPass(model, depth, sources)
        with seen:
            output = run(model, sources, {}, training=False)
            seen.n_forward = len(seen.graph.ops)
            scores = output if callable(target) else scores_of(output)
            error = tf.reduce_sum(chosen_scores(scores, target, None, int(sources[0].shape[0])).scores)
    end = seen.graph.known(error)
    grouping = None if end is None or end.op.type == "" else _Grouping(seen, end.op)
    if grouping is None or end is None or not grouping.has_blocks:
        raise InputError("the scores depend on nothing by any gradient (tf.stop_gradient, or rounding)")
    with own_pass():
        return grouping.block_graph(end, tape.gradient)


@final
class _SeenPass:
    """The operations and layer calls of one pass in this thread.

    Attributes:
        spans: the calls down to the depth, in the order in which they began.
        inputs: the inputs' names.
        n_forward: how many operations the network made.
    """

    def __init__(self, model: Any, depth: int, sources: Sequence[Any]) -> None:
        self.graph, self.spans, self.n_forward = OpGraph(), list[BlockCall](), 0
        names = ["x"] if len(sources) == 1 else [f"x[{i}]" for i in range(len(sources))]
        self.inputs = {self.graph.tensor(x, depends=True): name for x, name in zip(sources, names, strict=True)}
        self._model, self._depth, self._thread = model, depth, threading.get_ident()
        self._calls: Counter[str] = Counter()
        self._running: list[BlockCall] = []
        self._stack = ExitStack()

    def __enter__(self) -> None:
        layers = {named.name: named.module for named in named_modules(self._model)} | {"": self._model}
        names = {id(layer): name for name, layer in reversed(layers.items())}
        with ExitStack() as stack:
            stack.enter_context(wrapped({names[id(v)]: v for v in layers.values()}, self._around))
            stack.enter_context(operations_seen(self._see))
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _around(self, name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread or not tf.executing_eagerly():
            return call(*args, **kwargs)
        span = BlockCall(name, layer, number=self._calls[name], depth=len(self._running))
        self._calls[name] += 1
        if span.depth <= self._depth:
            self.spans.append(span)
            if self._running:
                span.around = self._running[-1]
                span.around.has_inner = True
        else:
            span.around = self._running[self._depth]
        self._running.append(span)
        try:
            output = call(*args, **kwargs)
        finally:
            del self._running[self._running.index(span) :]
        for _, tensor in tensors_with_paths(output):
            if tf.is_tensor(tensor):
                self.graph.tensor(tensor)
        return output

    def _see(
        self, kind: Any, inputs: Any, attributes: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> None:
        if graph is not None or threading.get_ident() != self._thread:
            return
        text = kind.decode() if isinstance(kind, bytes) else str(kind)
        span = None
        if self._running:
            span = self._running[-1] if self._running[-1].depth <= self._depth else self._running[-1].around
        self.graph.add(text, inputs, attributes, outputs, span, custom_gradient_around())


@final
class _Grouping:
    """The operations behind an objective, each in the group of its block.

    Args:
        end: the operation that gave the objective.
    """

    def __init__(self, seen: _SeenPass, end: SeenOp) -> None:
        self._seen, self._spans = seen, seen.spans
        self._reserved = {END, *seen.inputs.values()}
        self._order = {op: i for i, op in enumerate(seen.graph.ops)}
        self._group_of_span: dict[BlockCall, OpGroup] = {}
        self._objective = OpGroup(_OBJECTIVE, name=END)
        self._group_of: dict[SeenOp, OpGroup] = {}
        self._readers: dict[SeenOp, list[SeenOp]] = defaultdict(list)
        self._gather(end)
        self._drop_constants()
        while self._merge_operations():
            pass
        self._set_names()

    def block_graph(self, end: SeenTensor, gradient: Callable[..., Sequence[Any]]) -> BlockGraph:
        """Send one gradient back, and return the blocks with what every edge carries; `gradient` is a tape's."""
        sent = self._sent(end, gradient)
        totals = gradient(end.value, [tensor.value for tensor in sent])
        by_edge: dict[tuple[str, str], list[Any]] = defaultdict(list)
        by_block: dict[str, list[Any]] = defaultdict(list)
        differences: dict[str, list[float]] = defaultdict(list)
        for (tensor, by_reader), expected in zip(sent.items(), totals, strict=True):
            source = self._group_of[tensor.op]
            for reader, g in by_reader.items():
                if reader is not source:
                    by_edge[source.name, reader.name].append(g)
            by_block[source.name].append(sum(g for reader, g in by_reader.items() if reader is not source))
            differences[source.name].append(_relative_difference(sum(by_reader.values()), expected))
        groups = sorted({*self._group_of.values()} - {self._objective}, key=self._newest)
        order = {group.name: i for i, group in enumerate([*groups, self._objective])}
        blocks = [Block(g.name, g.kind, _norm(by_block[g.name]), max(differences[g.name], default=0.0)) for g in groups]
        edges = [Carried(*pair, _norm(gradients)) for pair, gradients in by_edge.items()]
        edges.sort(key=lambda edge: (order[edge.source], order[edge.target]))
        with_ops = {op.call for op in self._seen.graph.ops}
        passed_on = [s for s in self._innermost if s not in self._group_of_span and s not in with_ops]
        return BlockGraph(tuple(blocks), tuple(edges), tuple(map(self._call_name, passed_on)))

    @property
    def has_blocks(self) -> bool:
        """Whether the objective depends on any block."""
        return any(group is not self._objective for group in self._group_of.values())

    @property
    def _innermost(self) -> list[BlockCall]:
        return [span for span in self._spans if not span.has_inner]

    def _sent(self, end: SeenTensor, gradient: Callable[..., Sequence[Any]]) -> dict[SeenTensor, dict[OpGroup, Any]]:
        """Return the gradient that each group sends to each tensor that others than its own group read."""
        at: dict[SeenTensor, Any] = {end: tf.ones_like(end.value)}
        sent: dict[SeenTensor, dict[OpGroup, Any]] = {}
        for op in sorted(self._group_of, key=lambda op: -self._order.get(op, -1)):
            if op.type == "" or not any(y in at for y in op.outputs):
                continue
            for x, g in zip(op.inputs, self._backward(op, at, gradient), strict=True):
                if g is None or x.op not in self._group_of or not x.is_float:
                    continue
                at[x] = at[x] + g if x in at else g
                by_reader, reader = sent.setdefault(x, {}), self._group_of[op]
                by_reader[reader] = by_reader[reader] + g if reader in by_reader else g
        return {x: by_reader for x, by_reader in sent.items() if any(r is not self._group_of[x.op] for r in by_reader)}

    @staticmethod
    def _backward(op: SeenOp, at: dict[SeenTensor, Any], gradient: Callable[..., Sequence[Any]]) -> list[Any]:
        inputs, outputs = [x.value for x in op.inputs], [y.value for y in op.outputs]
        gs = [at[y] if y in at else tf.zeros_like(y.value) if y.is_float else None for y in op.outputs]
        if op.is_function:  # whose inputs depend on one another by nothing, see `_refuse_hidden`
            ys, xs = [y for y in op.outputs if y in at], [x.value for x in op.inputs if x.is_float]
            floats = iter(gradient([y.value for y in ys], xs, [at[y] for y in ys]))
            found = [next(floats) if x.is_float else None for x in op.inputs]
        else:
            found = gradients_of_operation(op.type, op.attributes, inputs, outputs, gs)
        return [None if g is None else tf.convert_to_tensor(g) for g in found]

    def _gather(self, end: SeenOp) -> None:
        """Put every operation that a gradient can come to, back to the inputs, into a group."""
        remaining = [end]
        self._group_of[end] = self._objective
        while remaining:
            op = remaining.pop()
            group = self._group_of[op]
            group.ops.append(op)
            self._refuse_hidden(op)
            for x in op.inputs if op.type else ():
                behind = x.op
                is_input = x in self._seen.inputs
                if not x.is_float or not (is_input or (behind in self._order and behind.carries)):
                    continue
                self._readers[behind].append(op)
                if behind not in self._group_of:
                    name = self._seen.inputs.get(x, "")
                    self._group_of[behind] = OpGroup(_INPUT, name=name) if is_input else self._choose_group(behind)
                    remaining.append(behind)

    def _choose_group(self, op: SeenOp) -> OpGroup:
        if self._order[op] >= self._seen.n_forward:
            return self._objective
        if isinstance(op.call, BlockCall) and not op.call.has_inner:
            return self._group_of_span.setdefault(op.call, OpGroup(type(op.call.layer).__name__, op.call))
        return OpGroup(op.name)

    def _newest(self, group: OpGroup) -> int:
        return max(self._order.get(op, -1) for op in group.ops)

    def _drop_constants(self) -> None:
        """Drop the operations that depend on weights, or on the input by no gradient, alone."""
        dependent: set[SeenOp] = set()
        for op in sorted(self._group_of, key=lambda op: self._order.get(op, -1)):
            if not self._group_of[op].is_operation or any(x.op in dependent and x.is_float for x in op.inputs):
                dependent.add(op)
        self._group_of = {op: group for op, group in self._group_of.items() if op in dependent}
        self._readers = {op: [r for r in readers if r in dependent] for op, readers in self._readers.items()}

    def _merge_operations(self) -> bool:
        """Merge each operation that reads one group and has one reader into its reader; say whether there was any."""
        merged = False
        operations = {group for group in self._group_of.values() if group.is_operation}
        for operation in sorted(operations, key=lambda group: -self._newest(group)):
            ops = operation.ops
            reads = {self._group_of[x.op] for op in ops for x in op.inputs if x.is_float and x.op in self._group_of}
            readers = {self._group_of[reader] for op in ops for reader in self._readers.get(op, ())} - {operation}
            if len(reads - {operation}) == 1 and len(readers) == 1:
                (reader,) = readers
                reader.ops += ops
                self._group_of.update(dict.fromkeys(ops, reader))
                merged = True
        return merged

    def _set_names(self) -> None:
        """Name the calls after their layers, and the operations after the innermost call around them."""
        groups = sorted({*self._group_of.values()}, key=self._newest)
        for group in groups:
            if group.span is not None:
                group.name = self._call_name(group.span)
        operations = [(group, self._operation_name(group)) for group in groups if group.is_operation]
        taken = {group.name for group in groups} | {span.name for span in self._spans}
        totals, counts = Counter(name for _, name in operations), Counter[str]()
        for group, name in operations:
            group.name = f"{name}#{counts[name]}" if totals[name] > 1 or name in taken else name
            counts[name] += 1

    def _call_name(self, span: BlockCall) -> str:
        is_reused = sum(other.name == span.name for other in self._innermost) > 1
        name = span.name or "(model)"
        return f"{name}#{span.number}" if is_reused or name in self._reserved else name

    @staticmethod
    def _operation_name(group: OpGroup) -> str:
        call = group.ops[0].call
        return f"{call.name}.{group.kind}" if call is not None and call.name else group.kind

    def _refuse_hidden(self, op: SeenOp) -> None:
        """Refuse what may hold several blocks, or whose gradient its operations do not tell."""
        where = op.call.name if op.call is not None and op.call.name else "the model"
        if op.opaque and op.opaque not in _WRITTEN_BY_TENSORFLOW:
            raise ModelError(f"{where} runs tf.custom_gradient {op.opaque!r}, which no operation shows; leave it out")
        within = [x for x in op.inputs if x.is_float and (x.op.type or x in self._seen.inputs)]
        is_leaf = op.call is not None and not children(op.call.layer) and len(within) == 1
        if op.is_function and not is_leaf:
            raise ModelError(f"{where} runs a tf.function, whose blocks cannot be told apart; call what it wraps")


def _norm(gradients: Sequence[Any]) -> float:
    return float(sum(np.square(np.abs(to_numpy(g).astype(np.float64))).sum() for g in gradients) ** 0.5)


def _relative_difference(ours: Any, expected: Any) -> float:
    """Return the largest absolute difference over the largest absolute value expected."""
    a, b = to_numpy(ours), to_numpy(tf.convert_to_tensor(expected))
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) if b.size else 0.0
