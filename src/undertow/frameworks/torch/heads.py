"""The last operation of a classifier, such as a softmax, and the scores before it.

Behind a softmax the score of a class falls whenever another's rises, and behind a saturated one no gradient is left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, ModelError, one_line
from ...outputs import Path
from ..base import AS_IS, Request
from .calls import eager, run, scores_of
from .internals import TorchDispatchMode

_NAMES = {"Softmax": "softmax", "LogSoftmax": "log-softmax", "Sigmoid": "sigmoid", "LogSigmoid": "log-sigmoid"}
_NODES = {f"{word}Backward0": name for word, name in _NAMES.items()}
_HEADS = {
    torch.ops.aten._softmax: "softmax",
    torch.ops.aten._log_softmax: "log-softmax",
    torch.ops.aten.sigmoid: "sigmoid",
    torch.ops.aten.sigmoid_: "sigmoid",
    torch.ops.aten.log_sigmoid_forward: "log-sigmoid",
}
_NODES_THAT_PASS = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0", "LogBackward0")
_THAT_PASS = (torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.alias, torch.ops.aten.log)


def head_name(scores: Tensor) -> str:
    """Return the last operation of what gave scores, by their graph: "softmax" or the like, "" for any other.

    A logarithm, a copy or another dtype after it does not count.

    >>> head_name(torch.log(torch.ones(1, 2, requires_grad=True).softmax(1)))
    'softmax'
    """
    node = scores.grad_fn
    while node is not None and type(node).__name__ in _NODES_THAT_PASS:
        node = node.next_functions[0][0]
    return _NODES.get(type(node).__name__, "")


def run_to_scores(
    request: Request,
    inputs: Sequence[Tensor],
    network: Callable[..., Any] | None = None,
    again: Callable[[], object] = lambda: None,
) -> tuple[Any, Path | None, str]:
    """Run a request's model; return what its target is to be read from, where in it, and the head that was taken off.

    Args:
        network: to run in place of the model.
        again: called before the model runs a second time, for what is before its head.

    Raises:
        InputError: the model cannot be called with the inputs in their structure. ModelError: as `run_before_head`.
    """
    call = request.bind(eager(request.model) if network is None else network)
    try:
        output = run(call, inputs)
    except (TypeError, AttributeError) as error:
        if request.is_plain:
            raise
        raise InputError(f"the model cannot be called with x in this structure ({one_line(error)})") from error
    name = "" if callable(request.target) else head_name(scores_of(output, request.output))
    if not name or request.head == AS_IS:
        return output, request.output, name
    del output  # and its graph, before the model runs again
    again()
    before, name = run_before_head(call, inputs, request.output)
    return before, None, name


def run_before_head(call: Callable[..., Any], inputs: Sequence[Tensor], path: Path | None) -> tuple[Tensor, str]:
    """Run the model; return the scores before its last operation, with their graph, and that operation's name.

    Where the last operation is no head, these are the model's own scores and "".

    Raises:
        ModelError: the head overwrites its input; or as `scores_of`.
    """
    with _Heads() as heads:
        scores = scores_of(run(call, inputs), path)
    name, before, result = heads.behind.get(id(scores), ("", scores, None))
    if before is result:
        raise ModelError(
            f"the model's last {name} overwrites the scores that it is given; write it out of place, as in "
            f"torch.{name}(x), or pass head='as is'"
        )
    return before, name


class _Heads(TorchDispatchMode):
    """Keeps what each softmax and sigmoid is given.

    Attributes:
        behind: by the id of a result: the operation's name, its input, and the result itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.behind: dict[int, tuple[str, Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _HEADS and _is_over_classes(args):
            kept = result[0] if isinstance(result, tuple) else result
            self.behind[id(kept)] = _HEADS[packet], args[0], kept
        elif packet in _THAT_PASS and id(args[0]) in self.behind:
            name, before, _ = self.behind[id(args[0])]
            self.behind[id(result)] = name, before, result
        return result


def _is_over_classes(args: Sequence[Any]) -> bool:
    """Whether a softmax is one over an axis other than the batch; of anything else, True."""
    return len(args) < 2 or not isinstance(args[1], int) or args[1] % args[0].ndim != 0
