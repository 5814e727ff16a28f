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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, did_you_mean
from ..frameworks.base import Arrays, Request, as_numpy, capability
from ..frameworks.results import Explanation, LayerGradients
from ..layouts import Layout, find_layout
from ..rules import gradient
from ..structures import is_tensor
from ..targets import Token

Array = npt.NDArray[Any]
KINDS = ("gradient", "smoothgrad", "integrated", "input-times", "grad-cam", "guided-grad-cam")
COUNTS = {"smoothgrad": 25, "integrated": 50}
LAYERED = ("grad-cam", "guided-grad-cam")
BLUR = 15  # the blur's standard deviation is this part of the image's side


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
    if estimator.kind in LAYERED:
        return _estimate_grad_cam(framework, request, estimator)
    explanation = capability(framework, "explain").explain(request)
    if estimator.kind == "gradient":
        return explanation
    arrays = capability(framework, "arrays")
    inputs = [arrays.to_numpy(x) for x in request.inputs]
    values = [None if m is None else arrays.to_numpy(m).astype(np.float64) for m in explanation.maps]
    completeness = None
    if estimator.kind == "smoothgrad":
        points = _noisy(inputs, values, estimator.count, seed, estimator.noise)
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
    difference: Any = arrays.to_numpy(explanation.scores).astype(np.float64)
    for baseline in estimator.baselines:
        starts = baseline_like(baseline, inputs, maps, explanation.channels_last)
        points = _on_the_line(inputs, starts, maps, estimator.count)
        mean = _mean(framework, request, explanation, points, estimator.inner_batch)
        for i, (gradients, x, start) in enumerate(zip(mean, inputs, starts, strict=True)):
            if gradients is not None:
                moved = x.astype(np.float64) - start
                part = gradients * (moved if explanation.scores.ndim == 1 else moved[:, None])
                totals[i] = totals[i] + part / len(estimator.baselines)
        tensors = tuple(arrays.like(s, x) for s, x in zip(starts, request.inputs, strict=True))
        at_start = explainer.explain(
            replace(request, inputs=tensors, target=target, rule=gradient, rule_name="gradient")
        )
        difference = difference - arrays.to_numpy(at_start.scores).astype(np.float64) / len(estimator.baselines)
    explained = sum(total.reshape(*difference.shape, -1).sum(-1) for total in totals if total is not None)
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals, np.where(difference == explained, 0.0, (difference - explained) / difference)


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


def baseline_like(
    baseline: Any, inputs: Sequence[Array], maps: Sequence[Array | None], channels_last: bool = False
) -> list[Array]:
    """Return where the line to each input begins; an input without a map stays as it is.

    Args:
        baseline: "zero"; "blur", the input smoothed by a normal kernel of a fifteenth of its side; a number; an array
            that fits one sample or the batch, with one value for each channel where it has just as many.

    Raises:
        InputError: it is something else, or does not fit.

    >>> x = np.ones((1, 3, 2, 2))
    >>> baseline_like((0, 1, 2), [x], [x])[0][0, :, 0, 0].tolist()
    [0.0, 1.0, 2.0]
    """
    return [x if m is None else _start(baseline, x, channels_last) for x, m in zip(inputs, maps, strict=True)]


def _start(baseline: Any, x: Array, channels_last: bool) -> Array:
    plane = range(1, x.ndim - 1) if channels_last else range(2, x.ndim)
    if isinstance(baseline, str):
        if baseline == "zero":
            return np.zeros_like(x)
        if baseline != "blur":
            raise InputError(f"unknown baseline {baseline!r}; it is 'zero', 'blur', a number or an array like x")
        if not plane:
            raise InputError(f"baseline 'blur' needs images, (B, C, H, W), and the input has shape {x.shape}")
        return _blurred(x, plane)
    try:
        array = as_numpy(baseline) if hasattr(baseline, "shape") else np.asarray(baseline, x.dtype)
        channel_axis = x.ndim - 1 if channels_last else 1
        if array.ndim == 1 and x.ndim > 2 and len(array) == x.shape[channel_axis]:
            array = array.reshape([-1 if axis == channel_axis else 1 for axis in range(x.ndim)])
        return np.broadcast_to(array, x.shape).astype(x.dtype)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a baseline of shape {np.shape(baseline)} does not fit the input {x.shape}; pass 'zero', 'blur', a "
            "number, one for each channel, or an array like the input"
        ) from error


def _blurred(x: Array, plane: Iterable[int]) -> Array:
    blurred = x.astype(np.float64)
    for axis in plane:
        distance = np.subtract.outer(np.arange(x.shape[axis]), np.arange(x.shape[axis])) * BLUR / x.shape[axis]
        kernel = np.exp(-(distance**2) / 2)
        kernel /= kernel.sum(1, keepdims=True)
        blurred = np.moveaxis(np.moveaxis(blurred, axis, -1) @ kernel.T, -1, axis)
    return blurred.astype(x.dtype)


def _times(values: Array | None, x: Array, scores: Any) -> Array | None:
    """Multiply a map by the input; with K targets per sample, each target's map."""
    if values is None:
        return None
    return values * (x if scores.ndim == 1 else x[:, None])


def _noisy(inputs: list[Array], maps: list[Any], count: int, seed: int, noise: float) -> Iterator[list[Array]]:
    """Yield `count` noisy copies of the inputs; those without a map, which are integers, stay."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield [x if m is None else x + _normal_noise(x, generator, noise) for x, m in zip(inputs, maps, strict=True)]


def _normal_noise(x: Array, generator: np.random.Generator, noise: float) -> Array:
    axes = tuple(range(1, x.ndim))
    value_range = x.max(axes, keepdims=True) - x.min(axes, keepdims=True)
    drawn: Array = generator.standard_normal(x.shape) * noise * value_range
    return drawn.astype(x.dtype)


def _on_the_line(inputs: list[Array], starts: list[Array], maps: list[Any], count: int) -> Iterator[list[Array]]:
    """Yield the midpoints of `count` equal parts of the line to the input."""
    for i in range(count):
        share = (i + 0.5) / count
        yield [
            x if m is None else start + (x - start) * x.dtype.type(share)
            for x, start, m in zip(inputs, starts, maps, strict=True)
        ]


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


def _estimate_grad_cam(framework: str, request: Request, estimator: Estimator) -> Explanation:
    guided = estimator.kind == "guided-grad-cam"
    plain = replace(request, rule=gradient, rule_name="gradient") if guided else request
    layer, at_layer = estimator.layer, capability(framework, "inspect.layers").layer_gradients(plain, [estimator.layer])
    if at_layer.explanation.channels_last:
        raise InputError("Grad-CAM is not there for Keras on torch yet; run the model with KERAS_BACKEND=tensorflow")
    calls = [name for name in at_layer.values if layer in (name, name.partition("@")[0])]
    reached = {i for call in calls for i in at_layer.reached[call]}
    cams: list[Array | None] = [None] * len(request.inputs)
    refused: list[InputError] = []
    for i in sorted(reached):
        reaching = [call for call in calls if i in at_layer.reached[call]]
        try:
            shape = _batch_shape(request, i, is_alone=len(reached) == 1)
            cam = _grad_cam(at_layer, layer, reaching, shape, estimator.axes)
            cams[i] = cam if request.inputs[i].ndim > 2 else cam.squeeze(-2)
        except InputError as error:  # a column of numbers beside an image, say, over which nothing can be laid
            refused.append(error)
    if refused and all(cam is None for cam in cams):
        raise refused[0]
    if all(cam is None for cam in cams):
        raise InputError(f"layer {layer!r} is not on the way from x to the scores, or returns no tensor")
    arrays = capability(framework, "arrays")
    if not guided:
        maps = (None if cam is None else arrays.like(cam, x) for cam, x in zip(cams, request.inputs, strict=True))
        return replace(at_layer.explanation, maps=tuple(maps))
    explanation = capability(framework, "explain").explain(request)
    maps = (
        None if m is None or cam is None else arrays.like(arrays.to_numpy(m) * cam, x)
        for m, cam, x in zip(explanation.maps, cams, request.inputs, strict=True)
    )
    return replace(explanation, maps=tuple(maps))


def _batch_shape(request: Request, i: int, is_alone: bool) -> tuple[int, ...]:
    """Return the shape of an input as `(B, C, ...)`, where it has places over which a layer can lie.

    Args:
        is_alone: no other input has a map; then `(B, L)` is a line without an axis of channels.

    Raises:
        InputError: it is one of several images in a list, which have no batch axis, or has its channels last.
    """
    x = request.inputs[i]
    args, kwargs = request.fill(range(len(request.inputs)))
    if x.ndim == 3 and i not in (*args, *kwargs.values()):
        raise InputError("Grad-CAM needs a batch axis, and x has images one by one; pass one tensor (B, C, H, W)")
    if x.ndim == 4 and x.shape[-1] <= 4 < x.shape[1]:
        raise InputError(
            f"x of {tuple(x.shape)} looks like images (B, H, W, C), and Grad-CAM lies over (B, C, H, W); wrap the "
            "model in one that takes those and permutes them"
        )
    return (x.shape[0], 1, x.shape[1]) if x.ndim == 2 and is_alone else tuple(x.shape)


def _grad_cam(
    at_layer: LayerGradients, layer: str, calls: Sequence[str], input_shape: tuple[int, ...], axes: str
) -> Array:
    """Return the Grad-CAM of a layer's calls over one input, `(B, 1, ...)`, or `(B, K, 1, ...)` for K targets.

    Raises:
        InputError: the calls' layout cannot be told, or the scores read only tokens without a place.
    """
    if len({at_layer.values[call].shape for call in calls}) > 1:
        raise InputError(f"layer {layer!r} runs {len(calls)} times on several sizes; name one call, as in {layer}@1")
    shape, channel_axis = at_layer.values[calls[0]].shape, at_layer.channel_axes[calls[0]]
    layout = find_layout(layer, shape, input_shape, channel_axis, axes)
    _refuse_tokens(layer, shape, input_shape, layout, axes)
    values = [layout.channels_first(at_layer.values[call]) for call in calls]
    gradients = [layout.channels_first(at_layer.gradients[call], 2) for call in calls]
    if layout.extra and not any(g.any() for g in gradients) and any(at_layer.gradients[call].any() for call in calls):
        raise InputError(
            f"of layer {layer!r} the scores read only tokens without a place in the input (extra at its start: "
            f"{layout.extra}); take a layer before the last attention"
        )
    terms = [weighted_channels(v, g) for v, g in zip(values, gradients, strict=True)]
    cam = upsampled(np.maximum(sum(terms), 0), input_shape[2:])[:, :, None]
    return cam[:, 0] if at_layer.explanation.scores.ndim == 1 else cam


def _refuse_tokens(layer: str, shape: tuple[int, ...], input_shape: tuple[int, ...], layout: Layout, axes: str) -> None:
    """Refuse a layer whose positions may be those of `x` along its second axis, unless `axes` has an "l" for its line.

    Where `x` is tokens `(B, T, C)`, Grad-CAM would be laid over their features.
    """
    if len(input_shape) == 3 and "l" not in axes and 1 < layout.grid[0] <= input_shape[1]:
        line = "bcl" if layout.channel_axis == 1 else "blc"
        raise InputError(
            f"layer {layer!r} gives {tuple(shape)}: x of {tuple(input_shape)} may be tokens (B, T, C), for which take "
            f"estimator='input-times'; if it is lines (B, C, L), pass axes={line!r}"
        )


def weighted_channels(values: Array, gradients: Array) -> Array:
    """Sum a layer's channels, each weighted by its mean gradient: Grad-CAM before its positive part is taken.

    Args:
        values: the layer's output, `(B, C, h, w)`, or with any other axes in place of h and w.
        gradients: what flowed back to it, `(B, K, C, h, w)`.

    Returns:
        `(B, K, h, w)` float64.

    Source: Selvaraju et al. 2016, arXiv 1610.02391, equations 1 and 2.

    >>> weighted_channels(np.full((1, 2, 1, 1), 3.0), np.array([2.0, -1.0]).reshape(1, 1, 2, 1, 1)).item()
    3.0
    """
    weights = gradients.astype(np.float64).mean(tuple(range(3, gradients.ndim)), keepdims=True)
    summed: Array = (weights * values[:, None]).sum(2)
    return summed


def upsampled(planes: Array, size: tuple[int, ...]) -> Array:
    """Resize the last axes by linear interpolation along each, an element's value being at its centre.

    >>> upsampled(np.array([[0.0, 1.0]]), (1, 4)).tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    for axis, new in enumerate(size, -len(size)):
        planes = np.moveaxis(np.moveaxis(planes, axis, -1) @ _weights(planes.shape[axis], new).T, -1, axis)
    return planes


def _weights(old: int, new: int) -> Array:
    """Return the weight of each old pixel in each new one, `(new, old)`."""
    positions = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    weights: Array = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old)))
    return weights
