"""The way of small results from a device to the host: a few large copies that the caller does not wait for."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ...results import Observation

_LARGE = 1 << 22  # bytes from which a result is copied by itself
Slot = tuple[dict[str, Any], str]  # a state and the name of an array in it


class HostTransfer:
    """Copies the arrays of states to the host.

    Args:
        observations: whose states are to be copied.
        others: further states.

    Attributes:
        nbytes: how much memory all of them take.
    """

    def __init__(self, observations: list[Observation], others: Sequence[dict[str, Any]] = ()) -> None:
        self._observations = observations
        states = [*(state for observation in observations for state in observation.states), *others]
        self._slots = [(state, name) for state in states for name in state]
        self.nbytes = sum(getattr(state[name], "nbytes", 0) for state, name in self._slots)
        self._copies: list[tuple[list[Slot], Tensor]] = []
        self._events: list[Any] = []
        for slots in self._on_cuda():
            self._send(slots)

    def wait(self) -> list[Observation]:
        """Wait for the copies, and return the observations with NumPy arrays in their states; bfloat16 as its bits."""
        for event in self._events:
            event.synchronize()
        for slots, copied in self._copies:
            start = 0
            for state, name in slots:
                shape = state[name].shape
                state[name] = _numpy(copied[start : start + shape.numel()].view(shape))
                start += shape.numel()
        for state, name in self._slots:
            if isinstance(state[name], Tensor):
                state[name] = _numpy(state[name].cpu())
        return self._observations

    def _on_cuda(self) -> list[list[Slot]]:
        """Group what lies on CUDA devices, by device and dtype; large tensors go alone."""
        groups: dict[Any, list[Slot]] = defaultdict(list)
        for i, (state, name) in enumerate(self._slots):
            tensor = state[name]
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                alone = i if tensor.nbytes >= _LARGE else -1
                groups[tensor.device, tensor.dtype, alone].append((state, name))
        return list(groups.values())

    def _send(self, slots: list[Slot]) -> None:
        tensors = [state[name].reshape(-1) for state, name in slots]
        packed = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        pinned.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(packed.device))
        self._events.append(event)
        self._copies.append((slots, pinned))


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    host = tensor.detach()
    array: npt.NDArray[Any] = host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
    return array
