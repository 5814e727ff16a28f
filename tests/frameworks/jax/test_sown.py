"""Values that Flax's modules name by `perturb` and `sow`, recorded beside functions split by hand where these are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import undertow as ut
from undertow.errors import InputError

NUMBERS = np.random.default_rng(7)
X = NUMBERS.normal(size=(2, 5))


class Block(linen.Module):
    """Both names are of one value that is read twice, the first time before it is sown."""

    @linen.compact
    def __call__(self, x):
        h = self.perturb("h", jnp.sin(linen.Dense(4, param_dtype=jnp.float64)(x)))
        squared = jnp.square(h)
        self.sow("intermediates", "s", squared)
        self.sow("intermediates", "aside", squared.mean())
        return jnp.tanh(squared) + squared[:, ::-1]


class Net(linen.Module):
    wrapped: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(Block) if self.wrapped else Block
        x = block(name="block")(x)
        return self.perturb("top", linen.Dense(3, param_dtype=jnp.float64)(x))


class Cell(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        h = self.perturb("h", jnp.sin(self.dense(x)))
        squared = jnp.square(h)
        self.sow(nnx.Intermediate, "s", squared)
        self.sow(nnx.Intermediate, name="aside", value=squared.mean())
        return jnp.tanh(squared) + squared[:, ::-1]


class Cells(nnx.Module):
    def __init__(self, rngs):
        self.block = Cell(rngs)
        self.Dense_0 = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.perturb("top", self.Dense_0(self.block(x)))


def after_h(h, params):
    return after_s(jnp.square(h), params)


def after_s(squared, params):
    return after_block(jnp.tanh(squared) + squared[:, ::-1], params)


def after_block(block, params):
    return after_top(block @ params["kernel"] + params["bias"], params)


def after_top(top, params):
    return (jnp.cos(top) * jnp.arange(3.0)).sum()


def wanted(inner, outer, x):
    """Return for each name the value, and the gradient of the function after it."""
    h = jnp.sin(x @ inner["kernel"] + inner["bias"])
    s = jnp.square(h)
    block = jnp.tanh(s) + s[:, ::-1]
    top = block @ outer["kernel"] + outer["bias"]
    values = {
        "block.h": (h, after_h),
        "block.s": (s, after_s),
        "block": (block, after_block),
        "top": (top, after_top),
    }
    return {name: (value, jax.grad(after)(value, outer)) for name, (value, after) in values.items()}


def assert_seen(seen, expected):
    assert {place.site for place in seen.places} == set(expected)
    for place, value, gradient in zip(seen.places, seen.values, seen.gradients, strict=True):
        for found, own in zip((value, gradient), expected[place.site], strict=True):
            np.testing.assert_allclose(found, own, rtol=0, atol=1e-12 * np.abs(own).max())


@pytest.fixture
def x():
    with jax.enable_x64():
        yield jnp.asarray(X)


def linen_net(x, **kwargs):
    net = Net(**kwargs)
    variables = net.init(jax.random.key(0), x)
    _, sown = net.apply(variables, x, mutable="intermediates")
    return net, {**variables, **sown}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "remat"])
def test_linen(tmp_path, x, wrapped):
    net, variables = linen_net(x, wrapped=wrapped)
    params = variables["params"]

    def loss(params, x):
        return after_top(net.apply({"params": params}, x), params)

    def sown_loss(params, x):
        y, state = net.apply({"params": params}, x, mutable="intermediates")
        return after_top(y, params), state

    expected = wanted(params["block"]["Dense_0"], params["Dense_0"], x)
    with ut.record(tmp_path, (net, variables), sites="block.h, block.s, block, top", phase="both") as recording:
        with recording.batch():
            value, gradients, seen = jax.jit(recording.value_and_grad(loss))(params, x)
            recording.add(seen)
        _, state = jax.value_and_grad(sown_loss, has_aux=True)(params, x)[0]
        (_, own), _, again = jax.jit(recording.value_and_grad(sown_loss, has_aux=True))(params, x)
    assert_seen(seen, expected)
    assert_seen(again, expected)
    assert value == pytest.approx(float(loss(params, x)), rel=1e-12)
    jax.tree.map(np.testing.assert_allclose, gradients, jax.grad(loss)(params, x))
    jax.tree.map(np.testing.assert_allclose, own, state)  # what the loss itself makes of what it sowed
    assert ut.Run(tmp_path).sites == ["block.h", "block.s", "block", "top"]
    assert "perturb" not in vars(net)


def test_the_users_own_perturbations_of_linen(tmp_path, x):
    net, variables = linen_net(x)
    params = variables["params"]

    def loss(params, perturbations, x):
        return after_top(net.apply({"params": params, "perturbations": perturbations}, x), params)

    expected = wanted(params["block"]["Dense_0"], params["Dense_0"], x)
    with ut.record(tmp_path, (net, variables), sites="perturb") as recording, recording.batch():
        _, (_, own), seen = recording.value_and_grad(loss, argnums=(0, 1))(params, variables["perturbations"], x)
        recording.add(seen)
    assert np.abs(own["block"]["h"] - expected["block.h"][1]).max() <= 1e-12
    assert np.abs(seen.gradients[0] - expected["block.h"][1]).max() <= 1e-12


def test_nnx(tmp_path, x):
    net = Cells(nnx.Rngs(0))
    params = {name: getattr(net.Dense_0, name)[...] for name in ("kernel", "bias")}
    inner = {name: getattr(net.block.dense, name)[...] for name in ("kernel", "bias")}
    expected = wanted(inner, params, x)

    def loss(net, x):
        y, own = nnx.capture(net, nnx.Intermediate)(x)
        return after_top(y, None), own

    with ut.record(tmp_path, net, sites="block.h, block.s, block, top", phase="both") as recording, recording.batch():
        (_, own), _, seen = nnx.jit(recording.value_and_grad(loss, has_aux=True))(net, x)
        recording.add(seen)
    assert_seen(seen, expected)
    np.testing.assert_allclose(own["block"]["s"][0], expected["block.s"][0], rtol=1e-12)
    assert type(net) is Cells
    assert type(net.block) is Cell
    assert ut.Run(tmp_path).sites == ["block.h", "block.s", "block", "top"]


@pytest.mark.filterwarnings("ignore:[^.]*Using .Module:DeprecationWarning")
def test_nnx_without_capture_and_with_its_modules_as_sites(tmp_path, x):
    net = Cells(nnx.Rngs(0))

    def recorded(sites):
        with ut.record(tmp_path, net, sites=sites, phase="both") as recording, recording.batch():
            _, _, seen = nnx.jit(recording.value_and_grad(lambda net, x: net(x).sum()))(net, x)
            recording.add(seen)
        return seen

    with pytest.warns(UserWarning, match="block.aside: no gradient reached its output"):  # nothing reads it
        seen = recorded("block, block.*, Dense_0, top")
    sites = {place.site: i for i, place in enumerate(seen.places)}
    assert set(sites) == {"block", "block.dense", "Dense_0", "block.h", "block.s", "block.aside", "top"}
    assert seen.gradients[sites["block.aside"]] is None
    # one value of two names
    assert np.array_equal(seen.gradients[sites["top"]], seen.gradients[sites["Dense_0"]])


class Step(linen.Module):
    """A step of a scan, which sows what it makes, or what it is given."""

    given: bool = False

    @linen.compact
    def __call__(self, h, _):
        before = h
        h = self.perturb("p", jnp.tanh(linen.Dense(5, param_dtype=jnp.float64)(h)))
        self.sow("intermediates", "s", before if self.given else h)
        return h, None


class Steps(linen.Module):
    given: bool = False

    @linen.compact
    def __call__(self, x):
        axes = {"intermediates": 0, "perturbations": 0}
        scan = linen.scan(Step, variable_axes=axes, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return scan(self.given, name="steps")(x, None)[0]


def scanned(x, **kwargs):
    net = Steps(**kwargs)
    variables = net.init(jax.random.key(0), x)
    _, sown = net.apply(variables, x, mutable="intermediates")
    return net, {**variables, **sown}


def test_the_steps_of_a_scan(tmp_path, x):
    net, variables = scanned(x)
    kernel = variables["params"]["steps"]["Dense_0"]["kernel"]

    def loss(params, x):
        return net.apply({"params": params}, x).sum()

    with ut.record(tmp_path, (net, variables), sites="steps.p, steps.s", phase="both") as recording, recording.batch():
        _, _, seen = jax.jit(recording.value_and_grad(loss))(variables["params"], x)
        recording.add(seen)
    assert [place.site for place in seen.places] == ["steps.p", "steps.s"]
    h = x
    for i in range(3):
        h = jnp.tanh(h @ kernel)

        def after(h, left=2 - i):
            for _ in range(left):
                h = jnp.tanh(h @ kernel)
            return h.sum()

        for values, gradients in zip(seen.values, seen.gradients, strict=True):
            np.testing.assert_allclose(values[i], h, atol=1e-12)
            np.testing.assert_allclose(gradients[i], jax.grad(after)(h), atol=1e-12)


def test_a_gradient_that_cannot_be_told_is_refused(tmp_path, x):
    net, variables = scanned(x, given=True)

    def loss(params, x):
        return net.apply({"params": params}, x).sum()

    with (
        pytest.raises(InputError, match=r"'steps.s' is sown in a loop .* write h = self.perturb\('s', h\)"),
        ut.record(tmp_path / "both", (net, variables), sites="steps.s", phase="both") as recording,
    ):
        recording.value_and_grad(loss)(variables["params"], x)
    with ut.record(tmp_path / "values", (net, variables), sites="steps.s", phase="forward") as recording:
        _, _, seen = recording.value_and_grad(loss)(variables["params"], x)
        with recording.batch():
            recording.add(seen)
    np.testing.assert_array_equal(seen.values[0][0], x)
