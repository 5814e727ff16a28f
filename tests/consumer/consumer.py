"""A small program that uses undertow, as `mypy --strict` sees it: what the public names promise to a type checker."""

import tempfile
from collections.abc import Callable

import torch

import undertow as ut
from undertow.captum import IntegratedGradients, LayerGradCam
from undertow.gradcam import ClassifierOutputTarget, GradCAM


def maps(model: torch.nn.Module, x: torch.Tensor) -> ut.Attribution:
    """Explain a batch."""
    a = ut.explain(model, x, rule="guided", target="top:2")
    rewired: int = a.rewired
    heatmap = a.image(0, target=1)
    print(rewired, heatmap.size)
    return a


def findings(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
    """Record a batch, and say what was found."""
    with ut.record(tempfile.mkdtemp(), model, sites="linear", diagnose=True) as recording, recording.batch():
        model(x).sum().backward()
    run = ut.Run(recording.folder)
    return [finding.sentence for finding in ut.diagnose(run)]


def verdict(model: torch.nn.Module, image: torch.Tensor) -> str:
    """Judge a map."""
    v: ut.Verdict = ut.trust(model, image, rule="gradient")
    return v.sentence


def as_others_call_it(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Call as Captum and pytorch-grad-cam are called."""
    IntegratedGradients(model).attribute(x, target=1)
    LayerGradCam(model, model.get_submodule("0")).attribute(x, target=1)
    with GradCAM(model=model, target_layers=[model.get_submodule("0")]) as cam:
        return float(cam(input_tensor=x, targets=[ClassifierOutputTarget(1)] * len(x)).max())


def doubled(g: torch.Tensor, local: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A rule of one's own."""
    return local(local(g))
