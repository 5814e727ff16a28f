"""AttnLRP and CP-LRP in JAX against twins written into the network, in float64."""

import functools
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import undertow as ut
from frameworks.jax.relevance_twins import Plain, Twin, half, identity_of, relevance

RULES = ("attnlrp", "cp-lrp")
NUMBERS = np.random.default_rng(5)
WIDTH = 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape):
    return NUMBERS.normal(size=shape)


X = drawn(2, 4, WIDTH)
Q, K, V, W, UP, GATE, DOWN = (drawn(WIDTH, WIDTH) / 2 for _ in range(7))
LAST = drawn(WIDTH, 3)


def distance(values, wanted):
    return float(np.abs(np.asarray(values) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


def explained(network, rule, x=X, **options):
    return ut.explain(functools.partial(network, Plain()), jnp.asarray(x), rule=rule, target=1, **options)


def assert_equals_the_twin(network, rule, rewired=None, x=X):
    a = explained(network, rule, x)
    assert distance(a.values, relevance(network, Twin(rule == "cp-lrp"), jnp.asarray(x), 1)) <= 1e-12
    assert (a.skipped, a.opaque) == ({}, {})
    assert rewired in (None, a.rewired)
    return a


def rotated(x):
    """Turn pairs of features by angles that grow with the position, as a rotary embedding does."""
    angle = jnp.arange(x.shape[1])[:, None] * jnp.array([1.0, 0.3, 0.1])
    first, second = x[..., ::2], x[..., 1::2]
    turned = first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle)
    return jnp.stack(turned, -1).reshape(x.shape)


def attended(k, x, mask=None):
    scores = k.matmul(rotated(x @ Q), rotated(x @ K).swapaxes(1, 2)) / WIDTH**0.5
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return k.mixed(k.softmax(scores), x @ V) @ W


def block(k, x):
    """Pre-norm attention with rotary positions, then SwiGLU, as Llama has them."""
    x = x + attended(k, k.rms_norm(x), jnp.tril(jnp.ones((x.shape[1],) * 2, bool)))
    h = k.rms_norm(x)
    return x + k.gated(k.activation(jax.nn.silu, h @ GATE), h @ UP) @ DOWN


def llama(k, x):
    return k.rms_norm(block(k, block(k, x)))[:, -1] @ LAST


def vit(k, x):
    x = x + attended(k, k.layer_norm(x))
    x = x + k.activation(jax.nn.gelu, k.layer_norm(x) @ UP) @ DOWN
    return k.layer_norm(x).mean(1) @ LAST


def small(k, x):
    return k.activation(jax.nn.gelu, k.layer_norm(x) @ UP).mean(1) @ LAST


@pytest.mark.parametrize("rule", RULES)
def test_transformers_equal_their_twins(rule):
    assert_equals_the_twin(llama, rule, rewired=2 * (2 + 1 + 1 + 2) + 1 + 2 * (rule == "cp-lrp"))
    a = assert_equals_the_twin(vit, rule, rewired=3 + 1 + 2 + (rule == "cp-lrp"))
    if rule == "cp-lrp":
        assert np.allclose(a.conservation, 1)  # a GELU keeps relevance, and there is no bias


# name: the function as people write it, and with the rule written into it
NORMS = {
    "nnx LayerNorm": (nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=nnx.Rngs(0)), "layer_norm"),
    "nnx LayerNorm, slow variance": (
        nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
        "layer_norm",
    ),
    "nnx RMSNorm": (nnx.RMSNorm(WIDTH, epsilon=1e-5, rngs=nnx.Rngs(0)), "rms_norm"),
    "linen LayerNorm": (lambda x: linen.LayerNorm(epsilon=1e-5).apply({"params": ONES}, x), "layer_norm"),
    "linen RMSNorm": (lambda x: linen.RMSNorm(epsilon=1e-5).apply({"params": {"scale": ONES["scale"]}}, x), "rms_norm"),
    "nnx GroupNorm of one": (
        lambda x: jax.vmap(nnx.GroupNorm(WIDTH, num_groups=1, epsilon=1e-5, rngs=nnx.Rngs(0)))(x),
        "layer_norm",
    ),
    "Equinox LayerNorm": (jax.vmap(jax.vmap(eqx.nn.LayerNorm(WIDTH))), "layer_norm"),
    "Equinox RMSNorm": (jax.vmap(jax.vmap(eqx.nn.RMSNorm(WIDTH))), "rms_norm"),
    "jax.nn.standardize": (jax.nn.standardize, "layer_norm"),
    "over a root": (
        lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
        "layer_norm",
    ),
    "to the power -0.5": (lambda x: x * (jnp.square(x).mean(-1, keepdims=True) + 1e-5) ** -0.5, "rms_norm"),
    "one over a root": (lambda x: x * (1 / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)), "rms_norm"),
    "as Keras has it": (lambda x: as_keras(x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True)), "layer_norm"),
}
ONES = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}


def as_keras(x, mean, variance):
    spread = lax.rsqrt(variance + 1e-5)
    return x * spread + (-mean * spread)


def side_by_side(functions):
    """Return one network in which each function has an input of its own: one program to compile."""
    return lambda x: sum(f(x[:, i]).reshape(len(x), -1, WIDTH).mean(1) @ LAST for i, f in enumerate(functions))


def assert_all_equal(table, rule):
    """Compare each function of a table, `(function, with the rule written in)`, on an input of its own."""
    functions, twins = zip(*table.values(), strict=True)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, len(table), 3, WIDTH)))
    a = ut.explain(side_by_side(functions), x, rule=rule, target=1)
    wanted = x * jax.jit(jax.grad(lambda x: side_by_side(twins)(x)[:, 1].sum()))(x)
    difference = np.abs(np.asarray(a.values - wanted)).max((0, 2, 3))
    scale = np.abs(np.asarray(wanted)).max((0, 2, 3))
    allowed = [1e-6 if "float32" in name else 1e-12 for name in table]
    rows = zip(table, difference, scale, allowed, strict=True)
    assert [name for name, d, s, by in rows if d > by * max(s, 1e-3)] == []
    assert (a.skipped, a.opaque) == ({}, {})
    return a


def test_norms_hold_their_spread_however_they_are_written():
    twin = Twin(cp=False)
    rows = {name: (f, getattr(twin, kind)) for name, (f, kind) in NORMS.items()}
    assert_all_equal(rows, "attnlrp")
    assert np.allclose(
        ut.explain(lambda x: jax.nn.standardize(x) @ LAST, jnp.asarray(X[:, 0]), rule="attnlrp").conservation, 1
    )


def sigmoid_by_hand(x):
    return 1 / (1 + jnp.exp(-x))


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu, exact": functools.partial(jax.nn.gelu, approximate=False),
    "gelu by hand": lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": jax.nn.silu,
    "x * sigmoid(ax)": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "x / (1 + exp(-x))": lambda x: x / (1 + jnp.exp(-x)),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "hard_silu": jax.nn.hard_silu,
    "relu": jax.nn.relu,
    "relu6": lambda x: jax.nn.relu6(4 * x),
    "leaky_relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "maximum with another number": lambda x: jnp.maximum(x, 0.3),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "square": jnp.square,
    "x * x": lambda x: x * x,
    "x ** 3": lambda x: x**3,
    "exp": jnp.exp,
    "constant / x": lambda x: 2 / x,
    "sinc, a custom_jvp of JAX": jnp.sinc,
}


def test_activations_pass_relevance_as_it_is():
    rows = {name: (f, identity_of(f)) for name, f in ACTIVATIONS.items()}
    assert_all_equal(rows, "attnlrp")


def masked_softmax(x):
    return jax.nn.softmax(x, where=MASK)


MASK = np.tri(3, WIDTH, dtype=bool)
SOFTMAXES = {
    "jax.nn.softmax": jax.nn.softmax,
    "with a mask": masked_softmax,
    "log_softmax": jax.nn.log_softmax,
    "by its logarithm": lambda x: jnp.exp(jax.nn.log_softmax(x)),
    "by logsumexp": lambda x: jnp.exp(x - jax.nn.logsumexp(x, axis=-1, keepdims=True)),
    "less a logarithm": lambda x: x - jnp.log(jnp.exp(x).sum(-1))[..., None],
    "by hand": lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
    "less the largest": lambda x: operator.truediv(
        e := jnp.exp(x - x.max(-1, keepdims=True)), e.sum(-1, keepdims=True)
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_softmaxes_however_they_are_written(rule):
    rows = {name: (f, f if rule == "attnlrp" else lambda x: lax.stop_gradient(x)) for name, f in SOFTMAXES.items()}
    rows["beside"] = (jnp.tanh, identity_of(jnp.tanh))
    a = assert_all_equal(rows, rule)
    assert a.rewired >= 1 + (rule == "cp-lrp") * len(SOFTMAXES)


def halves(x):
    return jnp.split(x, 2, -1)


def wide(x):
    return jnp.concatenate([x, x], -1)


def glu(product, x):
    a, b = halves(x)
    return wide(product(jax.nn.sigmoid(b), a))


def turned(x):
    """Turn pairs of features by a product of complex numbers."""
    z = lax.complex(x[..., ::2], x[..., 1::2]) * jnp.exp(1j * jnp.arange(3.0)[:, None])
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


def products(rule):
    twin = Twin(rule == "cp-lrp")
    gate = identity_of(jax.nn.sigmoid)
    return {
        "of two halves": (lambda x: wide(operator.mul(*halves(x))), lambda x: wide(twin.product(*halves(x)))),
        "glu": (
            functools.partial(glu, operator.mul),
            lambda x: wide(twin.gated(gate(halves(x)[1]), halves(x)[0])),
        ),
        "jax.nn.glu": (
            lambda x: wide(jax.nn.glu(x)),
            lambda x: wide(twin.gated(gate(halves(x)[1]), halves(x)[0])),
        ),
        "1 - gate": (
            lambda x: wide((1 - jax.nn.sigmoid(halves(x)[1])) * halves(x)[0]),
            lambda x: wide(twin.gated(1 - gate(halves(x)[1]), halves(x)[0])),
        ),
        "of two gates": (
            lambda x: wide(jax.nn.sigmoid(halves(x)[0]) * jax.nn.sigmoid(halves(x)[1])),
            lambda x: wide(half(gate(halves(x)[0])) * half(gate(halves(x)[1]))),
        ),
        "einsum of complex turns": (
            lambda x: jnp.einsum("btd,bsd->bts", turned(x), turned(x @ W)) @ W[:3],
            lambda x: jnp.einsum("btd,bsd->bts", half(turned(x)), half(turned(x @ W))) @ W[:3],
        ),
        "dot_product_attention, in float32 inside": (
            lambda x: jax.nn.dot_product_attention(*(h[:, :, None] for h in (x @ Q, x @ K, x)), is_causal=True)[
                :, :, 0
            ],
            lambda x: twin.mixed(
                twin.softmax(jnp.where(MASK[:, :3], twin.matmul(x @ Q, (x @ K).swapaxes(1, 2)) / WIDTH**0.5, -1e38)), x
            ),
        ),
    }


@pytest.mark.parametrize("rule", RULES)
def test_products_of_two_variables(rule):
    assert_all_equal(products(rule), rule)


STACK = drawn(3, WIDTH, WIDTH)


def scanned(k, x):
    """Layers scanned over stacked weights, each rematerialised; beside the state a number that x does not reach."""

    @jax.checkpoint
    def layer(carry, w):
        h, scale = carry
        h = h + k.mixed(k.softmax(k.matmul(h @ w, h.swapaxes(1, 2))), h)
        return (k.layer_norm(k.activation(jax.nn.gelu, h) * scale), scale * 1.5), None

    (h, scale), _ = lax.scan(layer, (x, jnp.asarray(1.0)), STACK)
    return (h * scale).mean(1) @ LAST


def branching(k, x):
    return lax.cond(x.sum() < 99, functools.partial(small, k), lambda x: x.mean(1) @ LAST, x)


def mapped(k, x):
    return jax.vmap(jax.jit(lambda x: small(k, x[None])[0]))(x)


@pytest.mark.parametrize(
    ("network", "rule"), [(scanned, "attnlrp"), (scanned, "cp-lrp"), (branching, "attnlrp"), (mapped, "cp-lrp")]
)
def test_inside_transformations(network, rule):
    rewired = {scanned: 3 * (2 + 1 + 1), branching: 2, mapped: 2}[network]
    assert_equals_the_twin(network, rule, rewired + 3 * (network is scanned and rule == "cp-lrp"))


@pytest.mark.slow
def test_flax_attention():
    attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=nnx.Rngs(0), dtype=jnp.float64)

    def by_hand(k, x):
        heads = (getattr(attention, name)(x).swapaxes(1, 2) for name in ("query", "key", "value"))
        q, key, value = heads
        mixed = k.mixed(k.softmax(k.matmul(q / (WIDTH / 2) ** 0.5, key.swapaxes(2, 3))), value)
        return attention.out(mixed.swapaxes(1, 2))[:, 0]

    for rule in RULES:
        a = ut.explain(lambda x: attention(x)[:, 0], jnp.asarray(X), rule=rule, target=1)
        assert (
            distance(a.values, relevance(by_hand, Twin(rule == "cp-lrp"), jnp.asarray(X), 1)) <= 1e-6
        )  # float32 inits


def test_at_a_place_it_is_in_units_of_the_score():
    def named(k, x):
        return small(k, checkpoint_name(x @ W, "here"))

    a = explained(named, "cp-lrp", at="here")
    assert distance(a.values, relevance(small, Twin(cp=True), jnp.asarray(X @ W), 1)) <= 1e-12
    assert np.allclose(a.conservation, 1)
    several = ut.explain(functools.partial(small, Plain()), jnp.asarray(X), rule="cp-lrp", target=[[0, 1], [1, 2]])
    assert np.allclose(several.conservation, 1)


def test_in_bfloat16_it_is_nearly_the_same():
    wanted = np.asarray(explained(small, "attnlrp").values)
    a = ut.explain(
        lambda x: small(Plain(), x.astype(jnp.float32)), jnp.asarray(X, jnp.bfloat16), rule="attnlrp", target=1
    )
    assert a.values.dtype == jnp.bfloat16
    assert distance(a.values.astype(float), wanted) < 0.1


def test_a_table_of_ones_own():
    def all_to_the_larger(g, local, op):
        first, second = local(g)
        larger = jnp.abs(first) < jnp.abs(second)
        return first * larger, second * ~larger

    rule = ut.Rule({**ut.rules.ATTNLRP.rows, "product": all_to_the_larger}, name="larger", values="input-times")
    a = ut.explain(lambda x: x[:, :2] * x[:, 2:], jnp.asarray([[3.0, 1.0, 2.0, 5.0]]), rule=rule, target=0)
    assert a.values.tolist() == [[6.0, 0.0, 0.0, 0.0]]
    assert a.conservation.tolist() == [1.0]
    for row, line in (
        (lambda g, local, op: local(g)[0], "returned 1 gradient"),
        (lambda g, local, op: (g, 0), "returned a int at mul"),
        (lambda g, local, op: local(g[:1, :1]), "gave local"),
        (lambda g, local, op: op.weight, "mul .product. has no weight"),
    ):
        with pytest.raises(ut.RuleError, match=line):
            ut.explain(lambda x: x[:, :2] * x[:, 2:], jnp.ones((1, 4)), rule=ut.Rule({"product": row}), target=0)


@jax.custom_vjp
def own(x):
    return x * 2


own.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))


def test_what_is_not_known_is_listed_and_refused_by_a_strict_table():
    def network(x):
        return own(jnp.cumprod(jnp.tanh(x), 1)) @ LAST

    with pytest.warns(ut.UndertowWarning, match="left alone on the way.*cumprod x1, own x1"):
        a = ut.explain(network, jnp.asarray(X[:, 0]), rule="attnlrp", target=1)
    assert (a.rewired, a.skipped, a.opaque) == (1, {"cumprod": 1}, {"own": 1})
    strict = ut.Rule(ut.rules.ATTNLRP.rows, name="strict", values="input-times", strict=True)
    with pytest.raises(ut.RuleError, match="'strict' has no row for cumprod x1, own x1"):
        ut.explain(network, jnp.asarray(X[:, 0]), rule=strict, target=1)


def kernel(x):
    from jax.experimental import pallas

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    return pallas.pallas_call(copy, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


@jax.custom_vjp
def fused(x):
    return kernel(x)


fused.defvjp(lambda x: (kernel(x), None), lambda _, g: (g,))


def sharded(x):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: jnp.tanh(x) * x, mesh=mesh, in_specs=spec, out_specs=spec)(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (kernel, {}, "rule 'attnlrp' cannot see into pallas_call"),
        (fused, {}, "rule 'attnlrp' cannot see into custom_vjp_call.*a kernel keeps its operations"),
        (sharded, {}, "rule 'attnlrp' cannot see into shard_map: its body has operations"),
        (lambda x: x, {}, "found no operation of its kinds .* between the input and the scores; rule='gradient' needs"),
        (jnp.tanh, {"rule": "deeplift"}, "'deeplift' is not there for JAX"),
        (jnp.tanh, {"rule": "attention-rollout"}, "'attention-rollout' is not there for JAX"),
        (jnp.tanh, {"through": "swap"}, "PyTorch"),
    ],
)
def test_what_is_refused(model, options, message):
    with pytest.raises(ut.RuleError, match=message):
        ut.explain(model, jnp.asarray(X[:, 0]), **{"rule": "attnlrp", "target": 1, **options})


def test_the_product_with_the_input_is_not_taken_twice():
    for estimator in ("input-times", "integrated:4"):
        with pytest.raises(ut.InputError, match="is so multiplied already"):
            explained(small, "attnlrp", estimator=estimator)
