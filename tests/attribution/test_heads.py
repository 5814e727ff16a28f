"""Heads: a class target means the score before a final softmax or sigmoid, unless it is asked for as it is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from undertow.cli import main
from undertow.frameworks.base import capability

torch.manual_seed(3)
BODY = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
CNN = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 4)).eval()
X, IMAGES = torch.randn(3, 6), torch.randn(2, 1, 8, 8)

HEADS = {
    "softmax": ("softmax", lambda z: z.softmax(1)),
    "softmax of the last axis": ("softmax", lambda z: F.softmax(z, -1)),
    "softmax in another precision": ("softmax", lambda z: z.softmax(1, dtype=torch.float64)),
    "a module's softmax": ("softmax", nn.Softmax(dim=1)),
    "log-softmax": ("log-softmax", lambda z: z.log_softmax(1)),
    "the logarithm of a softmax": ("softmax", lambda z: z.softmax(1).log()),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "a module's sigmoid": ("sigmoid", nn.Sigmoid()),
    "a logarithm of a sigmoid": ("log-sigmoid", F.logsigmoid),
    "under a name": ("softmax", lambda z: {"logits": z.softmax(1), "hidden": z}),
    "the first of a tuple": ("sigmoid", lambda z: (z.sigmoid(), z)),
}
NO_HEADS = {
    "none": lambda z: z,
    "softmax over the batch": lambda z: z.softmax(0),
    "a mean of two": lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
    "attention within": lambda z: z @ (z.T @ z).softmax(1),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("estimator", ["gradient", "smoothgrad:3", "integrated:4", "input-times"])
def test_a_class_means_the_score_before_the_head(case, estimator):
    name, head = HEADS[case]
    wanted = ut.explain(BODY, X, estimator=estimator, target="top:2")
    a = ut.explain(lambda v: head(BODY(v)), X, estimator=estimator, target="top:2")
    assert (a.head, wanted.head) == (f"before {name}", "as is")
    assert torch.equal(a.values, wanted.values)
    assert torch.equal(a.scores, wanted.scores)
    assert torch.equal(a.targets, wanted.targets)
    assert a.to_dict()["head"] == a.head


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
def test_every_way_and_grad_cam_and_trust_agree(through):
    ended = nn.Sequential(*CNN, nn.Softmax(1)).eval()
    assert torch.equal(ut.explain(ended, IMAGES, through=through).values, ut.explain(CNN, IMAGES).values)
    cam = {"estimator": "grad-cam:0", "rule": "gradient"}
    assert torch.equal(ut.explain(ended, IMAGES, **cam).values, ut.explain(CNN, IMAGES, **cam).values)
    assert ut.explain(ended, IMAGES, **cam).head == "before softmax"
    verdict, wanted = (ut.trust(model, IMAGES[:1], rule="gradient") for model in (ended, CNN))
    assert {q: a.value for q, a in verdict.answers.items()} == {q: a.value for q, a in wanted.answers.items()}
    scores = capability("torch", "explain").scores(ended, IMAGES)
    assert np.allclose(scores.sum(1), 1)  # what is printed as a probability


@pytest.mark.parametrize("case", HEADS)
def test_as_is_explains_what_the_model_returns(case):
    _, head = HEADS[case]
    x = X.clone().requires_grad_()
    output = head(BODY(x))
    output = output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output
    (wanted,) = torch.autograd.grad(output[:, 1].sum(), x)
    a = ut.explain(lambda v: head(BODY(v)), X, rule="gradient", target=1, head="as is")
    assert a.head == "as is"
    assert torch.equal(a.values, wanted)
    assert torch.equal(a.scores, output[:, 1].detach())


@pytest.mark.parametrize("case", NO_HEADS)
def test_what_is_no_head_stays(case):
    x = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(NO_HEADS[case](BODY(x))[:, 1].sum(), x)
    a = ut.explain(lambda v: NO_HEADS[case](BODY(v)), X, rule="gradient", target=1)
    assert a.head == "as is"
    assert torch.allclose(a.values, wanted, atol=1e-6)


def test_a_target_function_gets_what_the_model_returns():
    x = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(BODY(x).softmax(1)[:, 2].sum(), x)
    a = ut.explain(lambda v: BODY(v).softmax(1), X, rule="gradient", target=lambda p: p[:, 2])
    assert a.head == "as is"
    assert torch.equal(a.values, wanted)


def test_a_saturated_head_warns_only_where_its_map_vanishes():
    def ended(v):
        return (BODY(v) * 1e4).softmax(1)

    assert ut.explain(ended, X, rule="gradient").values.abs().max() > 1
    with pytest.warns(
        ut.UndertowWarning, match="the softmax is saturated and the map vanishes; leave head='as is' out"
    ):
        ut.explain(ended, X, rule="gradient", head="as is")
    with pytest.warns(ut.UndertowWarning, match="a score is 1 and the map vanishes; if it is a probability"):
        ut.explain(lambda v: (ended(v) + ended(v)) / 2, X, rule="gradient")
    with pytest.warns(ut.UndertowWarning, match="the log-softmax is saturated"):
        ut.explain(lambda v: (BODY(v) * 1e4).log_softmax(1), X, rule="gradient", head="as is")


def test_a_head_in_place_and_an_unknown_word_are_refused():
    with pytest.raises(ut.ModelError, match=r"last sigmoid overwrites.*torch.sigmoid\(x\), or pass head='as is'"):
        ut.explain(lambda v: BODY(v).sigmoid_(), X)
    assert ut.explain(lambda v: BODY(v).sigmoid_(), X, rule="gradient", head="as is").head == "as is"
    with pytest.raises(ut.InputError, match="unknown head 'after'"):
        ut.explain(BODY, X, head="after")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("softmax", lambda keras: [keras.layers.Dense(4, activation="softmax")]),
        ("softmax", lambda keras: [keras.layers.Dense(4), keras.layers.Softmax()]),
        ("softmax", lambda keras: [keras.layers.Dense(4), keras.layers.Activation("softmax", dtype="float64")]),
        ("log-softmax", lambda keras: [keras.layers.Dense(4, activation="log_softmax")]),
        ("sigmoid", lambda keras: [keras.layers.Dense(4, activation="sigmoid")]),
    ],
)
@pytest.mark.parametrize("through", ["graph", "swap"])
def test_keras_has_the_same_policy(name, ending, through):
    import keras
    import tensorflow as tf

    body = [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 6, 1)), *body, *ending(keras)])
    logits = keras.Sequential([keras.Input((6, 6, 1)), *body, keras.layers.Dense(4)])
    logits.set_weights(model.get_weights())
    x = tf.constant(IMAGES.numpy().transpose(0, 2, 3, 1)[:, :6, :6])
    a, wanted = (ut.explain(m, x, target=[1, 3], through=through) for m in (model, logits))
    assert (a.head, wanted.head) == (f"before {name}", "as is")
    assert np.allclose(a.values, wanted.values, atol=1e-6)
    assert np.allclose(a.scores, wanted.scores, atol=1e-6)
    inside = tf.function(lambda v: model(v))  # the head in a graph of its own
    assert np.allclose(ut.explain(inside, x, target=[1, 3]).values, wanted.values, atol=1e-6)
    with tf.GradientTape() as tape:
        tape.watch(x)
        score = model(x)[:, 1]
    as_is = ut.explain(model, x, rule="gradient", target=1, head="as is")
    assert as_is.head == "as is"
    assert np.allclose(as_is.values, tape.gradient(score, x), atol=1e-6)


NETS = """
import torch
from torch import nn

def ended():
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*body, nn.Softmax(1))
"""


def test_the_command_says_which_score_it_explains(tmp_path, capsys):
    import json

    from PIL import Image

    (tmp_path / "nets.py").write_text(NETS)
    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "p.png")
    words = ["explain", str(tmp_path / "p.png"), "--model", f"{tmp_path}/nets.py:ended", "--out", str(tmp_path / "out")]
    for options, said in ((), "the score before softmax"), (("--head", "as-is"), ""):
        with pytest.raises(SystemExit):
            main([*words, "--rule", "gradient", *options])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("explained: "))
        assert line.endswith(said) if said else "before" not in line
        result = json.loads((tmp_path / "out" / "p" / "result.json").read_text())
        target, best = result["targets"][0], result["predictions"][0]
        assert target["score"] == pytest.approx(best["probability"], abs=1e-6)
        assert (target["explained_score"] == pytest.approx(target["score"], abs=1e-6)) == bool(options)
        assert result["rules"]["gradient"]["head"] == ("as is" if options else "before softmax")
