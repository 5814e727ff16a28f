"""Run Captum's own tests of the classes that `undertow.captum` has, against it.

    git clone https://github.com/pytorch/captum CHECKOUT        # its wheel has no tests
    python benchmarks/captum_tests.py CHECKOUT [--captum] [PYTEST OPTIONS]

The installed Captum stays in place for all else: its testing models, its neuron methods. `--captum` runs the same tests
against Captum itself. Nothing of the checkout but `tests/` is used.
"""

import importlib
import os
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import captum
import pytest
import torch
from captum.attr._utils.attribution import GradientAttribution, InternalAttribution

import undertow.captum as ours

MODULES = {
    "guided_backprop_deconvnet": ["GuidedBackprop", "Deconvolution"],
    "saliency": ["Saliency"],
    "input_x_gradient": ["InputXGradient"],
    "integrated_gradients": ["IntegratedGradients"],
    "noise_tunnel": ["NoiseTunnel"],
    "guided_grad_cam": ["GuidedGradCam"],
    "lrp": ["LRP"],
    "layer.grad_cam": ["LayerGradCam"],
    "layer.layer_activation": ["LayerActivation"],
    "layer.layer_gradient_x_activation": ["LayerGradientXActivation"],
}
RULES = ["EpsilonRule", "GammaRule", "Alpha1_Beta0_Rule", "IdentityRule"]
FILES = [
    *("test_deconvolution", "test_guided_backprop", "test_guided_grad_cam", "test_input_x_gradient", "test_lrp"),
    *("test_integrated_gradients_basic", "test_integrated_gradients_classification", "test_saliency"),
    *("layer/test_grad_cam", "layer/test_layer_activation", "layer/test_layer_gradient_x_activation"),
]
GENERATED = ["test_hook_removal", "test_targets", "test_jit"]
"""Files with tests of every class of Captum's, named after it."""


def put_in_place() -> None:
    """Let Captum's modules give our classes for their own; Captum's other classes keep those that they imported."""
    for module in pkgutil.walk_packages(captum.attr.__path__, "captum.attr."):
        importlib.import_module(module.name)
    for path, names in MODULES.items():
        for name in names:
            # generated tests tell layers' methods from others by Captum's base classes
            base = InternalAttribution if name.startswith("Layer") or name == "GuidedGradCam" else GradientAttribution
            cls = type(name, (getattr(ours, name), base), {"__module__": "undertow.captum"})
            for holder in (captum.attr, importlib.import_module(f"captum.attr._core.{path}")):
                setattr(holder, name, cls)
    rules = importlib.import_module("captum.attr._utils.lrp_rules")
    for name in RULES:
        setattr(rules, name, getattr(ours, name))


class OurTests:
    """Keeps the tests of classes that are ours."""

    def __init__(self) -> None:
        names = "|".join(name for names in MODULES.values() for name in names)
        self.names = re.compile(rf"(?<![A-Za-z])({names})(?![A-Za-z])")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is about Captum's neurons and its other classes."""
        items[:] = [item for item in items if self.is_ours(item)]

    def is_ours(self, item: pytest.Item) -> bool:
        """Whether a test is of a class that is ours."""
        if item.path.stem in GENERATED:
            return bool(self.names.search(item.name.replace("_", " ")))
        return "neuron" not in item.name


def main(checkout: str, *options: str) -> int:
    """Run the tests; return pytest's exit code."""
    if "--captum" not in options:
        put_in_place()
    tests = Path(checkout).resolve() / "tests" / "attr"
    os.chdir(tests.parents[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    paths = [str(tests / f"{name}.py") for name in [*FILES, *GENERATED]]
    rest = [option for option in options if option != "--captum"]
    return pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, *rest, *paths], plugins=[OurTests()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
