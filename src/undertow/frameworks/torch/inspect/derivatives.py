"""Derivatives by autograd, with which those of `undertow.derive` are compared."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": torch.nn.functional.softplus,
}


def gradients(
    order: Sequence[str], edges: Sequence[tuple[str, str]], values: Mapping[str, npt.NDArray[Any]], activation: str
) -> dict[str, npt.NDArray[np.float64]]:
    """Return autograd's derivatives of E by every weight, bias, input and neuron, by name, in float64.

    Args:
        order: the neurons, each after those that it reads.
        edges: such as ("x1", "n1").
        values: weights `w[1,2]` and `b[2]` `(1,)`, `v[1,1]` `(D,)`, inputs `x1` `(P, D)`, targets `y2` `(P, 1)`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        Of the shape of the quantity; of neurons `(P, 1)`, each data point's own.
    """
    g = ACTIVATIONS[activation]
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in values.items() if name[0] in "wbvx"}
    points = next(len(value) for name, value in values.items() if name[0] == "y")
    neurons: dict[str, torch.Tensor] = {}
    for name in order:
        summed = leaves[f"b[{name[1:]}]"].expand(points, 1)  # each data point has a value of its own
        for source in (a for a, b in edges if b == name):
            pair = f"[{source[1:]},{name[1:]}]"
            if source[0] == "x":
                summed = summed + leaves[source] @ leaves[f"v{pair}"][:, None]
            else:
                summed = summed + neurons[source] * leaves[f"w{pair}"]
        neurons[name] = g(summed)
    error = torch.zeros((), dtype=torch.float64)
    for name in neurons.keys() - {source for source, _ in edges}:
        error = error + ((neurons[name] - torch.tensor(values[f"y{name[1:]}"])) ** 2).sum()
    wanted = {**leaves, **neurons}
    by_value = torch.autograd.grad(error, list(wanted.values()))
    return {name: gradient.numpy() for name, gradient in zip(wanted, by_value, strict=True)}


def jvp(
    function: Callable[[Mapping[str, Any], Any], torch.Tensor],
    values: Mapping[str, npt.NDArray[Any]],
    wrt: str,
    direction: npt.NDArray[Any],
) -> npt.NDArray[np.float64]:
    """Return the derivative of a function along a direction by `torch.func.jvp`.

    Args:
        function: of matrices by name, and of the module that computes.
        values: the point, float64.
        wrt: the matrix that varies.
        direction: of its shape.
    """
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of torch, about its own torch.jit
        moved = torch.func.jvp(
            lambda x: function({**tensors, wrt: x}, torch), (tensors[wrt],), (torch.from_numpy(direction),)
        )
    return moved[1].numpy()  # type: ignore[no-any-return]
