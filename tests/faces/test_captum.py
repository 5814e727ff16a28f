"""`undertow.captum` beside Captum 0.9 itself, in float64: equal where Captum is right, right where it is not."""

import inspect
import subprocess
import sys

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr._utils import lrp_rules
from torch import nn

import undertow.captum as ours
from faces.networks import Functional, Modules, Residual, Reused, TwoInputs, built
from undertow.errors import InputError, ModelError, RuleError, TargetError, UndertowWarning

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{of_captum}") for of_captum in ("Input Tensor", "Setting backward hooks")
]
NAMES = [
    *("Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution", "IntegratedGradients"),
    *("NoiseTunnel", "LayerGradCam", "GuidedGradCam", "LayerActivation", "LayerGradientXActivation", "LRP"),
]
AT_INPUT = ["Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution", "IntegratedGradients"]


@pytest.fixture(scope="module")
def model():
    return built(Modules)


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def both(name, constructor, *args, seed=None, **kwargs):
    """Return what Captum and what this library gives for one call."""
    results = []
    for module in (captum.attr, ours):
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  Captum draws baselines with it
        method = constructor(module, name)
        results.append(method.attribute(*[a.clone() if torch.is_tensor(a) else a for a in args], **kwargs))
    return results


def at_input(module, name, model):
    return getattr(module, name)(model)


def assert_same(theirs, own, tolerance=1e-12):
    assert type(own) is type(theirs)
    if isinstance(theirs, tuple | list):
        assert len(theirs) == len(own)
        for a, b in zip(theirs, own, strict=True):
            assert_same(a, b, tolerance)
        return
    theirs = theirs.detach()
    assert theirs.shape == own.shape
    assert theirs.abs().max() > 0
    torch.testing.assert_close(own, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_captums(name):
    for method in ("__init__", "attribute"):
        own, theirs = (inspect.signature(getattr(getattr(m, name), method)).parameters for m in (ours, captum.attr))
        assert [(p.name, p.default, p.kind) for p in own.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


@pytest.mark.parametrize("name", AT_INPUT)
@pytest.mark.parametrize(
    "target", [2, torch.tensor(1), torch.tensor([3]), torch.tensor([0, 1, 3]), [3, 1, 0], (2,), [(1,), (0,), (3,)], -1]
)
def test_every_form_of_a_target(model, x, name, target):
    theirs, own = both(name, lambda m, n: at_input(m, n, model), x, target=target)
    assert_same(theirs, own, 1e-7 if name == "IntegratedGradients" else 1e-12)  # Captum's weights are float32


@pytest.mark.parametrize("name", AT_INPUT)
def test_further_arguments(model, x, name):
    scale = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    more = {"target": 1, "additional_forward_args": (scale, True)}
    assert_same(*both(name, lambda m, n: at_input(m, n, model), x, **more), tolerance=1e-7)


@pytest.mark.parametrize("name", AT_INPUT)
def test_several_inputs(name):
    two, generator = built(TwoInputs), torch.Generator().manual_seed(2)
    a, b, offset = (torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (6, 3, 4))
    kwargs = {"target": [0, 3], "additional_forward_args": offset}
    theirs, own = both(name, lambda m, n: at_input(m, n, two), (a, b), **kwargs)
    assert isinstance(own, tuple)
    assert_same(theirs, own, 1e-7)


@pytest.mark.parametrize("name", AT_INPUT)
def test_one_score_a_sample_needs_no_target(x, name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    for function in (net, lambda x: net(x)[:, 0]):
        if isinstance(function, nn.Module) or ("Deconv" not in name and "Guided" not in name):
            assert_same(*both(name, lambda m, n, f=function: at_input(m, n, f), x), tolerance=1e-7)


def test_dense_scores_and_scores_of_the_whole_batch(x):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).double()
    assert_same(*both("Saliency", lambda m, n: at_input(m, n, net), x, target=(1, 2, 0), abs=False))
    assert_same(*both("Saliency", lambda m, n: at_input(m, n, lambda x: net(x).sum().view(1)), x, abs=False))


def test_a_softmax_at_the_end_is_explained_as_it_is(model, x):
    net = nn.Sequential(model, nn.Softmax(1))
    assert_same(*both("Saliency", lambda m, n: at_input(m, n, net), x, target=2))


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle"])
@pytest.mark.parametrize("internal_batch_size", [None, 3, 7])
def test_integrated_gradients(model, x, method, internal_batch_size):
    kwargs = {"target": 2, "n_steps": 11, "method": method, "return_convergence_delta": True}
    kwargs |= {"baselines": x.mean(0, keepdim=True), "internal_batch_size": internal_batch_size}
    (theirs, delta), (own, own_delta) = both("IntegratedGradients", lambda m, n: at_input(m, n, model), x, **kwargs)
    assert_same(theirs, own, 1e-6)
    torch.testing.assert_close(own_delta, delta, rtol=1e-4, atol=1e-6 * float(theirs.abs().sum()))


def test_the_trapezoid_adds_up_where_captums_does_not(x):
    """Of a linear model every quadrature is exact; Captum's trapezoid has weights that add up to (n - 1) / n."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 1)).double()
    kwargs = {"n_steps": 5, "method": "riemann_trapezoid"}
    theirs, own = both("IntegratedGradients", lambda m, n: at_input(m, n, net), x, **kwargs)
    exact = x * net[1].weight.view(3, 6, 6)
    torch.testing.assert_close(own, exact.detach())
    torch.testing.assert_close(theirs, exact.detach() * 4 / 5, rtol=1e-6, atol=1e-9)


def test_points_do_not_share_a_batch_whose_samples_meet(x):
    """A score that compares samples: Captum puts all points into one batch, so that they compare with one another."""

    def spread(x):
        return (x - x.mean(0)).pow(3).flatten(1).sum(1)

    own = ours.IntegratedGradients(spread).attribute(x, n_steps=20)
    leaf = x.clone().requires_grad_()  # along the line from zero the gradient grows as its square
    (gradient,) = torch.autograd.grad(spread(leaf).sum(), leaf)
    torch.testing.assert_close(own, gradient * x / 3)


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("size", [None, 2])
def test_noise_tunnel_draws_captums_noise(model, x, nt_type, size):
    def tunnel(module, _):
        return module.NoiseTunnel(module.Saliency(model))

    kwargs = {"nt_type": nt_type, "nt_samples": 5, "nt_samples_batch_size": size, "stdevs": 0.3, "target": [0, 1, 2]}
    assert_same(*both("", tunnel, x, seed=4, **kwargs), tolerance=1e-9)


def test_noise_tunnel_around_integrated_gradients(model, x):
    def tunnel(module, _):
        return module.NoiseTunnel(module.IntegratedGradients(model))

    kwargs = {"nt_samples": 3, "stdevs": 0.1, "baselines": x.flip(0), "target": 1, "return_convergence_delta": True}
    kwargs |= {"n_steps": 4, "draw_baseline_from_distrib": True}
    (theirs, delta), (own, own_delta) = both("", tunnel, x, seed=5, **kwargs)
    assert_same(theirs, own, 1e-6)
    torch.testing.assert_close(own_delta, delta, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["LayerGradCam", "LayerGradientXActivation"])
@pytest.mark.parametrize("layer", ["conv", "relu2", "pool", "linear"])
@pytest.mark.parametrize("at_layer_input", [False, True])
def test_layers(model, x, name, layer, at_layer_input):
    kwargs = {"target": [1, 0, 2], "attribute_to_layer_input": at_layer_input}
    module = model.get_submodule(layer)
    assert_same(*both(name, lambda m, n: getattr(m, n)(model, module), x, **kwargs))


def test_options_of_layers(model, x):
    layers = [model.conv, model.relu3]
    for kwargs in ({"relu_attributions": True}, {"attr_dim_summation": False}, {"grad_kwargs": {"retain_graph": True}}):
        assert_same(*both("LayerGradCam", lambda m, n: getattr(m, n)(model, model.relu2), x, target=1, **kwargs))
    assert_same(*both("LayerActivation", lambda m, n: getattr(m, n)(model, model.conv), x))
    assert_same(*both("LayerActivation", lambda m, n: getattr(m, n)(model, layers), x, attribute_to_layer_input=True))
    assert_same(*both("LayerGradientXActivation", lambda m, n: getattr(m, n)(model, layers), x, target=1))
    kwargs = {"multiply_by_inputs": False, "memory_efficient": True}
    gradient = lambda m, n: getattr(m, n)(model, model.conv, **kwargs)  # noqa: E731
    assert_same(*both("LayerGradientXActivation", gradient, x, target=1))
    function = lambda x: model(x, flip=True)  # noqa: E731  a layer of a function
    assert_same(*both("LayerGradCam", lambda m, n: getattr(m, n)(function, model.conv), x, target=1))
    cam = ours.LayerGradCam(model, model.relu2).attribute(x, target=1)
    assert_same(captum.attr.LayerAttribution.interpolate(cam, (6, 6)), ours.LayerGradCam.interpolate(cam, (6, 6)))


def test_a_frozen_network_of_tokens():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).double().requires_grad_(False)
    ids = torch.tensor([[1, 2, 3], [4, 5, 8]])
    assert_same(*both("LayerGradientXActivation", lambda m, n: getattr(m, n)(net, net[0]), ids, target=1))
    assert_same(*both("LayerActivation", lambda m, n: getattr(m, n)(net, net[0]), ids))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_guided_grad_cam(model, x, mode):
    kwargs = {"target": 1, "interpolate_mode": mode}
    assert_same(*both("GuidedGradCam", lambda m, n: getattr(m, n)(model, model.relu2), x, **kwargs))


@pytest.mark.parametrize("rules", [{}, {"conv": "GammaRule", "linear": "EpsilonRule"}, {"linear": "Alpha1_Beta0_Rule"}])
def test_lrp(x, rules):
    """Inputs of one sign, for which Captum's rules with changed weights hold; rules stay on their layers here."""
    net = built(Modules)

    def lrp(module, _):
        for layer, rule in rules.items():
            net.get_submodule(layer).rule = getattr(lrp_rules if module is captum.attr else ours, rule)()
        return module.LRP(net)

    kwargs = {"target": [0, 1, 2], "return_convergence_delta": True}
    (theirs, delta), (own, own_delta) = both("LRP", lrp, x.abs(), **kwargs)
    assert_same(theirs, own, 1e-6)
    torch.testing.assert_close(own_delta, delta, rtol=1e-5, atol=1e-6)


def test_lrp_takes_rules_of_captums_own(x, capsys):
    net = built(Modules)
    net.conv.rule = lrp_rules.GammaRule(0.5)
    own = ours.LRP(net).attribute(x.abs(), target=1, verbose=True)
    assert "GammaRule(gamma=0.5" in capsys.readouterr().out
    assert_same(captum.attr.LRP(net).attribute(x.abs(), target=1), own, 1e-6)
    net.conv.rule = "gamma"
    with pytest.raises(TypeError, match="Conv2d has the rule str"):
        ours.LRP(net)


def test_lrp_of_a_sum_conserves_where_captums_doubles():
    net = built(Residual)
    x = torch.rand(2, 6, dtype=torch.float64)
    own, delta = ours.LRP(net).attribute(x, target=1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-6
    theirs = captum.attr.LRP(net).attribute(x, target=1)
    assert (theirs.sum(1) - net(x)[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(
        own, x * _gradient(net, x, 1), rtol=1e-6, atol=1e-9
    )  # no bias: ε is input times gradient


def _gradient(net, x, target):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf)[:, target].sum(), leaf)[0]


@pytest.mark.parametrize("network", [Functional, Reused])
@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
def test_activations_that_captum_does_not_see(x, network, name):
    """The twin has the same weights, and each activation as a module of its own."""
    twin, net = built(Modules), built(network)
    right = getattr(captum.attr, name)(twin).attribute(x.clone(), target=2)
    if network is Functional:
        plain = captum.attr.Saliency(net).attribute(x.clone(), target=2, abs=False)
        assert_same(plain, getattr(captum.attr, name)(net).attribute(x.clone(), target=2))
    assert_same(right, getattr(ours, name)(net).attribute(x, target=2))


def test_channels_last_are_summed_where_captum_sums_places():
    net = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2)).double()
    tokens = torch.randn(2, 5, 3, dtype=torch.float64)
    own = ours.LayerGradCam(net, net[0]).attribute(tokens, target=0)
    h = net[0](tokens).detach()
    g = net[2].weight[0].view(5, 4).expand(2, 5, 4).detach()
    assert own.shape == (2, 1, 5)
    torch.testing.assert_close(own[:, 0], (h * g.mean(1, keepdim=True)).sum(2))


def test_nothing_is_left_on_the_model_or_the_input(model, x):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("GuidedBackprop", "LRP"):
        getattr(ours, name)(model).attribute(x, target=1)
    ours.LayerGradCam(model, model.conv).attribute(x, target=1)
    assert not x.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_fit_is_told(model, x):
    with pytest.raises(TargetError, match=r"no target is given, and the model returns \(3, 4\)"):
        ours.Saliency(model).attribute(x)
    with pytest.raises(AssertionError):  # as Captum raises it
        ours.Saliency(model).attribute(x, target=7)
    with pytest.raises(TargetError, match="2 targets for 3 samples"):
        ours.Saliency(model).attribute(x, target=[1, 2])
    with pytest.raises(InputError, match="unknown method 'riemann_midle'; did you mean riemann_middle"):
        ours.IntegratedGradients(model).attribute(x, target=0, method="riemann_midle")
    with pytest.raises(InputError, match="unknown nt_type"):
        ours.NoiseTunnel(ours.Saliency(model)).attribute(x, nt_type="smooth", target=0)
    net = built(Reused)
    with pytest.raises(InputError, match="runs 3 times"):
        ours.LayerActivation(net, net.relu1).attribute(x)
    with pytest.raises(InputError, match="does not run"):
        ours.LayerGradCam(model, nn.ReLU()).attribute(x, target=0)
    with pytest.raises(RuleError, match="no activation"):
        ours.GuidedBackprop(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).double()).attribute(x, target=0)
    with pytest.raises(ModelError, match="dropout"):
        ours.Saliency(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(108, 2).double())).attribute(x, target=0)
    with pytest.raises(NotImplementedError):
        ours.Saliency(model).attribute_future()
    gelu = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.GELU(), nn.ReLU(), nn.Linear(4, 2)).double()
    with pytest.warns(UndertowWarning, match="GeluBackward0"):
        ours.GuidedBackprop(gelu).attribute(x, target=0)


def test_it_runs_without_captum():
    code = "import sys; sys.modules['captum'] = None; import undertow.captum; assert 'captum.attr' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
