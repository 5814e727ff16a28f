"""Keras on torch, all verbs; run by `test_on_torch.py` in a process of its own, with KERAS_BACKEND=torch."""

import keras
import numpy as np
import pytest
import torch
from keras import layers

import undertow as ut
from undertow.frameworks.torch.inspect import layers as inspector

SITES = {
    "first": "conv",
    "inner.conv": "conv",
    "inner.norm": "norm",
    "inner": "sequential",
    "shared": "conv",
    "gate": "relu",
    "pool": "pool",
    "flat": "flatten",
    "head": "linear",
}


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(7)
    inner = [keras.Input((10, 14, 4)), layers.Conv2D(6, 3, activation="relu", name="conv")]
    inner = keras.Sequential([*inner, layers.BatchNormalization(name="norm")], name="inner")
    shared = layers.Conv2D(6, 3, padding="same", name="shared")
    x = keras.Input((12, 16, 3))
    h = shared(shared(inner(layers.Conv2D(4, 3, activation="relu", name="first")(x))))
    h = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(layers.ReLU(name="gate")(h)))
    return keras.Model(x, layers.Dense(5, activation="softmax", name="head")(h)).eval()


@pytest.fixture
def x():
    return torch.from_numpy(np.random.default_rng(5).normal(size=(2, 12, 16, 3)).astype(np.float32))


def weights_of(net):
    return [variable.value.detach().numpy().copy() for variable in net.weights]


def pieces(net):
    """The network as one layer after another, the last one without its softmax."""
    layer = net.get_layer
    inner, shared, head = layer("inner"), layer("shared"), layer("head")
    first = [layer("first"), inner.get_layer("conv"), inner.get_layer("norm"), shared, shared]
    return [*first, layer("gate"), layer("pool"), layer("flat"), lambda h: h @ head.kernel.value + head.bias.value]


def at(net, x, depth, target=2):
    """The value behind the first pieces, and the gradient of the scores' sum there."""
    functions, value = pieces(net), x
    for function in functions[:depth]:
        value = function(value)
    value = value.detach().requires_grad_()
    scores = value
    for function in functions[depth:]:
        scores = function(scores)
    (gradient,) = torch.autograd.grad(scores[:, target].sum(), value)
    return value.detach().numpy(), gradient.numpy()


def test_sites_have_kerass_names_and_kinds(net, x):
    assert {site.name: site.kind for site in ut.select(net, "**", example=x)} == SITES
    with pytest.raises(ut.InputError, match="did you mean inner"):
        ut.explain(net, x, estimator="grad-cam:innre")


@pytest.mark.parametrize(
    ("layer", "depth"), [("first", 1), ("inner.conv", 2), ("inner", 3), ("shared@1", 5), ("gate", 6)]
)
def test_grad_cam_of_any_layer(net, x, layer, depth):
    a = ut.explain(net, x, rule="gradient", estimator=f"grad-cam:{layer}", target=2)
    value, gradient = at(net, x, depth)
    plane = np.maximum((value * gradient.mean((1, 2), keepdims=True)).sum(-1), 0)
    tensor = torch.from_numpy(plane)[:, None]
    expected = torch.nn.functional.interpolate(tensor, (12, 16), mode="bilinear").numpy().transpose(0, 2, 3, 1)
    assert a.values.shape == (2, 12, 16, 1)
    assert np.abs(a.numpy() - expected).max() <= 1e-5 * expected.max()


@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp", "lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box", "deeplift"])
def test_tables_of_rules_see_what_they_see_in_a_torch_module(rule, x):
    keras.utils.set_random_seed(3)
    outer, normed = layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(epsilon=1e-5)
    source = keras.Input((12, 16, 3))
    h = layers.ReLU()(normed(outer(source)))
    second, head = layers.Conv2D(6, 3), layers.Dense(5, activation="softmax")
    h = layers.MaxPooling2D()(layers.Activation("relu")(second(h)))
    net = keras.Model(source, head(layers.GlobalAveragePooling2D()(h)))
    normed.set_weights(
        [np.array(values, np.float32) for values in ([1, 2, -1, 0.5], [0.1, 0, 0.2, 0], [0.3, 0, 0, 1], [1, 2, 3, 4])]
    )
    norm = torch.nn.BatchNorm2d(4)
    twin = [torch.nn.Conv2d(3, 4, 3, padding="same"), norm, torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU()]
    twin += [torch.nn.MaxPool2d(2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5)]
    with torch.no_grad():
        for ours, theirs in ((twin[0], outer), (twin[3], second), (twin[-1], head)):
            kernel = theirs.kernel.value
            ours.weight.copy_(kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T)
            ours.bias.copy_(theirs.bias.value)
        for ours, theirs in ((norm.weight, normed.gamma), (norm.bias, normed.beta)):
            ours.copy_(theirs.value)
        norm.running_mean.copy_(normed.moving_mean.value)
        norm.running_var.copy_(normed.moving_variance.value)
    expected = ut.explain(torch.nn.Sequential(*twin).eval(), x.permute(0, 3, 1, 2).contiguous(), rule=rule, target=2)
    a = ut.explain(net.eval(), x, rule=rule, target=2)
    assert np.abs(a.numpy().transpose(0, 3, 1, 2) - expected.numpy()).max() <= 1e-4 * np.abs(expected.numpy()).max()


def test_maps_at_a_layer_and_of_a_unit(net, x):
    _, gradient = at(net, x, 3)
    assert np.allclose(ut.explain(net, x, rule="gradient", at="inner", target=2).numpy(), gradient, atol=1e-6)
    source = x.clone().requires_grad_()
    value = net.get_layer("inner")(net.get_layer("first")(source))
    (expected,) = torch.autograd.grad(value[..., 4].sum(), source)
    unit = ut.explain(net, x, rule="gradient", target=ut.targets.unit("inner", 4))
    assert np.allclose(unit.numpy(), expected, atol=1e-6)


def test_records_have_channels_last(net, x, tmp_path):
    measures = ["keep", "channel-norm"]
    with (
        ut.record(tmp_path / "run", net, sites="shared", measures=measures) as recording,
        recording.batch(samples=["a", "b"]),
    ):
        h = x
        for function in pieces(net):  # not the model as a whole, whose head would be the softmax
            h = function(h)
        h[:, 2].sum().backward()
    run = ut.Run(tmp_path / "run")
    depths = {("shared", 0): 4, ("shared", 1): 5}
    for row, values in run.tensors():
        assert np.allclose(values, at(net, x, depths[row["site"], row["call"]])[1], atol=1e-6)
    rows = run.table("channel_norm").to_pylist()
    assert {(row["name"], row["site"], row["call"]) for row in rows} == {
        (name, *key) for name in "ab" for key in depths
    }
    for row in rows:
        gradient = at(net, x, depths[row["site"], row["call"]])[1][row["sample"]]
        assert np.allclose(row["values"], np.sqrt((gradient.astype(float) ** 2).sum((0, 1))), rtol=1e-4)


def test_parameters_have_kerass_names(net, x, tmp_path):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = weights_of(net)
    options = {"sites": "params:inner", "measures": "norm", "optimizer": optimizer}
    with ut.record(tmp_path / "run", net, **options) as recording, recording.batch():
        net(x)[:, 1].sum().backward()
        optimizer.step()
    for variable, value in zip(net.weights, before, strict=True):
        variable.assign(value)
    sites = {row["site"] for row in ut.Run(tmp_path / "run").table("norm").to_pylist()}
    assert {"inner.conv.kernel", "inner.conv.bias", "inner.norm.gamma", "inner.norm.beta"} <= sites


def test_a_dead_layer_is_diagnosed_by_its_name(x, tmp_path):
    first = layers.Conv2D(4, 3, name="dying", bias_initializer=keras.initializers.Constant(-100.0))
    stack = [keras.Input((12, 16, 3)), first, layers.ReLU(name="gate"), layers.Flatten(), layers.Dense(3, name="head")]
    dying = keras.Sequential(stack)
    with ut.record(tmp_path / "run", dying, sites="dying, head", diagnose=True) as recording:
        for _ in range(2):
            with recording.batch():
                dying(x)[:, 1].sum().backward()
    findings = ut.diagnose(ut.Run(tmp_path / "run"))
    assert any("dying" in finding.sentence for finding in findings)
    assert not any(finding.cause == "nothing" for finding in findings)


def test_a_trace_a_redirection_and_blocks(net, x):
    calls = ut.trace(net, x[:1] / 100).calls  # else the softmax is saturated
    assert [call.name for call in calls] == [
        *("first", "inner.conv", "inner.norm", "shared", "shared", "gate", "pool", "flat", "head")
    ]
    assert [call.verdict for call in calls] == ["equal"] * 9
    kernel = calls[1].parameter_gradients["kernel"]
    assert kernel.shape == (3, 3, 4, 6)
    assert float(kernel.abs().max()) > 0
    source = x.clone().requires_grad_()
    with ut.redirect(net, {"inner": ut.redirect.zero()}):
        net(source)[:, 2].sum().backward()
    assert float(source.grad.abs().max()) == 0
    assert "inner" in str(ut.derive.from_model(net, x[:1]))


def test_layers_are_drawn_anew_by_their_own_initialisers(net, x):
    net.get_layer("first").bias.assign(np.ones(4))
    weights = weights_of(net)
    twin = inspector.reinitialized(net, ["first"], 3)
    assert np.array_equal(twin.get_layer("first").bias.value.detach().numpy(), np.zeros(4))
    changed = [not np.array_equal(a, b) for a, b in zip(weights, weights_of(twin), strict=True)]
    assert changed == [True, True] + [False] * (len(weights) - 2)
    assert all(np.array_equal(a, b) for a, b in zip(weights, weights_of(net), strict=True))
    net.get_layer("first").bias.assign(np.zeros(4))


def test_a_verdict_answers_all_questions(net, x):
    verdict = ut.trust(net, x[:1], rule="guided")
    assert (len(verdict.answers), verdict.unanswered) == (6, {})
    assert verdict.values.shape == (3, 12, 16)
    assert verdict.answers["weights"].numbers["layers"] == 5


def test_a_training_step_of_keras_is_recorded(net, x, tmp_path):
    clone = keras.models.clone_model(net)
    clone.compile("sgd", "sparse_categorical_crossentropy")
    with ut.record(tmp_path / "run", clone, sites="conv", measures="norm") as recording, recording.batch():
        clone.train_on_batch(x.numpy(), np.array([1, 2]))
    assert set(ut.Run(tmp_path / "run").table("norm")["site"].to_pylist()) == {"first", "inner.conv", "shared"}


def test_estimators_average_what_torch_answers(net, x):
    plain = ut.explain(net, x, rule="guided", target=2)
    times = ut.explain(net, x, rule="guided", target=2, estimator="input-times")
    assert np.allclose(times.numpy(), plain.numpy() * x.numpy())
    path = ut.explain(net, x, rule="gradient", estimator="integrated:64", target=2)
    h, zero = x, torch.zeros_like(x)
    for function in pieces(net):
        h, zero = function(h), function(zero)
    expected = (h - zero)[:, 2].detach().numpy()
    assert np.allclose(path.numpy().sum((1, 2, 3)), expected, rtol=0.05, atol=0.05 * np.abs(expected).max())
    smooth = ut.explain(net, x, rule="guided", estimator="smoothgrad:3", target=2, seed=2)
    draw, total, given = np.random.default_rng(2), 0.0, x.numpy()
    spread = given.max((1, 2, 3), keepdims=True) - given.min((1, 2, 3), keepdims=True)
    for _ in range(3):
        noisy = given + (0.1 * spread * draw.standard_normal(given.shape)).astype(np.float32)
        total = total + ut.explain(net, torch.from_numpy(noisy), rule="guided", target=2).numpy()
    assert np.abs(smooth.numpy() - total / 3).max() <= 1e-4 * np.abs(total).max()


def test_references_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "net.keras").touch()
    remedy = pytest.raises(ut.FrameworkError, match="set KERAS_BACKEND=tensorflow, or pass the model itself")
    for reference in ("keras:MobileNetV2@none", str(tmp_path / "net.keras")):
        with remedy:
            ut.load(reference)
