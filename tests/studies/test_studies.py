"""The studies run, on the real images, and what they print is what lies on the disk."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))
import fashion_mnist
import vgg_batchnorm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def study(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "studies" / script), *map(str, words), "--threads", "1"]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(line, capture_output=True, text=True, env=path, timeout=300)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("activation", ["relu", "leaky:0.1"])
def test_six_convolutions_with_pooling_after_the_third_and_the_sixth(pool, activation):
    net = fashion_mnist.network("conv", pool, activation)
    kinds = "".join("c" if isinstance(m, nn.Conv2d) else "P" if "Pool" in type(m).__name__ else "" for m in net)
    assert kinds == "cccPcccP"
    assert isinstance(net.act1, nn.ReLU if activation == "relu" else nn.LeakyReLU)
    assert isinstance(net.pool3, nn.MaxPool2d if pool == "max" else nn.AvgPool2d)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_six_linear_layers():
    net = fashion_mnist.network("linear")
    sizes = [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)]
    assert sizes == [(784, 32), *[(32, 32)] * 4, (32, 10)]
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_the_real_images_are_read():
    # a missing data set is a failure: the studies are shown to work on it (apt-get install dataset-fashion-mnist)
    folder = fashion_mnist.find_data(None)
    x, y = fashion_mnist.load_split(folder, "train")
    assert x.shape == (60_000, 1, 28, 28)
    assert np.bincount(y).tolist() == [6000] * 10
    assert (x.mean().item(), x.std().item()) == pytest.approx((0, 1), abs=1e-3)
    assert fashion_mnist.load_split(folder, "test", 7)[0].shape == (7, 1, 28, 28)


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01\0", b"\0\0\x08\x01\0\0\0\x03ab"])
def test_damaged_images_are_refused_by_name(tmp_path, damage):
    file = tmp_path / "labels.gz"
    file.write_bytes(gzip.compress(damage))
    with pytest.raises(fashion_mnist.StudyError, match=re.escape(str(file))):
        fashion_mnist.read_idx(file)
    file.write_bytes(b"not gzip")
    with pytest.raises(fashion_mnist.StudyError, match=re.escape(str(file))):
        fashion_mnist.read_idx(file)


def test_a_folder_without_the_images_is_one_line(tmp_path):
    done = study("fashion_mnist.py", "--data", tmp_path, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in done.stderr


def test_fashion_mnist_study_end_to_end(tmp_path, capsys):
    out, plot = tmp_path / "run", tmp_path / "bars.png"
    line = ["--out", out, "--limit", "256", "--epochs", "2", "--batches", "3", "--keep", "--plot", plot]
    done = study("fashion_mnist.py", *line)
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")

    run, points = ut.Run(out), ut.Run(f"{out}-points")
    assert run.finished
    assert run.sites == [f"conv{i}" for i in range(1, 7)]
    assert set(run.table("batches")["epoch"].to_pylist()) == {1}
    kept = run.table("kept").to_pylist()
    assert len({row["file"] for row in kept}) == 3 * 6 == len(list((out / "tensors").iterdir()))
    names = run.table("samples")["name"].to_pylist()
    assert len(names) == len(set(names)) == 3 * 64
    assert all(re.fullmatch(r"train/00\d{3}", name) for name in names)

    printed = {words[1]: words[3:9:2] for row in done.stdout.splitlines() if len(words := row.split()) == 11}
    for row in run.quantiles([0.5, 0.7, 0.9]):
        values = np.concatenate([np.abs(t).ravel() for _, t in run.tensors(site=row.site)])
        exact = np.quantile(values, [0.5, 0.7, 0.9], method="inverted_cdf")
        np.testing.assert_allclose(row.values, exact, rtol=2**-8)
        assert [f"{v:.3g}" for v in row.values] == printed[row.site]

    zeros = fashion_mnist.zero_fractions(points)
    for number in (3, 6):
        # of each window's four places one receives the gradient, and passes it on if its unit is active
        assert zeros[f"act{number}", "backward"] >= 0.75
        passed = (1 - zeros[f"pool{number}", "forward"]) / 4
        assert zeros[f"conv{number}", "backward"] == pytest.approx(1 - passed, abs=1e-3)
    assert zeros["conv2", "backward"] == pytest.approx(zeros["act2", "forward"], abs=1e-3)

    before = (out / "manifest.json").stat().st_mtime_ns
    assert fashion_mnist.main(list(map(str, line))) == 0
    assert capsys.readouterr().out == done.stdout
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert fashion_mnist.main([*map(str, line), "--pool", "avg"]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    """Stopped after the first epoch, the same line gives the run that an undisturbed one gives."""
    line = ["--limit", "128", "--epochs", "2", "--batches", "2", "--network", "linear"]
    assert fashion_mnist.main([*line, "--out", str(tmp_path / "whole")]) == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    save = fashion_mnist.Checkpoint.save
    monkeypatch.setattr(fashion_mnist.Checkpoint, "save", lambda self, *a: (save(self, *a), stop()))
    assert fashion_mnist.main([*line, "--out", str(tmp_path / "cut")]) == 130
    assert not ut.Run(tmp_path / "cut").finished
    monkeypatch.setattr(fashion_mnist.Checkpoint, "save", save)
    assert fashion_mnist.main([*line, "--out", str(tmp_path / "cut")]) == 0
    for table in ("histogram", "samples", "channel_norm"):
        assert ut.Run(tmp_path / "cut").table(table).equals(ut.Run(tmp_path / "whole").table(table))


@pytest.mark.parametrize(("batch_norm", "second"), [(False, "features.2"), (True, "features.3")])
def test_the_small_vggs_are_numbered_as_torchvisions(batch_norm, second):
    net = vgg_batchnorm.small_vgg(batch_norm, width=2)
    assert [site.name for site in ut.select(net, "conv[:2]")] == ["features.0", second]
    assert len(ut.select(net, "conv")) == 13
    assert net.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_vgg_study_end_to_end(tmp_path, capsys):
    line = ["--networks", "fashion-mnist", "--limit", "256", "--train-epochs", "1", "--width", "4", "--early", "2"]
    line += ["--limit-images", "10", "--batch-size", "4", "--out", tmp_path / "vgg", "--plot", tmp_path / "curves.png"]
    done = study("vgg_batchnorm.py", *line)
    assert done.returncode == 0, done.stderr
    crops = sorted((tmp_path / "vgg" / "photographs").rglob("*.png"))
    assert len(crops) == len({crop.read_bytes() for crop in crops}) == 250

    for kind in ("photographs", "fashion-mnist"):
        runs = [ut.Run(tmp_path / "vgg" / f"{kind}-{name}") for name in vgg_batchnorm.NAMES]
        assert [run.sites for run in runs] == [["features.0", "features.2"], ["features.0", "features.3"]]
        names = [run.table("samples")["name"].to_pylist() for run in runs]
        assert names[0] == names[1]
        assert len(set(names[0])) == 10
        assert (tmp_path / f"curves_{kind.replace('-', '_')}.png").is_file()
        row = next(row for row in done.stdout.split(f"10 {kind}:")[1].splitlines() if "convolution 2, vgg16_bn" in row)
        norms = [
            n for row in runs[1].table("channel_norm").to_pylist() if row["site"] == "features.3" for n in row["values"]
        ]
        seen = [[row["class_name"] for row in run.table("samples").to_pylist()] for run in runs]
        same = sum(a == b for a, b in zip(*seen, strict=True))
        assert f"both networks saw the same class in {same} of 10 photographs" in done.stdout.split(f"10 {kind}:")[1]
        exact = np.quantile(norms, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
        assert row.split("|")[2:7] == [f" {value:.3g} " for value in exact]
    assert "first 2 batches of training" in done.stdout
    assert vgg_batchnorm.main(list(map(str, line))) == 0
    assert capsys.readouterr().out == done.stdout
    line[line.index("10")] = "9"
    assert vgg_batchnorm.main(list(map(str, line))) == 2
    assert "other images" in capsys.readouterr().err


def test_without_imagenet_weights_the_remedy_is_named(tmp_path, capsys):
    assert vgg_batchnorm.main(["--weights", str(tmp_path / "none.pth"), "--out", str(tmp_path / "vgg")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--networks fashion-mnist" in message
