"""What is differentiated where photographs are recorded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...base import Objective
from ..heads import run_before_head


@contextmanager
def objective(model: torch.nn.Module, name: str) -> Iterator[Objective]:
    """Give what runs a batch forward and backward; the objective is summed, so each sample's gradient is its own.

    It is one of the scores before a final softmax or sigmoid.
    It returns each sample's class, the one with the highest score or the label, and the score of that class.

    Inside, the weights are frozen: what is asked for are the gradients of what flows between the layers.

    Args:
        model: in eval mode.
        name: "predicted", "label" or "loss", as `undertow.recording.photographs` has them.
    """

    def run(x: torch.Tensor, labels: Sequence[int] | None) -> tuple[list[int], list[float]]:
        scores, _ = run_before_head(model, [x.requires_grad_()], None)
        ids = scores.argmax(1) if labels is None else torch.tensor(labels, device=x.device)
        of_class = scores.gather(1, ids[:, None])[:, 0]
        if name == "loss":
            torch.nn.functional.cross_entropy(scores, ids, reduction="sum").backward()
        else:
            (scores.amax(1) if labels is None else of_class).sum().backward()
        return ids.tolist(), of_class.tolist()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield run
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
