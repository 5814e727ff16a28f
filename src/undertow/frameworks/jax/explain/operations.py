"""An operation of one call as a row of a table sees it, and the equations of one run again under a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import jax
import jax.numpy as jnp

from ....errors import RuleError
from ....lrp import EPSILON, stabilized
from ....tables import Row, may_hold
from ..graph import Environment, JaxprValue
from ..internals import bind
from .layers import JaxLayer
from .recognition import FoundOperation

for _kind in (jax.Array, jax.core.Tracer):
    may_hold.register(_kind, lambda elements: True)
    stabilized.register(_kind, lambda z, epsilon=EPSILON: jnp.where(z < 0, z - epsilon, z + epsilon))


@final
@dataclass(frozen=True)
class JaxOperation:
    """One operation in one run: `undertow.tables.Operation`.

    Attributes:
        operands: those on the way.
        output: what it returned.
        values: of all else that its nodes read.
    """

    found: FoundOperation
    operands: tuple[Any, ...]
    output: Any
    values: Mapping[JaxprValue, Any]

    @property
    def kind(self) -> str:
        """One of `undertow.tables.KINDS`."""
        return self.found.kind

    @property
    def gate(self) -> int | None:
        """Which of two factors something computed as a weight."""
        return self.found.gate

    @property
    def input(self) -> Any:
        """What it was given, of kinds with one operand."""
        return self.operands[0]

    def _missing(self, what: str) -> RuleError:
        return RuleError(f"{self.found.name} ({self.kind}) has no {what}, and the rule needs it")

    @cached_property
    def _layer(self) -> JaxLayer:
        if not self.found.is_layer:
            raise self._missing("weight")
        return JaxLayer(self.found.nodes, self.found.operands[0][0][1], self.operands[0], self.values)

    @property
    def weight(self) -> Any:
        """The constant weights of a layer as the call holds them, a batch norm behind it folded in."""
        return self._layer.weight

    @property
    def own_weight(self) -> Any:
        """The constant weights as the call holds them."""
        return self._layer.own_weight

    @property
    def bias(self) -> Any:
        """What is added to each output, a batch norm behind the layer folded in; None where nothing is."""
        return self._layer.bias

    @property
    def has_negative_input(self) -> bool:
        """Whether a layer's input may be negative: not behind a ReLU."""
        return self.found.has_negative_input

    @property
    def has_negative_output(self) -> bool:
        """Whether relevance may reach a layer's negative outputs: not where a ReLU alone reads it."""
        return self.found.has_negative_output

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of a layer's input whose extremes are those of a channel: height and width."""
        return self._layer.positions

    def forward(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """Apply a layer to another input, with other weights."""
        return self._layer.forward(x, weight, bias)

    def backward(self, s: Any, weight: Any) -> Any:
        """Apply a layer's transpose with other weights."""
        return self._layer.backward(s, weight)

    def hold_spread(self, g: Any) -> Any:
        """There is no norm of one operation in a jaxpr."""
        raise self._missing("spread")


def ruled(found: FoundOperation, row: Row, rule: str) -> Callable[[Environment], list[Any]]:
    """Return what runs an operation with a row for its derivative.

    Args:
        rule: its name, for messages.
    """
    entering = {exit: k for k, exits in enumerate(found.operands) for exit in exits}
    made = {value for node in found.nodes for value in node.outputs}
    read = dict.fromkeys(
        value
        for node in found.nodes
        for i, value in enumerate(node.inputs)
        if (node, i) not in entering and value not in made
    )
    root = found.nodes[-1].outputs[0]

    def again(operands: Sequence[Any], others: dict[JaxprValue, Any]) -> Any:
        inner = Environment(dict(others))
        for node in found.nodes:
            given = (
                operands[entering[node, i]] if (node, i) in entering else inner[value]
                for i, value in enumerate(node.inputs)
            )
            inner.values.update(zip(node.outputs, bind(node.eqn, list(given), scope=node.scope), strict=True))
        return inner[root]

    def run(environment: Environment) -> list[Any]:
        # all that the body of a loop reads must be an argument: a constant would be taken out of the loop
        names = [value for value in read if value in environment]

        def forward(operands: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
            return again(operands, dict(zip(names, others, strict=True)))

        def backward(saved: Any, g: Any) -> Any:
            operands, others = saved
            output, pull = jax.vjp(lambda *moved: forward(moved, others), *operands)
            op = JaxOperation(found, operands, output, dict(zip(names, others, strict=True)))
            return apply_row(row, rule, g, pull, op), None

        operation = jax.custom_vjp(forward)
        operation.defvjp(lambda *arguments: (forward(*arguments), arguments), backward)
        operands = tuple(environment[exits[0][0].inputs[exits[0][1]]] for exits in found.operands)
        return [operation(operands, tuple(environment[value] for value in names))]

    return run


def apply_row(row: Row, rule: str, g: Any, pull: Callable[[Any], tuple[Any, ...]], op: JaxOperation) -> tuple[Any, ...]:
    """Return what a row makes of a gradient, one for each operand.

    Raises:
        RuleError: the row gave no arrays of the operands' shapes and dtypes, or gave `local` none like `g`.
    """

    def local(h: Any) -> Any:
        parts = pull(_like(h, g, rule, "gave local", op))
        return parts[0] if len(op.operands) == 1 else parts

    result = row(g, local, op)
    given = (result,) if len(op.operands) == 1 or not isinstance(result, tuple | list) else tuple(result)
    if len(given) != len(op.operands):
        raise RuleError(
            f"rule {rule!r} returned {len(given)} gradient(s) for the {len(op.operands)} operands of {op.found.name}; "
            "return one for each, as local does"
        )
    return tuple(
        jnp.zeros_like(x) if part is None else _like(part, x, rule, "returned", op)
        for part, x in zip(given, op.operands, strict=True)
    )


def _like(new: Any, wanted: Any, rule: str, did: str, op: JaxOperation) -> Any:
    if isinstance(new, jax.Array) and new.shape == wanted.shape and new.dtype == wanted.dtype:
        return new
    what = f"{new.shape} {new.dtype}" if isinstance(new, jax.Array) else f"a {type(new).__name__}"
    raise RuleError(f"rule {rule!r} {did} {what} at {op.found.name} where {wanted.shape} {wanted.dtype} is wanted")
