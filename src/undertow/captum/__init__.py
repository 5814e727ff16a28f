"""Captum's classes, calls and results on this library's engine: switching is `from undertow.captum import ...`.

Constructors, `attribute` and its arguments are those of Captum 0.9. Values equal its own wherever it is right; where
it is silently wrong they are right, or refused: `docs/coming-from.md` names each difference. Captum is not imported.

>>> import torch
>>> from undertow.captum import Saliency
>>> net = torch.nn.Linear(3, 2)
>>> Saliency(net).attribute(torch.ones(1, 3), target=1).shape
torch.Size([1, 3])
"""

from .gradients import Deconvolution as Deconvolution
from .gradients import GuidedBackprop as GuidedBackprop
from .gradients import InputXGradient as InputXGradient
from .gradients import Saliency as Saliency
from .integrated import IntegratedGradients as IntegratedGradients
from .layers import GuidedGradCam as GuidedGradCam
from .layers import LayerActivation as LayerActivation
from .layers import LayerAttribution as LayerAttribution
from .layers import LayerGradCam as LayerGradCam
from .layers import LayerGradientXActivation as LayerGradientXActivation
from .noise import NoiseTunnel as NoiseTunnel
from .relevance import LRP as LRP
from .relevance import Alpha1_Beta0_Rule as Alpha1_Beta0_Rule
from .relevance import EpsilonRule as EpsilonRule
from .relevance import GammaRule as GammaRule
from .relevance import IdentityRule as IdentityRule

__all__ = [
    "LRP",
    "Alpha1_Beta0_Rule",
    "Deconvolution",
    "EpsilonRule",
    "GammaRule",
    "GuidedBackprop",
    "GuidedGradCam",
    "IdentityRule",
    "InputXGradient",
    "IntegratedGradients",
    "LayerActivation",
    "LayerAttribution",
    "LayerGradCam",
    "LayerGradientXActivation",
    "NoiseTunnel",
    "Saliency",
]
