"""What a forward pass may change beside its output: the random state, the buffers, and the autocast settings."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..own_passes import own_pass
from .calls import module_of


class RngAndBuffers:
    """The random state, a module's buffers and the autocast settings at one moment, to go back to."""

    def __init__(self, module: nn.Module | None, tensors: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._buffers = [] if module is None else [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        devices = {t.device for t in tensors}
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        kinds = {d.type for d in devices} & {"cpu", "cuda"}
        self._casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]

    def has_drawn(self) -> bool:
        """Whether a random generator has moved since."""
        if not torch.equal(torch.get_rng_state(), self._cpu):
            return True
        return any(not torch.equal(torch.cuda.get_rng_state(d), state) for d, state in self._cuda.items())

    def restore(self) -> None:
        """Restore the random state, and the buffers that have changed."""
        if not torch.equal(torch.get_rng_state(), self._cpu):
            torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for buffer, former in self._buffers:
            if not torch.equal(buffer, former):  # any write, even of the same values, invalidates saved tensors
                buffer.data.copy_(former)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the random state and the buffers, and inside the context the autocast settings too."""
        self.restore()
        before = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind, _, _ in self._casts]
        try:
            self._set(self._casts)
            yield
        finally:
            self._set(before)

    @staticmethod
    def _set(casts: list[tuple[str, torch.dtype, bool]]) -> None:
        for kind, dtype, enabled in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def unchanged(model: Callable[..., Any], inputs: Sequence[Tensor], buffers: bool) -> Iterator[RngAndBuffers]:
    """Restore at the end the random state, and the buffers where they may change; yield what restores them earlier."""
    state = RngAndBuffers(module_of(model) if buffers else None, inputs)
    try:
        with own_pass(), torch.inference_mode(False), torch.enable_grad():
            yield state
    finally:
        state.restore()
