"""Every spelling of an activation against a network in which it is swapped by hand."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import undertow as ut
from frameworks.jax import twins

NUMBERS = np.random.default_rng(5)
X = jnp.asarray(NUMBERS.normal(size=(3, 5)), jnp.float32)
FIRST = jnp.asarray(NUMBERS.normal(size=(5, 6)) * 1.5, jnp.float32)
LAST = jnp.asarray(NUMBERS.normal(size=(6, 4)), jnp.float32)
GUIDED = twins.swap(jax.nn.relu, twins.above, "guided")


def side_by_side(activations):
    """Return one network in which each activation has an input of its own: one program to compile."""
    return lambda x: sum(f(x[:, i] @ FIRST) @ LAST for i, f in enumerate(activations))


def inputs(count):
    return jnp.asarray(np.random.default_rng(6).normal(size=(3, count, 5)), jnp.float32)


def worst(values, wanted, names):
    """Return the names of the activations whose maps differ."""
    difference = np.abs(np.asarray(values) - np.asarray(wanted)).max((0, 2))
    return [name for name, d, w in zip(names, difference, np.abs(wanted).max((0, 2)), strict=True) if d > 1e-6 * w]


@pytest.mark.parametrize("rule", twins.RULES)
def test_each_spelling_is_swapped(rule):
    functions, derivatives = zip(*twins.RELUS.values(), strict=True)
    swapped = [twins.swap(f, d, rule) for f, d in zip(functions, derivatives, strict=True)]
    x = inputs(len(functions))
    wanted = jax.jit(jax.grad(lambda x: side_by_side(swapped)(x)[:, 1].sum()))(x)
    a = ut.explain(side_by_side(functions), x, rule=rule, target=1)
    assert worst(a.values, wanted, twins.RELUS) == []
    assert (a.rewired, a.skipped) == (0 if rule == "gradient" else len(functions), {})


@pytest.mark.filterwarnings("ignore:guided. left alone")
def test_smooth_activations_are_swapped_with_all_and_listed_without():
    functions = list(twins.SMOOTH.values())
    swapped = [twins.swap(f, twins.derivative_of(f), "guided") for f in functions]
    x = inputs(len(functions))
    wanted = jax.jit(jax.grad(lambda x: side_by_side(swapped)(x)[:, 1].sum()))(x)
    a = ut.explain(side_by_side(functions), x, target=1, activations="all")
    assert worst(a.values, wanted, twins.SMOOTH) == []
    assert (a.rewired, a.skipped) == (len(functions), {})
    mixed = ut.explain(side_by_side([*functions, jax.nn.relu]), inputs(len(functions) + 1), target=1)
    names = Counter(re.match(r"quick gelu|\w+", name)[0] for name in twins.SMOOTH)
    assert (mixed.rewired, sum(mixed.skipped.values())) == (1, len(functions))
    assert mixed.skipped == {"silu": names.pop("quick gelu") + names.pop("silu"), **names}


@pytest.mark.filterwarnings("ignore:guided. left alone")
def test_other_functions_are_listed_and_left_alone():
    functions = [*twins.OTHER.values(), jax.nn.relu]
    a = ut.explain(side_by_side(functions), inputs(len(functions)), target=1, activations="all")
    assert (a.rewired, a.skipped) == (1, dict.fromkeys(twins.OTHER, 1))


def test_float64_and_bfloat16():
    with jax.enable_x64(True):
        x, first, last = (jnp.asarray(np.asarray(w), jnp.float64) for w in (X, FIRST, LAST))
        for rule in twins.RULES:
            wanted = jax.grad(
                lambda x, r=rule: (twins.swap(jax.nn.relu, twins.above, r)(x @ first) @ last)[:, 2].sum()
            )(x)
            a = ut.explain(lambda x: jax.nn.relu(x @ first) @ last, x, rule=rule, target=2)
            assert a.values.dtype == jnp.float64
            assert np.array_equal(a.values, wanted)
    half = [w.astype(jnp.bfloat16) for w in (X, FIRST, LAST)]
    a = ut.explain(lambda x: jnp.maximum(x @ half[1], 0) @ half[2], half[0], target=2)
    assert a.values.dtype == jnp.bfloat16
    assert a.numpy().dtype == np.float32
    wanted = jax.grad(lambda x: (GUIDED(x @ half[1]) @ half[2])[:, 2].sum())(half[0])
    assert np.abs(a.numpy() - wanted.astype(jnp.float32)).max() <= 0.02 * np.abs(a.numpy()).max()


@pytest.mark.parametrize("spelling", [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: x * (x > 0)])
def test_the_gradient_at_zero_is_jaxs_own(spelling):
    x = jnp.zeros((1, 3))
    for rule in (lambda g, local: local(g), "gradient"):
        a = ut.explain(lambda x: spelling(x) @ jnp.eye(3), x, rule=rule, target=0)
        assert np.array_equal(a.values, jax.grad(lambda x: spelling(x)[:, 0].sum())(x))


def test_a_norms_guard_is_no_activation():
    def normalised(x):
        variance = jnp.maximum(0.0, (x * x).mean(1, keepdims=True) - x.mean(1, keepdims=True) ** 2)
        return (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(variance + 1e-5)

    a = ut.explain(lambda x: jax.nn.relu(normalised(x @ FIRST)) @ LAST, X, target=1)
    wanted = jax.grad(lambda x: (GUIDED(normalised(x @ FIRST)) @ LAST)[:, 1].sum())(X)
    assert np.abs(a.values - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert (a.rewired, a.skipped) == (1, {"Maximum": 1})


def test_a_bound_by_another_number_is_none():
    a = ut.explain(lambda x: jax.nn.relu(jnp.maximum(x @ FIRST, 1e-6)) @ LAST, X, target=1)
    assert (a.rewired, a.skipped) == (1, {"Maximum": 1})


def test_what_somebody_else_reads_too_is_no_part():
    def network(x):
        positive = jnp.maximum(x @ FIRST, 0)
        return jnp.minimum(positive, 1.5) @ LAST + positive @ LAST

    swap = twins.swap(jax.nn.relu, twins.above, "deconvnet")
    wanted = jax.grad(lambda x: (jnp.minimum(h := swap(x @ FIRST), 1.5) @ LAST + h @ LAST)[:, 1].sum())(X)
    a = ut.explain(network, X, target=1, rule="deconvnet")
    assert np.abs(a.values - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert (a.rewired, a.skipped) == (1, {"Minimum": 1})


def test_a_users_function_with_the_name_of_a_smooth_one_is_read():
    @jax.jit
    def softplus(x):
        return jnp.maximum(x, 0) * 2

    assert ut.explain(lambda x: softplus(x @ FIRST) @ LAST, X, target=1).rewired == 1


def test_a_rule_of_ones_own():
    def network(activation):
        return lambda x: activation(x @ FIRST) @ LAST

    a = ut.explain(network(jax.nn.relu), X, rule=lambda g, local: local(jnp.abs(g)) * 2, target=1)
    swap = jax.custom_vjp(jax.nn.relu)
    swap.defvjp(lambda x: (jax.nn.relu(x), x), lambda x, g: (2 * jnp.abs(g) * (x > 0),))
    wanted = jax.grad(lambda x: network(swap)(x)[:, 1].sum())(X)
    assert np.allclose(a.values, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ut.RuleError, match=r"rule '<lambda>' returned \(6,\) float32 where the gradient is \(3, 6\)"):
        ut.explain(network(jax.nn.relu), X, rule=lambda g, local: g[0], target=1)
    with pytest.raises(ut.RuleError, match="gave local a float"):
        ut.explain(network(jax.nn.relu), X, rule=lambda g, local: local(1.0), target=1)
