"""The command as a person meets it: what it prints, writes, refuses, and with which exit code."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

import undertow as ut
from undertow import images, models
from undertow.cli import app, main
from undertow.cli.errors import debugging

pytestmark = pytest.mark.slow


def call(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capfd.readouterr()
    return left.value.code, printed.out, printed.err


@pytest.fixture(scope="module")
def cat() -> Path:
    return images.demo_photographs()["chelsea"]


@pytest.fixture
def tiny(tmp_path) -> str:
    """A person's own network in a file of their own: quick, and with a ReLU that no module shows."""
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3, stride=4)\n"
        "        self.head = torch.nn.Linear(4, 5)\n"
        "    def forward(self, x):\n"
        "        return self.head(torch.relu(self.conv(x)).mean((2, 3)))\n"
        "def load():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    return f"{path}:load"


@pytest.mark.parametrize("words", ["import undertow", "from undertow.cli import main; main(['--help'])"])
def test_no_framework_is_loaded_before_it_is_needed(words):
    spy = (
        f"import sys\ntry:\n    exec({words!r})\nexcept SystemExit:\n    pass\n"
        "loaded = {'torch', 'torchvision', 'timm', 'tensorflow', 'keras', 'skimage'} & set(sys.modules)\n"
        "print('loaded:', sorted(loaded))\n"
    )
    done = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")


def test_every_command_has_help_with_examples(capfd):
    code, out, _ = call(capfd, "--help")
    assert code == 0
    for name in app.commands:
        assert name in out
        code, text, _ = call(capfd, name, "--help")
        assert code == 0
        assert f"undertow {name}" in text.partition("Example")[2]


def test_demo_explains_the_packaged_photographs(capfd, tmp_path):
    code, out, _ = call(capfd, "demo", "--out", tmp_path)
    assert code == 0
    wanted = {"chelsea": (285, 0.36), "coffee": (967, 0.84), "camera": (872, 0.93), "rocket": (657, 0.41)}
    for name, (class_id, probability) in wanted.items():
        result = json.loads((tmp_path / name / "result.json").read_text())
        best = result["predictions"][0]
        assert best["class"] == class_id
        assert best["probability"] == pytest.approx(probability, abs=0.005)
        assert result["rules"]["guided"]["rewired"] == 33
        assert "no max-pooling" in result["notes"][0]
        for file in result["files"]:
            assert (tmp_path / name / file).stat().st_size > 0
    likeness = dict(line.split() for line in out.partition("correlation")[2].splitlines()[1:4])
    assert float(likeness["deconvnet"]) > 0.9 > 0.5 > float(likeness["guided"])
    assert "undertow explain PHOTO.jpg --model demo" in out.splitlines()[-1]


def test_the_files_hold_what_the_library_gives(capfd, tmp_path, cat):
    words = ("--model", "demo", "--target", "tiger cat", "--target", "285", "--json", "--out", tmp_path)
    code, out, err = call(capfd, "explain", cat, *words)
    assert (code, err) == (0, "")
    (result,) = json.loads(out)["results"]
    assert [t["class"] for t in result["targets"]] == [282, 285]
    classifier = models.load("demo")
    x = torch.from_numpy(classifier.preprocessing.array(images.read(cat)))[None]
    for rule in ("gradient", "deconvnet", "guided"):
        a = ut.explain(classifier.module, x, rule=rule, target=[[282, 285]])
        saved = load_file(tmp_path / "chelsea" / f"{rule}.safetensors")
        assert np.array_equal(saved["values"], a.numpy())
        for style in ("magnitude", "signed", "colour"):
            with Image.open(tmp_path / "chelsea" / f"{rule}-285-{style}.png") as picture:
                assert np.array_equal(np.asarray(picture), np.asarray(a.image(0, 1, style)))
        assert {f"{rule}-282-overlay.png", f"{rule}-285-signed.png"} <= set(result["files"])
    assert result["weights_sha256"] == classifier.weights_sha256
    with Image.open(tmp_path / "chelsea" / "panel.png") as panel:
        assert panel.width > 1000
        assert panel.height > 6 * 224  # three rules for two classes


def test_what_cannot_be_done_is_named_and_the_others_are_done(capfd, tmp_path, cat, tiny):
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    Image.open(cat).resize((80, 60)).save(folder / "good.png")
    Image.open(cat).resize((64, 64)).convert("CMYK").save(folder / "sub" / "good.jpg")
    (folder / "empty.png").touch()
    (folder / "broken.png").write_bytes(Path(cat).read_bytes()[:5000])
    code, out, err = call(capfd, "explain", folder, "--model", tiny, "--out", tmp_path / "out", "--json")
    assert code == 2
    summary = json.loads(out)
    assert len(summary["results"]) == 2
    assert len({r["folder"] for r in summary["results"]}) == 2
    assert [Path(f["photograph"]).name for f in summary["failed"]] == ["broken.png", "empty.png"]
    assert err.count("error: ") == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "tigr cat"], "did you mean tiger cat"),
        (["--target", "1000"], "0 to 999"),
        (["--target", "top:2", "--target", "3"], "top:K stands alone"),
        (["--target", "top:2000"], "more classes than the model has"),
        (["--rule", "guidde"], "guided"),
        (["--device", "cuda:7"], "--device auto or cpu"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
        (["--model", "torchvision:vgg61@none"], "vgg16"),
        (["--through", "side"], "swap"),
    ],
)
def test_wrong_words_get_one_line_and_exit_code_2(capfd, tmp_path, cat, words, message):
    code, out, err = call(capfd, "explain", cat, "--model", "demo", "--out", tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_no_arguments_and_a_missing_file(capfd, tmp_path):
    assert call(capfd, "explain", "--model", "demo")[0] == 2
    code, _, err = call(capfd, "explain", tmp_path / "nope.jpg", "--model", "demo")
    assert code == 2
    assert "nope.jpg does not exist" in err


def test_a_missed_activation_is_an_error_and_names_the_remedy(capfd, tmp_path, cat, tiny):
    code, _, err = call(capfd, "explain", cat, "--model", tiny, "--through", "swap", "--out", tmp_path / "out")
    assert code == 2
    assert "missed 1 activation call" in err
    assert call(capfd, "explain", cat, "--model", tiny, "--out", tmp_path / "out", "--ground", "dark")[0] == 0
    with Image.open(tmp_path / "out" / "chelsea" / "panel.png") as panel:
        assert panel.getpixel((0, 0)) == (24, 24, 24)


def test_nan_scores_are_an_error(capfd, tmp_path, cat):
    path = tmp_path / "bad.py"
    path.write_text(
        "import torch\n"
        "def load():\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),\n"
        "                              torch.nn.Flatten())\n"
        "    torch.nn.init.constant_(net[0].weight, float('nan'))\n"
        "    return net\n"
    )
    code, _, err = call(capfd, "explain", cat, "--model", f"{path}:load", "--out", tmp_path / "out")
    assert code == 2
    assert "nan" in err


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "undertow", "explain", str(tmp_path / "no.jpg"), "--model", "demo", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", ["explain", "trust"])
def test_debug_raises_the_error_of_a_photograph_when_called_from_python(capfd, tmp_path, tiny, command):
    words = [command, str(tmp_path / "no.jpg"), "--model", tiny, "--out", str(tmp_path / "out")]
    code, _, err = call(capfd, *words)
    assert code == 2
    assert "error: " in err
    assert "no.jpg does not exist" in err
    assert "Traceback" not in err
    with pytest.raises(ut.PhotographError, match=r"no\.jpg does not exist"):
        main([*words, "--debug"])
    assert app.main(words, standalone_mode=False) == 2  # click's own call, which knows nothing of --debug


def test_outside_a_command_there_is_no_debug():
    assert not debugging()


def test_the_version(capfd):
    assert call(capfd, "--version") == (0, "undertow 0.1.0\n", "")


def test_models_lists_what_works_offline(capfd):
    code, out, _ = call(capfd, "models", "vgg16", "--json")
    assert code == 0
    rows = {row["reference"]: row["offline"] for row in json.loads(out)}
    assert rows["torchvision:vgg16@none"] is True
    code, out, _ = call(capfd, "models", "demo")
    assert "yes" in out
    code, _, err = call(capfd, "models", "vvgg61")
    assert code == 2
    assert "no model contains" in err


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_a_panel_is_written_as_svg_and_pdf_too(tmp_path, ending):
    cat = ut.images.demo_photographs()["chelsea"]
    words = [
        "explain",
        str(cat),
        "--model",
        "demo",
        "--rule",
        "gradient",
        "--ground",
        "transparent",
        "--figure",
        ending,
    ]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], standalone_mode=False)
    panel = tmp_path / "chelsea" / f"panel.{ending}"
    assert f"-> {panel}" in done.stdout
    if ending == "pdf":
        assert panel.read_bytes().startswith(b"%PDF")
        return
    image = ElementTree.parse(panel).getroot()[0]
    data = base64.b64decode(image.get("href").removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as picture:
        assert (str(picture.width), str(picture.height)) == (image.get("width"), image.get("height"))
        assert picture.getextrema()[3][0] == 0
