"""The words of --preprocess: what each makes of black, red and white, and what becomes of a network in a file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import undertow as ut
from undertow.cli import main
from undertow.images import Preprocessing, demo_photographs
from undertow.scales import SCALES, Scaling, describe

RED = Image.new("RGB", (8, 8), (255, 0, 0))
BY_HAND = {
    "0..1": (1, 0, 0),
    "-1..1": (1, -1, -1),
    "0..255": (255, 0, 0),
    "imagenet": ((1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225),
    "caffe": (-103.939, -116.779, 255 - 123.68),  # B, G, R
}


@pytest.mark.parametrize("word", SCALES)
def test_red_is_as_by_hand(word):
    scaled = Scaling.parse(word).applied(Preprocessing(8, 8, order="BGR"))
    assert scaled.array(RED)[:, 3, 3] == pytest.approx(BY_HAND[word], abs=1e-4)
    assert describe(scaled) == f"8 x 8 {word}"


def test_a_size_may_be_said():
    kept = Preprocessing(256, 224, interpolation="bicubic")
    assert Scaling.parse("IMAGENET").applied(kept) == kept
    assert Scaling.parse("imagenet@32").applied(kept) == Preprocessing(32, 32, interpolation="bicubic")
    assert Scaling.parse("0..1@32x48").applied(kept).view(RED).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("imagnet", r"called 'imagnet'; did you mean imagenet\?; there are 0\.\.1, "),
        ("", "no way to preprocess is called ''; there are"),
        ("0..1@", r"'0\.\.1@' has no size after @; .*as in 0\.\.1@224"),
        ("0..1@0", "has no size after @"),
        ("0..1@32x", "has no size after @"),
        ("keras:VGG16", "no way to preprocess is called 'keras:VGG16'"),
    ],
)
def test_what_is_not_understood_is_said(word, message):
    with pytest.raises(ut.InputError, match=message):
        ut.load("demo", preprocess=word)


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU(), torch.nn.Linear(3 * 16, 2))\n"
        "def own():\n    return {'module': net(), 'preprocessing': {'resize': 4, 'crop': 4, 'mean': (.5, .4, .3)}}\n"
    )
    return path


def test_a_network_in_a_file_is_given_photographs_as_is_said(nets):
    with pytest.raises(ut.ModelError, match="say its size, as in --preprocess imagenet@32"):
        ut.load(f"{nets}:net")
    classifier = ut.load(f"{nets}:net", preprocess="-1..1@4")
    assert classifier.preprocessing == Preprocessing(4, 4, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(classifier.prepare(RED)[0, :, 1, 1], torch.tensor([1.0, -1.0, -1.0]))
    assert classifier.preprocessing_from == "--preprocess -1..1@4"
    own = ut.load(f"{nets}:own")
    assert own.preprocessing_from == "returned with the network"
    assert describe(own.preprocessing) == "4 x 4 RGB less (0.5, 0.4, 0.3) over (0.229, 0.224, 0.225)"
    assert ut.load(f"{nets}:own", preprocess="0..255").prepare(RED).max().item() == pytest.approx(255)


def test_the_commands_print_what_was_used_and_keep_it(nets, tmp_path, capfd):
    photograph = demo_photographs()["chelsea"]
    words = [str(photograph), "--model", f"{nets}:net", "--preprocess", "0..1@4", "--out", str(tmp_path / "out")]
    for command in ("explain", "trust"):
        with pytest.raises(SystemExit) as left:
            main([command, *words, "--rule", "gradient"])
        printed = capfd.readouterr()
        assert left.value.code == 0, printed.err
        assert "\n  input: 4 x 4 0..1 (--preprocess 0..1@4)\n" in printed.out
    for name in ("result", "verdict"):
        result = json.loads((tmp_path / "out" / "chelsea" / f"{name}.json").read_text())
        assert (
            Preprocessing(**result["preprocessing"]).array(RED).tolist()
            == Preprocessing(4, 4, (0.0,) * 3, (1.0,) * 3).array(RED).tolist()
        )
        assert result["preprocessing_from"] == "--preprocess 0..1@4"


def test_a_result_names_the_versions_of_what_computed_it(nets, tmp_path, capfd):
    words = ["explain", str(demo_photographs()["chelsea"]), "--model", f"{nets}:own", "--json", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(words)
    versions = json.loads(capfd.readouterr().out)["results"][0]["versions"]
    expected = {"undertow": ut.__version__, "torch": torch.__version__, "numpy": np.__version__}
    assert {name: versions[name] for name in expected} == expected
    assert versions["tensorflow"] is not None  # installed as tensorflow-cpu here, imported or not


def test_a_run_is_continued_only_with_the_same_preprocessing(nets, tmp_path, capfd):
    folder = tmp_path / "photographs"
    folder.mkdir()
    RED.save(folder / "red.png")
    words = ["record", str(folder), "--model", f"{nets}:net", "--sites", "linear", "--out", str(tmp_path / "run")]
    for preprocess, more, code in (("0..1@4", [], 0), ("-1..1@4", ["--resume"], 2)):
        with pytest.raises(SystemExit) as left:
            main([*words, *more, "--preprocess", preprocess])
        printed = capfd.readouterr()
        assert left.value.code == code
    assert "input: 4 x 4 " not in printed.out
