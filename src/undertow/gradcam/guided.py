"""pytorch-grad-cam's GuidedBackpropReLUModel."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ..attribution.explain import explain
from ..errors import InputError


class GuidedBackpropReLUModel:
    """Guided backpropagation of one image, at every ReLU, however it is written.

    Args:
        model: a module in eval mode; it is left as it is.
        device: where to move the model; None leaves it where it is.

    Source: Springenberg et al. 2014, arXiv 1412.6806.
    """

    def __init__(self, model: nn.Module, device: Any = None) -> None:
        self.model = model if device is None else model.to(device)

    def __call__(self, input_img: Tensor, target_category: int | None = None) -> npt.NDArray[Any]:
        """Return the map of one image `(1, C, H, W)` as `(H, W, C)`.

        Args:
            input_img: moved to the model's device.
            target_category: a class; None: the one with the highest score.

        Raises:
            InputError: there are several images. RuleError: there is no ReLU.
        """
        if input_img.ndim != 4 or len(input_img) != 1:
            raise InputError(f"input_img of {tuple(input_img.shape)} must be one image, (1, C, H, W); call it for each")
        first = next(self.model.parameters(), None)
        x = input_img if first is None else input_img.to(first.device)
        a = explain(self.model, x, rule="guided", target=target_category, head="as is")
        return np.moveaxis(a.numpy()[0], 0, -1)
