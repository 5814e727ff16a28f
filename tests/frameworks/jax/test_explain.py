"""What an explanation in JAX takes, tells and refuses."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import undertow as ut
from frameworks.jax import twins
from undertow.frameworks.jax.explain import program

NUMBERS = np.random.default_rng(5)
X = jnp.asarray(NUMBERS.normal(size=(2, 4)), jnp.float32)
W = jnp.asarray(NUMBERS.normal(size=(4, 4)), jnp.float32)
STACK = jnp.asarray(NUMBERS.normal(size=(3, 4, 4)), jnp.float32)


def scanned(activation, x):
    return jax.lax.scan(lambda h, w: (activation(h @ w), None), x, STACK)[0] @ W


def loop(activation, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: activation(h @ W), x) @ W


def branches(activation, x):
    return jax.lax.cond(x.sum() < 99, lambda h: activation(h @ W), lambda h: activation(h) @ W, x) @ W


def rematerialised(activation, x):
    return jax.checkpoint(lambda h: activation(h @ W) @ W)(x)


def nested(activation, x):
    inner = jax.checkpoint(jax.jit(lambda h: jax.vmap(lambda row: activation(row @ W))(h)))
    return jax.lax.scan(lambda h, _: (inner(h), None), x, None, length=2)[0] @ W


def jitted(activation, x):
    return jax.jit(jax.jit(lambda h: activation(h @ W)), donate_argnums=0)(x * 1) @ W


def mapped(activation, x):
    return jax.vmap(lambda row: activation(row @ W) @ W)(x)


AROUND = {scanned: 3, loop: 3, branches: 2, rematerialised: 1, nested: 2, jitted: 1, mapped: 1}


@pytest.mark.parametrize("network", AROUND)
def test_activations_inside_transformations(network):
    for spelling, rule in [(jax.nn.relu, "guided"), (lambda x: jnp.maximum(x, 0), "deconvnet")]:
        a = ut.explain(functools.partial(network, spelling), X, rule=rule, target=1)
        swap = twins.swap(spelling, twins.above, rule)
        wanted = jax.grad(lambda x, swap=swap: network(swap, x)[:, 1].sum())(X)
        assert np.abs(a.values - wanted).max() <= 2e-6 * np.abs(wanted).max()
        assert (a.rewired, a.skipped) == (AROUND[network], {})


def test_a_constant_of_a_loop_may_be_the_zero():
    zeros = jnp.zeros(4)
    a = ut.explain(functools.partial(scanned, lambda x: jnp.maximum(x, zeros)), X, target=1)
    wanted = jax.grad(lambda x: scanned(twins.swap(jax.nn.relu, twins.above, "guided"), x)[:, 1].sum())(X)
    assert np.abs(a.values - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_a_rule_may_capture_an_array():
    factor = jnp.arange(4.0)
    network = functools.partial(branches, jax.nn.relu)
    a = ut.explain(network, X, rule=lambda g, local: local(g * factor), target=1)
    swap = jax.custom_vjp(jax.nn.relu)
    swap.defvjp(lambda x: (jax.nn.relu(x), x), lambda x, g: (g * factor * (x > 0),))
    assert np.allclose(a.values, jax.grad(lambda x: branches(swap, x)[:, 1].sum())(X), atol=1e-5)


@jax.custom_vjp
def block(x):
    return jax.nn.relu(x @ W) @ W


block.defvjp(lambda x: (block(x), None), lambda _, g: (g,))


@jax.custom_vjp
def scaled(x):
    return x * 2


scaled.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))


def while_loop(x):
    return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: jax.nn.relu(h) * 2 + 1, x)


def callback(x):
    return jax.nn.relu(jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x))


def kernel(x):
    from jax.experimental import pallas

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.nn.relu(pallas.pallas_call(copy, shape, interpret=True)(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (while_loop, "no gradient passes while: JAX has no gradient of a while loop"),
        (callback, "no gradient passes pure_callback: a callback runs Python that no jaxpr shows"),
        (kernel, r"rule 'guided' cannot see into pallas_call.*a kernel keeps its operations to itself"),
        (lambda x: block(x), "cannot see into custom_vjp_call.*its derivative is its own, and activations are in it"),
        (lambda x: x @ W, r"found no activation to rewire .*\(met: none\); rule='gradient' needs none"),
        (lambda x: jax.nn.gelu(x), r"met: gelu x1\); activations='all' takes the smooth ones too"),
    ],
)
def test_what_cannot_be_seen_into_is_refused_by_name(model, message):
    with pytest.raises(ut.RuleError, match=message):
        ut.explain(model, X, target=1)


def test_a_function_with_its_own_derivative_is_listed():
    with pytest.warns(ut.UndertowWarning, match="left alone on the way.*scaled x1"):
        a = ut.explain(lambda x: jax.nn.relu(scaled(x)), X, target=1)
    assert (a.rewired, a.opaque) == (1, {"scaled": 1})


def test_other_ways_are_refused():
    for options in ({"through": "swap"}, {"through": "hook"}, {"rule": "attnlrp", "through": "swap"}):
        with pytest.raises(ut.RuleError, match="PyTorch"):
            ut.explain(jax.nn.relu, X, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: jax.lax.stop_gradient(x) @ W, "does not reach input 0: it ends at stop_gradient"),
        (lambda x: jnp.round(x) @ W, "does not reach input 0: it ends at round"),
        (lambda x: jnp.ones((2, 3)) * W[0, 0], "input 0 does not influence the scores; bind it"),
    ],
)
def test_a_gradient_that_is_cut_is_told(model, message):
    for rule in ("gradient", "guided"):
        with pytest.raises(ut.InputError, match=message):
            ut.explain(model, X, rule=rule, target=1)


def test_a_named_scope_says_where_a_gradient_is_cut():
    def network(x):
        with jax.named_scope("head"):
            return jax.lax.stop_gradient(x) @ W

    with pytest.raises(ut.InputError, match="ends at stop_gradient in 'head'"):
        ut.explain(network, X, rule="gradient", target=1)


def test_a_gradient_of_nan_is_named():
    def network(x):
        return jax.nn.relu(x) @ W + jnp.sqrt(x - x)

    for rule in ("gradient", "guided"):
        with pytest.raises(ut.ModelError, match=r"finite and their gradient is NaN, first at sub|first at sqrt"):
            ut.explain(network, X, rule=rule, target=1)
    with pytest.raises(ut.ModelError, match="the score of sample 1 is nan"):
        ut.explain(lambda x: x @ W, X.at[1, 0].set(jnp.nan), rule="gradient", target=1)


def test_random_numbers_and_batch_statistics_are_refused():
    def dropout(x):
        return jax.nn.relu(jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x / 0.5, 0))

    def norm(x):
        return jax.nn.relu((x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5))

    def layer_norm(x):
        return jax.nn.relu((x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-5))

    for model, name in [(dropout, "random numbers"), (norm, "batch norm in training")]:
        with pytest.raises(ut.ModelError, match=f"since these acted: {name} x1; call the model as it predicts"):
            ut.explain(model, X, target=1)
        assert ut.explain(model, X, target=1, training=True).acting == {name: 1}
    assert ut.explain(layer_norm, X, target=1).acting == {}


def network(x):
    return jax.nn.relu(x @ W) @ W


def test_targets():
    wanted = [jax.grad(lambda x, c=c: network(x)[:, c].sum())(X) for c in range(4)]
    several = ut.explain(network, X, rule="gradient", target=[[0, 3], [2, 1]])
    assert several.values.shape == (2, 2, 4)
    assert np.allclose(several.values[0], [wanted[0][0], wanted[3][0]], atol=1e-6)
    assert np.allclose(several.values[1], [wanted[2][1], wanted[1][1]], atol=1e-6)
    predicted = network(X).argmax(1)
    assert np.array_equal(ut.explain(network, X).targets, predicted)
    top = ut.explain(network, X, rule="gradient", target="top:2")
    assert np.array_equal(top.targets, jnp.argsort(-network(X), 1)[:, :2])
    assert np.array_equal(ut.explain(network, X, target=np.eye(4)[[1, 2]]).targets, [1, 2])
    function = ut.explain(network, X, rule="gradient", target=lambda output: output[:, 0] - output[:, 3])
    assert np.allclose(function.values, wanted[0] - wanted[3], atol=1e-5)
    assert function.targets is None
    for target, message in [(4, "classes 0 to 3"), ("best", "'top:K'"), (lambda o: o, "one score for each sample")]:
        with pytest.raises(ut.TargetError, match=message):
            ut.explain(network, X, target=target)


def test_targets_in_dense_scores():
    def dense(x):
        return jax.nn.relu(x)[:, None, :] * jnp.arange(1.0, 4.0)[:, None]  # (B, 3, 4)

    place = ut.explain(dense, X, rule="gradient", target=(2, 1))
    assert np.array_equal(place.values, jnp.where((X > 0) & (jnp.arange(4) == 1), 3.0, 0.0))
    region = ut.explain(dense, X, rule="gradient", target=ut.targets.where(np.array([1, 0, 0, 1]), 1))
    assert np.array_equal(region.values, jnp.where((X > 0) & (jnp.arange(4) % 3 == 0), 2.0, 0.0))
    token = ut.explain(lambda x: dense(x).transpose(0, 2, 1), X, rule="gradient", target=ut.targets.token(0, 2))
    assert np.array_equal(token.values, jnp.where((X > 0) & (jnp.arange(4) == 2), 1.0, 0.0))


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (jax.nn.softmax, "softmax"),
        (jax.nn.log_softmax, "log-softmax"),
        (jax.nn.sigmoid, "sigmoid"),
        (lambda s: jnp.log(jax.nn.softmax(s)), "softmax"),
        (lambda s: jnp.exp(s) / jnp.exp(s).sum(-1, keepdims=True), "softmax"),
        (jax.vmap(jax.jit(jax.nn.softmax)), "softmax"),
    ],
)
def test_a_class_means_the_score_before_a_head(head, name):
    a = ut.explain(lambda x: head(network(x)), X, target=1)
    assert a.head == f"before {name}"
    assert np.array_equal(a.values, ut.explain(network, X, target=1).values)
    as_is = ut.explain(lambda x: head(network(x)), X, target=1, rule="gradient", head="as is")
    assert np.allclose(as_is.values, jax.grad(lambda x: head(network(x))[:, 1].sum())(X), atol=1e-6)
    assert ut.explain(lambda x: jax.nn.softmax(network(x), axis=0), X, target=1).head == "as is"


def test_inputs_in_structures():
    def two(image, *, mask=None):
        return {"logits": network(image * mask["weights"]), "hidden": image}

    ones = jnp.ones_like(X)
    a = ut.explain(two, {"image": X, "mask": {"weights": ones, "ids": jnp.arange(2)}}, target=1)
    assert np.array_equal(a.values["image"], ut.explain(network, X, target=1).values)
    assert a.values["mask"]["ids"] is None
    pair = ut.explain(lambda x, y: (network(x) + y, x), (X, ones), target=1, rule="gradient", output=0)
    assert np.array_equal(pair.values[1], jnp.eye(4)[jnp.array([1, 1])])
    hidden = ut.explain(two, {"image": X, "mask": {"weights": ones}}, target=1, rule="gradient", output="hidden")
    assert np.array_equal(hidden.values["image"], jnp.eye(4)[jnp.array([1, 1])])
    with pytest.raises(ut.ModelError, match="no part 'score'"):
        ut.explain(two, {"image": X, "mask": {"weights": ones}}, output="score")
    with pytest.raises(ut.InputError, match="input 0 does not influence"):
        ut.explain(lambda x, y: network(y), (X, ones))


def test_estimators():
    x = X[:1]
    smooth = ut.explain(network, x, estimator="smoothgrad:3", target=1, rule="gradient")
    generator, width = np.random.default_rng(0), float(x.max() - x.min())
    points = [x + (generator.standard_normal(x.shape) * 0.1 * width).astype(np.float32) for _ in range(3)]
    wanted = np.mean([jax.grad(lambda x: network(x)[:, 1].sum())(p) for p in points], 0)
    assert np.allclose(smooth.values, wanted, atol=1e-6)
    integrated = ut.explain(network, x, estimator="integrated:64", target=1, rule="gradient")
    assert np.abs(integrated.completeness) < 0.05
    times = ut.explain(network, x, estimator="input-times", target=1, rule="gradient")
    assert np.allclose(times.values, x * jax.grad(lambda x: network(x)[:, 1].sum())(x), atol=1e-6)


def test_numpy_in_numpy_out():
    a = ut.explain(jax.jit(network), np.asarray(X), target=1)
    assert isinstance(a.values, np.ndarray)
    assert np.array_equal(a.values, ut.explain(network, X, target=1).values)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.arange(4), "a map needs floating point"),
        (X + 1j, "complex"),
        ((X, X[:1]), r"input 1 has shape \(1, 4\); every input needs the same first"),
    ],
)
def test_inputs_that_cannot_be_explained(x, message):
    with pytest.raises(ut.InputError, match=message):
        ut.explain(lambda x, y=0: network(x + y), x)
    with pytest.raises(ut.InputError, match="traced: explain outside"):
        jax.jit(lambda x: ut.explain(network, x).values)(X)


def test_a_sample_without_a_batch_axis_is_recognised():
    image = jnp.ones((5, 6, 3))
    with pytest.raises(ut.InputError, match=r"pass x\[None\]"):
        ut.explain(lambda x: jax.nn.relu(x.mean((-3, -2))), image)


def test_a_plain_function_sees_new_values_of_what_it_captured():
    weights = {"w": W}

    def closed(x):
        return jax.nn.relu(x @ weights["w"]) @ W

    first = ut.explain(closed, X, target=1).values
    weights["w"] = -W
    second = ut.explain(closed, X, target=1).values
    assert not np.allclose(first, second)
    assert np.array_equal(second, ut.explain(lambda x: jax.nn.relu(x @ -W) @ W, X, target=1).values)


def test_a_jitted_function_is_traced_and_compiled_once_and_forgotten_with_it():
    count = []

    @jax.jit
    def counted(params, x):
        count.append(1)
        return jax.nn.relu(x @ params["w"]) @ W

    before = len(program.cache)
    maps = {}
    for rule in ("guided", "deconvnet", "guided"):
        for w in (W, -W):
            maps[rule, float(w[0, 0])] = ut.explain(functools.partial(counted, {"w": w}), X, rule=rule, target=1).values
    assert len(count) == 1
    assert len(program.cache) == before + 1
    assert not np.allclose(maps["guided", float(W[0, 0])], maps["guided", float(-W[0, 0])])
    del counted
    assert len(program.cache) == before


def test_threads_do_not_meet():
    rules, maps = ("guided", "deconvnet", "gradient"), {}
    function = jax.jit(network)

    def work(rule):
        maps[rule] = ut.explain(function, X, rule=rule, target=1).values

    threads = [threading.Thread(target=work, args=(rule,)) for rule in rules]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for rule in rules:
        assert np.array_equal(maps[rule], ut.explain(network, X, rule=rule, target=1).values)


def test_named_places():
    def named(x):
        with jax.named_scope("block"):
            x = jax.nn.relu(x @ W)
        x = checkpoint_name(x @ W, "middle")
        return jax.checkpoint(lambda h: checkpoint_name(jax.nn.relu(h), "inside") @ W)(x)

    middle = jax.nn.relu(X @ W) @ W
    a = ut.explain(named, X, at=["block", "middle"], target=1)
    tail = twins.swap(jax.nn.relu, twins.above, "guided")
    wanted = jax.grad(lambda h: (tail(h) @ W)[:, 1].sum())(middle)
    assert np.allclose(a.values["middle"], wanted, atol=1e-6)
    assert np.allclose(a.values["block"], wanted @ W.T, atol=1e-6)
    inside = ut.explain(named, X, at="inside", target=1, rule="gradient")
    assert np.allclose(inside.values, jnp.broadcast_to(W[:, 1], (2, 4)), atol=1e-6)
    function = ut.explain(named, X, at="middle", target=lambda output: output[:, 1])
    assert np.allclose(function.values, wanted, atol=1e-6)
    with pytest.raises(ut.InputError, match=r"no layer 'midle'.*did you mean middle\?"):
        ut.explain(named, X, at="midle")
    with pytest.raises(ut.InputError, match="'here' is inside a loop"):
        ut.explain(functools.partial(scanned, lambda h: checkpoint_name(jax.nn.relu(h), "here")), X, at="here")


def test_a_place_that_runs_twice():
    def twice(x):
        for _ in range(2):
            x = checkpoint_name(jax.nn.relu(x @ W), "step")
        return x @ W

    a = ut.explain(twice, X, at="step", target=1, rule="gradient")
    assert list(a.values) == ["step", "step@1"]
    second = ut.explain(twice, X, at="step@1", target=1, rule="gradient")
    assert np.array_equal(second.values, a.values["step@1"])


def test_grad_cam_of_a_named_place():
    kernel = jnp.asarray(NUMBERS.normal(size=(3, 3, 3, 4)), jnp.float32)
    images = jnp.asarray(NUMBERS.normal(size=(2, 8, 8, 3)), jnp.float32)

    def network(x):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = checkpoint_name(jax.nn.relu(x), "features")
        return x.mean((1, 2)) @ W

    cam = ut.explain(network, images, estimator="grad-cam:features", target=1, rule="gradient")
    conv = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    wanted = jnp.maximum((jax.nn.relu(conv) * W[:, 1] / 64).sum(-1), 0)
    assert np.allclose(np.squeeze(cam.numpy()), wanted, atol=1e-6)
