"""Conversion of tensors to and from NumPy, and the choice of their device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import InputError


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    host = (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy().copy()


def like(array: npt.NDArray[Any], x: torch.Tensor) -> torch.Tensor:
    """Make an array a tensor of the dtype and on the device of `x`."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(x.device, x.dtype)


def channels_last() -> bool:
    """Images are `(B, C, H, W)` in torch."""
    return False


def batch(arrays: Sequence[npt.NDArray[Any]], device: str) -> torch.Tensor:
    """Stack arrays of one shape into a batch on a device."""
    stacked = torch.stack([torch.from_numpy(array) for array in arrays])
    if torch.device(device).type != "cuda":
        return stacked.to(device)
    # the copy goes on while the next batch is made ready; the pinned memory is kept until it has ended
    return stacked.pin_memory().to(device, non_blocking=True)


def device(name: str) -> str:
    """Return the device that a name means; "auto" is the fastest one there is.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here; use --device auto or cpu") from error
    return name


def move(model: torch.nn.Module, device: str) -> None:
    """Move a network to a device."""
    model.to(device)
