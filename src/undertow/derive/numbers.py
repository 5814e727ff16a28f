"""Numerical checks of derivatives of networks: values at a random point, and expressions evaluated there."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .chain import Derivative
from .graph import END, Graph

Array = npt.NDArray[np.float64]
POINTS = 5


def _sigmoid(a: Array) -> Array:
    return 0.5 * (1 + np.tanh(a / 2))


# name: (activation, its slope)
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sigmoid": (_sigmoid, lambda a: _sigmoid(a) * (1 - _sigmoid(a))),
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "softplus": (lambda a: np.logaddexp(0, a), _sigmoid),
}


class Values(dict[str, Array]):
    """Arrays by the names of quantities; `x2[3]` is the third column of `x2`, and `x2[d]` is all columns.

    >>> Values({"x2": np.array([[5.0, 6.0, 7.0]])})["x2[3]"]
    array([[7.]])
    """

    def __missing__(self, name: str) -> Array:
        match = re.fullmatch(r"([xv].*)\[([a-z]|\d+)\]", name)
        if match is None:
            raise KeyError(name)
        vector = self[match[1]]
        return vector if match[2].isalpha() else vector[..., int(match[2]) - 1 : int(match[2])]


def random_values(
    order: Sequence[str],
    sources: Mapping[str, Sequence[str]],
    nodes: Sequence[str],
    activation: str,
    seed: int = 0,
    width: int = 2,
) -> Values:
    """Return random weights, biases, targets and five data points, and the values of all neurons there.

    Args:
        order: the neurons, each after those that it reads.
        sources: for each neuron the inputs and neurons that it reads.
        nodes: inputs and neurons; random numbers are drawn for inputs and targets in this order.
        activation: "sigmoid", "tanh", "relu" or "softplus".
        seed: of NumPy's generator; each activation draws numbers of its own.
        width: the minimum number of components of an input; each has up to two more.

    Returns:
        float64, by name: w[2,5] and b[3] of shape (1,), v[1,1] of (D,), x1 of (5, D), n4, y7 and g'(a4) of (5, 1).
    """
    rng = np.random.default_rng([seed, list(ACTIVATIONS).index(activation)])
    g, slope = ACTIVATIONS[activation]
    values = Values()
    for node in nodes:
        if node[0] == "x":
            values[node] = rng.standard_normal((POINTS, rng.integers(width, width + 3)))
    for neuron in order:
        i = neuron[1:]
        values[f"b[{i}]"] = rng.standard_normal(1) * 0.5
        summed = np.broadcast_to(values[f"b[{i}]"], (POINTS, 1))
        for source in sources[neuron]:
            letter = "w" if source[0] == "n" else "v"
            size = values[source].shape[1]
            weight = rng.standard_normal(size) * np.sqrt(2 / (len(sources[neuron]) * size))
            values[f"{letter}[{source[1:]},{i}]"] = weight
            summed = summed + (values[source] * weight).sum(1, keepdims=True)
        values[neuron], values[f"g'(a{i})"] = g(summed), slope(summed)
    read = {source for names in sources.values() for source in names}
    for node in nodes:
        if node not in read:
            values[f"y{node[1:]}"] = rng.standard_normal((POINTS, 1))
    return values


def with_partials(graph: Graph, values: Values) -> Values:
    """Return the values and those of every ∂n_k/∂n_i and ∂E/∂n_j, each `(5, 1)`."""
    extended = Values(values)
    for node, readers in graph.readers.items():
        for reader in readers:
            partial = graph.partial(reader, node)
            if reader == END:
                extended[partial.symbol.text] = 2 * (values[node] - values[f"y{node[1:]}"])
            else:
                extended[partial.symbol.text] = values[f"g'(a{reader[1:]})"] * values[f"w[{node[1:]},{reader[1:]}]"]
    return extended


def evaluate(expression: Any, values: Mapping[str, Array]) -> Array:
    """Evaluate a SymPy expression of sums, products and powers; shared subexpressions are computed once.

    >>> import sympy
    >>> a, b = sympy.symbols("a b")
    >>> evaluate(a * (a + 2 * b), {"a": np.array([3.0]), "b": np.array([0.5])})
    array([12.])
    """
    computed: dict[int, Any] = {}
    stack = [expression]
    while stack:
        node = stack[-1]
        waiting = [] if node.is_Atom or node.is_Function else [arg for arg in node.args if id(arg) not in computed]
        if waiting:
            stack.extend(waiting)
            continue
        computed[id(stack.pop())] = _value(node, values, computed)
    return computed[id(expression)]  # type: ignore[no-any-return]


def _value(node: Any, values: Mapping[str, Array], computed: dict[int, Any]) -> Any:
    if node.is_Number:
        return float(node)
    if node.is_Symbol or node.is_Function:
        return values[node.name if node.is_Symbol else str(node)]
    operands = [computed[id(arg)] for arg in node.args]
    result = operands[0]
    for operand in operands[1:]:
        result = result * operand if node.is_Mul else result + operand if node.is_Add else result**operand
    return result


def difference(derivative: Derivative, expression: Any, values: Values, autograd: Values) -> float:
    """Return the largest difference between an expression and autograd over autograd's largest absolute value."""
    values = Values(values)
    for _, last in derivative.ends:
        if last is not None:
            product: Any = 1.0
            for factor in last.closed_form:
                product = product * values[factor.text]
            values[last.symbol.text] = product
    ours = np.broadcast_to(evaluate(expression, values), (POINTS, autograd[derivative.wrt.text].shape[-1]))
    if derivative.summed:
        ours = ours.sum(0)
    return relative_difference(ours, autograd[derivative.wrt.text])


def relative_difference(ours: Array, theirs: Array) -> float:
    """Return the largest absolute difference over the largest absolute value of `theirs`; 0 where both are zero."""
    largest = float(np.abs(ours - theirs).max())
    return largest / float(np.abs(theirs).max() or 1.0)
