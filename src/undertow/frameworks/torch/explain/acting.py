"""What makes a forward pass depend on chance or on the rest of its batch: random operations, batch statistics."""

from collections import Counter
from typing import Any

import torch
from torch.autograd.graph import Node

from ....errors import ModelError
from ...base import Request
from ..calls import eager, module_of, modules_in_training, uncompiled
from ..internals import TorchDispatchMode
from ..nodes import all_nodes_behind, uses_batch_statistics
from ..state import RngAndBuffers

DROPOUT, RRELU, NORM = "dropout", "RReLU", "batch norm in training"
_NAMES = {"bernoulli": DROPOUT, "native_dropout": DROPOUT, "rrelu_with_noise": RRELU}


def what_acts(request: Request, root: Node | None, start: RngAndBuffers) -> dict[str, int]:
    """Return what acted in a forward pass that has just ended, by name and how often.

    Noise of another kind in a module that is wholly in eval mode is the module's design, and is not refused.

    Args:
        root: the graph node of the scores.
        start: the state before the pass: where a generator has moved since, the model runs once more, and this thread's
            random operations are counted.

    Raises:
        ModelError: something acted, and `training=True` was not passed.
    """
    counts: dict[str, int] = {}
    if root is not None and (statistics := sum(map(uses_batch_statistics, all_nodes_behind(root)))):
        counts[NORM] = statistics
    if start.has_drawn():
        counts |= _random_operations(request, start)
    if counts and not request.training and not (counts.keys().isdisjoint((DROPOUT, RRELU, NORM)) and _in_eval(request)):
        listed = ", ".join(f"{name} x{count}" for name, count in counts.items())
        raise ModelError(
            f"the map would depend on chance or on the rest of the batch, since these acted: {listed}; "
            "call eval() on every module that the model uses, or pass training=True"
        )
    return counts


def _in_eval(request: Request) -> bool:
    module = module_of(uncompiled(request.model))
    return module is not None and not any(modules_in_training(module))


def _random_operations(request: Request, start: RngAndBuffers) -> dict[str, int]:
    fed = [x.clone().detach() for x in request.inputs]
    with start.restored(), _RandomOperations() as mode:
        request.bind(eager(request.model))(*fed)
    return dict(mode.counts)


class _RandomOperations(TorchDispatchMode):
    """Counts the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = func.overloadpacket.__name__.rstrip("_")
            self.counts[_NAMES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))
