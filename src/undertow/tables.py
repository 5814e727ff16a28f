"""A rule as a table: for each kind of operation, how a gradient passes it. Framework-free, as `undertow.rules` is.

| kind | operation | what `local` returns |
|---|---|---|
| relu | a ReLU-like activation: ReLU, ReLU6, LeakyReLU, PReLU, clamp(min=0), in any spelling | one gradient |
| smooth | any other elementwise function, such as GELU, tanh, exp; of several operations too | one |
| linear | a matrix product with a constant matrix | one |
| conv | a convolution with constant weights | one |
| matmul | a matrix product of two operands on the way | a pair |
| product | an elementwise product of two operands on the way | a pair |
| attention | scaled dot-product attention as one operation | of queries, keys, values (and a mask) |
| softmax | softmax, log-softmax, exp(x) / exp(x).sum() | one |
| norm | a layer, group, instance or RMS norm as one operation | one |
| spread | a norm written out: a product with, or a quotient by, a statistic | a pair: of the input, of the statistic |
| pool | max-pooling | one |
| add | a sum of two operands on the way | a pair |

"On the way" is what the score's gradient reaches the input through, so weights are not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Protocol

from .errors import InputError, did_you_mean

KINDS = (
    *("relu", "smooth", "linear", "conv", "matmul", "product", "attention", "softmax", "norm", "spread", "pool", "add"),
)
FIRST = "first"


@singledispatch
def relu(g: Any) -> Any:
    """Return the positive part of an array, elementwise; the shape and dtype stay. NaN stays NaN.

    Each framework registers its own kernel for its own tensors when it is first used.

    >>> import numpy as np
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    import numpy as np  # as in `stabilized`

    return np.maximum(g, 0)


@singledispatch
def may_hold(elements: Any) -> bool:
    """Return whether any element is true, or not zero; True too where only a compiled program's run will tell.

    >>> import numpy as np
    >>> may_hold(np.array([False, True]))
    True
    """
    return bool(elements.any())


Local = Callable[[Any], Any]
ActivationRule = Callable[[Any, Local], Any]
"""`(g, local) -> g`: what acts on activations alone."""


class Operation(Protocol):
    """One call of an operation in one forward pass; everything is read when it is first asked for.

    Tensors are the framework's, detached. An attribute that the kind does not have, or that nothing kept, raises
    RuleError.
    """

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def input(self) -> Any:
        """The tensor that the operation was given, of kinds with one operand."""

    @property
    def output(self) -> Any:
        """What it returned; of a layer with a batch norm behind it, what that returned.

        Of a layer that a ReLU alone reads, the ReLU's output, where no gradient passes its zeros.
        """

    @property
    def weight(self) -> Any:
        """The constant weights of `linear`, `(in, out)`, or of `conv`, a batch norm behind it folded in."""

    @property
    def own_weight(self) -> Any:
        """The constant weights as the layer itself holds them: a view of its parameter."""

    @property
    def bias(self) -> Any:
        """The bias of `linear` and `conv`, `(out,)`, a batch norm behind it folded in; None where there is none."""

    @property
    def has_negative_input(self) -> bool:
        """Whether a layer was given negative numbers; True too where nobody can tell."""

    @property
    def has_negative_output(self) -> bool:
        """Whether relevance may reach negative outputs of a layer; True too where nobody can tell."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of a layer's input whose extremes are those of a channel, as height and width; else its features."""

    @property
    def gate(self) -> int | None:
        """Which operand of `matmul` or `product` is a weight that a softmax, sigmoid or activation computed, if one."""

    def forward(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """Apply `linear` or `conv` to another input, with other weights."""

    def backward(self, s: Any, weight: Any) -> Any:
        """Apply the transpose of `linear` or `conv` with other weights to `s`, of the output's shape."""

    def hold_spread(self, g: Any) -> Any:
        """Return the gradient at the input of `norm` as if its standard deviation or root mean square were constant."""


@dataclass(frozen=True)
class AttentionRule:
    """A map of what attention layers attend to, in the place of a gradient: one number a token, or a patch.

    Attributes:
        name: for messages and results.
        by_gradient: weights count with the score's gradient by them; else alone, whatever the class.
        source: the paper.
    """

    name: str
    by_gradient: bool
    source: str = field(default="", repr=False)


Row = Callable[[Any, Local, Operation], Any]
"""`(g, local, op) -> g`: a gradient at an operation's output to the one at its operand, or to a tuple of them."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule for operations of any kind.

    Args:
        rows: for each kind of `KINDS` its function `(g, local, op) -> g`; what has no row passes its gradient. "first"
            stands for `linear` and `conv` from whose input no other is reached, and only where `values="relevance"`.
        name: for messages and results.
        values: what the map is. "gradient": `g` at the input. "input-times": `g` times the input. "relevance": the
            rows carry R / x, the first layers give R itself, and the map is R. "difference": the batch is the input
            and, behind it, a baseline, the rows compare the two, and the map is `g` times input less baseline.
        strict: refuse operations that no row is known for, in place of listing them in `a.skipped`.
        source: the paper.

    A row calls `local(h)`, the operation's own backward, as often as it likes; it is linear in `h`, so a row that
    halves is `local(g / 2)`. A row must be a pure function: it may run twice.

    Raises:
        InputError: a kind that does not exist.

    >>> Rule({"product": lambda g, local, op: local(g / 2)}, name="halved", values="input-times").name
    'halved'
    """

    rows: Mapping[str, Row] = field(repr=False)
    name: str = "custom"
    values: str = "gradient"
    strict: bool = False
    source: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        kinds = (*KINDS, FIRST)
        for kind in self.rows:
            if kind not in kinds:
                hint = did_you_mean(str(kind), kinds)
                raise InputError(f"a rule has no row for {kind!r}{hint} (kinds: {', '.join(kinds)})")
        if not self.rows:
            raise InputError("a rule needs a row, as in ut.Rule({'product': lambda g, local, op: local(g / 2)})")
        values = ("gradient", "input-times", "relevance", "difference")
        if self.values not in values:
            hint = did_you_mean(str(self.values), values)
            raise InputError(f"unknown values={self.values!r}{hint} (known: {', '.join(values)})")

    @property
    def is_attribution(self) -> bool:
        """Whether its maps share out the score itself, so that they add up to it as far as no bias absorbs some."""
        return self.values in ("input-times", "relevance")
