"""Estimators against their definitions, and against Captum and pytorch-grad-cam."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from undertow.attribution import estimators, points
from undertow.frameworks import base
from undertow.frameworks.torch.zoo import importing

RULES = ("gradient", "deconvnet", "guided")


class Net(nn.Module):
    """Two convolutions with an in-place ReLU after each, a pooling, and a smooth head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2)
        self.relu, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.head = nn.Linear(8 * 3 * 4, 5)

    def forward(self, x):
        h = F.max_pool2d(self.relu2(self.second(self.relu(self.first(x)))), 2, ceil_mode=True)
        return self.head(h.flatten(1))


def net(seed: int = 3) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double().eval()  # batches of other sizes round otherwise, and in float32 might open another ReLU


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(5)).double() * 1.4 + 0.3


def answer(model, x, rule="gradient", estimator="smoothgrad:3", seed=0):
    request = base.Request(model, (x,), ut.rules.RULES[rule], rule, None, "graph", "relu-like", False)
    return estimators.estimate("torch", request, estimators.resolve(estimator), seed)


@pytest.mark.parametrize("rule", RULES)
def test_smoothgrad_without_noise_is_the_gradient(x, rule):
    attribution = ut.explain(net(), x, rule=rule, estimator="smoothgrad:3", noise=0.0).values
    assert torch.allclose(attribution, ut.explain(net(), x, rule=rule).values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_smoothgrad_is_the_mean_over_noisy_inputs(x, rule):
    attribution = ut.explain(net(), x, rule=rule, estimator="smoothgrad:5", seed=7)
    generator, classes = np.random.default_rng(7), net()(x).argmax(1)
    reach = 0.1 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).reshape(2, 1, 1, 1)
    total = torch.zeros_like(x)
    for _ in range(5):
        noise = torch.from_numpy(generator.standard_normal(x.shape)) * reach
        total += ut.explain(net(), x + noise, rule=rule, target=classes).values
    assert torch.allclose(attribution.values, total / 5, rtol=1e-4, atol=1e-6)
    assert torch.equal(attribution.targets, classes)
    assert attribution.estimator == "smoothgrad:5"
    assert not torch.allclose(attribution.values, ut.explain(net(), x, rule=rule, estimator="smoothgrad:5").values)


def test_integrated_gradients_are_complete(x):
    model = net()
    attribution = ut.explain(model, x, rule="gradient", estimator="integrated:400", target=[1, 3])
    with torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[[0, 1], [1, 3]]
    assert torch.allclose(attribution.values.sum((1, 2, 3)), difference, rtol=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_input_times_the_gradient(x, rule):
    attribution = ut.explain(net(), x, rule=rule, estimator="input-times", target="top:2")
    assert attribution.values.shape == (2, 2, 3, 12, 16)
    assert torch.allclose(attribution.values, x[:, None] * ut.explain(net(), x, rule=rule, target="top:2").values)


@pytest.mark.parametrize(
    ("estimator", "rule"), list(itertools.product(("smoothgrad:3", "integrated:4", "grad-cam:second"), RULES))
)
def test_targets_of_a_sample_are_as_if_asked_alone(x, estimator, rule):
    several = ut.explain(net(), x, rule=rule, estimator=estimator, target=[[0, 4], [2, 1]])
    for place, target in enumerate(([0, 2], [4, 1])):
        alone = ut.explain(net(), x, rule=rule, estimator=estimator, target=target)
        assert torch.allclose(several.values[:, place], alone.values, rtol=1e-4, atol=1e-6)
    assert several.scores.shape == (2, 2)


def test_a_function_as_target_sees_the_batch_as_it_is(x):
    places = torch.arange(2)
    attribution = ut.explain(net(), x, estimator="integrated:3", target=lambda out: out[places, torch.tensor([4, 1])])
    assert torch.allclose(
        attribution.values, ut.explain(net(), x, estimator="integrated:3", target=[4, 1]).values, atol=1e-6
    )


def test_integers_in_a_tuple_get_no_map():
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    v, ids = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 2, 5])
    attribution = ut.explain(lambda v, i: head(v + table[i]), (v, ids), estimator="smoothgrad:2")
    assert attribution.values[0].shape == (3, 4)
    assert attribution.values[1] is None


def by_hand(model: Net, x: torch.Tensor, target: int, rule: str) -> torch.Tensor:
    """Grad-CAM of the second convolution, from what follows it written out a second time."""
    values = model.second(F.relu(model.first(x))).detach().requires_grad_()
    h = F.max_pool2d(values.relu(), 2, ceil_mode=True)
    h.register_hook(lambda g: g if rule == "gradient" else g.relu())  # the pooling only chooses, so it may come after
    (g,) = torch.autograd.grad(model.head(h.flatten(1))[:, target].sum(), values)
    return ((g.mean((2, 3), keepdim=True) * values).sum(1, keepdim=True)).relu().detach()


@pytest.mark.parametrize("rule", ["gradient", "guided"])
def test_grad_cam_of_a_layer_before_an_in_place_relu(x, rule):
    attribution = ut.explain(net(), x, rule=rule, estimator="grad-cam:second", target=2)
    small = by_hand(net(), x, 2, rule)
    assert small.max() > 0
    expected = F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)
    assert attribution.values.shape == (2, 1, 12, 16)
    assert torch.allclose(attribution.values, expected, atol=1e-6)


def for_peers() -> Net:
    """The same network, without the in-place activations that peers cannot hook beside."""
    model = net()
    model.relu, model.relu2 = nn.ReLU(), nn.ReLU()
    return model


def test_captum_gives_the_same(x):
    from captum.attr import GuidedGradCam, IntegratedGradients, LayerAttribution, LayerGradCam

    peer = for_peers()
    small = LayerGradCam(peer, peer.second).attribute(x, target=2, relu_attributions=True)
    attribution = ut.explain(net(), x, rule="gradient", estimator="grad-cam:second", target=2).values
    assert torch.allclose(attribution, LayerAttribution.interpolate(small, x.shape[-2:], "bilinear"), atol=1e-6)

    line = IntegratedGradients(peer).attribute(x, torch.zeros_like(x), 2, n_steps=7, method="riemann_middle")
    attribution = ut.explain(net(), x, rule="gradient", estimator="integrated:7", target=2).values
    assert torch.allclose(attribution, line, atol=1e-5)

    with warnings.catch_warnings(action="ignore"):  # it says that its backward hooks are set
        both = GuidedGradCam(peer, peer.second).attribute(x, target=2, interpolate_mode="bilinear")
    attribution = ut.explain(net(), x, rule="guided", estimator="guided-grad-cam:second", target=2).values
    assert torch.allclose(attribution, both, atol=1e-6)


@pytest.mark.slow
def test_pytorch_grad_cam_gives_the_same_on_its_scale(x):
    importing.import_torchvision()  # which pytorch-grad-cam imports, and which fails beside a CPU-only torch
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    peer = for_peers()
    with GradCAM(peer, [peer.second]) as cam:
        theirs = torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(2)] * 2))
    attribution = ut.explain(net(), x, rule="gradient", estimator="grad-cam:second", target=2).values[:, 0]
    low, high = attribution.amin((1, 2), keepdim=True), attribution.amax((1, 2), keepdim=True)
    assert torch.allclose((attribution - low) / (high - low), theirs.double(), atol=1e-4)


def test_guided_grad_cam_is_the_guided_map_times_the_plain_grad_cam(x):
    attribution = ut.explain(net(), x, rule="guided", estimator="guided-grad-cam:second", target=2)
    cam = ut.explain(net(), x, rule="gradient", estimator="grad-cam:second", target=2).values
    assert torch.allclose(attribution.values, cam * ut.explain(net(), x, target=2).values)
    assert attribution.values.shape == x.shape


def test_the_model_is_left_as_it_was(x):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ut.explain(model, x, estimator="guided-grad-cam:second")
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("smothgrad", "did you mean smoothgrad"),
        ("smoothgrad:0", "write a number of inputs, as in smoothgrad:25"),
        ("smoothgrad:many", "write a number"),
        ("gradient:3", "takes nothing after it"),
        ("grad-cam", "needs a layer, as in grad-cam:layer4"),
        ("grad-cam:secnd", "no layer 'secnd'; did you mean second"),
        ("grad-cam:head", r"needs a layer of channels on a plane, .*; layer 'head' gives \(2, 5\)"),
    ],
)
def test_an_estimator_that_cannot_be_is_said(x, estimator, message):
    with pytest.raises(ut.InputError, match=message):
        ut.explain(net(), x, estimator=estimator)


def test_layers_are_read_through_the_graph_alone(x):
    with pytest.raises(ut.InputError, match="through='graph'"):
        ut.explain(net(), x, estimator="grad-cam:second", through="swap")


def test_bfloat16_stays_bfloat16(x):
    attribution = ut.explain(net().bfloat16(), x.bfloat16(), estimator="smoothgrad:2")
    assert attribution.values.dtype == torch.bfloat16


BASELINES = {
    "zero": lambda x: torch.zeros_like(x),
    0.5: lambda x: torch.full_like(x, 0.5),
    (0.1, -0.2, 0.3): lambda x: torch.tensor([0.1, -0.2, 0.3]).double()[:, None, None].expand_as(x),
}


def line_by_hand(model, x, start, count, classes):
    """Integrated gradients by their definition, one point at a time, by autograd."""
    total = torch.zeros_like(x)
    for i in range(count):
        point = (start + (x - start) * (i + 0.5) / count).requires_grad_()
        total += torch.autograd.grad(model(point).gather(1, classes[:, None]).sum(), point)[0]
    return (x - start) * total / count


@pytest.mark.parametrize("baseline", BASELINES)
def test_integrated_gradients_begin_at_the_baseline(x, baseline):
    model, classes = net(), torch.tensor([1, 3])
    start = BASELINES[baseline](x)
    a = ut.explain(model, x, rule="gradient", estimator="integrated:6", target=classes, baseline=baseline)
    wanted = line_by_hand(model, x, start, 6, classes)
    assert torch.allclose(a.values, wanted, atol=1e-9)
    moved = (model(x) - model(start)).gather(1, classes[:, None])[:, 0].detach()
    left = (moved - wanted.flatten(1).sum(1)) / moved
    assert np.allclose(a.completeness, left, atol=1e-9)
    tensor = ut.explain(model, x, rule="gradient", estimator="integrated:6", target=classes, baseline=start)
    assert torch.allclose(tensor.values, wanted, atol=1e-9)


def test_baselines_are_averaged_and_the_blur_is_a_gaussian(x):
    from scipy import ndimage

    model, classes = net(), torch.tensor([1, 3])
    options = {"rule": "gradient", "estimator": "integrated:5", "target": classes}
    each = [ut.explain(model, x, **options, baseline=b).values for b in ("zero", "blur", 0.5)]
    mean = ut.explain(model, x, **options, baseline=["zero", "blur", 0.5])
    assert torch.allclose(mean.values, torch.stack(each).mean(0), atol=1e-9)
    big = np.random.default_rng(0).normal(size=(1, 2, 60, 45))
    blurred = points.baseline_like("blur", [big], [big])[0]
    sigma = (0, 0, 60 / 15, 45 / 15)
    spread = ndimage.gaussian_filter(big, sigma, mode="constant", truncate=20)
    weight = ndimage.gaussian_filter(np.ones_like(big), sigma, mode="constant", truncate=20)
    assert np.allclose(blurred, spread / weight, atol=1e-9)
    last = points.baseline_like("blur", [np.moveaxis(big, 1, -1)], [big], channels_last=True)[0]
    assert np.allclose(np.moveaxis(last, -1, 1), blurred)


@pytest.mark.parametrize("estimator", ["smoothgrad:7", "integrated:7"])
def test_the_inner_batch_bounds_what_goes_through_at_once(x, estimator):
    sizes, model = [], net()

    def counted(v):
        sizes.append(len(v))
        return model(v)

    wanted = ut.explain(model, x, estimator=estimator, target=1).values
    for inner_batch in (1, 2, 6):
        sizes.clear()
        a = ut.explain(counted, x, estimator=estimator, target=1, inner_batch=inner_batch)
        assert max(sizes) <= max(inner_batch, len(x))
        assert torch.allclose(a.values, wanted, atol=1e-9)


def test_noise_is_a_part_of_the_range(x):
    model, classes, generator = net(), torch.tensor([1, 3]), np.random.default_rng(0)
    ranges = (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)).numpy()
    point = torch.tensor(x.numpy() + generator.standard_normal(x.shape) * 0.3 * ranges).requires_grad_()
    (wanted,) = torch.autograd.grad(model(point).gather(1, classes[:, None]).sum(), point)
    a = ut.explain(model, x, rule="gradient", estimator="smoothgrad:1", noise=0.3, target=classes)
    assert torch.allclose(a.values, wanted, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "black"}, "unknown baseline 'black'; it is 'zero', 'blur'"),
        ({"baseline": torch.ones(2, 2)}, r"a baseline of shape .*2, 2.* does not fit the input \(2, 3, 12, 16\)"),
        ({"baseline": []}, "baseline=\\[\\] is empty"),
        ({"noise": -1.0}, "noise=-1.0 must be 0 or more"),
        ({"inner_batch": 0}, "inner_batch=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_said(x, options, message):
    with pytest.raises(ut.InputError, match=message):
        ut.explain(net(), x, estimator="integrated:3", **options)
    with pytest.raises(ut.InputError, match=r"'blur' needs images"):
        ut.explain(nn.Linear(4, 2), torch.ones(1, 4), rule="gradient", estimator="integrated:3", baseline="blur")


def test_likeness_says_whether_the_map_changes_with_the_class(x):
    a = ut.explain(net(), x, rule="gradient", target=[[0, 3, 4]] * 2)
    maps = a.values.flatten(2).numpy()
    assert np.allclose(a.likeness(), [np.corrcoef(rows) for rows in maps], atol=1e-9)
    from scipy import stats

    ranks = [stats.spearmanr(np.abs(rows), axis=1).statistic for rows in maps]
    assert np.allclose(a.likeness("magnitude"), ranks, atol=1e-9)
    opposite = ut.explain(
        lambda v: torch.stack([net()(v)[:, 0], -net()(v)[:, 0]], 1), x, rule="gradient", target="top:2"
    )
    assert np.allclose(opposite.likeness()[:, 0, 1], -1)
    for make, message in (
        (lambda: ut.explain(net(), x).likeness(), "one target a sample; explain several"),
        (lambda: a.likeness("signs"), "it is 'values' or 'magnitude'"),
    ):
        with pytest.raises(ut.InputError, match=message):
            make()


class OfList(nn.Module):
    """Takes a list of images of any sizes, and gives a score for each."""

    def forward(self, images):
        return torch.stack([image.pow(3).sum() for image in images])


def test_the_images_of_a_list_are_samples_each():
    generator = np.random.default_rng(3)
    images = [
        torch.tensor(generator.normal(size=size) * [[[0.0]], [[9.0]], [[1.0]]]) for size in ((3, 5, 4), (3, 6, 6))
    ]
    own = {"rule": "gradient", "target": lambda scores: scores}
    noise = np.random.default_rng(0)
    noisy = [x + torch.tensor(noise.standard_normal(x.shape)) * 0.1 * (x.max() - x.min()) for x in images]
    a = ut.explain(OfList(), images, estimator="smoothgrad:1", **own)
    for values, point in zip(a.values, noisy, strict=True):
        assert torch.allclose(values, 3 * point**2)
    blurred = ut.explain(OfList(), images, estimator="integrated:400", baseline="blur", **own)
    wanted = [points.baseline_like("blur", [x[None].numpy()], [x])[0][0] for x in images]
    for values, x, start in zip(blurred.values, images, wanted, strict=True):
        assert values.sum().item() == pytest.approx(x.pow(3).sum().item() - (start**3).sum(), rel=1e-4)


def test_masks_beside_an_input_are_not_moved():
    x, mask = torch.tensor([[2.0, -1.0, 3.0]]).double(), torch.tensor([[1.0, 0.0, 1.0]]).double()
    seen = []

    def model(v, m):
        seen.append(m.detach().clone())
        return (v.pow(2) * m).sum(1, keepdim=True)

    for estimator in ("smoothgrad:3", "integrated:3"):
        seen.clear()
        ut.explain(model, (x, mask), rule="gradient", estimator=estimator)
        assert all(torch.equal(m.unique(dim=0), mask) for m in seen)


@pytest.mark.parametrize("estimator", ["smoothgrad:2", "integrated:2"])
def test_a_box_is_not_chosen_anew_at_each_point(estimator):
    def detector(images):
        return [{"boxes": torch.tensor([[0.0, 0, 2, 2]]), "scores": image.sum()[None]} for image in images]

    images = [torch.ones(3, 4, 4)]
    with pytest.raises(ut.InputError, match=r"would choose box 0 anew .*ut\.targets\.box\(near="):
        ut.explain(detector, images, rule="gradient", estimator=estimator, target=ut.targets.box())
    near = ut.targets.box(near=(0, 0, 3, 3))
    a = ut.explain(detector, images, rule="gradient", estimator=estimator, target=near)
    assert torch.allclose(a.values[0], torch.ones(3, 4, 4))
