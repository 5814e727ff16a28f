"""Modules of Flax and Equinox against the same networks as functions, in which activations are swapped by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import undertow as ut
from frameworks.jax import twins
from undertow.frameworks.base import capability, framework_of
from undertow.frameworks.jax.explain import program

X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 12, 12, 3)), jnp.float32)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.dropout(self.features(x)).mean((1, 2)))

    def features(self, x):
        return jax.nn.relu(self.norm(self.conv(x)))


class LinenNet(linen.Module):
    width: int = 6

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Conv(self.width, (3, 3))(x)))
        return linen.Dense(4)(x.mean((1, 2)))


class EqxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    dense: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 6, 3, padding=1, key=first)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)
        self.dense = eqx.nn.Linear(6, 4, key=second)

    def __call__(self, x):
        return self.dense(self.dropout(jax.nn.relu(self.conv(x)).mean((1, 2))))


def by_hand(kernel, bias, norm, dense, activation, x):
    """Return the scores of all three networks, from weights in Flax's layout."""
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
    mean, variance, scale, shift = norm
    x = activation((x - mean) / jnp.sqrt(variance + 1e-5) * scale + shift)
    return x.mean((1, 2)) @ dense[0] + dense[1]


def drawn(seed):
    """Return a mean, a variance, a scale and a shift."""
    numbers = np.random.default_rng(seed)
    arrays = numbers.normal(size=6), numbers.uniform(0.5, 1.5, 6), numbers.uniform(0.5, 1.5, 6), numbers.normal(size=6)
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.fixture(scope="module")
def nnx_net():
    net = NnxNet(nnx.Rngs(0))
    net.eval()
    net.norm.mean[...], net.norm.var[...], net.norm.scale[...], net.norm.bias[...] = drawn(1)
    return net


@pytest.fixture(scope="module")
def linen_net():
    net = LinenNet()
    variables = net.init(jax.random.key(0), X)
    mean, variance, scale, shift = drawn(1)
    variables["params"]["BatchNorm_0"] = {"scale": scale, "bias": shift}
    variables["batch_stats"]["BatchNorm_0"] = {"mean": mean, "var": variance}
    return net, variables


@pytest.fixture(scope="module")
def eqx_net():
    return EqxNet(jax.random.key(0))


def hand_of_nnx(net):
    norm = [net.norm.mean[...], net.norm.var[...], net.norm.scale[...], net.norm.bias[...]]
    dense = net.dense.kernel[...], net.dense.bias[...]
    return functools.partial(by_hand, net.conv.kernel[...], net.conv.bias[...], norm, dense)


def hand_of_linen(net, variables):
    params, statistics = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    norm = [statistics["mean"], statistics["var"], params["BatchNorm_0"]["scale"], params["BatchNorm_0"]["bias"]]
    dense = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    return functools.partial(by_hand, params["Conv_0"]["kernel"], params["Conv_0"]["bias"], norm, dense)


def hand_of_eqx(net):
    norm = [jnp.zeros(6), jnp.ones(6) - 1e-5, jnp.ones(6), jnp.zeros(6)]
    kernel = net.conv.weight.transpose(2, 3, 1, 0)
    return functools.partial(by_hand, kernel, net.conv.bias[:, 0, 0], norm, (net.dense.weight.T, net.dense.bias))


def check(model, x, hand, rule, axes=(0, 1, 2, 3)):
    a = ut.explain(model, x, rule=rule, target=1)
    swapped = twins.swap(jax.nn.relu, twins.above, rule)
    wanted = jax.grad(lambda x: hand(swapped, x)[:, 1].sum())(X).transpose(axes)
    assert np.abs(a.values - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert a.rewired == (rule != "gradient")
    return a


@pytest.mark.parametrize("rule", twins.RULES)
def test_an_nnx_module(nnx_net, rule):
    a = check(nnx_net, X, hand_of_nnx(nnx_net), rule)
    assert a.channels_last
    before = len(program.cache)
    assert np.array_equal(ut.explain(nnx_net, X, rule=rule, target=1).values, a.values)
    assert len(program.cache) == before


@pytest.mark.parametrize("rule", twins.RULES)
def test_a_linen_module(linen_net, rule):
    net, variables = linen_net
    a = check(net.bind(variables), X, hand_of_linen(net, variables), rule)
    for spelling in ((net, variables), functools.partial(net.apply, variables), lambda x: net.apply(variables, x)):
        assert np.allclose(ut.explain(spelling, X, rule=rule, target=1).values, a.values, atol=1e-7)


@pytest.mark.parametrize("rule", twins.RULES)
def test_an_equinox_module_takes_one_sample_and_is_mapped(eqx_net, rule):
    x = X.transpose(0, 3, 1, 2)
    a = check(eqx_net, x, hand_of_eqx(eqx_net), rule, axes=(0, 3, 1, 2))
    assert not a.channels_last
    for spelling in (
        eqx.filter_jit(eqx_net),
        eqx.filter_vmap(eqx_net),
        jax.vmap(eqx_net),
        lambda x: jax.vmap(eqx_net)(x),
    ):
        assert np.allclose(ut.explain(spelling, x, rule=rule, target=1).values, a.values, atol=1e-7)


def test_numpy_is_taken_by_modules(nnx_net):
    a = ut.explain(nnx_net, np.asarray(X), target=1)
    assert isinstance(a.values, np.ndarray)
    import torch

    with pytest.raises(ut.InputError, match=r"x is a PyTorch tensor, and the model is of JAX; use jax.numpy.asarray"):
        ut.explain(nnx_net, torch.ones(2, 12, 12, 3))
    with pytest.raises(ut.InputError, match=r"x is a JAX array, and the model takes a torch tensor"):
        ut.explain(torch.nn.ReLU(), X)


def test_new_weights_count_at_once():
    net = NnxNet(nnx.Rngs(0))
    net.eval()
    first = ut.explain(net, X, target=1).values
    net.dense.kernel[...] = -net.dense.kernel[...]
    second = ut.explain(net, X, target=1).values
    assert not np.allclose(first, second)
    check(net, X, hand_of_nnx(net), "guided")


def test_the_module_is_as_before(nnx_net):
    def state():
        return jax.tree.leaves(nnx.state(nnx_net, nnx.Param, nnx.BatchStat))

    before = state()
    ut.explain(nnx_net, X, target=1)
    assert all(np.array_equal(a, b) for a, b in zip(before, state(), strict=True))


def test_training_is_refused_and_leaves_no_trace():
    net = NnxNet(nnx.Rngs(0))
    mean = np.array(net.norm.mean[...])
    with pytest.raises(ut.ModelError, match=r"random numbers x1, batch norm in training x1; .* model.eval\(\) in nnx"):
        ut.explain(net, X, target=1)
    assert ut.explain(net, X, target=1, training=True).acting == {"random numbers": 1, "batch norm in training": 1}
    assert np.array_equal(net.norm.mean[...], mean)


def test_a_linen_module_without_weights_is_refused(linen_net):
    with pytest.raises(ut.ModelError, match=r"LinenNet has no weights of its own; pass module.bind\(variables\)"):
        ut.explain(linen_net[0], X)


def test_layers_and_shuffled_weights(nnx_net, linen_net, eqx_net):
    inspector = capability("jax", "inspect.layers")
    first = X.transpose(0, 3, 1, 2)
    assert inspector.layers(nnx_net, X) == ["conv", "norm", "dense"]
    assert inspector.layers(linen_net[0].bind(linen_net[1]), X) == ["Conv_0", "BatchNorm_0", "Dense_0"]
    assert inspector.layers(eqx_net, first) == ["conv", "dense"]
    assert inspector.layers(lambda x: nnx_net(x), X) == []
    twin = inspector.reinitialized(nnx_net, ["dense"], seed=0)
    again = inspector.reinitialized(nnx_net, ["dense"], seed=0)
    assert framework_of(twin) == "jax"
    weights = dict(zip(twin.paths, twin.weights, strict=True))
    kernel = nnx_net.dense.kernel[...]
    assert np.array_equal(weights["conv.kernel"], nnx_net.conv.kernel[...])
    assert np.array_equal(np.sort(weights["dense.kernel"], None), np.sort(kernel, None))
    assert not np.array_equal(weights["dense.kernel"], kernel)
    assert np.array_equal(weights["dense.kernel"], again.weights[twin.paths.index("dense.kernel")])
    original = ut.explain(nnx_net, X, target=1).values
    before = len(program.cache)
    assert not np.allclose(ut.explain(twin, X, target=1).values, original)
    assert len(program.cache) == before


@pytest.mark.parametrize("kind", ["nnx", "linen", "equinox", "function"])
def test_a_verdict(kind, nnx_net, linen_net, eqx_net):
    image = jnp.asarray(np.random.default_rng(4).normal(size=(1, 16, 16, 3)), jnp.float32)
    model = {
        "nnx": nnx_net,
        "linen": linen_net,
        "equinox": eqx_net,
        "function": jax.jit(lambda x: nnx_net(x)),
    }[kind]
    x = image.transpose(0, 3, 1, 2) if kind == "equinox" else image
    verdict = ut.trust(model, x, rule="gradient", target=1)
    answered = {"class", "weights", "input", "faithfulness", "stability", "convergence"}
    assert set(verdict.answers) == answered - ({"weights"} if kind == "function" else set())
    assert kind != "function" or "plain function" in verdict.unanswered["weights"]
    assert verdict.values.shape == (3, 16, 16)


def test_grad_cam_of_a_linen_layer(linen_net):
    net, variables = linen_net
    a = ut.explain((net, variables), X, estimator="grad-cam:BatchNorm_0", rule="gradient", target=1)
    params = variables["params"]
    conv = jax.lax.conv_general_dilated(
        X, params["Conv_0"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, variance, scale, shift = drawn(1)
    normed = (conv + params["Conv_0"]["bias"] - mean) / jnp.sqrt(variance + 1e-5) * scale + shift
    gradients = (normed > 0) * params["Dense_0"]["kernel"][:, 1] / 144
    wanted = jnp.maximum((normed * gradients.mean((1, 2), keepdims=True)).sum(-1, keepdims=True), 0)
    assert np.allclose(a.values, wanted, atol=1e-5 * float(wanted.max()))


def test_a_graph_of_blocks_is_refused_in_one_line(nnx_net):
    with pytest.raises(
        ut.ModelError, match=r"derive\.from_model is not there for JAX yet; ut\.trace\(model, x\) shows"
    ):
        ut.derive.from_model(nnx_net, X)
