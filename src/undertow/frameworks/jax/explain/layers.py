"""Layers: a product with constant weights, and the bias and batch norm that alone read it, as one operation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax

from ..graph import CUSTOM, JaxprNode, JaxprValue, body_graph, uniform
from ..internals import bind
from .kinds import COPIES, ELEMENTWISE
from .steps import JaxprStep, JaxprSteps

_RESHAPED = frozenset(("reshape", "squeeze", "expand_dims", "transpose"))
_SCALES = frozenset(("mul", "div"))
_SHIFTS = frozenset(("add", "add_any", "sub"))


def channel_axes(node: JaxprNode, place: int) -> list[tuple[int, int]]:
    """Return pairs of an axis of a layer's output and the axis of its weights that are as one: of the outputs.

    Args:
        node: a convolution or a product of matrices.
        place: of its input among its two operands.
    """
    dimensions = node.eqn.params["dimension_numbers"]
    if node.name == "conv_general_dilated":
        return [(dimensions.out_spec[1], dimensions.rhs_spec[0])]
    (summed, batched), weight = dimensions, 1 - place
    free = [i for i in range(node.inputs[weight].aval.ndim) if i not in (*summed[weight], *batched[weight])]
    n_batched, n_left = len(batched[0]), node.inputs[0].aval.ndim - len(summed[0]) - len(batched[0])
    start = n_batched + (n_left if weight == 1 else 0)
    return [*enumerate(batched[weight]), *enumerate(free, start)]


def behind_layer(root: JaxprStep, steps: JaxprSteps) -> tuple[JaxprNode, ...]:
    """Return the nodes by which a layer's output, which each alone reads, is scaled and shifted in each channel.

    Those are a bias, and a batch norm as it predicts, with views between them. The last of them is no view.
    """
    axes = {axis for axis, _ in channel_axes(root.root, root.places[0])}
    chain: list[JaxprNode] = []
    length, value = 0, root.output
    while steps.readers[value] == 1 and (reader := steps.reader.get(value)) is not None:
        node = reader.root
        if reader.match is not None or len(reader.inputs) != 1 or len(node.outputs) != 1:
            break
        if node.name in COPIES | _RESHAPED:
            mapping = _axes_kept(node)
            if mapping is None:
                break
            axes = {mapping[axis] for axis in axes if axis in mapping}
        elif node.name in _SCALES | _SHIFTS and (reader.places == (0,) or node.name in ("mul", "add", "add_any")):
            if not _varying_axes(node.inputs[1 - reader.places[0]]) <= axes:
                break
            length = len(chain) + 1
        else:
            break
        chain.append(node)
        value = reader.output
    return tuple(chain[:length])


def _axes_kept(node: JaxprNode) -> dict[int, int] | None:
    """Return where a view puts each axis longer than one; None where it makes others of them."""
    before, after = node.inputs[0].aval.shape, node.outputs[0].aval.shape
    if node.name == "transpose":
        return {axis: i for i, axis in enumerate(node.eqn.params["permutation"])}
    long, longer = ([i for i, n in enumerate(shape) if n > 1] for shape in (before, after))
    same = [before[i] for i in long] == [after[i] for i in longer]
    return dict(zip(long, longer, strict=True)) if same else None


def _varying_axes(value: JaxprValue) -> set[int]:
    """Return the axes along which a constant may vary."""
    long, node = {i for i, n in enumerate(value.aval.shape) if n > 1}, value.node
    if not long or node is None or uniform(value) is not None:
        return long if uniform(value) is None else set()
    if node.name == "broadcast_in_dim":
        dimensions = node.eqn.params["broadcast_dimensions"]
        return {dimensions[i] for i in _varying_axes(node.inputs[0])}
    if node.name in COPIES | _RESHAPED:
        mapping = _axes_kept(node)
        return long if mapping is None else {mapping[i] for i in _varying_axes(node.inputs[0]) if i in mapping}
    if node.name in ELEMENTWISE:
        return set[int]().union(*(_varying_axes(operand) for operand in node.inputs))
    return long


_AS_THE_FIRST = frozenset(
    (
        *(*COPIES, *_RESHAPED, "broadcast_in_dim", "slice", "dynamic_slice", "rev", "reduce_sum", "reduce_max"),
        *("reduce_window_sum", "reduce_window_max", "cumsum", "sqrt"),
    )
)
_AS_ALL = frozenset(("add", "add_any", "mul", "div", "min", "concatenate", "pad", "stack"))
_NEVER_NEGATIVE = frozenset(("exp", "exp2", "logistic", "abs", "square"))


def is_nonnegative(value: JaxprValue) -> bool:
    """Whether no element can be negative, as behind a ReLU, by the operations that make it; False if that is not told.

    >>> import jax
    >>> from undertow.frameworks.jax.graph import graph_of
    >>> graph = graph_of(jax.make_jaxpr(lambda x: (jax.nn.relu(x).sum(0) / 2, x))(jnp.ones(3)))
    >>> [is_nonnegative(value) for value in graph.outputs]
    [True, False]
    """
    known: dict[JaxprValue, bool] = {}

    def told(value: JaxprValue) -> bool:
        if value not in known:
            known[value] = of(value)
        return known[value]

    def of(value: JaxprValue) -> bool:
        number, node = uniform(value), value.node
        if number is not None or node is None:
            return number is not None and number >= 0
        if node.name in CUSTOM:
            return told(body_graph(node).outputs[0])
        if node.name == "max":
            return any((bound := uniform(operand)) is not None and bound >= 0 for operand in node.inputs)
        if node.name in _AS_ALL:
            return all(map(told, node.inputs))
        return node.name in _NEVER_NEGATIVE or (node.name in _AS_THE_FIRST and told(node.inputs[0]))

    return told(value)


@final
@dataclass(frozen=True)
class JaxLayer:
    """A layer in one run.

    Attributes:
        nodes: the product, and what `behind_layer` found.
        place: of its input among the product's operands.
        x: the input.
        values: of all else that the nodes read.
    """

    nodes: tuple[JaxprNode, ...]
    place: int
    x: Any
    values: Mapping[JaxprValue, Any]

    @property
    def root(self) -> JaxprNode:
        """The product."""
        return self.nodes[0]

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of the input over which an extreme is one of a channel: height and width; features without these."""
        dimensions = self.root.eqn.params["dimension_numbers"]
        if self.root.name == "conv_general_dilated":
            return tuple(dimensions.lhs_spec[2:])
        return tuple(dimensions[0][self.place])

    def _value(self, value: JaxprValue) -> Any:
        return self.values.get(value, value.known)

    @property
    def own_weight(self) -> Any:
        """The weights as the call holds them."""
        return self._value(self.root.inputs[1 - self.place])

    @cached_property
    def _norm(self) -> tuple[Any, Any]:
        """What each output of the product is multiplied by, in its shape, and what is added, in that of the output."""
        zero = jnp.zeros(self.root.outputs[0].aval.shape, self.root.outputs[0].aval.dtype)
        shift, pull = jax.vjp(lambda y: self._behind(y, scaled=True), zero)
        return pull(jnp.ones_like(shift))[0], shift

    @cached_property
    def weight(self) -> Any:
        """The weights, what scales the outputs folded in."""
        weight = self.own_weight
        if not any(node.name in _SCALES for node in self.nodes):
            return weight
        scale, pairs = self._norm[0], channel_axes(self.root, self.place)
        for axis in range(scale.ndim):
            if axis not in {y for y, _ in pairs}:
                scale = lax.slice_in_dim(scale, 0, 1, axis=axis)
        order = sorted(pairs, key=lambda pair: pair[1])
        rest = [axis for axis in range(scale.ndim) if axis not in {y for y, _ in pairs}]
        scale = scale.transpose([*(y for y, _ in order), *rest])
        shape = [weight.shape[axis] if axis in {w for _, w in pairs} else 1 for axis in range(weight.ndim)]
        return weight * scale.reshape(shape).astype(weight.dtype)

    @cached_property
    def bias(self) -> Any:
        """What is added to each output, in the output's shape; None where nothing is."""
        return self._norm[1] if any(node.name in _SHIFTS for node in self.nodes) else None

    def forward(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """Apply the layer to another input, with other weights."""
        given = (x, weight) if self.place == 0 else (weight, x)
        y = self._behind(bind(self.root.eqn, given, scope=self.root.scope)[0], scaled=False)
        return y if bias is None else y + bias

    def backward(self, s: Any, weight: Any) -> Any:
        """Apply the layer's transpose with other weights."""
        _, pull = jax.vjp(lambda x: self.forward(x, weight), self.x)
        return pull(s)[0]

    def _behind(self, y: Any, scaled: bool) -> Any:
        """Pass the product's output through the nodes behind; without what they scale and shift by, or with it."""
        made = {self.root.outputs[0]: y}
        for node in self.nodes[1:]:
            (at,) = (i for i, value in enumerate(node.inputs) if value in made)
            if scaled or node.name not in _SCALES | _SHIFTS:
                operands = [made[v] if i == at else self._value(v) for i, v in enumerate(node.inputs)]
                result = bind(node.eqn, operands, scope=node.scope)[0]
            else:
                result = made[node.inputs[at]]
            made = {node.outputs[0]: result}
        return result if self.nodes[1:] else y
