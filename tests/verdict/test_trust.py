"""What trust promises: its passes, its refusals, a model left as it was; and the command around it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import undertow as ut
from geometry import faults
from undertow.cli import main
from undertow.frameworks import base
from undertow.show import verdict as show
from undertow.show.plots import save

QUESTIONS = ("class", "weights", "input", "faithfulness", "stability", "convergence")


class Net(nn.Module):
    """Batch norm with statistics of its own, functional and in-place activations, a reused layer."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, classes)
        self.norm.running_mean += torch.linspace(-0.3, 0.4, 8)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x)))
        h = self.mid(self.mid(h).relu_()).relu_()
        return self.head(F.adaptive_avg_pool2d(h, 4).flatten(1))


def net(seed: int = 0, classes: int = 6) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(classes).eval()


@pytest.fixture
def x():
    return torch.randn(1, 3, 20, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def verdict():
    return ut.trust(net(), torch.randn(1, 3, 20, 24, generator=torch.Generator().manual_seed(1)), names=list("abcdef"))


def test_all_six_questions_are_answered(verdict):
    assert tuple(verdict.answers) == QUESTIONS
    assert not verdict.unanswered
    for answer in verdict.answers.values():
        assert answer.level in ("yes", "weak", "no")
        assert np.isfinite(answer.value)
        assert answer.definition
        assert "arXiv" in answer.source
    assert verdict.target_name in "abcdef"
    assert verdict.sentence in str(verdict)


def test_facts_are_json_and_hold_no_map(verdict):
    facts = json.loads(json.dumps(verdict.to_dict()))
    assert facts["answers"]["class"]["value"] == verdict.answers["class"].value
    assert "values" not in facts
    assert verdict.values.shape == (3, 20, 24)


@pytest.mark.parametrize(
    ("rule", "estimator"), [("gradient", "gradient"), ("guided", "smoothgrad:3"), ("gradient", "grad-cam:mid")]
)
def test_passes_are_as_said_beforehand(x, rule, estimator):
    model, seen = net(), []
    cost = ut.trust.cost(model, x, rule=rule, estimator=estimator)
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    moved = []
    judged = ut.trust(model, x, rule=rule, estimator=estimator, advance=moved.append)
    assert judged.passes == {"forward": cost.forward, "backward": cost.backward}
    assert sum(moved) == cost.forward + cost.backward
    once_for_six_directions = 5
    assert sum(seen) == cost.forward + cost.backward - once_for_six_directions
    assert f"{cost.forward} images forward" in str(cost)


def test_the_same_seed_gives_the_same_verdict_and_another_one_other_numbers(x, verdict):
    again = ut.trust(net(), x, names=list("abcdef"))
    assert again.answers == verdict.answers
    other = ut.trust(net(), x, names=list("abcdef"), seed=1)
    assert other.answers["stability"].value != verdict.answers["stability"].value
    assert other.answers["weights"].value != verdict.answers["weights"].value


def test_the_model_the_image_and_the_random_state_are_left_as_they_were(x):
    model, image, random = net(), x.clone(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ut.trust(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, image)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_are_in_the_order_in_which_they_run(x):
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.unused, self.stem = nn.Linear(4, 2), nn.Linear(3, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.head(self.stem(x).mean((2, 3)))

    inspector = base.capability("torch", "inspect.layers")
    assert inspector.layers(Backwards().eval(), x) == ["stem", "head"]
    assert inspector.layers(net(), x) == ["stem", "norm", "mid", "head"]
    assert inspector.layers(lambda v: v, x) == []


def test_reinitialized_layers_are_new_and_the_rest_is_the_same_weights(x):
    inspector, model = base.capability("torch", "inspect.layers"), net()
    twin = inspector.reinitialized(model, ["norm", "head"], seed=3)
    assert twin.stem.weight is model.stem.weight
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert twin.head.weight.std().item() == pytest.approx(
        1 / (3 * 128) ** 0.5, rel=0.1
    )  # uniform within 1/sqrt(fan in)
    assert not twin.norm.running_mean.any()
    assert model.norm.running_mean.abs().max() > 0.3
    alone = inspector.reinitialized(model, ["head"], seed=3)
    assert torch.equal(alone.head.weight, twin.head.weight)  # each from a seed of its own
    assert not torch.equal(inspector.reinitialized(model, ["head"], seed=4).head.weight, twin.head.weight)


def test_weights_that_no_module_knows_how_to_draw_are_shuffled():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.conv = nn.Parameter(torch.arange(8.0)), nn.Conv2d(3, 8, 3)

        def reset_parameters(self):
            raise AssertionError("it would reach the shared convolution")

    model = Scaled().eval()
    twin = base.capability("torch", "inspect.layers").reinitialized(model, [""], seed=0)
    assert sorted(twin.scale.tolist()) == list(range(8))
    assert twin.scale.tolist() != list(range(8))
    assert twin.conv.weight is model.conv.weight
    attention = nn.MultiheadAttention(8, 2).eval()
    drawn = base.capability("torch", "inspect.layers").reinitialized(attention, [""], seed=0)
    assert not torch.equal(drawn.in_proj_weight, attention.in_proj_weight)
    assert drawn.out_proj.weight is not attention.out_proj.weight


def test_layer_gradients_of_directions(x):
    inspector, model = base.capability("torch", "inspect.layers"), net()
    directions = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    request = base.Request(model, (x,), ut.rules.gradient, "gradient", None, "graph", "relu-like", False)
    seen = inspector.layer_gradients(request, ["norm"], directions)
    for k in range(2):
        leaf = model.norm(model.stem(x)).detach().requires_grad_()
        h = model.mid(model.mid(F.relu(leaf)).relu()).relu()
        scores = model.head(F.adaptive_avg_pool2d(h, 4).flatten(1))
        (g,) = torch.autograd.grad((scores * torch.from_numpy(directions[k])).sum(), leaf)
        assert np.allclose(seen.gradients["norm"][:, k], g.numpy(), atol=1e-6)
    assert np.allclose(seen.values["norm"], model.norm(model.stem(x)).detach().numpy(), atol=1e-6)
    assert seen.at_input.shape == (1, 2, 3, 20, 24)


def test_layer_gradients_are_those_before_a_softmax(x):
    """The model then runs twice; what its layers returned the first time is forgotten."""
    torch.manual_seed(2)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6)
    inspector = base.capability("torch", "inspect.layers")
    found = []
    for model in (nn.Sequential(*layers).eval(), nn.Sequential(*layers, nn.Softmax(1)).eval()):
        request = base.Request(model, (x,), ut.rules.gradient, "gradient", 1, "graph", "relu-like", False)
        found.append(inspector.layer_gradients(request, ["0", "2"]))
    plain, softmax = found
    assert list(softmax.gradients) == ["0", "2"]
    for name, gradients in plain.gradients.items():
        assert np.abs(gradients).max() > 0
        assert np.array_equal(softmax.gradients[name], gradients)


def test_what_cannot_be_asked_says_why(x):
    def function(images):
        return F.relu(images.mean((2, 3))) @ torch.linspace(-1, 2, 12).reshape(3, 4)

    judged = ut.trust(function, x.abs(), rule="gradient")
    assert "plain function" in judged.unanswered["weights"]
    assert set(judged.answers) == {"class", "input", "faithfulness", "stability", "convergence"}
    assert "one class alone" in ut.trust(net(classes=1), x).unanswered["class"]


def test_a_model_that_ignores_the_class_gets_no():
    """Every score is the same multiple of one number, so every class has the same map, under any rule."""

    class Deaf(Net):
        def forward(self, x):
            h = F.relu(self.mid(F.relu(self.stem(x)))).sum((1, 2, 3))
            return h[:, None] * torch.linspace(1, 2, 6)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deaf().eval()
    image = torch.randn(1, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    for rule in ut.rules.RULES:
        answer = ut.trust(model, image, rule=rule).answers["class"]
        assert (answer.level, round(answer.value, 6)) == ("no", 1.0)


@pytest.mark.parametrize("shape", [(20, 24), (3, 20, 24), (1, 20, 24), (1, 3, 20, 24)])
def test_a_map_of_another_tool_in_any_shape(x, shape):
    values = np.random.default_rng(0).random(shape)
    judged = ut.trust.of_map(net(), x, values, target=2)
    assert set(judged.answers) == {"input", "faithfulness"}
    assert set(judged.unanswered) == {"class", "weights", "stability", "convergence"}
    assert (judged.rule, judged.target_name) == ("given", "class 2")


def test_a_tool_that_makes_our_maps_gets_our_verdict(x, verdict):
    def guided(model, images, target):
        return ut.explain(model, images, target=target).numpy()

    values = ut.explain(net(), x).numpy()
    judged = ut.trust.of_map(net(), x, values, explainer=guided, names=list("abcdef"))
    for question in ("weights", "input", "faithfulness", "stability"):
        assert judged.answers[question] == verdict.answers[question]
    assert judged.answers["class"].value == verdict.answers["class"].value
    assert "convergence" in judged.unanswered


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target": 6}, "target 6 is out of range: the model has classes 0 to 5"),
        ({"target": "cat"}, "pass its id, or None"),
        ({"samples": 5}, "19 are the fewest"),
        ({"names": ["a"]}, "1 names for 6 classes"),
        ({"estimator": "grad-cam:nowhere"}, "no layer 'nowhere'"),
        ({"rule": "gided"}, "did you mean guided"),
    ],
)
def test_a_wrong_argument_is_said(x, more, message):
    with pytest.raises(ut.InputError, match=message):
        ut.trust(net(), x, **more)


def test_a_batch_or_a_misfitting_map_is_refused(x):
    with pytest.raises(ut.InputError, match=r"pass image\[None\] of each"):
        ut.trust(net(), x.repeat(2, 1, 1, 1))
    with pytest.raises(ut.InputError, match=r"they must be \(1, channels, 20, 24\)"):
        ut.trust.of_map(net(), x, np.zeros((3, 10, 10)))
    with pytest.raises(ut.ModelError, match="training mode"):
        ut.trust(net().train(), x)


def test_a_verdict_is_drawn_from_its_facts_alone(verdict, tmp_path):
    photograph = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    facts = json.loads(json.dumps(verdict.to_dict()))
    path = save(show.figure(photograph, verdict.values, facts), tmp_path / "v.png")
    with Image.open(path) as drawn:
        assert drawn.width > 1000
        assert np.asarray(drawn.convert("L")).std() > 20
    unasked = {**facts, "answers": {"input": facts["answers"]["input"]}, "unanswered": {"class": "why"}}
    save(show.figure(photograph, verdict.values, unasked), tmp_path / "u.svg")


@pytest.mark.parametrize("kind", ["as it is", "alike", "long", "unasked", "many layers"])
def test_a_verdict_is_laid_out_so_that_nothing_covers_a_label(verdict, kind):
    """No curve through a label, no text on another or outside, and layers that are told apart."""
    photograph = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    facts = json.loads(json.dumps(verdict.to_dict()))
    depths = facts["answers"]["convergence"]["numbers"]["depths"]
    if kind == "alike":
        for i, depth in enumerate(depths):
            depth["layer"] = f"block.{i}.conv"
    if kind == "long":
        facts["target_name"] = "a class, $x_1$, " * 40
        facts["sentence"] = "A sentence that goes on. " * 20
        for i, (answer, depth) in enumerate(zip(facts["answers"].values(), depths, strict=False)):
            answer["sentence"] = "words_without_an_end" * 30 + " and so on" * 60
            depth["layer"] = f"{'very_' * 50}{i}{'_deep' * 50}"
    if kind == "unasked":
        facts |= {"answers": {"input": facts["answers"]["input"]}, "unanswered": {"class": "for a reason " * 40}}
    if kind == "many layers":
        depths += [{"layer": f"layer{i}.conv", "cosine": 1 - i / 20} for i in range(16)]
        facts["answers"]["convergence"]["numbers"]["null"] = {"unrelated": 0.49, "half": 0.5}
    figure = show.figure(photograph, verdict.values, facts)
    assert faults(figure) == []
    if kind != "unasked":
        names = [tick.get_text() for tick in figure.axes[-1].get_yticklabels()]
        assert len(set(names)) == len(names) == len(depths)


# the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "nets.py"
    path.write_text(
        "import torch\n"
        "from undertow.images import Preprocessing\n"
        "def load():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(), torch.nn.Linear(36, 5))\n"
        "    return {'module': net, 'preprocessing': Preprocessing(resize=32, crop=32), 'classes': list('abcde')}\n"
    )
    return f"{path}:load"


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no photograph")
    return folder


def call(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capfd.readouterr()
    return left.value.code, printed.out, printed.err


def test_trust_writes_a_folder_and_names_what_cannot_be_read(capfd, tiny, photographs, tmp_path):
    words = ("trust", photographs, "--model", tiny, "--rule", "guided", "--rule", "gradient", "--out", tmp_path / "o")
    code, out, err = call(capfd, *words, "--json")
    summary = json.loads(out)
    assert code == 2
    assert "bad.png is not a photograph" in summary["failed"][0]["error"]
    assert "2 map(s) of each; for a photograph:" in err
    (result,) = summary["results"]
    written = json.loads((tmp_path / "o" / "good" / "verdict.json").read_text())
    assert {**written, "folder": result["folder"]} == result
    assert set(result["verdicts"]) == {"guided", "gradient"}
    for name in result["files"]:
        assert (tmp_path / "o" / "good" / name).stat().st_size > (10_000 if name.startswith("verdict") else 500)
    guided = result["verdicts"]["guided"]
    assert set(guided["answers"]) == set(QUESTIONS)


def test_trust_prints_its_sentence(capfd, tiny, photographs, tmp_path):
    words = ("trust", photographs / "good.png", "--model", tiny, "--out", tmp_path / "o", "--target", "c")
    code, out, _ = call(capfd, *words, "--figure", "svg", "--ground", "dark")
    assert "#181818" in (tmp_path / "o" / "good" / "verdict-guided.svg").read_text()
    written = json.loads((tmp_path / "o" / "good" / "verdict.json").read_text())
    assert code == 0
    assert written["verdicts"]["guided"]["sentence"] in out
    assert "guided, c" in out
    assert all(question in out for question in QUESTIONS)


def test_tables_go_to_stdout_although_the_bar_is_on_a_terminal(capfd, tiny, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    code, out, _ = call(capfd, "trust", photographs / "good.png", "--model", tiny, "--out", tmp_path / "o")
    assert code == 0
    assert all(question in out for question in QUESTIONS)


def test_explain_says_the_sentence_next_to_the_map(capfd, tiny, photographs, tmp_path):
    words = ("explain", photographs / "good.png", "--model", tiny, "--rule", "guided", "--out", tmp_path / "o")
    code, out, _ = call(capfd, *words, "--estimator", "smoothgrad:2", "--trust", "--json")
    (result,) = json.loads(out)["results"]
    assert code == 0
    assert result["rules"]["guided"]["estimator"] == "smoothgrad:2"
    assert result["verdicts"]["guided"]["estimator"] == "smoothgrad:2"
    with Image.open(tmp_path / "o" / "good" / "panel.png") as panel:
        height = panel.height
    call(capfd, *words)
    with Image.open(tmp_path / "o" / "good" / "panel.png") as panel:
        assert panel.height < height


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--estimator", "smoth"), "unknown estimator 'smoth'"),
        (("--target", "zebra"), "no class 'zebra'"),
        (("--samples", "3"), "19 are the fewest"),
    ],
)
def test_a_wrong_option_is_one_line(capfd, tiny, photographs, tmp_path, words, message):
    code, _, err = call(capfd, "trust", photographs / "good.png", "--model", tiny, "--out", tmp_path / "o", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_nothing_heavy_is_loaded_before_it_is_needed():
    spy = "import sys, undertow.cli; print({'torch', 'matplotlib', 'scipy', 'rich', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
    assert "matplotlib" not in done.stdout
    assert "scipy" not in done.stdout
