"""Completion of `--model`, through click and in a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from frameworks.torch.real_models import timm, torchvision
from undertow.cli import app, main
from undertow.cli.completing import VARIABLE, references, registered
from undertow.references import FORMS


def completed(*words, incomplete):
    found = ShellComplete(app, {}, "undertow", VARIABLE).get_completions(list(words), incomplete)
    return [(item.type, item.value) for item in found]


def values(incomplete):
    return [
        value for kind, value in completed("explain", "cat.jpg", "--model", incomplete=incomplete) if kind == "plain"
    ]


def test_the_names_are_those_that_the_packages_list():
    models = torchvision.models
    assert sorted(registered("timm")) == sorted(timm.list_models())
    assert sorted(registered("torchvision")) == sorted(models.list_models(module=models))
    assert {"ResNet50", "DenseNet201", "MobileNetV3Small"} <= set(registered("keras"))


def test_sources_come_first_and_then_their_models(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert values("") == ["demo", "torchvision:", "timm:", "hf:", "open_clip:", "keras:", "jax:"]
    assert values("open_clip:ViT-B-32-q") == ["open_clip:ViT-B-32-quickgelu"]
    assert values("open_clip:ViT-B-32@") == ["open_clip:ViT-B-32@none"]
    assert values("t") == ["torchvision:", "timm:"]
    assert values("torchvision:vgg16") == ["torchvision:vgg16", "torchvision:vgg16_bn"]
    assert "timm:resnet18" in values("ti")
    assert values("timm:resnet18@") == ["timm:resnet18@none"]
    assert values("d") == ["demo"]
    assert values("timm:nothing") == []


def test_models_of_the_hub_and_folders(monkeypatch, tmp_path):
    (tmp_path / "cache" / "models--google--vit-base-patch16-224").mkdir(parents=True)
    (tmp_path / "saved" / "bert").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert values("hf:goo") == ["hf:google/vit-base-patch16-224"]
    assert values("hf:sav") == ["hf:saved"]
    assert values("hf:saved/") == ["hf:saved/bert"]
    assert values(f"hf:{tmp_path}/sav") == [f"hf:{tmp_path}/saved"]


def test_files_and_their_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("raise SystemExit\ndef load(): ...\ndef _own(): ...\ndef large(): ...\n")
    assert completed("explain", "--model", incomplete="net") == [("file", "net")]
    assert values("nets.py:") == ["nets.py:load", "nets.py:large"]
    assert values("jax:nets.py:la") == ["jax:nets.py:large"]
    Path("deeper").mkdir()
    assert values("jax:") == ["jax:deeper/", "jax:nets.py"]
    assert list(references("nothere.py:")) == []


@pytest.mark.parametrize("command", ["explain", "trust", "record", "trace", "sites", "derive model"])
def test_every_command_with_a_model_completes_it_and_says_what_it_is(command, capsys):
    words = [*command.split(), "--model"]
    found = ShellComplete(app, {}, "undertow", VARIABLE).get_completions(words, "torchvision:alex")
    assert [item.value for item in found] == ["torchvision:alexnet"]
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert FORMS in " ".join(capsys.readouterr().out.split())


SPY = """
import sys
from undertow.cli import main
try:
    main([])
finally:
    print("loaded", sorted({"torch", "timm", "numpy", "rich", "PIL"} & set(sys.modules)), file=sys.stderr)
"""


def asked(**more):
    words = [sys.executable, "-c", SPY]
    return subprocess.run(words, env=os.environ | more, capture_output=True, text=True, timeout=60)


def test_no_framework_is_loaded_for_it():
    line = "undertow explain cat.jpg --model timm:resnet1"
    ran = asked(
        **{VARIABLE: "bash_complete", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_WORDBREAKS": " :="}
    )
    assert ran.returncode == 0, ran.stderr
    assert "plain,resnet18" in ran.stdout.splitlines()
    assert ran.stderr.strip() == "loaded []"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_whole_references(shell):
    typed = "timm:resnet1"
    more = {"COMP_WORDS": f"undertow explain --model {typed}", "COMP_CWORD": "3" if shell == "zsh" else typed}
    ran = asked(**{VARIABLE: f"{shell}_complete"}, **more)
    assert ran.returncode == 0, ran.stderr
    assert "timm:resnet18" in ran.stdout
    script = asked(**{VARIABLE: f"{shell}_source"})
    assert "_UNDERTOW_COMPLETE" in script.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash_replaces_the_part_behind_the_colon(tmp_path):
    program = tmp_path / "undertow"
    program.write_text(f"#!{sys.executable}\nfrom undertow.cli import main\nmain()\n")
    program.chmod(0o755)
    script = f"""
    PATH={tmp_path}:$PATH
    eval "$({VARIABLE}=bash_source undertow)"
    complete -p undertow
    compopt() {{ echo "compopt $*"; }}
    for COMP_LINE in "undertow explain a.jpg --model torchvision:vgg16" "undertow explain --model ti" "undertow expl"
    do
        COMP_POINT=${{#COMP_LINE}}
        _undertow_completion undertow
        echo "${{COMPREPLY[*]:0:2}}"
    done
    """
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    lines = ran.stdout.splitlines()
    assert "_undertow_completion undertow" in lines[0], ran.stderr
    assert lines[1].split() == ["vgg16", "vgg16_bn"]
    assert lines[2].startswith("timm:")
    assert lines[3].split() == ["explain"]
