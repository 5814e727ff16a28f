"""The numbers that Quantus defines too are Quantus's."""

import numpy as np
import pytest
import quantus
import torch
from quantus.functions import norm_func
from torch import nn

import undertow as ut
from undertow import similarity
from undertow.verdict import faithfulness, fill, null, stability


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 4)
        ).eval()  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def explained(model, inputs, targets, **_):
    """Guided maps, as Quantus asks for them: arrays in, arrays out."""
    images = torch.as_tensor(np.asarray(inputs), dtype=torch.float32)
    return ut.explain(model, images, target=torch.as_tensor(np.asarray(targets))).numpy()


QUIET = {"disable_warnings": True, "display_progressbar": False, "normalise": False, "abs": False}


def test_similarities():
    a, b = np.random.default_rng(0).random((2, 14, 19))
    b += a
    assert similarity.spearman(a, b) == pytest.approx(quantus.correlation_spearman(a.ravel(), b.ravel()))
    assert similarity.correlation(a, b) == pytest.approx(quantus.correlation_pearson(a.ravel(), b.ravel()))


def test_max_sensitivity(net, x):
    """Quantus draws its own noise, so it is given ours, one copy after the other."""
    noisy = stability.noisy(x[0].numpy(), 5, seed=0)
    waiting = iter(noisy)
    metric = quantus.MaxSensitivity(
        nr_samples=5,
        norm_numerator=norm_func.fro_norm,
        norm_denominator=norm_func.fro_norm,
        similarity_func=quantus.difference,
        perturb_func=lambda arr, **_: np.stack([next(waiting)] * len(arr)),
        perturb_func_kwargs={},
        **QUIET,
    )
    target = net(x).argmax(1).numpy()
    theirs = metric(model=net, x_batch=x.numpy(), y_batch=target, explain_func=explained)
    maps = explained(net, noisy, np.repeat(target, 5))
    original = explained(net, x, target)[0]
    answer = stability.answer(original, list(maps), 0.02, null.Null.of(original, 19, 0), 0)
    assert answer.value == pytest.approx(theirs[0], rel=1e-4)


def test_deletion(x):
    """Quantus's pixel flipping in eight steps, of one channel, with the image's own mean put in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 4)).eval()
    image, target = x[0, :1].numpy(), 2
    values = np.abs(explained(model, image[None], [target])) + 1e-4 * np.random.default_rng(0).random((1, 1, 16, 16))
    assert len(np.unique(values)) == values.size  # no ties, which each would break in its own way

    def scores(images):
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()[:, target].astype(np.float64)

    ends = scores(np.stack([image, fill.mean_image(image)]))
    ours = faithfulness._replaced({"map": values[0, 0]}, image, fill.mean_image(image), scores, tuple(ends), steps=8)[
        "map"
    ]
    flipping = quantus.PixelFlipping(features_in_step=32, perturb_baseline=float(image.mean()), **QUIET)
    theirs = flipping(model=model, x_batch=image[None], y_batch=np.array([target]), a_batch=values, softmax=False)
    expected = (np.array(theirs[0]) - ends[1]) / abs(ends[0] - ends[1])
    assert ours.deletion[1:] == pytest.approx(expected.tolist(), abs=1e-4)


def test_random_logit(net, x):
    """Quantus's random logit, with rank correlation as the similarity."""
    target = np.array([0])
    metric = quantus.RandomLogit(num_classes=2, similarity_func=quantus.correlation_spearman, seed=1, **QUIET)
    theirs = metric(model=net, x_batch=x.numpy(), y_batch=target, explain_func=explained)
    a, b = (explained(net, x, [i])[0] for i in (0, 1))
    assert similarity.spearman(a, b) == pytest.approx(theirs[0], abs=1e-6)
