"""Watches one batch so that the causes of zeros can be proved: what reads each layer's output, and what comes back.

While a batch runs, every operation that TensorFlow runs eagerly is seen. From a site's output the activations,
poolings and normalisations that alone read it are followed, up to the next reader. Each leaves a **point**: which
elements its forward pass closed to the gradient, and which zeros came. `undertow.diagnosis` compares the two. The
gradients at points come of the user's own `tape.gradient`, which is asked for them too.

A Dense layer or a convolution with `activation=` returns what its activation gives. The way from before it is
followed as well, under the output "before activation".
"""

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self, final

import numpy as np
import tensorflow as tf

from ....measures import stats
from ....structures import tensors_with_paths
from ...diagnosis_rows import AT_SITES, has_arrived, row_of
from ...own_passes import in_own_pass
from ..arrays import to_numpy
from ..internals import all_layers, custom_gradient_around, operations_seen
from ..layers import named_modules
from ..outputs import is_float
from ..watching import gradients_watched, wrapped
from .cuts import flat_behind, why_none
from .op_graph import LayerCall, OpGraph, SeenTensor, TensorReader
from .zero_causes import backward_state, forward_state, operand, settings, weight_statistics

END = -1
INSIDE = "before activation"  # as in `undertow.diagnosis.evidence`
ChannelsSecond = Callable[[Any, Any], Any]


@dataclass(eq=False)
class WatchedPoint:
    """One step from a site to its next reader: the site's output (step 0), or that of a unit behind it.

    Attributes:
        facts: columns of its row.
        layer: the site's, which says where the channels are.
        tensor: whose gradient is read.
        unit: that gave the tensor, of a later step than 0.
        state: what was measured.
        readers: names of what reads it and lets a gradient through.
        read_by: of a site's output, the numbers of the site outputs that read it first, `END` for the end.
    """

    facts: dict[str, Any]
    layer: Any
    tensor: SeenTensor | None = None
    unit: TensorReader | None = None
    state: dict[str, Any] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    read_by: list[int] = field(default_factory=list)

    @property
    def arrived(self) -> bool:
        """Whether a gradient was measured."""
        return has_arrived(self.state)

    def row(self) -> dict[str, Any]:
        """Return its row; what was not measured is NaN, -1 or an empty list."""
        return row_of(self.facts, self.state, self.readers, self.read_by)


@final
class EagerRecorder:
    """Sees the operations and the layers' calls of this thread from `__enter__` to `__exit__`.

    Args:
        network: the whole model.
        unscaled: divides a gradient by the loss's scale.
        channels_second: views a layer's output as `(B, C, ...)`.
    """

    def __init__(self, network: Any, unscaled: Callable[[Any], Any], channels_second: ChannelsSecond) -> None:
        self._network, self._unscaled, self._channels_second = network, unscaled, channels_second
        self._layers = {named.name: named.module for named in named_modules(network)}
        self.points: list[WatchedPoint] = []
        self.graph = OpGraph()
        self._running: list[LayerCall] = []
        self._ended: dict[str, LayerCall] = {}
        self._roots: list[SeenTensor] = []
        self._read_handles: set[int] = set()
        self._broken_data = -1
        self._paused = 0
        self._thread = 0
        self._ran_backward = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            layers = {**self._layers, "": self._network}
            unique = {id(layer): name for name, layer in reversed(layers.items())}
            stack.enter_context(wrapped({unique[id(v)]: v for v in layers.values()}, self._around))
            stack.enter_context(gradients_watched(self._gradient))
            stack.enter_context(operations_seen(self._see))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._thread = 0

    def paused(self) -> ExitStack:
        """Return a context in which operations are not seen."""
        stack = ExitStack()
        self._paused += 1
        stack.callback(self._resume)
        return stack

    def _resume(self) -> None:
        self._paused -= 1

    def _ignores(self) -> bool:
        return bool(self._paused) or threading.get_ident() != self._thread or in_own_pass()

    def _see(
        self, kind: Any, inputs: Any, attributes: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> None:
        if graph is not None or self._ignores():
            return
        text = kind.decode() if isinstance(kind, bytes) else str(kind)
        if text == "ReadVariableOp":
            self._read_handles.add(id(inputs[0]))
            return
        call = self._running[-1] if self._running else None
        self.graph.add(text, inputs, attributes, outputs, call, custom_gradient_around())

    def _around(self, name: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._ignores() or not tf.executing_eagerly():
            return call(*args, **kwargs)
        leaves = [leaf for _, leaf in tensors_with_paths((args, kwargs))]
        given = [t for t in leaves if tf.is_tensor(t) and hasattr(t, "numpy")]
        inputs = [self.graph.tensor(t, depends=True) for t in given]  # a model makes tensors of arrays for its layers
        if layer is self._network and self._broken_data < 0:
            self._broken_data = _broken(leaves)
        this = LayerCall(name, layer, [x for x in inputs if x.is_float])
        self._running.append(this)
        try:
            output = call(*args, **kwargs)
        finally:
            del self._running[self._running.index(this) :]
        this.outputs = [self.graph.tensor(t, depends=True) for _, t in tensors_with_paths(output) if is_float(t)]
        self._ended[name] = this
        return output

    def begin(self, site: str, call: int, position: str, layer: Any, tensor: Any, passed: Any) -> WatchedPoint:
        """Record a site's output, and what stands for it behind the hook."""
        seen = self.graph.tensor(tensor, depends=True)
        self.graph.same(passed, seen)
        layer_call = self._ended.get(site)
        facts = {"site": site, "call": call, "output": position, "phase": "backward", "repeat": 0}
        facts |= {"step": 0, "op": "", "module": site, "settings": "{}", "flat": "", "arrival": "", "joins": 0}
        facts |= self._shape(layer, tensor) | {"number": len(self.points), "trainable": trainable(layer)}
        with self.paused():
            state = weight_statistics(layer) | {"broken_output": _broken([tensor])}
            if state["broken_output"] and layer_call is not None:
                state["broken_input"] = _broken([x.value for x in layer_call.inputs])
        if custom_gradient_around():
            facts["arrival"] = "in a custom gradient"
        elif hasattr(tensor, "_keras_logits"):
            facts["arrival"] = "passed by"
        point = WatchedPoint(facts, layer, seen, None, state)
        self.points.append(point)
        return point

    def _shape(self, layer: Any, tensor: Any) -> dict[str, Any]:
        shape = self._channels_second(layer, np.empty(tensor.shape, np.bool_)).shape
        return {"shape": list(shape), "dtype": tensor.dtype.name}

    def _gradient(self, original: Callable[..., Any], target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        """Let a tape give the gradients at the points too, and measure these."""
        if self._ignores():
            return original(target, sources, *args, **kwargs)
        with self.paused():
            self._follow()
            self._ran_backward = True
            roots = [self.graph.known(t) for _, t in tensors_with_paths(target) if tf.is_tensor(t)]
            self._roots += [root for root in roots if root is not None]
            for point in self.points:
                if point.tensor in self._roots:
                    point.readers.append("backward")
            waiting = [point for point in self.points if not point.arrived and point.tensor is not None]
            tensors = [point.tensor.value for point in waiting if point.tensor is not None]
            found, at_points = original(target, [sources, tensors], *args, **kwargs)
            for point, g in zip(waiting, at_points, strict=True):
                if g is not None:
                    self._measure(point, tf.convert_to_tensor(g))
            return found

    def _follow(self) -> None:
        """Add the steps behind each site's output that was not followed yet."""
        for point in [p for p in self.points if p.facts["step"] == 0 and not p.readers and not p.arrived]:
            before = self._before_activation(point)
            for start in (point, *([] if before is None else [before])):
                if start is before:
                    self.points.append(start)
                self._add_steps(start)
            point.facts["joins"] = self._joins_behind(point)

    def _before_activation(self, point: WatchedPoint) -> WatchedPoint | None:
        """Return the point before the activation that a layer with weights ends in."""
        tensor = point.tensor
        assert tensor is not None
        activation = self.graph.activation_of(tensor.op)
        if activation is None or activation.ops[-1] is not tensor.op or tensor.op.call is None:
            return None
        if tensor.op.call.layer is not point.layer or activation.x.op.call is not tensor.op.call:
            return None
        facts = {**point.facts, "output": INSIDE, "number": END, "arrival": INSIDE}
        return WatchedPoint(facts, point.layer, activation.x)

    def _add_steps(self, point: WatchedPoint) -> None:
        while point.tensor is not None:
            units = self.graph.readers(point.tensor)
            point.readers = [unit.name for unit in units]
            for unit in units:
                if (other := operand(unit)) is not None:
                    point.state["operand"] = other
            if not units or not units[0].family:
                return
            unit = units[0]
            facts = {**point.facts, "step": point.facts["step"] + 1, "op": unit.name, "joins": 0, "arrival": ""}
            facts |= {"module": unit.call.name if unit.call is not None else "", "flat": "", "number": END}
            facts |= {"settings": json.dumps(settings(unit))} | self._shape(point.layer, unit.y and unit.y.value)
            layer = point.layer
            state = forward_state(unit, lambda x: self._channels_second(layer, x))  # noqa: B023
            point = WatchedPoint(facts, layer, unit.y, unit, state)
            self.points.append(point)

    def _joins_behind(self, point: WatchedPoint) -> int:
        tensor = point.tensor
        assert tensor is not None
        ops = self.graph.ops
        first = ops.index(tensor.op) + 1 if tensor.op in ops else 0
        return sum(op.joins for op in ops[first:])

    def _measure(self, point: WatchedPoint, gradient: Any) -> None:
        g = self._unscaled(gradient)
        if point.unit is not None:
            point.state |= backward_state(point.unit, gradient) | (
                {} if point.unit.family != "activation" or g is gradient else self._expected(point.unit, g)
            )
        statistics = stats(self._channels_second(point.layer, to_numpy(g)))
        wide = np.asarray(statistics.x, np.float64)
        point.state["absolute"], point.state["norm"] = float(np.abs(wide).sum()), float(statistics.norm)
        if point.facts["step"] == 0:
            for measure in AT_SITES:
                point.state |= measure.pick(statistics)
        point.state["zeros"] = int(statistics.zeros)

    @staticmethod
    def _expected(unit: TensorReader, g: Any) -> dict[str, Any]:
        return {"expected_absolute": backward_state(unit, g)["expected_absolute"]}

    def close(self, names: Sequence[str], arrived: set[tuple[str, int, str]]) -> list[WatchedPoint]:
        """Return the points of the named sites, each with the reason where no gradient came.

        Args:
            arrived: site, call and output of what a gradient reached.
        """
        with self.paused():
            chosen, called = set(names), {point.facts["site"] for point in self.points}
            self._link()
            points = [point for point in self.points if point.facts["site"] in chosen]
            for point in points:
                if point.facts["step"] == 0 and point.facts["arrival"] != INSIDE:
                    self._settle(point, arrived)
            came = {(p.facts["site"], p.facts["call"]) for p in points if p.facts["arrival"] == "arrived"}
            points = [p for p in points if p.facts["output"] != INSIDE or (p.facts["site"], p.facts["call"]) in came]
            for point in self.points:
                point.tensor = point.unit = None
            self.graph, self._roots = OpGraph(), []
            return points + [self._uncalled(name) for name in names if name not in called]

    def _settle(self, point: WatchedPoint, arrived: set[tuple[str, int, str]]) -> None:
        facts = point.facts
        if (facts["site"], facts["call"], facts["output"]) in arrived:
            facts["arrival"] = "arrived"
        elif not self._ran_backward:
            facts["arrival"] = "no backward"
        elif facts["arrival"] == "":
            assert point.tensor is not None
            facts["arrival"] = why_none(point.tensor, self._roots)
        if point.tensor is not None:
            facts["flat"] = flat_behind(point.tensor)
        point.state["broken_data"] = self._broken_data

    def _link(self) -> None:
        """Find which site outputs read which first, nearest the loss."""
        numbers: dict[SeenTensor, int] = {}
        for point in self.points:
            if point.facts["number"] >= 0 and point.tensor is not None:
                point.facts["number"] = numbers.setdefault(point.tensor, point.facts["number"])
        reached: dict[SeenTensor, int] = dict.fromkeys(self._roots, 1)
        read_by: dict[SeenTensor, int] = {}
        sites = dict.fromkeys(numbers)
        for op in reversed(self.graph.ops):
            bits = 0
            for y in op.outputs:
                bits |= _bits_at(y, reached, numbers, read_by)
                sites.pop(y, None)
            for x in op.inputs if bits and op.carries else ():
                if x.is_float:
                    reached[x] = reached.get(x, 0) | bits
        for source in sites:  # a site's output that no operation here gave
            _bits_at(source, reached, numbers, read_by)
        for point in self.points:
            if point.facts["number"] >= 0 and point.tensor is not None:
                bits = read_by.get(point.tensor, 1)
                point.read_by = [i + END for i in range(bits.bit_length()) if bits >> i & 1]

    def _uncalled(self, name: str) -> WatchedPoint:
        layer = self._layers[name]
        handles = [id(variable.value.handle) for variable in layer.weights]
        unseen = bool(handles) and self._read_handles.issuperset(handles)
        return WatchedPoint({**_UNCALLED, "site": name} | ({"arrival": "used unseen"} if unseen else {}), layer)


def _bits_at(
    tensor: SeenTensor, reached: dict[SeenTensor, int], numbers: dict[SeenTensor, int], read_by: dict[SeenTensor, int]
) -> int:
    bits = reached.get(tensor, 0)
    if tensor in numbers:
        read_by[tensor] = bits or 1
        return 1 << (numbers[tensor] + 1)
    return bits


def trainable(layer: Any) -> int:
    """Return whether any weight of a layer learns: 1, 0, or -1 where it has none that could."""
    if layer.trainable_variables:
        return 1
    return 0 if any(own._trainable_variables for own in all_layers(layer)) else -1


def _broken(tensors: Sequence[Any]) -> int:
    """Count the infinite elements and those that are not a number; -1 without floating-point tensors."""
    arrays = [to_numpy(t) if is_float(t) else t for t in tensors]
    counts = [int((~np.isfinite(a)).sum()) for a in arrays if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    return sum(counts) if counts else -1


_UNCALLED: dict[str, Any] = {
    "call": -1,
    "output": "",
    "phase": "backward",
    "repeat": 0,
    "step": 0,
    "op": "",
    "module": "",
    "settings": "{}",
    "shape": [],
    "dtype": "",
    "joins": 0,
    "arrival": "never called",
    "flat": "",
    "number": -1,
    "trainable": -1,
}
