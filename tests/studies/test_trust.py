"""Known failures of maps, reproduced at a small size; a planted truth is found, and a cheat is caught."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import fashion_mnist
import trust

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("garments")]


def test_one_random_layer_gives_the_image_back_under_guided_alone(tmp_path, capsys):
    assert trust.main(["random", "--out", str(tmp_path), "--threads", "2"]) == 0
    rows = json.loads((tmp_path / "random.json").read_text())["rows"]
    guided = [row["guided"] for row in rows]
    assert [row["filters"] for row in rows] == [4, 16, 64, 256, 1024]
    assert 0.15 < guided[0] < 0.35
    assert guided[-1] > 0.7
    assert guided == sorted(guided)
    assert max(abs(row["gradient"]) for row in rows) < 0.05
    printed = capsys.readouterr().out
    for row in rows:
        assert f"| {row['filters']} | {row['gradient']:.2f} | {row['deconvnet']:.2f} | {row['guided']:.2f} |" in printed
    assert (tmp_path / "random.png").stat().st_size > 5000


def test_training_lowers_the_loss_and_gives_the_model_ready_to_be_asked():
    """Of a linear classifier, which is convex: small steps lower it, whatever the rounding."""
    labels = torch.arange(64) % 4
    x = F.one_hot(labels, 4).float()
    model = torch.nn.Linear(4, 4)
    before = F.cross_entropy(model(x), labels).item()
    assert trust.train(model, x, labels, 3, "line") is model
    assert F.cross_entropy(model(x), labels).item() < before
    assert not model.training


@pytest.mark.parametrize("seed", range(3))
def test_a_random_last_layer_changes_the_gradient_and_not_the_guided_map(seed):
    """Of VGG11 as it is initialised: what short training comes to differs between processors, and it needs none."""
    x, _ = fashion_mnist.load_split(fashion_mnist.find_data(None), "train", 8)
    x = F.pad(x, (2, 2, 2, 2), value=x.min())
    model = trust.vgg11(seed=seed).eval()
    alike = {row["rule"]: row["spearman"] for row in trust.last_layer(model, x)}
    assert alike["guided"] > 0.95
    assert alike["gradient"] < 0.5
    curves = trust.over_depth(model, x)
    assert curves["guided"][-1] > 0.95
    assert curves["deconvnet"][-1] > 0.8
    assert abs(curves["gradient"][-1]) < 0.4


@pytest.fixture(scope="module")
def garments():
    return trust.data(argparse.Namespace(data=None), "test", 60)


@pytest.fixture(scope="module")
def reader():
    """The study's network with weights that read the patch and nothing else, built rather than trained.

    One filter of 3 x 3 for each pattern. Garments lie in [-0.9, 2.1], and a patch is of -1 and 3: beside the right
    patch a filter comes to 21.7 (stripes) or 14.1 (the others) at most, whatever garment surrounds it, and in its
    middle to 24 or 16. So a bias between opens it within the right patch alone.
    """
    stripes = torch.tensor([-1.0, 2, -1])[:, None].expand(3, 3)
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    patterns = torch.stack([stripes, stripes.T, 1.8 * board - 1, 1.8 * cross - 1])
    model = trust.small_network(4).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model[0].weight[:4, 0] = patterns
        model[0].bias[:4] = torch.tensor([-22.5, -22.5, -14.5, -14.5])
        for layer in (model[3], model[6]):  # these hand on what they are given
            torch.nn.init.dirac_(layer.weight)
        model[9].weight.view(4, 32, 49)[range(4), range(4)] = 1
    return model


def test_the_patch_that_decides_is_where_maps_point(garments, reader):
    test, _ = garments
    asked = torch.randint(0, 4, (len(test),), generator=torch.Generator().manual_seed(8))
    patched, where = trust.stamped(test, asked, seed=1)
    assert trust.accuracy(reader, patched, asked) == 1
    rows = trust.shares(reader, patched[:8], where[:8])
    share = {row["method"]: row["share"] for row in rows}
    for rule, estimator in (("gradient", "gradient"), ("gradient", "integrated:10"), ("guided", "gradient")):
        assert share[f"{rule} {estimator}"] == pytest.approx(1, abs=1e-6)
    assert 0.9 > share["the image's edges"] > share["chance"]
    assert [row["share"] for row in rows] == sorted(share.values(), reverse=True)


def test_a_model_that_is_right_for_the_wrong_reason_is_caught(garments, reader):
    test, right = garments
    familiar, where = trust.stamped(test, right, seed=2)
    other, _ = trust.stamped(test, (right + 1) % 4, seed=2)
    assert trust.accuracy(reader, familiar, right) == 1
    assert trust.accuracy(reader, other, right) == 0
    levels = trust.hypotheses(reader, familiar[:3], where[:3], test[:3])
    assert levels["patch"]["yes"] == 3
    assert levels["garment"]["yes"] == 0


def test_a_patch_is_where_it_says_and_says_its_label():
    labels = torch.tensor([0, 1, 2, 3, 1])
    values, where = trust.stamps(labels, seed=0)
    assert where.sum((1, 2, 3)).tolist() == [25.0] * 5
    assert not values[where == 0].any()
    assert torch.equal(values[1][where[1] > 0], values[4][where[4] > 0])
    assert not torch.equal(values[0][where[0] > 0], values[1][where[1] > 0])
    assert not torch.equal(where[1], where[4])


def test_a_folder_without_the_data_is_said(tmp_path, capsys):
    assert trust.main(["planted", "--out", str(tmp_path / "o"), "--data", str(tmp_path)]) == 2
    assert "lacks train-images" in capsys.readouterr().err
