"""What is explained: functions of one sample's output, as pytorch-grad-cam's targets are; any other will do as well."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassifierOutputTarget:
    """The score of a class.

    >>> ClassifierOutputTarget(1)(torch.tensor([3.0, 5.0]))
    tensor(5.)
    """

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category]


@dataclass(frozen=True)
class ClassifierOutputSoftmaxTarget:
    """The probability of a class, by a softmax over the scores."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        return torch.softmax(model_output, -1)[..., self.category]


@dataclass(frozen=True)
class BinaryClassifierOutputTarget:
    """The one score of a binary classifier: for class 1 as it is, else negated."""

    category: int

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output if self.category == 1 else -model_output


@dataclass(frozen=True)
class RawScoresOutputTarget:
    """The one score that the model returns."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output


@dataclass(frozen=True, eq=False)
class SemanticSegmentationTarget:
    """The sum of a category's scores `(C, H, W)` where a mask `(H, W)` is on."""

    category: int
    mask: Any

    def __call__(self, model_output: Tensor) -> Tensor:
        mask = torch.as_tensor(self.mask, device=model_output.device)
        return (model_output[self.category] * mask).sum()
