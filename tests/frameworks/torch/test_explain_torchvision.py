"""The networks people use, random weights, against the twin, to the last bit."""

import functools
import gc

import pytest
import torch

import undertow as ut
from frameworks.torch.references import reference
from undertow.frameworks.torch.zoo.importing import import_torchvision

pytestmark = pytest.mark.slow

# name: (activation calls, side of the input, whether modules show all of them)
NETWORKS = {
    "vgg16": (15, 64, True),
    "vgg16_bn": (15, 64, True),
    "resnet50": (49, 64, True),
    "alexnet": (7, 64, True),
    "densenet201": (201, 64, False),
    "googlenet": (57, 64, False),
    "inception_v3": (94, 96, False),
    "mobilenet_v2": (35, 64, True),
    "squeezenet1_1": (26, 64, True),
}


@functools.cache
def build(name: str) -> torch.nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return import_torchvision().models.get_model(name, weights=None, **options).eval()


SLOW = ("vgg16", "vgg16_bn", "resnet50", "densenet201", "googlenet", "inception_v3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def test_maps_equal_the_twin(name: str):
    calls, side, modules = NETWORKS[name]
    net = build(name)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))
    inplace = [module.inplace for module in net.modules() if hasattr(module, "inplace")]
    guided = None
    for rule in ("deconvnet", "gradient", "guided"):
        values, count = reference(net, x, 5, rule)
        guided = values
        a = ut.explain(net, x, rule=rule, target=5)
        assert torch.equal(a.values, values), rule
        assert (a.rewired, count) == (0 if rule == "gradient" else calls, calls)
        assert values.abs().sum() > 0
    for through in ("swap", "hook"):
        if modules:
            a = ut.explain(net, x, target=5, through=through)
            assert torch.equal(a.values, guided)
            assert a.rewired == calls
        else:
            with pytest.raises(ut.RuleError, match="missed"):
                ut.explain(net, x, target=5, through=through)
    assert inplace == [module.inplace for module in net.modules() if hasattr(module, "inplace")]
    build.cache_clear()
    gc.collect()
