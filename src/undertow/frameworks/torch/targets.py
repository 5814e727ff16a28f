"""Which scores a target means: of classes, of places in dense outputs, of a unit inside, of a detector's box."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ...errors import InputError, ModelError, TargetError
from ...layouts import find_layout
from ...outputs import Path, head_of
from ...targets import Box, Region, Token, Unit
from ..base import Request
from ..targets import from_one_hot, places, refuse_missing, top
from .arrays import like
from .calls import has_channels_last, module_of, scores_of, uncompiled
from .layers import channel_axis, record_outputs


def with_function(request: Request, network: Callable[..., Any], stack: ExitStack) -> Request:
    """Return a request whose target is a function where it was a unit or a box.

    Args:
        network: that runs in place of the model; the unit's layer is hooked until the stack closes.
    """
    if isinstance(request.target, Unit):
        outputs = record_outputs(network, [request.target.layer], stack)
        return replace(request, target=partial(_unit_scores, request, request.target, outputs))
    if isinstance(request.target, Box):
        return replace(request, target=partial(_box_scores, request.target, request.model))
    return request


def target_scores(
    output: Any, target: Any, batch: int | None, path: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Return the scores to explain, `(B, K)`, their class ids or None, and whether each sample has a single target.

    Args:
        output: as the model returned it.
        target: as `undertow.explain` takes it; a function is given the output, or the part of it that `path` names.
        batch: the number of samples, where the inputs tell.
        path: the part of the output that holds the scores.

    Raises:
        TargetError: a class that the model does not have, or a target that does not fit the batch.
        ModelError: the output is not `(B, classes)`, or a score to explain is not finite.
    """
    if callable(target):
        given = output if path is None else head_of(output, path)
        scores, ids, single = _function_scores(target(given), batch).unsqueeze(1), None, True
    else:
        others = isinstance(output, tuple | list) and len(output) > 1 and path is None
        scores, ids, single = _chosen(scores_of(output, path), target, batch, others)
    finite = scores.detach().isfinite()
    if not bool(finite.all()):
        sample, k = finite.logical_not().nonzero()[0].tolist()
        value = scores.detach()[sample, k].item()
        raise ModelError(f"the score of sample {sample} is {value}; check its pixels and the model's weights for NaN")
    return scores, ids, single


def _chosen(
    scores: torch.Tensor, target: Any, batch: int | None, has_others: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Return the scores `(B, K)` that a target means among those of a model, `(B, ...)`.

    Args:
        has_others: the model returned other parts beside these scores.
    """
    shape, target_is_class = tuple(scores.shape), target is None or isinstance(target, str)
    if not shape or len(shape) < 2 or shape[0] != (batch or shape[0]):
        wanted = ", not (batch, classes)" if batch is None else f" for a batch of {batch}, not ({batch}, classes)"
        raise ModelError(
            f"the model returned shape {shape}{wanted}; {'name another part of it, as in output=1, or ' * has_others}"
            "pass target=lambda output: ... that returns one score for each sample"
        )
    if isinstance(target, Region):
        weights = like(target.weights(shape), scores)
        return (scores * weights).flatten(1).sum(1, keepdim=True), None, True
    if isinstance(target, Token):
        return _chosen(_at_position(scores, target.position), target.target, batch)
    if scores.ndim == 2:
        ids, single = _class_ids(scores, target)
        return scores.gather(1, ids), ids, single
    if target_is_class:
        raise ModelError(
            f"the model returned shape {shape}, not ({shape[0]}, classes): say which of its scores, as in "
            f"target=({', '.join('0' * (len(shape) - 1))}), ut.targets.where(mask, class), ut.targets.token(id) or a "
            "function of the output"
        )
    indices, single = places(target.detach().cpu().numpy() if isinstance(target, torch.Tensor) else target, shape)
    along = [torch.as_tensor(indices[..., axis], device=scores.device) for axis in range(len(shape) - 1)]
    return scores[(torch.arange(shape[0], device=scores.device)[:, None], *along)], None, single


def _at_position(scores: torch.Tensor, position: Any) -> torch.Tensor:
    """Return the scores at one position of each sample, `(B, classes)`, from `(B, positions, classes)`."""
    if scores.ndim != 3:
        raise TargetError(
            f"a token has scores (batch, positions, vocabulary), and the model returned {tuple(scores.shape)}"
        )
    positions = np.asarray(position.cpu() if isinstance(position, torch.Tensor) else position)
    batch, length = scores.shape[:2]
    if positions.dtype.kind not in "iu" or positions.shape not in ((), (batch,)):
        raise TargetError(f"position={position!r} is not understood; pass a number, or one for each of {batch} samples")
    if ((positions < -length) | (positions >= length)).any():
        raise TargetError(f"position {position} is out of range: there are positions 0 to {length - 1}")
    rows = torch.as_tensor(np.broadcast_to(positions, (batch,)).copy(), device=scores.device)
    return scores[torch.arange(batch, device=scores.device), rows]


def _unit_scores(request: Request, target: Unit, outputs: Mapping[str, torch.Tensor], _: Any) -> torch.Tensor:
    """Return the scores `(B,)` of a unit, whose layer has just run."""
    layer = target.layer
    if layer not in outputs:
        raise InputError(f"layer {layer!r} is not reached from x by any gradient, or returns no tensor; name another")
    values = outputs[layer]
    axis = target.axis if target.axis is not None else _unit_axis(request, layer, values)
    channels = values.movedim(axis, 1)
    if not 0 <= target.channel < channels.shape[1]:
        raise TargetError(f"layer {layer!r} has channels 0 to {channels.shape[1] - 1}; there is no {target.channel}")
    plane = channels[:, target.channel]
    if target.place is None:
        return plane.reshape(len(plane), -1).sum(1)
    if len(target.place) != plane.ndim - 1 or any(
        not -n <= i < n for i, n in zip(target.place, plane.shape[1:], strict=True)
    ):
        raise TargetError(f"layer {layer!r} has places {tuple(plane.shape[1:])}; there is none at {target.place}")
    index: tuple[Any, ...] = (slice(None), *target.place)
    return plane[index]


def _unit_axis(request: Request, layer: str, values: torch.Tensor) -> int:
    if values.ndim == 2:
        return 1
    told, x = channel_axis(request.model, layer, values.ndim), request.inputs[0]
    if told is not None and has_channels_last(request.model):
        return told
    if x.is_floating_point() and x.ndim >= 3:
        return find_layout(layer, values.shape, x.shape, told).channel_axis
    if told is None:
        raise InputError(
            f"layer {layer!r} gives {tuple(values.shape)}: which of its axes are channels cannot be told; pass axis="
        )
    return told


def _box_scores(target: Box, model: Any, output: Any) -> torch.Tensor:
    """Return the score `(B,)` of a kept box of each image."""
    if isinstance(output, tuple | list) and output and all(isinstance(o, Mapping) and "scores" in o for o in output):
        kept = [(image["boxes"], image["scores"]) for image in output]
    else:
        kept = _queries(model, output)
    return torch.stack([scores[_box_index(target, boxes, i)] for i, (boxes, scores) in enumerate(kept)])


def _queries(model: Any, output: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each image's boxes (x0, y0, x1, y1) and the logits of their likeliest classes, the surest query first."""
    parts = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    logits, boxes = parts.get("logits", parts.get("pred_logits")), parts.get("pred_boxes")
    if logits is None or boxes is None:
        raise TargetError(
            "the output is no detector's that is known: torchvision's has boxes and scores for each image, DETR's "
            "pred_boxes and logits; pass a function of the output"
        )
    known = getattr(getattr(module_of(uncompiled(model)), "config", None), "num_labels", logits.shape[-1] - 1)
    classes = logits[..., : min(known, logits.shape[-1])]  # without the class "no object", where there is one
    best = classes.detach().argmax(-1, keepdim=True)
    scores = classes.gather(-1, best).squeeze(-1)
    has_no_object = logits.shape[-1] > classes.shape[-1]
    sure = (logits.softmax(-1) if has_no_object else logits).detach().gather(-1, best).squeeze(-1)
    centre, size = boxes.detach()[..., :2], boxes.detach()[..., 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], -1)
    order = sure.argsort(-1, descending=True)
    return [(corners[i][row], scores[i][row]) for i, row in enumerate(order)]


def _box_index(target: Box, boxes: torch.Tensor, image: int) -> int:
    """Return which of an image's boxes `(N, 4)` is meant."""
    if target.near is None:
        if not 0 <= target.index < len(boxes):
            raise TargetError(
                f"the detector keeps {len(boxes)} box(es) of image {image}; there is no box {target.index}"
            )
        return target.index
    near = torch.tensor(target.near, device=boxes.device, dtype=boxes.dtype)
    low, high = torch.maximum(boxes[:, :2], near[:2]), torch.minimum(boxes[:, 2:], near[2:])
    common = (high - low).clamp(min=0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (near[2:] - near[:2]).prod() - common
    if not bool((common > 0).any()):
        raise TargetError(f"no box that the detector keeps of image {image} overlaps near={target.near}")
    return int((common / union).argmax())


def _function_scores(scores: Any, batch: int | None) -> torch.Tensor:
    if (
        isinstance(scores, torch.Tensor)
        and scores.ndim == 1
        and len(scores) == (len(scores) if batch is None else batch)
    ):
        return scores
    batch = "B" if batch is None else batch  # type: ignore[assignment]
    returned = f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
    raise TargetError(f"the target function returned {returned}; it must return one score for each sample, ({batch},)")


def _class_ids(output: torch.Tensor, target: Any) -> tuple[torch.Tensor, bool]:
    """Return class ids `(B, K)` int64, and whether the target names a single class for each sample."""
    batch, classes = output.shape
    if target is None:
        return output.detach().argmax(1, keepdim=True), True
    if isinstance(target, str):
        return output.detach().topk(top(target, classes), dim=1).indices, False
    ids = _integers(target, output.device)
    if ids.ndim == 0:
        ids = ids.expand(batch)
    if ids.ndim not in (1, 2) or ids.shape[0] != batch or 0 in ids.shape[1:]:
        raise TargetError(
            f"target has shape {tuple(ids.shape)} for a batch of {batch}: pass an int, ({batch},) or (B, K)"
        )
    refuse_missing(ids.detach().cpu().numpy(), classes)
    return (ids.unsqueeze(1), True) if ids.ndim == 1 else (ids, False)


def _integers(target: Any, device: torch.device) -> torch.Tensor:
    try:
        ids = torch.as_tensor(target, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"target {target!r} is not understood: pass None, an int, (B,) or (B, K) class ids, 'top:K' or a function"
        ) from error
    if ids.ndim == 2 and ids.dtype not in (torch.bool, torch.bfloat16) and not ids.is_complex():
        ids = torch.as_tensor(from_one_hot(ids.detach().cpu().numpy()), device=device)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TargetError(f"target has dtype {ids.dtype}; class ids are integers")
    return ids.long()
