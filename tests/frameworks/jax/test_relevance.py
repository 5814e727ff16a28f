"""LRP in JAX on convolutional networks as they are, against explicit sums over all pairs of an input and an output.

The twin goes through the layers by hand. Each layer is a dense matrix, got by applying it to every unit vector, and
each rule is written out over the table of contributions x_i w_ij.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import undertow as ut
from undertow.frameworks.jax.explain.layers import is_nonnegative
from undertow.frameworks.jax.explain.recognition import recognize
from undertow.frameworks.jax.explain.steps import JaxprSteps
from undertow.frameworks.jax.graph import graph_of, route

EPSILON = 1e-6
BOX = (-4.0, 4.0)
NUMBERS = np.random.default_rng(2)
RULES = {
    "lrp:epsilon": ("epsilon", "epsilon", "epsilon"),
    "lrp:epsilon-plus-flat": ("flat", "plus", "epsilon"),
    "lrp:epsilon-alpha2-beta1": ("alpha2_beta1", "alpha2_beta1", "epsilon"),
    "lrp:epsilon-gamma-box": ("box", "gamma", "epsilon"),
    "excitation": ("excitation", "excitation", "excitation"),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, by=1.0):
    return NUMBERS.normal(size=shape) * by


X = drawn(2, 8, 8, 3)
FIRST, SECOND = drawn(3, 3, 3, 4, by=0.4), drawn(3, 3, 2, 6, by=0.4)
THIRD, FOURTH = drawn(6, 5, by=0.5), drawn(5, 3, by=0.6)
BIASES = [drawn(n, by=0.3) for n in (4, 6, 5, 3)]
SCALE, SHIFT, MEAN, VARIANCE = drawn(4), drawn(4), drawn(4), NUMBERS.uniform(0.5, 2, 4)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def first(x):
    return lax.conv_general_dilated(x, FIRST, (1, 1), "SAME", dimension_numbers=LAYOUT)


def norm(x):
    return (x - MEAN) * (lax.rsqrt(VARIANCE + 1e-5) * SCALE) + SHIFT


def maximum(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def second(x):
    return lax.conv_general_dilated(x, SECOND, (2, 2), "VALID", dimension_numbers=LAYOUT, feature_group_count=2)


def plain(x):
    """A convolution with batch norm, one in groups, max-pooling and a mean, two linear layers."""
    h = maximum(jax.nn.relu(norm(first(x) + BIASES[0])))
    h = jax.nn.relu(second(h) + BIASES[1]).mean((1, 2))
    return jax.nn.leaky_relu(h @ THIRD + BIASES[2]) @ FOURTH + BIASES[3]


def share(contributions, whole, relevance):
    """Share R_j over i: (B, n, m) of a whole (B, m)."""
    return (contributions * (relevance / (whole + EPSILON * np.where(whole < 0, -1, 1)))[:, None]).sum(-1)


def clipped(z, sign):
    return np.maximum(sign * z, 0) * sign


class Layer:
    """A layer as a matrix (n, m) and a bias (m,), flattened."""

    def __init__(self, linear, x, affine=lambda y: y):
        self.shape = x.shape
        unit = np.eye(x[0].size).reshape(-1, *x.shape[1:])
        zero = np.asarray(affine(linear(unit[:1] * 0)))
        self.b, self.x = zero.reshape(-1), np.asarray(x).reshape(len(x), -1)
        self.W = (np.asarray(affine(linear(unit))) - zero).reshape(len(unit), -1)
        self.connected = (np.abs(np.asarray(linear(unit))) > 0).reshape(len(unit), -1)
        self.z = self.x[:, :, None] * self.W
        self.y = self.z.sum(1) + self.b

    def back(self, rule, relevance):
        return getattr(self, rule)(relevance.reshape(len(relevance), -1)).reshape(self.shape)

    def epsilon(self, R):
        return share(self.z, self.y, R)

    def parts(self, sign, R):
        z = clipped(self.z, sign)
        return share(z, z.sum(1) + clipped(self.b, sign), R)

    def plus(self, R):
        return self.parts(1, R)

    def alpha2_beta1(self, R):
        return 2 * self.parts(1, R) - self.parts(-1, R)

    def gamma(self, R, by=0.25):
        total = 0
        for sign in (1, -1):
            z, b = self.z + by * clipped(self.z, sign), self.b + by * clipped(self.b, sign)
            total = total + share(z, z.sum(1) + b, R * (sign * self.y > 0))
        return total

    def flat(self, R):
        z = np.broadcast_to(self.connected, self.z.shape) * 1.0
        return share(z, z.sum(1), R)

    def box(self, R):
        low, high = BOX
        z = self.z - low * np.maximum(self.W, 0) - high * np.minimum(self.W, 0)
        return share(z, z.sum(1), R)

    def excitation(self, R):
        z = np.maximum(self.x, 0)[:, :, None] * np.maximum(self.W, 0)
        return share(z, z.sum(1), R)


def back_through(pool, x, relevance):
    """Where max-pooling: all to the winner. Where a mean: in proportion to what each gave."""
    y, pull = jax.vjp(pool, jnp.asarray(x))
    y = np.asarray(y)
    ratio = np.divide(relevance.reshape(y.shape), y, out=np.zeros_like(y), where=y != 0)
    return np.asarray(x * pull(jnp.asarray(ratio))[0])


def by_hand(rule, target):
    """Return the relevance of X under a composite."""
    at_first, conv, linear = RULES[rule]
    one = Layer(first, X, lambda y: norm(y + BIASES[0]))
    h = np.maximum(one.y, 0).reshape(2, 8, 8, 4)
    two = Layer(second, np.asarray(maximum(h)), lambda y: y + BIASES[1])
    after = np.maximum(two.y, 0).reshape(2, 1, 1, 6)
    three = Layer(lambda x: x @ THIRD, after.mean((1, 2)), lambda y: y + BIASES[2])
    four = Layer(lambda x: x @ FOURTH, np.where(three.y < 0, 0.01, 1) * three.y, lambda y: y + BIASES[3])
    R = np.zeros_like(four.y)
    R[:, target] = four.y[:, target]
    R = three.back(linear, four.back(linear, R))
    R = two.back(conv, back_through(lambda x: x.mean((1, 2)), after, R))
    return one.back(at_first, back_through(maximum, h, R))


def rule_of(name):
    bounded = ut.rules.composite("bounded", ut.lrp.gamma(), ut.lrp.box(*BOX))
    return bounded if name == "lrp:epsilon-gamma-box" else name


def distance(values, wanted):
    return float(np.abs(np.asarray(values) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


def explained(network, rule, x=X, **options):
    return ut.explain(network, jnp.asarray(x), rule=rule_of(rule), target=1, **options)


@pytest.mark.parametrize("rule", RULES)
def test_a_network_equals_its_twin(rule):
    a = explained(plain, rule)
    assert distance(a.values, by_hand(rule, 1)) <= 1e-12
    assert (a.rewired, a.switches, a.skipped, a.opaque) == (7, 1, {}, {})


def simple(x):
    return jax.nn.relu(norm(first(x) + BIASES[0])).mean((1, 2)) @ THIRD[:4] + BIASES[2]


class NnxNet(nnx.Module):
    def __init__(self):
        options = {"rngs": nnx.Rngs(0), "dtype": jnp.float64, "param_dtype": jnp.float64}
        self.conv, self.dense = nnx.Conv(3, 4, (3, 3), **options), nnx.Linear(4, 5, **options)
        self.norm = nnx.BatchNorm(4, use_running_average=True, **options)
        self.conv.kernel, self.conv.bias = map(nnx.Param, (jnp.asarray(FIRST), jnp.asarray(BIASES[0])))
        self.dense.kernel, self.dense.bias = map(nnx.Param, (jnp.asarray(THIRD[:4]), jnp.asarray(BIASES[2])))
        self.norm.mean, self.norm.var = map(nnx.BatchStat, (jnp.asarray(MEAN), jnp.asarray(VARIANCE)))
        self.norm.scale, self.norm.bias = map(nnx.Param, (jnp.asarray(SCALE), jnp.asarray(SHIFT)))

    def __call__(self, x):
        return self.dense(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
        x = linen.BatchNorm(use_running_average=True, param_dtype=jnp.float64)(x)
        return linen.Dense(5, param_dtype=jnp.float64)(linen.relu(x).mean((1, 2)))


def of_linen():
    return LinenNet().bind(
        {
            "params": {
                "Conv_0": {"kernel": FIRST, "bias": BIASES[0]},
                "BatchNorm_0": {"scale": SCALE, "bias": SHIFT},
                "Dense_0": {"kernel": THIRD[:4], "bias": BIASES[2]},
            },
            "batch_stats": {"BatchNorm_0": {"mean": MEAN, "var": VARIANCE}},
        }
    )


def of_equinox():
    """Channels first, each sample by itself, and W @ x."""
    conv = eqx.nn.Conv2d(3, 4, 3, padding=1, key=jax.random.key(0))
    dense = eqx.nn.Linear(4, 5, key=jax.random.key(0))
    weights = FIRST.transpose(3, 2, 0, 1), BIASES[0][:, None, None], THIRD[:4].T, BIASES[2]
    conv, dense = eqx.tree_at(
        lambda both: (both[0].weight, both[0].bias, both[1].weight, both[1].bias),
        (conv, dense),
        tuple(jnp.asarray(w) for w in weights),
    )

    def net(image):
        h = conv(image.transpose(2, 0, 1))
        h = jax.nn.relu((h - MEAN[:, None, None]) / jnp.sqrt(VARIANCE + 1e-5)[:, None, None] * SCALE[:, None, None]
                        + SHIFT[:, None, None])  # fmt: skip
        return dense(h.mean((1, 2)))

    return jax.vmap(net)


@pytest.mark.parametrize("make", [NnxNet, of_linen, of_equinox])
def test_modules_are_folded_as_functions_are(make):
    a = explained(make(), "lrp:epsilon-gamma-box")
    assert distance(a.values, explained(simple, "lrp:epsilon-gamma-box").values) <= 1e-12
    assert a.rewired == 3


def test_a_box_by_default_is_each_samples_own():
    both = ut.explain(simple, jnp.asarray(X), rule="lrp:epsilon-gamma-box", target=1).values
    low, high = X[:1].min((1, 2), keepdims=True), X[:1].max((1, 2), keepdims=True)
    own = ut.rules.composite("own", ut.lrp.gamma(), ut.lrp.box(low, high))
    assert distance(both[:1], ut.explain(simple, jnp.asarray(X[:1]), rule=own, target=1).values) <= 1e-12


STACK = drawn(3, 5, 5)


def deep(around, x):
    """Layers scanned behind the first, which is in a rematerialised block."""
    h = around(lambda x: jax.nn.relu(norm(first(x) + BIASES[0])))(x).mean((1, 2)) @ THIRD[:4]
    if around is jax.checkpoint:
        return lax.scan(lambda h, w: (jax.nn.leaky_relu(h @ w + BIASES[2]), None), h, STACK)[0]
    for w in STACK:
        h = jax.nn.leaky_relu(h @ w + BIASES[2])
    return h


def test_inside_transformations():
    for rule in ("lrp:epsilon-plus-flat", "excitation"):
        wanted = explained(functools.partial(deep, lambda f: f), rule)
        a = explained(functools.partial(deep, jax.checkpoint), rule)
        assert distance(a.values, wanted.values) <= 1e-12
        assert a.rewired == wanted.rewired == 9
        assert (
            distance(
                explained(jax.jit(jax.vmap(lambda x: simple(x[None])[0])), rule).values, explained(simple, rule).values
            )
            <= 1e-12
        )


def test_what_scales_the_input_passes_relevance():
    def scaled(x):
        return simple(2 * (-x - 0.5) / 0.25)

    normed = 2 * (-X - 0.5) / 0.25
    for rule in ("lrp:epsilon-plus-flat",):
        assert distance(explained(scaled, rule).values, explained(simple, rule, normed).values) <= 1e-12


def test_at_a_place_and_conservation():
    def without_biases(x):
        h = checkpoint_name(jax.nn.relu(first(x)), "here")
        return jax.nn.relu(second(h)).mean((1, 2)) @ THIRD

    for rule in ("lrp:epsilon-plus-flat", "lrp:epsilon"):
        a = explained(without_biases, rule)
        assert np.allclose(a.conservation, 1, atol=1e-4)
        inside = explained(without_biases, rule, at="here")
        assert np.allclose(inside.conservation, 1, atol=1e-4)
        assert inside.values.shape == (2, 8, 8, 4)


def dense(x):
    return x.reshape(len(x), -1)[:, :5] @ STACK[0]


def beside(x):
    return jnp.concatenate([jax.nn.relu(first(x)), x], -1).mean((1, 2)) @ drawn(7, 3)


def from_the_loop(x):
    return lax.scan(lambda h, w: (h @ w, None), x.reshape(len(x), -1)[:, :5], STACK)[0]


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (beside, "x reaches concatenate beside the first layers"),
        (lambda x: dense(x.mean(1)), "reduce_sum lies between x and the first layer"),
        (lambda x: jax.nn.softmax(x.reshape(2, -1)), "no convolution or matrix product"),
        (lambda x: jnp.cumprod(dense(x), 1), "has no row for cumprod x1 on the way"),
        (from_the_loop, "x enters a loop .* before the first layer; unroll it"),
        (lambda x: dense(x) + x.sum((1, 2, 3))[:, None], "x reaches add beside the first layers"),
    ],
)
def test_what_would_be_wrong_is_refused(network, line):
    with pytest.raises(ut.RuleError, match=line):
        explained(network, "lrp:epsilon-plus-flat", head="as is")


SIGNS = {
    True: (
        jax.nn.relu,
        jax.nn.relu6,
        lambda x: jnp.maximum(0.5, x),
        lambda x: jax.nn.relu(x) + jnp.abs(x),
        lambda x: jnp.concatenate([jax.nn.relu(x) / 3, jnp.exp(x)]),
        lambda x: jnp.pad(jax.nn.relu(x).reshape(-1).mean(keepdims=True), 1),
        lambda x: jax.nn.relu(x).max(0),
    ),
    False: (
        lambda x: x,
        jax.nn.gelu,
        jax.nn.leaky_relu,
        lambda x: jnp.where(x > -1, x, 0),
        lambda x: jnp.maximum(x, -1),
        lambda x: jax.nn.relu(x) - jax.nn.relu(-x),
        lambda x: jnp.pad(jax.nn.relu(x), 1, constant_values=-1),
        lambda x: jnp.minimum(jax.nn.relu(x), -0.5),
    ),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_what_cannot_be_negative_is_told_by_what_makes_it(sign):
    for function in SIGNS[sign]:
        graph = graph_of(jax.make_jaxpr(function)(jnp.ones((2, 3))))
        assert is_nonnegative(graph.outputs[0]) is sign


@pytest.mark.parametrize(
    ("behind", "may_be_negative"),
    [
        (jax.nn.relu, False),
        (lambda y: jnp.maximum(y, 0), False),
        (jax.nn.leaky_relu, True),
        (jnp.abs, True),
        (lambda y: jax.nn.relu(y) + y, True),
        (lambda y: jnp.where(y > -1, y, 0), True),
    ],
)
def test_negative_outputs_get_no_relevance_where_a_relu_alone_reads_them(behind, may_be_negative):
    graph = graph_of(jax.make_jaxpr(lambda x: behind(x @ STACK[0] + BIASES[2]))(jnp.ones((2, 5))))
    way = route(graph.nodes, graph.arguments[-1:], graph.outputs)
    (layer,) = (operation for operation in recognize(JaxprSteps(graph, way)).operations if operation.is_layer)
    assert (layer.has_negative_input, layer.has_negative_output) == (True, may_be_negative)
    assert [node.name for node in layer.nodes] == ["dot_general", "add"]
