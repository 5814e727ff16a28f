"""`undertow.gradcam` beside pytorch-grad-cam 1.5 itself: equal where that is right."""

import numpy as np
import pytest
import torch
from torch import nn

import undertow.gradcam as ours
from faces.networks import Modules, Reused, built
from undertow.errors import FrameworkError, InputError, ModelError
from undertow.frameworks.torch.zoo.importing import import_torchvision


@pytest.fixture(scope="module")
def theirs():
    import_torchvision()
    import pytorch_grad_cam
    import pytorch_grad_cam.utils.image

    return pytorch_grad_cam


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return built(Modules, seed=3).float()


class Tokens(nn.Module):
    """A class token and 9 others, as a vision transformer has them."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        h = self.mix(torch.cat([h.mean(1, keepdim=True), h], 1)).tanh()
        return self.head((h * h).mean(1))


def targets(module, classes=(1, 0, 3)):
    return [module.ClassifierOutputTarget(c) for c in classes]


@pytest.mark.parametrize("names", [["conv"], ["relu2"], ["conv", "relu2"]])
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("options", [{}, {"aug_smooth": True}, {"eigen_smooth": True}])
def test_maps(theirs, model, x, names, chosen, options):
    own = ours.GradCAM(model=model, target_layers=[model.get_submodule(name) for name in names])
    with theirs.GradCAM(model=model, target_layers=[model.get_submodule(name) for name in names]) as cam:
        right = cam(input_tensor=x, targets=targets(ours) if chosen else None, **options)
    maps = own(input_tensor=x, targets=targets(ours) if chosen else None, **options)
    assert maps.dtype == right.dtype
    assert maps.shape == right.shape == (3, 6, 6)
    assert right.max() > 0.5
    np.testing.assert_allclose(maps, right, atol=2e-5)
    assert torch.equal(own.outputs, model((x.flip(-1) * 1.1) if options.get("aug_smooth") else x))


def test_tokens_with_a_transform_and_without(theirs, x):
    net = built(Tokens).float()

    def reshape(tokens):
        return tokens[:, 1:].mT.reshape(len(tokens), 4, 3, 3)

    right = theirs.GradCAM(net, [net.mix], reshape_transform=reshape)(x, targets(ours))
    np.testing.assert_allclose(
        ours.GradCAM(net, [net.mix], reshape_transform=reshape)(x, targets(ours)), right, atol=2e-5
    )
    np.testing.assert_allclose(ours.GradCAM(net, [net.mix])(x, targets(ours)), right, atol=2e-5)


def test_targets_of_theirs_and_of_ours(theirs, model, x):
    of_theirs = theirs.utils.model_targets
    mask = np.eye(4, dtype=np.float32)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    pairs = [
        (
            model,
            model.conv,
            [of_theirs.ClassifierOutputSoftmaxTarget(1)] * 3,
            [ours.ClassifierOutputSoftmaxTarget(1)] * 3,
        ),
        (
            dense,
            dense[0],
            [of_theirs.SemanticSegmentationTarget(1, mask)] * 3,
            [ours.SemanticSegmentationTarget(1, mask)] * 3,
        ),
    ]
    for net, layer, their_targets, own_targets in pairs:
        right = theirs.GradCAM(net, [layer])(x, their_targets)
        for chosen in (their_targets, own_targets):
            np.testing.assert_allclose(ours.GradCAM(net, [layer])(x, chosen), right, atol=2e-5)
    score = torch.tensor([0.5])
    for category in (0, 1):
        assert ours.BinaryClassifierOutputTarget(category)(score) == of_theirs.BinaryClassifierOutputTarget(category)(
            score
        )
    assert ours.RawScoresOutputTarget()(score) is score


def test_guided(theirs, model, x):
    for category in (2, None):
        own = ours.GuidedBackpropReLUModel(model)(x[:1], category)
        right = theirs.GuidedBackpropReLUModel(model=built(Modules, seed=3).float())(x[:1].clone(), category)
        assert own.shape == (6, 6, 3)
        assert np.abs(right).max() > 0
        np.testing.assert_allclose(own, right, atol=1e-6)
    reused = built(Reused, seed=3).float()
    np.testing.assert_allclose(
        ours.GuidedBackpropReLUModel(reused, "cpu")(x[:1], 2), ours.GuidedBackpropReLUModel(model)(x[:1], 2)
    )
    with pytest.raises(InputError, match="must be one image"):
        ours.GuidedBackpropReLUModel(model)(x)


def test_pictures(theirs, x):
    image = np.random.default_rng(0).random((7, 5, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((7, 5)).astype(np.float32)
    of_theirs = theirs.utils.image
    for options in ({}, {"use_rgb": True}, {"image_weight": 0.8}):
        right = of_theirs.show_cam_on_image(image, mask, **options).astype(int)
        assert np.abs(ours.show_cam_on_image(image, mask, **options).astype(int) - right).max() <= 3
    np.testing.assert_array_equal(ours.deprocess_image(image), of_theirs.deprocess_image(image))
    torch.testing.assert_close(ours.preprocess_image(image), of_theirs.preprocess_image(image))
    pixels = (image * 255).astype(np.uint8)
    torch.testing.assert_close(ours.preprocess_image(pixels), of_theirs.preprocess_image(pixels))
    with pytest.raises(InputError, match="colormap=4"):
        ours.show_cam_on_image(image, mask, colormap=4)
    with pytest.raises(InputError, match="between 0 and 1"):
        ours.show_cam_on_image(image * 255, mask)


def test_a_layer_that_runs_twice_counts_with_both_calls(x):
    """Their lists of activations and gradients have one entry a call, and only the first is taken."""
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(108, 4)).eval()
    twice = nn.Sequential(net[0], net[1], net[0], net[2], net[3]).eval()
    own = ours.GradCAM(twice, [net[0]])(x, targets(ours))
    first = net[0](x)
    second = net[0](first.tanh())
    score = net[3](second.flatten(1))[range(3), [1, 0, 3]].sum()
    terms = [
        (h * g.mean((2, 3), keepdim=True)).sum(1)
        for h, g in zip((first, second), torch.autograd.grad(score, (first, second)), strict=True)
    ]
    cam = sum(terms).clamp(min=0).detach().numpy()
    np.testing.assert_allclose(
        own, (cam - cam.min((1, 2), keepdims=True)) / np.ptp(cam, (1, 2), keepdims=True), atol=1e-5
    )


def test_volumes():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    maps = ours.GradCAM(net, [net[0]])(torch.randn(2, 1, 4, 4, 4), targets(ours, (0, 2)))
    assert maps.shape == (2, 4, 4, 4)


def test_the_model_is_as_before(model, x):
    before = torch.get_rng_state()
    with ours.GradCAM(model, [model.conv]) as cam:
        assert not model.conv._forward_hooks
        again = [cam(x, targets(ours)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert not model.conv._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_what_does_not_fit_is_told(model, x):
    cam = ours.GradCAM(model, [model.conv])
    with pytest.raises(InputError, match="1 targets for 3 images"):
        cam(x, targets(ours, (1,)))
    with pytest.raises(InputError, match="must return one score"):
        cam(x, [lambda output: output] * 3)
    with pytest.raises(InputError, match="must be images"):
        cam(x[0])
    with pytest.raises(InputError, match="target_layers must be"):
        ours.GradCAM(model, [])
    with pytest.raises(InputError):
        ours.GradCAM(model, [model.linear])(x, targets(ours))
    net = nn.Sequential(model.conv, nn.Dropout(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ModelError, match="dropout"):
        ours.GradCAM(net, [net[0]])(x)
    with pytest.raises(FrameworkError, match="ScoreCAM is not there"):
        from undertow.gradcam import ScoreCAM  # noqa: F401
    assert not hasattr(ours, "nonsense")
