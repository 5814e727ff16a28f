"""pytorch-grad-cam's call on this library's engine: switching is `from undertow.gradcam import ...`.

The constructors and calls are those of grad-cam 1.5; the maps equal its own wherever it is right. The model keeps its
mode, hooks and gradients, each call stands alone, and a batch needs a target for each image; `docs/coming-from.md`
names each difference. pytorch-grad-cam is not imported.

>>> import torch
>>> from undertow.gradcam import ClassifierOutputTarget, GradCAM
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 5)).eval()
>>> with GradCAM(model=net, target_layers=[net[0]]) as cam:
...     cam(input_tensor=torch.ones(1, 3, 6, 6), targets=[ClassifierOutputTarget(2)]).shape
(1, 6, 6)
"""

from ..errors import FrameworkError
from .cam import GradCAM as GradCAM
from .guided import GuidedBackpropReLUModel as GuidedBackpropReLUModel
from .pictures import deprocess_image as deprocess_image
from .pictures import preprocess_image as preprocess_image
from .pictures import show_cam_on_image as show_cam_on_image
from .scores import BinaryClassifierOutputTarget as BinaryClassifierOutputTarget
from .scores import ClassifierOutputSoftmaxTarget as ClassifierOutputSoftmaxTarget
from .scores import ClassifierOutputTarget as ClassifierOutputTarget
from .scores import RawScoresOutputTarget as RawScoresOutputTarget
from .scores import SemanticSegmentationTarget as SemanticSegmentationTarget

__all__ = [
    "BinaryClassifierOutputTarget",
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "GradCAM",
    "GuidedBackpropReLUModel",
    "RawScoresOutputTarget",
    "SemanticSegmentationTarget",
    "deprocess_image",
    "preprocess_image",
    "show_cam_on_image",
]

_NOT_THERE = (
    *("AblationCAM", "DeepFeatureFactorization", "EigenCAM", "EigenGradCAM", "FEM", "FinerCAM", "FullGrad"),
    *("GradCAMElementWise", "GradCAMPlusPlus", "HiResCAM", "KPCA_CAM", "LayerCAM", "RandomCAM", "RefineCAM"),
    *("ScoreCAM", "SegEigenCAM", "ShapleyCAM", "XGradCAM"),
)


def __getattr__(name: str) -> object:
    """Say of what pytorch-grad-cam has and this has not that it is not there."""
    if name in _NOT_THERE:
        raise FrameworkError(f"{name} is not there in undertow.gradcam, which has GradCAM; take pytorch-grad-cam's")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
