"""pytorch-grad-cam's GradCAM: from a batch of images to maps `(B, H, W)` between 0 and 1."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..attribution.grad_cam import weighted_channels
from ..errors import InputError
from ..frameworks.base import AS_IS, Request
from ..frameworks.torch.inspect.module_tensors import ModuleTensors, module_tensors
from ..frameworks.torch.layers import channel_axis_of
from ..layouts import find_layout, upsampled
from ..outputs import head_of
from ..rules import gradient

Array = npt.NDArray[Any]
TINY = 1e-7  # of pytorch-grad-cam's scaling: a map of zeros stays one
BRIGHTNESS = (0.9, 1.0, 1.1)


class GradCAM:
    """Grad-CAM of one layer or of several, whose maps are averaged.

    Args:
        model: a module in eval mode; it is left as it is.
        target_layers: modules of it.
        reshape_transform: from a layer's output to `(B, C, h, w)`. Not needed where the layer's modules and the sizes
            tell, as of a vision transformer's tokens.

    Attributes:
        outputs: what the model returned in the last call, detached.

    Source: Selvaraju et al. 2016, arXiv 1610.02391.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        target_layers: Sequence[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.target_layers = [target_layers] if isinstance(target_layers, nn.Module) else list(target_layers)
        self.reshape_transform = reshape_transform
        self.outputs: Any = None
        if not self.target_layers or not all(isinstance(layer, nn.Module) for layer in self.target_layers):
            raise InputError("target_layers must be a list of modules of the model, as in [model.layer4[-1]]")

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Array:
        """Return the maps, float32 `(B, H, W)`, each from 0 to 1; of volumes `(B, D, H, W)`.

        Args:
            input_tensor: images `(B, C, H, W)` or volumes `(B, C, D, H, W)`; moved to the model's device.
            targets: for each image a function of its output to one score; None: the class with the highest score.
            aug_smooth: average over six passes: mirrored or not, times 0.9, 1 or 1.1.
            eigen_smooth: in place of the channels' sum their first principal component.

        Raises:
            InputError: another number of targets than images, or a layer whose layout cannot be told.
            ModelError: dropout or batch norm in training act.
        """
        x = self._placed(input_tensor)
        if not aug_smooth:
            return self._maps(x, targets, eigen_smooth)
        smoothed = []
        for mirrored in (False, True):
            for factor in BRIGHTNESS:
                maps = self._maps((x.flip(-1) if mirrored else x) * factor, targets, eigen_smooth)
                smoothed.append(maps[..., ::-1] if mirrored else maps)
        return np.asarray(np.mean(smoothed, 0), np.float32)

    def _placed(self, input_tensor: Tensor) -> Tensor:
        if not isinstance(input_tensor, Tensor) or input_tensor.ndim not in (4, 5):
            shape = tuple(getattr(input_tensor, "shape", ()))
            raise InputError(f"input_tensor of {shape} must be images (B, C, H, W) or volumes (B, C, D, H, W)")
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        first = next(parameters, None)
        return input_tensor if first is None else input_tensor.to(first.device)

    def _maps(self, x: Tensor, targets: Any, eigen_smooth: bool) -> Array:
        request = Request(
            self.model,
            (x,),
            gradient,
            "gradient",
            lambda output: self._scores(output, targets, len(x)),
            through="graph",
            activations="relu-like",
            training=False,
            head=AS_IS,
        )
        size = tuple(x.shape[2:])
        of_layers = [
            upsampled(self._cam(layer, calls, x, eigen_smooth), size)
            for layer, calls in zip(self.target_layers, module_tensors(request, self.target_layers), strict=True)
        ]
        return between_0_and_1(np.mean(of_layers, 0)).astype(np.float32)

    def _scores(self, output: Any, targets: Any, batch: int) -> Tensor:
        """Return the score of each image, `(B,)`."""
        given = output if isinstance(output, Tensor | list) else head_of(output, None)
        self.outputs = given.detach() if isinstance(given, Tensor) else given
        if targets is None:
            if not isinstance(given, Tensor) or given.ndim != 2:
                raise InputError(
                    "the model does not return scores (B, classes); pass targets=[...], one for each image"
                )
            return given.gather(1, given.detach().argmax(1, keepdim=True))[:, 0]
        if len(targets) != batch:
            raise InputError(f"there are {len(targets)} targets for {batch} images; pass one for each")
        scores = [target(sample) for target, sample in zip(targets, given, strict=True)]
        if any(not isinstance(score, Tensor) or score.numel() != 1 for score in scores):
            raise InputError("a target must return one score of an image's output, as ClassifierOutputTarget(281) does")
        return torch.stack([score.reshape(()) for score in scores])

    def _cam(self, layer: nn.Module, calls: Sequence[ModuleTensors], x: Tensor, eigen_smooth: bool) -> Array:
        """Return the positive part of a layer's map, `(B, h, w)`, scaled; the sum over its calls."""
        terms = []
        for call in calls:
            values, flowed = call.tensors[0], call.gradients[0]
            if flowed is None:
                raise InputError(
                    f"the scores do not depend on layer {type(layer).__name__}; take one before the scores"
                )
            terms.append(_channels_summed(*self._as_planes(layer, values, flowed, x), eigen_smooth))
        return between_0_and_1(np.maximum(sum(terms), 0))

    def _as_planes(self, layer: nn.Module, values: Tensor, flowed: Tensor, x: Tensor) -> tuple[Array, Array]:
        """Return a layer's output and the gradient there with the channels second."""
        if self.reshape_transform is not None:
            values, flowed = self.reshape_transform(values), self.reshape_transform(flowed)
            if values.ndim != x.ndim:
                raise InputError(f"reshape_transform returned {tuple(values.shape)}, not (B, C, h, w)")
            return _array(values), _array(flowed)
        shapes, axis = (tuple(values.shape), tuple(x.shape)), channel_axis_of(layer, values.ndim)
        layout = find_layout(type(layer).__name__, *shapes, axis, "")
        return layout.channels_first(_array(values)), layout.channels_first(_array(flowed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is attached between calls, so nothing is removed."""


def _array(tensor: Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float64).numpy()


def _channels_summed(values: Array, gradients: Array, eigen_smooth: bool) -> Array:
    if not eigen_smooth:
        return weighted_channels(values, gradients[:, None])[:, 0]
    weights = gradients.mean(tuple(range(2, gradients.ndim)), keepdims=True)
    return np.stack([_first_component(sample) for sample in weights * values])


def _first_component(channels: Array) -> Array:
    """Return channels `(C, h, w)` along their first principal axis, `(h, w)`; its sign is that of the decomposition."""
    rows = channels.reshape(len(channels), -1).T
    rows = rows - rows.mean(0)
    axes = np.linalg.svd(rows, full_matrices=False)[2]
    projected: Array = (rows @ axes[0]).reshape(channels.shape[1:])
    return projected


def between_0_and_1(maps: Array) -> Array:
    """Scale each map of `(B, ...)` from its lowest value to its highest.

    >>> between_0_and_1(np.array([[1.0, 3.0]])).round(6).tolist()
    [[0.0, 1.0]]
    """
    axes = tuple(range(1, maps.ndim))
    above = maps - maps.min(axes, keepdims=True)
    scaled: Array = above / (TINY + above.max(axes, keepdims=True))
    return scaled
