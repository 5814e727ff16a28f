"""Grad-CAM: a layer's channels weighted by their mean gradients, laid over the inputs that reach the layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..frameworks.base import Request, capability
from ..frameworks.results import Explanation, LayerGradients
from ..layouts import Layout, find_layout, upsampled
from ..rules import gradient

Array = npt.NDArray[Any]


def grad_cam(framework: str, request: Request, layer: str, axes: str, guided: bool) -> Explanation:
    """Explain by the Grad-CAM of a layer, `(B, 1, H, W)`; guided: times the rule's map, of the input's shape.

    Where images have their channels last, so have the maps: `(B, H, W, 1)`.

    Args:
        layer: its name; `layer@1` is its second call.
        axes: of its output, as in "bhwc"; empty: find them.

    Raises:
        InputError: the layer is not there, or its layout cannot be told.

    Source: Selvaraju et al. 2016, arXiv 1610.02391.
    """
    plain = replace(request, rule=gradient, rule_name="gradient") if guided else request
    at_layer = capability(framework, "inspect.layers").layer_gradients(plain, [layer])
    channels_last = at_layer.explanation.channels_last
    calls = [name for name in at_layer.values if layer in (name, name.partition("@")[0])]
    reached = {i for call in calls for i in at_layer.reached[call]}
    cams: list[Array | None] = [None] * len(request.inputs)
    refused: list[InputError] = []
    for i in sorted(reached):
        reaching = [call for call in calls if i in at_layer.reached[call]]
        try:
            shape = _batch_shape(request, i, is_alone=len(reached) == 1, channels_last=channels_last)
            cam = _cam_of_calls(at_layer, layer, reaching, shape, axes)
            channel = 1 if at_layer.explanation.scores.ndim == 1 else 2
            cams[i] = np.moveaxis(cam, channel, -1) if channels_last else cam
            if request.inputs[i].ndim == 2:
                cams[i] = cam.squeeze(channel)
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


def _batch_shape(request: Request, i: int, is_alone: bool, channels_last: bool) -> tuple[int, ...]:
    """Return the shape of an input as `(B, C, ...)`, where it has places over which a layer can lie.

    Args:
        is_alone: no other input has a map; then `(B, L)` is a line without an axis of channels.
        channels_last: inputs are `(B, ..., C)`.

    Raises:
        InputError: it is one of several images in a list, which have no batch axis, or has its channels last.
    """
    x = request.inputs[i]
    if channels_last and x.ndim > 2:
        return (x.shape[0], x.shape[-1], *x.shape[1:-1])
    args, kwargs = request.fill(range(len(request.inputs)))
    if x.ndim == 3 and i not in (*args, *kwargs.values()):
        raise InputError("Grad-CAM needs a batch axis, and x has images one by one; pass one tensor (B, C, H, W)")
    if x.ndim == 4 and x.shape[-1] <= 4 < x.shape[1]:
        raise InputError(
            f"x of {tuple(x.shape)} looks like images (B, H, W, C), and Grad-CAM lies over (B, C, H, W); wrap the "
            "model in one that takes those and permutes them"
        )
    return (x.shape[0], 1, x.shape[1]) if x.ndim == 2 and is_alone else tuple(x.shape)


def _cam_of_calls(
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
    if not at_layer.explanation.channels_last:  # there tokens and lines are the same, (B, T, C)
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
