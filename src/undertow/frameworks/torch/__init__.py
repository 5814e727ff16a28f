"""PyTorch: rules on the autograd graph of one call, on swapped modules, or by backward hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import InputError, ModelError, RuleError
from ...rules import RULES, gradient
from ..base import Answer, Met, Request
from .calls import chosen, eager, leaves, output_of, refuse_training, untouched
from .graph import ThroughGraph, Way, visited
from .layers import inside as inside
from .layers import layers as layers
from .layers import redrawn as redrawn
from .modules import ThroughHooks, ThroughSwap
from .nodes import Kind, hidden_reason, name_of, walk

WAYS: dict[str, type[Way]] = {"graph": ThroughGraph, "swap": ThroughSwap, "hook": ThroughHooks}


def explain(request: Request) -> Answer:
    """Explain the scores of one batch: one forward pass, and one backward pass for each target of a sample.

    Raises:
        InputError, ModelError, TargetError, RuleError: as `undertow.explain` says.
    """
    if not request.training:
        refuse_training(request.model)
    with untouched(request), ExitStack() as stack:
        sources, fed = leaves(request.inputs)
        way = None if request.rule is gradient else stack.enter_context(WAYS[request.through](request))
        output = output_of(eager(request.model) if way is None else way.network, fed)
        scores, ids, single = chosen(output, request.target, len(fed[0]))
        if scores.grad_fn is None:
            raise InputError("the scores do not depend on x by any gradient (detached, or made under no_grad)")
        if way is not None:
            stack.enter_context(visited(scores.grad_fn, way))
        maps = _maps(scores, sources, request)
        detached = scores.detach()
    if single:
        maps = tuple(None if m is None else m[:, 0] for m in maps)
        detached, ids = detached[:, 0], None if ids is None else ids[:, 0]
    return Answer(maps, ids, detached, Met() if way is None else way.met)


def _maps(scores: torch.Tensor, sources: list[torch.Tensor | None], request: Request) -> tuple[Any, ...]:
    """Return, for each input, a map for each target: `(B, K, ...)`."""
    wanted = [source for source in sources if source is not None]
    count = scores.shape[1]
    rows = []
    for k in range(count):
        ones = torch.zeros_like(scores)
        ones[:, k] = 1
        # a rule that calls `local` reads what a node saved a second time, which a freed graph may not allow
        keep = k + 1 < count or request.rule not in RULES.values()
        rows.append(_gradients(scores, wanted, ones, keep))
    stacked = iter([torch.stack(maps, 1) if count > 1 else maps[0].unsqueeze(1) for maps in zip(*rows, strict=True)])
    return tuple(None if source is None else next(stacked) for source in sources)


def _gradients(scores: torch.Tensor, wanted: list[torch.Tensor], ones: torch.Tensor, keep: bool) -> tuple[Any, ...]:
    try:
        found = torch.autograd.grad(scores, wanted, ones, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        met = walk(scores.grad_fn) if scores.grad_fn is not None else ()
        hidden = [n for n, kind in met if kind is Kind.HIDDEN and name_of(n) != "CopySlices"]
        if hidden:
            raise RuleError(f"no gradient passes {name_of(hidden[0])}: {hidden_reason(hidden[0])}") from error
        raise
    for place, found_one in enumerate(found):
        if found_one is None:
            raise InputError(f"input {place} does not influence the scores; bind it, as with functools.partial")
    return found


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to NumPy; bfloat16, which NumPy lacks, becomes float32."""
    host = tensor.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy().copy()


def batch(arrays: Sequence[npt.NDArray[Any]], device: str) -> torch.Tensor:
    """Stack arrays of one shape into a batch on a device."""
    return torch.stack([torch.from_numpy(array) for array in arrays]).to(device)


def like(array: npt.NDArray[Any], x: torch.Tensor) -> torch.Tensor:
    """Make an array a tensor of the dtype and on the device of `x`."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(x.device, x.dtype)


def scores(model: Callable[..., Any], x: torch.Tensor) -> npt.NDArray[Any]:
    """Return the model's scores as they are, `(B, classes)`.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    with torch.no_grad():
        found = output_of(eager(model), [x.clone()])
    if found.ndim != 2:
        raise ModelError(f"the model returned shape {tuple(found.shape)}, not (batch, classes)")
    return to_numpy(found)


def probabilities(model: Callable[..., Any], x: torch.Tensor) -> npt.NDArray[Any]:
    """Return the softmax of the model's scores, `(B, classes)` float64.

    Raises:
        ModelError: the output is not `(B, classes)`.
    """
    with torch.no_grad():
        scores = output_of(model, [x])
    if scores.ndim != 2:
        raise ModelError(f"the model returned shape {tuple(scores.shape)}, not (batch, classes)")
    return to_numpy(scores.double().softmax(1))


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


def place(model: torch.nn.Module, device: str) -> None:
    """Move a network to a device."""
    model.to(device)


@contextmanager
def objective(model: torch.nn.Module, name: str) -> Iterator[Callable[[torch.Tensor, Sequence[int] | None], None]]:
    """Give what runs a batch forward and backward; the objective is summed, so each sample's gradient is its own.

    Inside, the weights are frozen: what is asked for are the gradients of what flows between the layers.

    Args:
        model: in eval mode.
        name: "predicted", "label" or "loss", as `undertow.recording.photographs` has them.
    """

    def run(x: torch.Tensor, labels: Sequence[int] | None) -> None:
        scores = output_of(model, [x.requires_grad_()])
        if labels is None:
            scores.amax(1).sum().backward()
            return
        ids = torch.tensor(labels, device=x.device)
        if name == "label":
            scores.gather(1, ids[:, None]).sum().backward()
        else:
            torch.nn.functional.cross_entropy(scores, ids, reduction="sum").backward()

    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield run
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
