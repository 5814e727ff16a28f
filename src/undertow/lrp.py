"""Layer-wise relevance propagation for convolutional networks: how a layer shares out the relevance of its output.

Every edge carries g = R / x, relevance by value, so ReLU, max-pooling, views, sums and means are right as they are, and
a row begins with R = g·y. The first layers, whose rule need not be proportional to x, return R itself. y is the layer's
output with its bias, and with the batch norm behind it.

| row | shares R out over its inputs in proportion to |
|---|---|
| epsilon | x·w, where y + ε·sign(y) is the whole: the ε absorbs |
| alpha_beta(α, β) | α times the positive x·w, less β times the negative ones; z⁺ is (1, 0) |
| gamma(c) | x·(w + c·w⁺) where the output is positive, x·(w + c·w⁻) where it is negative |
| flat | 1: a first layer shares equally |
| box(low, high) | x·w - low·w⁺ - high·w⁻, of a first layer whose inputs lie between low and high: z^B |
| excitation | x·w⁺, without bias: excitation backprop |

Source: ε and αβ, Bach et al. 2015, doi 10.1371/journal.pone.0130140; z⁺ and z^B, Montavon et al. 2017,
arXiv 1512.02479; γ and composites, Montavon et al. 2019, doi 10.1007/978-3-030-28954-6_10; excitation backprop, Zhang
et al. 2016, arXiv 1608.00507.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

from .tables import Local, Operation, Row, may_hold, relu

EPSILON = 1e-6


@singledispatch
def stabilized(z: Any, epsilon: float = EPSILON) -> Any:
    """Return z + epsilon·sign(z), with sign(0) = 1, in the shape and dtype of z.

    >>> import numpy as np
    >>> stabilized(np.array([-1.0, 0.0]), 0.5)
    array([-1.5,  0.5])
    """
    import numpy as np  # here: the command names rules without computing, and a TAB waits for its imports

    return np.where(z < 0, z - epsilon, z + epsilon)


def epsilon(by: float = EPSILON) -> Row:
    """Return the ε rule."""

    def row(g: Any, local: Local, op: Operation) -> Any:
        y = op.output
        return local(g * (y / stabilized(y, by)))

    return row


def alpha_beta(alpha: float, beta: float) -> Row:
    """Return the αβ rule, in which alpha - beta is 1; (1, 0) is z⁺."""

    def row(g: Any, local: Local, op: Operation) -> Any:
        relevance, w, b = g * op.output, op.weight, op.bias
        w_up, b_up = relu(w), None if b is None else relu(b)
        shared = share(relevance, op, w_up, lambda: w - w_up, b_up)
        if not beta:
            return shared
        return alpha * shared - beta * share(relevance, op, w - w_up, lambda: w_up, None if b is None else b - b_up)

    return row


def gamma(by: float = 0.25) -> Row:
    """Return the γ rule, for inputs and outputs of either sign."""

    def row(g: Any, local: Local, op: Operation) -> Any:
        relevance, y, w, b = g * op.output, op.output, op.weight, op.bias
        w_more, b_more = w + by * relu(w), None if b is None else b + by * relu(b)
        below = relevance * (y < 0)
        if not (op.has_negative_output and may_hold(below)):
            return share(relevance, op, w_more, lambda: w + by * (w - relu(w)), b_more)
        w_less, b_less = w + by * (w - relu(w)), None if b is None else b + by * (b - relu(b))
        above = share(relevance * (y > 0), op, w_more, lambda: w_less, b_more)
        return above + share(below, op, w_less, lambda: w_more, b_less)

    return row


def excitation(g: Any, local: Local, op: Operation) -> Any:
    """Share over excitatory connections, x⁺ by w⁺; a bias takes nothing."""
    x, w_up = relu(op.input), relu(op.weight)
    return op.backward(g * op.output / stabilized(op.forward(x, w_up)), w_up) * (op.input > 0)


def flat(g: Any, local: Local, op: Operation) -> Any:
    """Return the relevance of a first layer's inputs, shared equally."""
    ones, w = op.input * 0 + 1, op.weight * 0 + 1
    return op.backward(g * op.output / stabilized(op.forward(ones, w)), w)


def box(low: Any = None, high: Any = None) -> Row:
    """Return the z^B rule of a first layer.

    Args:
        low, high: the bounds of its inputs, numbers or tensors that broadcast to them, such as `(1, C, 1, 1)`; None
            takes the lowest and highest value of each channel of each sample.
    """

    def row(g: Any, local: Local, op: Operation) -> Any:
        x, w = op.input, op.weight
        w_up = relu(w)
        w_down = w - w_up
        bottom = x * 0 + (_extreme(op, "amin") if low is None else low)
        top = x * 0 + (_extreme(op, "amax") if high is None else high)
        z = op.forward(x, w) - op.forward(bottom, w_up) - op.forward(top, w_down)
        s = g * op.output / stabilized(z)
        return x * op.backward(s, w) - bottom * op.backward(s, w_up) - top * op.backward(s, w_down)

    return row


def _extreme(op: Operation, name: str) -> Any:
    """Return each sample's and channel's lowest or highest value, such as `(B, C, 1, 1)`; each sample's of features."""
    x, axes = op.input, op.positions
    return getattr(x, name)(axes, keepdim=True) if hasattr(x, name) else getattr(x, name[1:])(axes, keepdims=True)


def share(
    relevance: Any, op: Operation, w: Any, w_of_negative: Callable[[], Any], bias: Any, epsilon: float = EPSILON
) -> Any:
    """Share R out over x⁺·w + x⁻·w_of_negative + bias, epsilon·sign added; return R / x at the input."""
    x = op.input
    if not op.has_negative_input:
        return op.backward(relevance / stabilized(op.forward(x, w, bias), epsilon), w)
    is_negative = x < 0
    x_up, other = relu(x), w_of_negative()
    s = relevance / stabilized(op.forward(x_up, w, bias) + op.forward(x - x_up, other), epsilon)
    return op.backward(s, w) * ~is_negative + op.backward(s, other) * is_negative
