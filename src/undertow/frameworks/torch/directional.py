"""Forward-mode autograd's word on a directional derivative."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


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
