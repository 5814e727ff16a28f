"""What is differentiated where photographs are recorded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..heads import run_before_head


@contextmanager
def objective(model: torch.nn.Module, name: str) -> Iterator[Callable[[torch.Tensor, Sequence[int] | None], None]]:
    """Give what runs a batch forward and backward; the objective is summed, so each sample's gradient is its own.

    It is one of the scores before a final softmax or sigmoid.

    Inside, the weights are frozen: what is asked for are the gradients of what flows between the layers.

    Args:
        model: in eval mode.
        name: "predicted", "label" or "loss", as `undertow.recording.photographs` has them.
    """

    def run(x: torch.Tensor, labels: Sequence[int] | None) -> None:
        scores, _ = run_before_head(model, [x.requires_grad_()], None)
        if labels is None:
            scores.amax(1).sum().backward()
            return
        ids = torch.tensor(labels, device=x.device)
        if name == "label":
            scores.gather(1, ids[:, None]).sum().backward()
        else:
            torch.nn.functional.cross_entropy(scores, ids, reduction="sum").backward()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield run
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
