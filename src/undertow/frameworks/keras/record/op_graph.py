"""The operations of one batch that ran eagerly, as a graph: what each read and gave, and in which layer's call it ran.

`SeenTensor` and `SeenOp` have as much of a TensorFlow graph's tensors and operations as `explain.patterns` asks for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from ..explain.patterns import Activation, OpKind, activations
from ..internals import carries_gradient, gradients_of_operation

_WITHOUT_GRADIENT = frozenset(("StopGradient", "Floor", "Ceil", "Rint", "Round"))
_JOINS = frozenset(("AddV2", "AddN", "ConcatV2"))
_NORMS = {
    "BatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "RMSNormalization": "rms_norm",
}
_POOLS = {
    f"{kind}Pooling{n}D": f"{name}_pool{n}d" for kind, name in (("Max", "max"), ("Average", "avg")) for n in (1, 2, 3)
}
_POOL_OPS = {"MaxPool": "max_pool2d", "MaxPool3D": "max_pool3d", "AvgPool": "avg_pool2d", "AvgPool3D": "avg_pool3d"}
_PRODUCTS = {"Dense": "linear", "EinsumDense": "linear"} | {
    f"{depthwise}Conv{n}D{kind}": f"conv{kind and '_transpose'}{n}d"
    for depthwise in ("", "Depthwise")
    for n in (1, 2, 3)
    for kind in ("", "Transpose")
}
_ACTIVATION_NAMES = {"LeakyRelu": "leaky_relu", "Maximum": "relu", "HardSilu": "hardswish"}
_OP_NAMES = {"AddV2": "add", "AddN": "add", "MatMul": "matmul", "BatchMatMulV2": "matmul", "ConcatV2": "concat"}


@dataclass(eq=False)
class LayerCall:
    """One call of one layer.

    Attributes:
        inputs, outputs: the floating-point tensors that it was given and that it returned.
    """

    name: str
    layer: Any
    inputs: "list[SeenTensor]" = field(default_factory=list)
    outputs: "list[SeenTensor]" = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The first class of Keras's own that the layer is of, such as "Conv2D"; "" where it is of none."""
        return next((c.__name__ for c in type(self.layer).__mro__ if c.__module__.startswith("keras.")), "")


@dataclass(eq=False)
class SeenTensor:
    """A tensor that an operation gave, or one from outside."""

    value: Any
    op: "SeenOp"
    readers: "list[SeenOp]" = field(default_factory=list)

    @property
    def shape(self) -> Any:
        """Of its value."""
        return self.value.shape

    @property
    def is_float(self) -> bool:
        """Whether it can have a gradient."""
        return bool(self.value.dtype.is_floating)

    def consumers(self) -> "list[SeenOp]":
        """Return the operations that read it."""
        return self.readers

    def ref(self) -> "SeenTensor":
        """Return what stands for it in a set."""
        return self


@dataclass(eq=False)
class SeenOp:
    """An operation. `opaque` is the name of the `tf.custom_gradient` that it ran in."""

    type: str
    inputs: list[SeenTensor] = field(default_factory=list)
    attributes: tuple[Any, ...] = ()
    call: LayerCall | None = None
    opaque: str = ""
    outputs: list[SeenTensor] = field(default_factory=list)
    node_def: ClassVar[Any] = SimpleNamespace(attr={})

    @property
    def name(self) -> str:
        """Its name in a sentence, such as "add"."""
        if self.is_function:
            return "tf.function"
        return _OP_NAMES.get(self.type, "".join(f"_{c.lower()}" if c.isupper() else c for c in self.type).strip("_"))

    @property
    def is_function(self) -> bool:
        """Whether it is a call of a `tf.function`."""
        return self.type.startswith("__")

    @property
    def carries(self) -> bool:
        """Whether a gradient can pass it."""
        known = self.type not in _WITHOUT_GRADIENT and carries_gradient(self.type)
        return (known or bool(self.opaque)) and any(y.is_float for y in self.outputs)

    @property
    def joins(self) -> bool:
        """Whether it joins several ways, as a residual addition does."""
        inside = self.opaque or (self.call is not None and self.call.kind in _NORMS)
        return self.type in _JOINS and not inside and sum(x.is_float and x.op.type != "" for x in self.inputs) > 1


@dataclass(frozen=True, eq=False)
class TensorReader:
    """What reads a tensor: an activation, a pooling or a normalisation, which are followed; or anything else.

    Attributes:
        name: such as "relu", "max_pool2d", "conv2d", "add".
        family: "activation", "pool", "norm", or "" for what is not followed.
        x, y: its input, and its output where it is followed.
        ops: its operations in order of execution, where a gradient is taken through it.
        call: the layer's call that it ran in.
    """

    name: str
    family: str
    x: SeenTensor
    y: SeenTensor | None
    ops: tuple[SeenOp, ...]
    call: LayerCall | None
    product: bool = False

    def gradient(self, g: Any) -> Any:
        """Return the gradient at its input, from one at its output; None where there is none."""
        assert self.y is not None
        at: dict[SeenTensor, Any] = {self.y: g}
        for op in reversed(self.ops):
            if not any(y in at for y in op.outputs):
                continue
            by_inputs = gradients_of_operation(
                op.type,
                op.attributes,
                [x.value for x in op.inputs],
                [y.value for y in op.outputs],
                [at.get(y) for y in op.outputs],
            )
            for x, gradient in zip(op.inputs, by_inputs, strict=True):
                if gradient is not None:
                    at[x] = at[x] + gradient if x in at else gradient
        return at.get(self.x)


class OpGraph:
    """The operations that depend on what the network was given, in order of execution."""

    def __init__(self) -> None:
        self.ops: list[SeenOp] = []
        self.sources: list[SeenTensor] = []
        self._tensors: dict[int, SeenTensor] = {}
        self._n_matched = 0
        self._activation_of: dict[SeenOp, Activation] = {}

    def tensor(self, value: Any, depends: bool = False) -> SeenTensor:
        """Return what stands for a tensor; one not seen before comes from outside, as a constant or as an input."""
        seen = self._tensors.get(id(value))
        if seen is None:
            seen = self._tensors[id(value)] = SeenTensor(value, SeenOp(""))
        if depends and seen.op.type == "" and seen not in self.sources:
            self.sources.append(seen)
        return seen

    def known(self, value: Any) -> SeenTensor | None:
        """Return what stands for a tensor, None for one that no operation here gave or read."""
        return self._tensors.get(id(value))

    def same(self, value: Any, seen: SeenTensor) -> None:
        """Let another tensor of the same values stand for one."""
        self._tensors[id(value)] = seen
        self._kept = [*getattr(self, "_kept", ()), value]  # so that no other tensor gets its id

    def add(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: Any,
        outputs: Sequence[Any],
        call: LayerCall | None,
        opaque: str,
    ) -> None:
        """Add an operation, if it depends on what the network was given."""
        known = [self._tensors.get(id(x)) for x in inputs]
        if not any(x is not None and (x.op.type != "" or x in self.sources) for x in known):
            return
        op = SeenOp(kind, [self.tensor(x) for x in inputs], tuple(attributes or ()), call, opaque)
        for x in dict.fromkeys(op.inputs):
            x.readers.append(op)
        for value in outputs:
            seen = self._tensors[id(value)] = SeenTensor(value, op)
            op.outputs.append(seen)
        self.ops.append(op)

    def activation_of(self, op: SeenOp) -> Activation | None:
        """Return the activation that an operation is a part of."""
        if self._n_matched != len(self.ops):
            plain = [op for op in self.ops if not op.opaque]
            found = [a for a in activations(plain, self.sources) if a.kind is not OpKind.OPAQUE]
            self._activation_of = {op: activation for activation in found for op in activation.ops}
            self._n_matched = len(self.ops)
        return self._activation_of.get(op)

    def readers(self, x: SeenTensor) -> list[TensorReader]:
        """Return what reads a tensor and lets a gradient through, in order of execution, each once."""
        units: dict[Any, TensorReader] = {}
        for op in x.readers:
            if op.carries:
                key, unit = self._unit(x, op)
                units.setdefault(key, unit)
        return list(units.values())

    def _unit(self, x: SeenTensor, op: SeenOp) -> tuple[Any, TensorReader]:
        """Return the unit by which an operation reads a tensor, and what tells it from others."""
        call = op.call
        if op.opaque:
            return (call, op.opaque), TensorReader(f"tf.custom_gradient {op.opaque}", "", x, None, (), call)
        activation = self.activation_of(op)
        if call is not None and x in call.inputs and (layer_unit := self._of_layer(x, call)) is not None:
            return call, layer_unit
        if activation is not None and activation.x is x and activation.kind is not OpKind.SWITCH:
            y = activation.ops[-1].outputs[0]
            return activation, TensorReader(_name_of(activation), "activation", x, y, activation.ops, call)
        if op.type in _POOL_OPS:
            return op, TensorReader(_POOL_OPS[op.type], "pool", x, op.outputs[0], (op,), call)
        return op, TensorReader(op.name, "", x, None, (op,), call)

    def _of_layer(self, x: SeenTensor, call: LayerCall) -> TensorReader | None:
        """Return the unit that a layer's call is as a whole: a normalisation, a pooling, or a product with weights."""
        if call.kind in _PRODUCTS:
            return TensorReader(_PRODUCTS[call.kind], "", x, None, (), call, product=True)
        if len(call.outputs) == 1 and call.kind in _NORMS | _POOLS:
            ops = tuple(op for op in self.ops if op.call is call)
            family = "norm" if call.kind in _NORMS else "pool"
            return TensorReader((_NORMS | _POOLS)[call.kind], family, x, call.outputs[0], ops, call)
        return None


def _name_of(activation: Activation) -> str:
    is_leaky = activation.name == "Relu" and activation.root.type == "Sub"
    return "leaky_relu" if is_leaky else _ACTIVATION_NAMES.get(activation.name, activation.name.lower())


def behind(start: SeenTensor, only_carrying: bool = True) -> Iterator[SeenOp]:
    """Yield the operations that depend on a tensor, each once, by a gradient or in any way."""
    remaining, seen = [start], set[SeenOp]()
    while remaining:
        x = remaining.pop()
        for op in x.readers:
            if op in seen or (only_carrying and not x.is_float):
                continue
            seen.add(op)
            yield op
            if not only_carrying or op.carries:
                remaining += op.outputs


def before(end: SeenTensor) -> Iterator[SeenOp]:
    """Yield the operations that a tensor was computed by, each once."""
    remaining, seen = [end.op], set[SeenOp]()
    while remaining:
        op = remaining.pop()
        if op.type and op not in seen:
            seen.add(op)
            yield op
            remaining += [x.op for x in op.inputs]
