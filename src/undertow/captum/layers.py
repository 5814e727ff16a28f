"""Captum's methods at a layer: LayerActivation, LayerGradientXActivation, LayerGradCam and GuidedGradCam.

A layer is a module, whichever function calls it. One that runs several times in a pass is refused: Captum would return
its last call alone.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, UndertowWarning
from ..frameworks.base import Request
from ..frameworks.torch.inspect.module_tensors import ModuleTensors, module_tensors, module_values
from ..frameworks.torch.layers import channel_axis_of
from .arguments import Tensors, as_tuple, like, request_for
from .gradients import GuidedBackprop
from .method import Method

Layer = nn.Module | Sequence[nn.Module]


class LayerAttribution(Method):
    """A method at one layer, or at several where its class says so.

    Args:
        forward_func: a module, or any function that calls the layer.
        layer: a module, or a list of modules.
        device_ids: of a model spread over several GPUs, which is refused; else it has no effect.
    """

    def __init__(self, forward_func: Callable[..., Any], layer: Layer, device_ids: list[int] | None = None) -> None:
        super().__init__(forward_func)
        several = [layer] if isinstance(layer, nn.Module) else list(layer)
        for module in several:
            if not isinstance(module, nn.Module):
                raise InputError(f"layer is a {type(module).__name__}; pass a module of the network, or a list of them")
        if isinstance(forward_func, nn.DataParallel) and len(forward_func.device_ids) > 1:
            raise InputError("a DataParallel over several devices is not read; pass its .module")
        self.layer: Any = layer
        self.device_ids = device_ids

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Resize a layer's attribution `(B, C, ...)` to other sizes, by `torch.nn.functional.interpolate`."""
        return F.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)

    def _modules(self) -> list[nn.Module]:
        return [self.layer] if isinstance(self.layer, nn.Module) else list(self.layer)

    def _single_calls(self, calls: list[list[ModuleTensors]]) -> list[ModuleTensors]:
        for module, of_module in zip(self._modules(), calls, strict=True):
            if len(of_module) > 1:
                raise InputError(
                    f"layer {type(module).__name__} runs {len(of_module)} times in this pass, and its calls cannot be "
                    "one result; ut.explain(model, x, at='NAME@1') takes its second call, ut.trace shows all"
                )
        return [of_module[0] for of_module in calls]

    def _results(self, values: Sequence[tuple[Tensor, ...]]) -> Any:
        """Return one layer's values, or a list of those of several; several tensors of a layer as a tuple."""
        formed = [of_layer if len(of_layer) > 1 else of_layer[0] for of_layer in values]
        return formed[0] if isinstance(self.layer, nn.Module) else formed

    def _request(self, inputs: Tensors, target: Any, more: Any) -> Request:
        return request_for(self.forward_func, as_tuple(inputs), target, more)

    def _gradients(
        self, request: Request, at_input: bool, grad_kwargs: Mapping[str, Any] | None
    ) -> list[ModuleTensors]:
        """Return each layer's call; a tensor without a gradient is an error."""
        calls = self._single_calls(module_tensors(request, self._modules(), at_input, grad_kwargs))
        for module, call in zip(self._modules(), calls, strict=True):
            if any(g is None for g in call.gradients):
                raise InputError(f"the scores do not depend on all of what layer {type(module).__name__} has here")
        return calls


class LayerActivation(LayerAttribution):
    """What a layer returns, or is given."""

    @property
    def multiplies_by_inputs(self) -> bool:
        """True, as of Captum's."""
        return True

    def attribute(
        self, inputs: Tensors, additional_forward_args: Any = None, attribute_to_layer_input: bool = False
    ) -> Any:
        """Return the layer's tensor, or a tuple of several; of a list of layers, a list.

        Args:
            inputs, additional_forward_args: as of `Saliency.attribute`; of any dtype.
            attribute_to_layer_input: what the layer is given, not what it returns.
        """
        request = self._request(inputs, None, additional_forward_args)
        calls = self._single_calls(module_values(request, self._modules(), attribute_to_layer_input))
        return self._results([call.tensors for call in calls])


class LayerGradientXActivation(LayerAttribution):
    """A layer's output times the gradient there.

    Args:
        forward_func, layer, device_ids: as of `LayerAttribution`.
        multiply_by_inputs: False gives the gradient alone.
        memory_efficient: put the results on the CPU.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self._multiply_by_inputs, self._memory_efficient = multiply_by_inputs, memory_efficient

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the constructor was told."""
        return self._multiply_by_inputs

    def attribute(
        self,
        inputs: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the attributions in the shapes of the layer's tensors; arguments as of `LayerGradCam.attribute`."""
        request = self._request(inputs, target, additional_forward_args)
        calls = self._gradients(request, attribute_to_layer_input, grad_kwargs)
        return self._results([self._of(call) for call in calls])

    def _of(self, call: ModuleTensors) -> tuple[Tensor, ...]:
        pairs = zip(call.tensors, call.gradients, strict=True)
        values = tuple(t * g if self._multiply_by_inputs else g for t, g in pairs if g is not None)
        return tuple(v.cpu() for v in values) if self._memory_efficient else values


class LayerGradCam(LayerAttribution):
    """A layer's channels, each weighted by its mean gradient, summed: `(B, 1, ...)`.

    Of a layer whose modules have their channels last, such as a linear layer of tokens, the last axis is summed.

    Source: Selvaraju et al. 2016, arXiv 1610.02391.
    """

    def attribute(
        self,
        inputs: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the attribution of the layer's tensor, or a tuple of several.

        Args:
            inputs: a batch or a tuple of batches, of any dtype.
            target, additional_forward_args: as of `Saliency.attribute`.
            attribute_to_layer_input: at what the layer is given, not at what it returns.
            relu_attributions: take the positive part.
            attr_dim_summation: False leaves the channels apart: `(B, C, ...)`.
            grad_kwargs: for `torch.autograd.grad`.
        """
        request = self._request(inputs, target, additional_forward_args)
        calls = self._gradients(request, attribute_to_layer_input, grad_kwargs)
        cams = [
            tuple(_cam(module, t, g, attr_dim_summation, attribute_to_layer_input) for t, g in _pairs(call))
            for module, call in zip(self._modules(), calls, strict=True)
        ]
        return self._results([tuple(map(F.relu, cam)) if relu_attributions else cam for cam in cams])


def _pairs(call: ModuleTensors) -> list[tuple[Tensor, Tensor]]:
    return [(t, g) for t, g in zip(call.tensors, call.gradients, strict=True) if g is not None]


def _cam(module: nn.Module, values: Tensor, gradient: Tensor, summed: bool, at_input: bool) -> Tensor:
    """Return weighted channels, `(B, 1, ...)` or `(B, C, ...)`, the channels second."""
    if values.ndim > 2 and not at_input and channel_axis_of(module, values.ndim) == -1:
        values, gradient = values.movedim(-1, 1), gradient.movedim(-1, 1)
    weights = gradient.mean(tuple(range(2, gradient.ndim)), keepdim=True) if gradient.ndim > 2 else gradient
    weighted = weights * values
    return weighted.sum(1, keepdim=True) if summed else weighted


class GuidedGradCam(Method):
    """Guided backpropagation times Grad-CAM, laid over the input.

    Source: Selvaraju et al. 2016, arXiv 1610.02391.
    """

    def __init__(self, model: Any, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(model)
        self.grad_cam = LayerGradCam(model, layer, device_ids)
        self.guided_backprop = GuidedBackprop(model)

    def attribute(
        self,
        inputs: Tensors,
        target: Any = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Return attributions, one like each input; empty, with a warning, where the layer cannot lie over it.

        Args:
            inputs, target, additional_forward_args: as of `Saliency.attribute`.
            interpolate_mode: how Grad-CAM is resized, by `torch.nn.functional.interpolate`.
            attribute_to_layer_input: as of `LayerGradCam.attribute`.
        """
        given = as_tuple(inputs)
        cam = self.grad_cam.attribute(given, target, additional_forward_args, attribute_to_layer_input, True)
        if isinstance(cam, tuple | list):
            raise InputError(f"GuidedGradCam takes one layer with one tensor, and there are {len(cam)}")
        maps = as_tuple(self.guided_backprop.attribute(given, target, additional_forward_args))
        return like(inputs, tuple(_laid_over(cam, m, interpolate_mode) for m in maps))


def _laid_over(cam: Tensor, values: Tensor, mode: str) -> Tensor:
    try:
        return values * LayerAttribution.interpolate(cam, tuple(values.shape[2:]), mode)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        shapes = f"{tuple(cam.shape)} cannot lie over an input of {tuple(values.shape)}"
        warnings.warn(f"Grad-CAM of {shapes}; its attribution is empty", UndertowWarning, stacklevel=3)
        return torch.empty(0)
