"""Passes traced call by call, and gradients redirected on their way, beside functions written by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import undertow as ut

NUMBERS = np.random.default_rng(3)
X = jnp.asarray(NUMBERS.normal(size=(3, 4)), jnp.float32)
TOKENS = jnp.asarray([[0, 1], [2, 1]])


class Mlp(nnx.Module):
    """A layer that is read twice, and one with weights of its own beside its parts'."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)
        self.unused = nnx.Linear(4, 2, rngs=rngs)
        self.gain = nnx.Param(jnp.full(2, 3.0))

    def __call__(self, x):
        h = jax.nn.relu(self.norm(self.first(x)))
        return self.last(h + jnp.tanh(self.first(h))) * self.gain


class Small(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="last")(jnp.tanh(linen.Dense(4)(x)))


class Row(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, row):
        return self.last(jnp.tanh(self.first(row)))


def mlp():
    return Mlp(nnx.Rngs(0))


def small():
    return Small(), Small().init(jax.random.key(0), X)


def row():
    return Row(*(eqx.nn.Linear(4, n, key=jax.random.key(n)) for n in (4, 2)))


def close(values, wanted):
    assert np.abs(np.asarray(values) - np.asarray(wanted)).max() <= 1e-5 * np.abs(np.asarray(wanted)).max()


def test_every_call_of_an_nnx_module():
    net = mlp()
    weight = jnp.asarray(NUMBERS.normal(size=(3, 2)), jnp.float32)
    traced = ut.trace(net, X, weight)
    assert [(c.name, c.kind, c.call) for c in traced.calls] == [
        ("", "Mlp", 0),
        ("first", "Linear", 0),
        ("norm", "BatchNorm", 0),
        ("first", "Linear", 1),
        ("last", "Linear", 0),
    ]
    assert traced.unreached == ("unused",)
    h = jax.nn.relu(net.norm(net.first(X)))
    second = net.first(h)
    before = h + jnp.tanh(second)

    def after(before):
        return (net.last(before) * net.gain * weight).sum()

    g = jax.grad(after)(before)
    by_second = g * (1 - jnp.tanh(second) ** 2)
    close(traced["last"].input_gradients[0], g)
    close(traced["first", 1].output_gradients[0], by_second)
    # by way of this call alone, though `h` is read elsewhere
    close(traced["first", 1].input_gradients[0], by_second @ net.first.kernel.T)
    close(traced["first", 0].inputs[0], X)
    close(traced["first", 1].outputs[0], second)
    close(traced["last"].parameter_gradients["kernel"], before.T @ (weight * net.gain))
    close(traced[""].parameter_gradients["gain"], (net.last(before) * weight).sum(0))
    assert traced["first", 0].parameter_gradients == {"bias": None, "kernel": None}
    assert "several calls" in traced["first", 0].note
    assert traced["norm"].parameter_gradients["mean"] is None  # no parameter
    assert traced["norm"].parameter_gradients["scale"].shape == (4,)


def test_linen_and_equinox():
    net, variables = small()
    traced = ut.trace((net, variables), X)
    assert [c.name for c in traced.calls] == ["Dense_0", "last"]
    kernel = variables["params"]["last"]["kernel"]
    close(traced["last"].input_gradients[0], jnp.ones((3, 2)) @ kernel.T)
    one = row()
    traced = ut.trace(one, X)
    h = jnp.tanh(jax.vmap(one.first)(X))
    assert [(c.name, c.outputs[0].shape) for c in traced.calls] == [("first", (3, 4)), ("last", (3, 2))]
    close(traced["last"].inputs[0], h)
    close(traced["first"].output_gradients[0], jnp.ones((3, 2)) @ one.last.weight * (1 - h**2))
    close(traced["first"].parameter_gradients["weight"], traced["first"].output_gradients[0].T @ X)


class Words(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(3, 2, rngs=rngs)

    def __call__(self, tokens):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h), None), self.embed(tokens), None, length=2)[0]


def test_integers_and_what_is_refused():
    traced = ut.trace(Words(nnx.Rngs(0)), TOKENS)
    assert (traced["embed"].inputs[0].dtype, traced["embed"].input_gradients) == (jnp.int32, (None,))
    assert traced["embed"].parameter_gradients["embedding"].shape == (3, 2)
    with pytest.raises(ut.InputError, match="a function has no module calls"):
        ut.trace(jax.jit(lambda x: x), X)
    with pytest.raises(ut.InputError, match=r"gradient has shape \(2,\) where the output has \(3, 2\)"):
        ut.trace(row(), X, np.ones(2))
    with pytest.raises(ut.InputError, match="depends on nothing"):
        ut.trace(Cut(), X)


class Cut(nnx.Module):
    def __call__(self, x):
        return jax.lax.stop_gradient(x)


# --- redirect


def gradient_of(net, x):
    return nnx.grad(lambda net: net(x).sum())(net)["first"]["kernel"][...]


@pytest.mark.parametrize("around", [lambda f: f, nnx.jit])
def test_a_change_counts_inside_the_context_alone(around):
    net, step = mlp(), around(gradient_of)
    before = step(net, X)
    with ut.redirect(net, {"last": ut.redirect.scale(-2)}) as redirected:
        close(step(net, X), -2 * before)
    assert redirected.changed == {"last": 1}
    assert np.array_equal(step(net, X), before)
    assert type(net.last) is nnx.Linear
    with ut.redirect(net, {"last": ut.redirect.zero()}), ut.redirect(net, {"": ut.redirect.scale(3)}):
        assert not step(net, X).any()


def test_a_jitted_step_of_linen_is_traced_anew():
    net, variables = small()
    step = jax.jit(jax.grad(lambda variables: net.apply(variables, X).sum()))
    before = step(variables)["params"]["Dense_0"]["kernel"]
    with ut.redirect((net, variables), {"Dense*": ut.redirect.scale(5), "last": ut.redirect.scale(2)}):
        close(step(variables)["params"]["Dense_0"]["kernel"], 10 * before)
    assert np.array_equal(step(variables)["params"]["Dense_0"]["kernel"], before)


def at_first(net, x):
    """The gradient at each row of what `first` returns."""
    h = jax.vmap(net.first)(x)
    return jax.grad(lambda h: jax.vmap(lambda h: net.last(jnp.tanh(h)))(h).sum())(h)


def test_under_vmap_a_change_is_given_the_whole_batch():
    net = row()
    g = np.float64(at_first(net, X))
    norms = np.linalg.norm(g, axis=1, keepdims=True)
    shapes = []

    def told(g):
        shapes.append(g.shape)
        return g

    def by_input(net):
        return jax.grad(lambda x: jax.vmap(net)(x).sum())(X)

    limit = float(np.median(norms))
    with ut.redirect(net, {"first": told}), ut.redirect(net, {"first": ut.redirect.clip(limit)}):
        found = by_input(net)
    close(found, g * np.minimum(1, limit / norms) @ np.asarray(net.first.weight))
    assert shapes == [(3, 4)]
    with ut.redirect(net, {"first": told}):
        jax.vmap(jax.grad(lambda x: net(x).sum()))(X)  # each sample's gradient by itself
    assert shapes[1:] == [(1, 4)]


def test_noise_is_another_for_another_gradient():
    noise = ut.redirect.noise(0.5, seed=1)
    g = jnp.zeros((400, 50))
    first, again, other = noise(g), ut.redirect.noise(0.5, seed=1)(g), noise(g + 1) - (g + 1)
    assert np.array_equal(first, again)
    assert abs(float(first.std()) - 0.5) < 0.01
    assert abs(np.corrcoef(np.ravel(first), np.ravel(other))[0, 1]) < 0.05


def test_under_scan_and_remat():
    net = row()

    def looped(x):
        step = jax.checkpoint(lambda h, _: (jnp.tanh(jax.vmap(net.first)(h)), None))
        return jax.lax.scan(step, x, None, length=2)[0].sum()

    with ut.redirect(net, {"first": ut.redirect.scale(3)}):
        found = jax.grad(looped)(X)
    close(found, 9 * jax.grad(looped)(X))


def test_what_redirect_refuses():
    net = row()
    for sites, words in [
        ({}, "sites is empty"),
        ({"frist": abs}, "did you mean first"),
        ({"first": 1}, "not a function"),
    ]:
        with pytest.raises(ut.InputError, match=words):
            ut.redirect(net, sites)
    with pytest.raises(ut.InputError, match="a function has none"):
        ut.redirect(jax.jit(lambda x: x), {"a": abs})
    with pytest.raises(ut.InputError, match="where the gradient is"), ut.redirect(net, {"first": lambda g: g[:1]}):
        jax.grad(lambda x: jax.vmap(net)(x).sum())(X)
    with pytest.raises(ut.RuleError, match="no gradient came back"), ut.redirect(net, {"first": abs}):
        jax.vmap(net)(X)


def test_a_module_is_a_place_by_its_path():
    net = mlp()
    for at, wanted in [("norm", net.norm(net.first(X))), ("first@1", None)]:
        a = ut.explain(net, X, at=at, rule="gradient", target=1)
        assert a.values.shape == (3, 4)
        if wanted is not None:
            by = jax.grad(lambda h: second(net, jax.nn.relu(h)))(wanted)
            close(a.values, by)


def second(net, h):
    return (net.last(h + jnp.tanh(net.first(h))) * net.gain)[:, 1].sum()
