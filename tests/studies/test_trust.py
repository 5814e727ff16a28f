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


def test_one_random_layer_gives_the_image_back_under_guided_alone(tmp_path, capsys):
    assert trust.main(["random", "--out", str(tmp_path), "--threads", "2"]) == 0
    rows = json.loads((tmp_path / "random.json").read_text())["rows"]
    guided = [row["guided"] for row in rows]
    assert [row["filters"] for row in rows] == [4, 16, 64, 256, 1024]
    assert 0.15 < guided[0] < 0.35
    assert guided[-1] > 0.7
    assert guided == sorted(guided)
    assert max(abs(row["gradient"]) for row in rows) < 0.05
    assert f"| 4 | -0.01 | -0.04 | {guided[0]:.2f} |" in capsys.readouterr().out
    assert (tmp_path / "random.png").stat().st_size > 5000


def test_a_random_last_layer_changes_the_gradient_and_not_the_guided_map():
    folder = fashion_mnist.find_data(None)
    x, y = fashion_mnist.load_split(folder, "train", 2500)
    x = F.pad(x, (2, 2, 2, 2), value=x.min())
    model = trust.train(trust.vgg11(), x, y, 1, "VGG11")
    assert trust.accuracy(model, x[:500], y[:500]) > 0.4
    alike = {row["rule"]: row["spearman"] for row in trust.last_layer(model, x[:4])}
    assert alike["guided"] > 0.95
    assert alike["gradient"] < 0.4
    curves = trust.over_depth(model, x)
    assert curves["guided"][-1] > 0.95
    assert curves["deconvnet"][-1] > 0.5
    assert abs(curves["gradient"][-1]) < 0.3


@pytest.fixture(scope="module")
def garments():
    args = argparse.Namespace(data=None)
    return trust.data(args, "train", 3000), trust.data(args, "test", 60)


def test_the_patch_that_decides_is_where_maps_point(garments):
    (x, y), (test, right) = garments
    labels = torch.randint(0, 4, (len(y),), generator=torch.Generator().manual_seed(7))
    asked = torch.randint(0, 4, (len(right),), generator=torch.Generator().manual_seed(8))
    model = trust.train(trust.small_network(4), trust.stamped(x, labels, seed=0)[0], labels, 5, "patch")
    patched, where = trust.stamped(test, asked, seed=1)
    assert trust.accuracy(model, patched, asked) > 0.8
    rows = trust.shares(model, patched[:8], where[:8])
    share = {row["method"]: row["share"] for row in rows}
    assert share["gradient integrated:10"] > share["the image's edges"] > share["chance"]
    assert share["guided gradient"] > 4 * share["chance"]
    assert [row["share"] for row in rows] == sorted(share.values(), reverse=True)


def test_a_model_that_is_right_for_the_wrong_reason_is_caught(garments):
    (x, y), (test, right) = garments
    cheat = trust.train(trust.small_network(4), trust.stamped(x, y, seed=0)[0], y, 6, "cheat")
    familiar, where = trust.stamped(test, right, seed=2)
    other, _ = trust.stamped(test, (right + 1) % 4, seed=2)
    assert trust.accuracy(cheat, familiar, right) > 0.85
    assert trust.accuracy(cheat, other, right) < 0.4
    levels = trust.hypotheses(cheat, familiar[:3], where[:3], test[:3])
    assert levels["patch"]["yes"] >= 2
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
