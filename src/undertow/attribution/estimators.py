"""How gradients are averaged over inputs, or weighted by a layer: each with any rule, on any framework.

| estimator | values, each of the input's shape unless said | passes |
|---|---|---|
| gradient | one backward pass at the input itself | 1 |
| smoothgrad:N | the mean over N inputs with normal noise, a tenth of each sample's range of values | 2 + N |
| integrated:N | the mean over N points on the line from a baseline to the input, times their difference | 3 + N |
| input-times | the gradient times the input | 1 |
| grad-cam:LAYER[:AXES] | the layer's channels weighted by their mean gradients, positive part, `(B, 1, H, W)` | 1 |
| guided-grad-cam:LAYER[:AXES] | the rule's map times the Grad-CAM of the plain gradient | 2 |

A layer that runs several times counts with all of its calls; `LAYER@1` is its second alone. AXES, such as `bhwc`, say
where its channels are where `layouts` cannot tell. Of several inputs each has the map of the calls that read it, None
where the layer does not lie over it. Of lines `(B, L)` the map has the input's shape. Targets are those of the input
itself: noise does not change the class that is explained.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, UndertowError, did_you_mean, one_line
from ..frameworks.base import Arrays, Request, as_numpy, capability
from ..frameworks.results import Explanation
from ..rules import gradient
from ..structures import is_tensor
from ..tables import AttentionRule, Rule
from ..targets import Box, Token
from .grad_cam import grad_cam
from .points import baseline_like, moved, noisy, on_the_line

Array = npt.NDArray[Any]
KINDS = ("gradient", "smoothgrad", "integrated", "input-times", "grad-cam", "guided-grad-cam")
COUNTS = {"smoothgrad": 25, "integrated": 50}
LAYERED = ("grad-cam", "guided-grad-cam")


@dataclass(frozen=True)
class Estimator:
    """An estimator and its settings.

    Attributes:
        kind: one of `KINDS`.
        count: how many inputs are averaged; 1 where none are.
        layer: of Grad-CAM; empty elsewhere.
        axes: of the layer's output, as in "bhwc"; empty: find them.
        noise: SmoothGrad's standard deviation, as a fraction of each sample's range (largest minus smallest value).
        baselines: where the line of integrated gradients begins: "zero", "blur", numbers or arrays, one in turn.
        inner_batch: how many samples go through the network at once, at most, where inputs are averaged.
    """

    kind: str
    count: int = 1
    layer: str = ""
    axes: str = ""
    noise: float = 0.1
    baselines: tuple[Any, ...] = ("zero",)
    inner_batch: int = 8  # a larger one gains nothing on a CPU and costs memory

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise InputError(f"noise={self.noise} must be 0 or more: a fraction of the input's range, such as 0.1")
        if self.inner_batch < 1:
            raise InputError(f"inner_batch={self.inner_batch} must be at least 1")
        if not self.baselines:
            raise InputError("baseline=[] is empty; pass 'zero', 'blur', a number, or an array like the input")

    @property
    def passes(self) -> int:
        """How often each sample goes forward and backward."""
        if self.kind == "integrated":
            return 2 + len(self.baselines) * (1 + self.count)
        return 2 + self.count if self.kind in COUNTS else 2 if self.kind == "guided-grad-cam" else 1

    @property
    def name(self) -> str:
        """The estimator as one word, its number or layer included."""
        detail = str(self.count) if self.kind in COUNTS else ":".join(filter(None, (self.layer, self.axes)))
        return f"{self.kind}:{detail}" if detail else self.kind


def resolve(word: str) -> Estimator:
    """Parse an estimator's name, such as "smoothgrad:10".

    Raises:
        InputError: no such estimator, not a number of inputs, or no layer.

    >>> resolve("smoothgrad:10")
    Estimator(kind='smoothgrad', count=10, layer='', axes='', noise=0.1, baselines=('zero',), inner_batch=8)
    >>> resolve("grad-cam")
    Traceback (most recent call last):
    undertow.errors.InputError: estimator 'grad-cam' needs a layer, as in grad-cam:layer4
    """
    kind, colon, detail = str(word).partition(":")
    if kind not in KINDS:
        forms = "gradient, smoothgrad:N, integrated:N, input-times, grad-cam:LAYER, guided-grad-cam:LAYER"
        raise InputError(f"unknown estimator {word!r}{did_you_mean(kind, KINDS)} (known: {forms})")
    if kind in LAYERED:
        if not detail:
            raise InputError(f"estimator {word!r} needs a layer, as in {kind}:layer4")
        layer, _, axes = detail.partition(":")
        return Estimator(kind, layer=layer, axes=axes)
    if kind not in COUNTS:
        if colon:
            raise InputError(f"estimator {kind!r} takes nothing after it; write {kind!r} alone")
        return Estimator(kind)
    if colon and not (detail.isdecimal() and int(detail)):
        raise InputError(f"estimator {word!r} is not understood; write a number of inputs, as in {kind}:25")
    return Estimator(kind, int(detail) if colon else COUNTS[kind])


def estimate(framework: str, request: Request, estimator: Estimator, seed: int) -> Explanation:
    """Explain by an estimator. Shapes as in the table above; dtype and device of the input.

    Args:
        seed: of SmoothGrad's noise, the same on every framework and device.

    Raises:
        InputError: Grad-CAM of a layer that is not there, or whose layout cannot be told; a baseline that does not fit.

    Source: SmoothGrad, Smilkov et al. 2017, arXiv 1706.03825; integrated gradients, Sundararajan et al. 2017,
        arXiv 1703.01365; Grad-CAM and guided Grad-CAM, Selvaraju et al. 2016, arXiv 1610.02391.
    """
    if isinstance(request.rule, AttentionRule) and estimator.kind not in ("gradient", "smoothgrad"):
        raise InputError(
            f"{estimator.kind} is of gradients, and the map of {request.rule_name!r} is none; take "
            "estimator='gradient', which is that map, or 'smoothgrad'"
        )
    if estimator.kind in LAYERED:
        guided = estimator.kind == "guided-grad-cam"
        return grad_cam(framework, request, estimator.layer, estimator.axes, guided)
    if (
        estimator.kind in ("integrated", "input-times")
        and isinstance(request.rule, Rule)
        and request.rule.is_attribution
    ):
        raise InputError(
            f"{estimator.kind} multiplies by the input, and the map of {request.rule_name!r} is so multiplied already; "
            "take estimator='gradient', which is that map, or 'smoothgrad'"
        )
    if estimator.kind in COUNTS and isinstance(request.target, Box) and request.target.near is None:
        raise InputError(
            f"{estimator.kind} would choose box {request.target.index} anew at each of its inputs; say where it is, as "
            "in ut.targets.box(near=(x0, y0, x1, y1))"
        )
    if isinstance(request.rule, Rule) and request.rule.values == "difference":
        return _from_baselines(framework, request, estimator)
    explanation = capability(framework, "explain").explain(request)
    if estimator.kind == "gradient":
        return explanation
    arrays = capability(framework, "arrays")
    inputs = [arrays.to_numpy(x) for x in request.inputs]
    values = [None if m is None else arrays.to_numpy(m).astype(np.float64) for m in explanation.maps]
    completeness = None
    if estimator.kind == "smoothgrad":
        per_sample = not _are_samples(request, explanation)
        points = noisy(inputs, moved(inputs, values), estimator.count, seed, estimator.noise, per_sample)
        values = _mean(framework, request, explanation, points, estimator.inner_batch)
    elif estimator.kind == "integrated":
        values, completeness = _integrated(framework, request, explanation, estimator, inputs, values)
    else:
        values = [_times(v, x, explanation.scores) for v, x in zip(values, inputs, strict=True)]
    maps = (None if v is None else arrays.like(v, x) for v, x in zip(values, request.inputs, strict=True))
    return replace(explanation, maps=tuple(maps), completeness=completeness)


def _integrated(
    framework: str,
    request: Request,
    explanation: Explanation,
    estimator: Estimator,
    inputs: list[Array],
    maps: list[Array | None],
) -> tuple[list[Array | None], Array]:
    """Return the maps, averaged over the baselines, and the part of the score's difference that they do not explain."""
    explainer, arrays = capability(framework, "explain"), capability(framework, "arrays")
    target = _kept_target(request, explanation)
    totals: list[Any] = [None if m is None else 0.0 for m in maps]
    moving = [m if moves else None for m, moves in zip(maps, moved(inputs, maps), strict=True)]
    difference: Any = arrays.to_numpy(explanation.scores).astype(np.float64)
    for baseline in estimator.baselines:
        if _are_samples(request, explanation):
            starts = [start[0] for start in baseline_like(baseline, [x[None] for x in inputs], moving)]
        else:
            starts = baseline_like(baseline, inputs, moving, explanation.channels_last)
        points = on_the_line(inputs, starts, maps, estimator.count)
        mean = _mean(framework, request, explanation, points, estimator.inner_batch)
        for i, (gradients, x, start) in enumerate(zip(mean, inputs, starts, strict=True)):
            if gradients is not None:
                way = x.astype(np.float64) - start
                part = gradients * (way if explanation.scores.ndim == 1 else way[:, None])
                totals[i] = totals[i] + part / len(estimator.baselines)
        tensors = tuple(arrays.like(s, x) for s, x in zip(starts, request.inputs, strict=True))
        at_start = explainer.explain(
            replace(request, inputs=tensors, target=target, rule=gradient, rule_name="gradient")
        )
        difference = difference - arrays.to_numpy(at_start.scores).astype(np.float64) / len(estimator.baselines)
    return totals, _left_out(totals, difference)


def _from_baselines(framework: str, request: Request, estimator: Estimator) -> Explanation:
    """Return the maps of a rule that compares the input with a baseline in one batch, averaged over the baselines.

    Raises:
        InputError: an estimator that does not fit, a model for one size of batch, or samples of a batch that change
            one another's scores.
    """
    if estimator.kind != "gradient":
        raise InputError(
            f"rule {request.rule_name!r} has a baseline of its own; leave estimator={estimator.kind!r} out"
        )
    explainer, arrays = capability(framework, "explain"), capability(framework, "arrays")
    plain = explainer.explain(replace(request, rule=gradient, rule_name="gradient"))
    if _are_samples(request, plain):
        raise InputError(f"rule {request.rule_name!r} needs batches, not lists of samples; stack them")
    inputs = [arrays.to_numpy(x) for x in request.inputs]
    gradients = [None if m is None else arrays.to_numpy(m).astype(np.float64) for m in plain.maps]
    moving = [m if moves else None for m, moves in zip(gradients, moved(inputs, gradients), strict=True)]
    scores = arrays.to_numpy(plain.scores).astype(np.float64)
    totals: list[Any] = [None if m is None else 0.0 for m in gradients]
    batch, difference = len(scores), np.zeros_like(scores)
    for baseline in estimator.baselines:
        starts = baseline_like(baseline, inputs, moving, plain.channels_last)
        pairs = (np.concatenate([x, start]) for x, start in zip(inputs, starts, strict=True))
        tensors = tuple(arrays.like(pair, x) for pair, x in zip(pairs, request.inputs, strict=True))
        try:
            both = explainer.explain(replace(request, inputs=tensors, target=_kept_target(request, plain, 2)))
        except UndertowError:
            raise
        except Exception as error:  # the model's own: it has run without the baseline
            raise InputError(
                f"rule {request.rule_name!r} puts a baseline into the batch, and with {2 * batch} samples for {batch} "
                f"the model fails ({one_line(error)}); it must take any number, as an exported one by dynamic_shapes"
            ) from error
        compared = arrays.to_numpy(both.scores).astype(np.float64)
        if not (np.abs(compared[:batch] - scores) <= 1e-4 * max(np.abs(scores).max(), 1e-6)).all():
            raise InputError(
                f"rule {request.rule_name!r} puts a baseline into the batch, and there it changes the score"
            )
        difference += (scores - compared[batch:]) / len(estimator.baselines)
        for i, (m, x, start) in enumerate(zip(both.maps, inputs, starts, strict=True)):
            if m is not None:
                way = x.astype(np.float64) - start
                part = arrays.to_numpy(m)[:batch].astype(np.float64) * (way if scores.ndim == 1 else way[:, None])
                totals[i] = totals[i] + part / len(estimator.baselines)
    maps = (None if v is None else arrays.like(v, x) for v, x in zip(totals, request.inputs, strict=True))
    return replace(plain, maps=tuple(maps), stats=both.stats, completeness=_left_out(totals, difference))


def _left_out(totals: list[Any], difference: Array) -> Array:
    """Return the part of the score's difference that maps do not account for."""
    explained = sum(total.reshape(*difference.shape, -1).sum(-1) for total in totals if total is not None)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == explained, 0.0, (difference - explained) / difference)


def _kept_target(request: Request, first: Explanation, copies: int = 1) -> Any:
    """Return the target that means the classes found for the input itself, in a batch of copies of it."""
    if first.targets is None:
        return request.target
    ids = np.concatenate([as_numpy(first.targets)] * copies)
    if not isinstance(request.target, Token):
        return ids
    given = request.target.position
    position = as_numpy(given) if is_tensor(given) else np.asarray(given)
    return Token(ids, np.concatenate([position] * copies) if position.ndim else position)


def _times(values: Array | None, x: Array, scores: Any) -> Array | None:
    """Multiply a map by the input; with K targets per sample, each target's map."""
    if values is None:
        return None
    return values * (x if scores.ndim == 1 else x[:, None])


def _are_samples(request: Request, explanation: Explanation) -> bool:
    """Whether each input is one sample, without a batch axis, as in a list of images of any sizes."""
    count = len(explanation.scores)
    are_batches = all(len(x) == count for x in request.inputs if x.ndim)
    return request.is_list and len(request.inputs) == count and not are_batches


def _mean(
    framework: str, request: Request, first: Explanation, points: Iterator[list[Array]], inner_batch: int
) -> list[Array | None]:
    """Return the mean of the maps at the points, each `(B, ...)` float64.

    Several points go in one batch where the input itself, put behind the first of them, keeps its score: samples of a
    batch meet in batch norm without running statistics, and in models that are bound to other tensors. Behind, because
    positions in a batch, as in the edges of a graph, count from its start.
    """
    explainer, arrays = capability(framework, "explain"), capability(framework, "arrays")

    def explain_points(chunk: list[list[Array]]) -> tuple[Array, list[Array | None]]:
        """Return the scores, and the maps `(points, B, ...)`."""
        inputs = [np.concatenate(parts) for parts in zip(*chunk, strict=True)]
        target = _kept_target(request, first, len(chunk))
        tensors = tuple(arrays.like(a, x) for a, x in zip(inputs, request.inputs, strict=True))
        explanation = explainer.explain(replace(request, inputs=tensors, target=target))
        maps = [None if m is None else arrays.to_numpy(m).astype(np.float64) for m in explanation.maps]
        parts = [None if m is None else m.reshape(len(chunk), -1, *m.shape[1:]) for m in maps]
        return arrays.to_numpy(explanation.scores), parts if len(chunk) > 1 else [_first_axis(m) for m in maps]

    totals: list[Any] = [0.0] * len(request.inputs)
    count = 0

    def add(maps: list[Array | None]) -> None:
        nonlocal count
        count += max(len(m) for m in maps if m is not None)
        for i, m in enumerate(maps):
            if m is not None:
                totals[i] = totals[i] + m.sum(0)

    # a target function may depend on positions in the batch, so it is given the batch as it is
    per_pass = 1 if first.targets is None or not request.batch else max(1, inner_batch // request.batch)
    if per_pass > 1:
        trial = list(islice(points, per_pass - 1))
        maps = _stacked_maps(explain_points, [*trial, [arrays.to_numpy(x) for x in request.inputs]], first, arrays)
        if maps is None:
            per_pass, points = 1, chain(trial, points)
        else:
            add([None if m is None else m[:-1] for m in maps])
    while chunk := list(islice(points, per_pass)):
        add(explain_points(chunk)[1])
    return [total / count if isinstance(total, np.ndarray) else None for total in totals]


def _first_axis(values: Array | None) -> Array | None:
    return None if values is None else values[None]


def _stacked_maps(
    explain_points: Callable[[list[list[Array]]], tuple[Array, list[Array | None]]],
    points: list[list[Array]],
    first: Explanation,
    arrays: Arrays,
) -> list[Array | None] | None:
    """Return the maps of points in one batch; None where the last of them, the input, has another score than alone."""
    try:
        scores, maps = explain_points(points)
    except Exception:  # whatever somebody's model raises for a larger batch
        return None
    alone = arrays.to_numpy(first.scores).astype(np.float64)
    difference = np.abs(scores[-len(alone) :] - alone)
    return maps if (difference <= 1e-4 * max(np.abs(alone).max(), 1e-6)).all() else None
