"""What an operation was given: read from its graph node, or noted below autograd during the forward pass."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import RuleError
from ..internals import (
    TorchDispatchMode,
    beside_the_engine,
    next_sequence_number,
    saved,
    sequence_number,
    version,
)
from ..nodes import name_of

aten = torch.ops.aten
Read = Callable[[Any, str], Any]
"""`SavedTensors.read`."""
_Calls = dict[Any, tuple[str, tuple[int, ...]]]

# By what is called: the name of the node less its number, and where its operands stand among the arguments.
_ELEMENTWISE: _Calls = {
    **{getattr(aten, name): (f"{name.capitalize()}Backward", (0,)) for name in ("tanh", "sigmoid", "exp")},
    **{getattr(aten, name): (f"{name.capitalize()}Backward", (0,)) for name in ("sqrt", "rsqrt", "reciprocal")},
}
_WEIGHTED: _Calls = {
    aten.convolution: ("ConvolutionBackward", (0, 1, 2)),
    aten.addmm: ("AddmmBackward", (0, 1, 2)),
    aten.mm: ("MmBackward", (0, 1)),
    aten.bmm: ("BmmBackward", (0, 1)),
    aten.baddbmm: ("BaddbmmBackward", (0, 1, 2)),
    aten.mv: ("MvBackward", (0, 1)),
    aten.native_batch_norm: ("NativeBatchNormBackward", (0, 1, 2)),
    aten._native_batch_norm_legit: ("NativeBatchNormLegitBackward", (0, 1, 2)),
    aten._native_batch_norm_legit_no_training: ("NativeBatchNormLegitNoTrainingBackward", (0, 1, 2)),
    aten.cudnn_batch_norm: ("CudnnBatchNormBackward", (0, 1, 2)),
    aten.miopen_batch_norm: ("MiopenBatchNormBackward", (0, 1, 2)),
}
# For a constant of each channel, which no large tensor is.
_SHIFTED: _Calls = {aten.add: ("AddBackward", (0, 1)), aten.sub: ("SubBackward", (0, 1))}
_MOST_CHANNELS = 1 << 16
_ALWAYS: _Calls = {aten.threshold: ("ThresholdBackward", (0, 2))}  # rare, and its value is told nowhere else
_NEEDED_BY: dict[str, _Calls] = {
    "relu": {aten.relu: ("ReluBackward", (0,))},
    "smooth": _ELEMENTWISE,
    "conv": _WEIGHTED | _SHIFTED,
    "linear": _WEIGHTED | _SHIFTED,
}


class SavedTensors:
    """What the nodes of one call saved, read in its backward passes beside the engine, which reads it too.

    A checkpointed segment is run once more for all that is read here, and gives each tensor once: hence kept.
    """

    def __init__(self) -> None:
        self._reader = beside_the_engine()
        self._kept: dict[tuple[Any, str], Any] = {}

    def read(self, node: Any, name: str) -> Any:
        """Return what a node saved under a name, a tensor detached.

        Raises:
            RuleError: it can be read once only, which the engine needs to do.
            AttributeError: it saved nothing of that name.
        """
        key = (node, name)
        if key not in self._kept:
            try:
                value = saved(node, name, self._reader)
            except RuntimeError as error:
                raise RuleError(
                    f"{name_of(node)} lets what it saved be read once only (checkpointed?), and the rule reads it too; "
                    "switch checkpointing off"
                ) from error
            self._kept[key] = value.detach() if isinstance(value, Tensor) else value
        return self._kept[key]

    def clear(self) -> None:
        """Let go of all tensors."""
        self._kept.clear()


@dataclass(frozen=True)
class _Note:
    node: str
    operands: tuple[Any, ...]
    versions: tuple[int, ...]


class ForwardNotes(TorchDispatchMode):
    """Notes operands, by the number of the node that autograd has just made for the call.

    Args:
        kinds: those whose operands a rule's rows read.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        wanted = [_ALWAYS, *(calls for kind, calls in _NEEDED_BY.items() if kind in kinds)]
        self._noted = {call: how for calls in wanted for call, how in calls.items()}
        self._in_place = {getattr(aten, f"{c.__name__}_"): c for c in self._noted if hasattr(aten, f"{c.__name__}_")}
        self._notes: dict[int, _Note] = {}
        self.saved = SavedTensors()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        in_place = self._in_place.get(packet)
        how = self._noted.get(packet if in_place is None else in_place)
        if how is not None:
            node, places = how
            operands = tuple(args[i] if i < len(args) else None for i in places)
            if (packet if in_place is None else in_place) in _SHIFTED:
                operands = tuple(x if isinstance(x, Tensor) and x.numel() <= _MOST_CHANNELS else None for x in operands)
            if in_place is not None:  # the call is about to overwrite it
                operands = tuple(x.clone() if isinstance(x, Tensor) else x for x in operands)
            versions = tuple(version(x) if isinstance(x, Tensor) else 0 for x in operands)
            # a later call without a node of its own has the same number
            self._notes.setdefault(next_sequence_number() - 1, _Note(node, operands, versions))
        return func(*args, **(kwargs or {}))

    def has(self, node: Any) -> bool:
        """Whether a node's operands were noted."""
        note = self._notes.get(sequence_number(node))
        return note is not None and note.node == _name(node)

    def operand(self, node: Any, i: int) -> Any:
        """Return an operand, a tensor or a number; None where none was given or noted, or it was overwritten since."""
        note = self._notes.get(sequence_number(node))
        if note is None or note.node != _name(node):
            return None
        x = note.operands[i]
        return x if not isinstance(x, Tensor) or version(x) == note.versions[i] else None

    def was_given(self, node: Any, i: int) -> bool:
        """Whether a noted node had an operand there."""
        return self.has(node) and self._notes[sequence_number(node)].operands[i] is not None

    def clear(self) -> None:
        """Let go of all tensors."""
        self._notes.clear()
        self.saved.clear()


def _name(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789")  # an in-place call's node may have another number
