"""What is recorded of networks in JAX, beside gradients of functions split by hand at the place."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from PIL import Image

import undertow as ut
from undertow import images
from undertow.recording.photographs import record_photographs

NUMBERS = np.random.default_rng(5)
X = jnp.asarray(NUMBERS.normal(size=(2, 6, 6, 3)), jnp.float32)
Y = jnp.asarray([1, 0])


def loss_of(scores, y):
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 4, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = jax.nn.relu(block(x))
        return self.head(self.norm(x).mean((1, 2)))


class Small(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(4, (3, 3))(x))
        return linen.Dense(3, name="head")(linen.relu(linen.Conv(4, (3, 3))(x)).mean((1, 2)))


class Plain(eqx.Module):
    convs: list
    head: eqx.nn.Linear

    def __call__(self, image):
        for conv in self.convs:
            image = jax.nn.relu(conv(image))
        return self.head(image.mean((1, 2)))


def nnx_loss(net, x, y):
    return loss_of(net(x), y)


def test_an_nnx_module_in_a_jitted_step(tmp_path):
    net, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    optimizer, other = (nnx.Optimizer(n, optax.sgd(0.1), wrt=nnx.Param) for n in (net, twin))
    kept, plainly = {}, {}
    with ut.record(
        tmp_path, net, sites="conv, params:head", measures=["channel-norm", "keep"], phase="both"
    ) as recording:
        value_and_grad = recording.value_and_grad(nnx_loss)

        @nnx.jit
        def step(net, optimizer, x, y):
            loss, gradients, seen = value_and_grad(net, x, y)
            optimizer.update(net, gradients)
            return loss, seen

        @nnx.jit
        def plain(net, optimizer, x, y):
            loss, gradients = nnx.value_and_grad(nnx_loss)(net, x, y)
            optimizer.update(net, gradients)
            return loss, gradients

        for batch in range(2):
            with recording.batch(samples=["a", "b"]):
                loss, seen = step(net, optimizer, X, Y)
                recording.add(seen)
            kept[batch] = seen
            wanted, plainly[batch] = plain(twin, other, X, Y)
            assert np.allclose(loss, wanted, rtol=1e-6)
    # the training went on as it would have, the statistics of the norm too
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *map(nnx.state, (net, twin)))
    assert type(net.head) is nnx.Linear
    assert "undertow_sites" not in vars(net.head)
    assert ut.Run(tmp_path).sites == ["blocks.0", "blocks.1"]
    found = ut.Run(tmp_path).table("channel_norm").to_pylist()
    for sample, name in enumerate("ab"):
        for phase, arrays in (("forward", kept[0].values), ("backward", kept[0].gradients)):
            (row,) = (
                r for r in found if (r["batch"], r["site"], r["phase"], r["name"]) == (0, "blocks.1", phase, name)
            )
            assert np.allclose(row["values"], np.linalg.norm(np.asarray(arrays[1][sample]).reshape(-1, 4), axis=0))
    (kernel,) = (r for r in found if r["site"] == "head.kernel" and r["batch"] == 0)
    gradient = plainly[0]["head"]["kernel"][...]
    assert kernel["phase"] == "gradient"
    assert np.allclose(kernel["values"], np.linalg.norm(gradient, axis=1), atol=1e-6)


def test_gradients_are_those_of_a_split_function(tmp_path):
    with jax.enable_x64():
        net = Net(nnx.Rngs(0))
        nnx.update(net, jax.tree.map(lambda a: a.astype(jnp.float64), nnx.state(net)))
        for module in (*net.blocks, net.norm, net.head):
            module.dtype = module.param_dtype = jnp.float64
        net.eval()
        x = jnp.asarray(NUMBERS.normal(size=(2, 6, 6, 3)))

        def second(h):
            h = net.blocks[1](jax.nn.relu(h))
            return loss_of(net.head(net.norm(jax.nn.relu(h)).mean((1, 2))), Y)

        with ut.record(tmp_path, net, sites="conv") as recording:
            loss, _, seen = nnx.jit(recording.value_and_grad(nnx_loss))(net, x, Y)
            with recording.batch():
                recording.add(seen)
        h = net.blocks[0](x)
        value, wanted = jax.jit(jax.value_and_grad(second))(h)
        assert np.abs(seen.gradients[0] - wanted).max() <= 1e-12 * np.abs(wanted).max()
        assert float(loss) == pytest.approx(float(value), rel=1e-12)


def test_a_linen_module_and_its_variables(tmp_path):
    net = Small()
    variables = net.init(jax.random.key(0), X)

    def loss(params, x, y):
        return loss_of(net.apply({"params": params}, x), y), jnp.ones(3)

    with ut.record(tmp_path, (net, variables), sites="conv[-1], params:head") as recording:
        step = jax.jit(recording.value_and_grad(loss, has_aux=True))
        with recording.batch(samples=["a", "b"]):
            (value, aux), gradients, seen = step(variables["params"], X, Y)
            recording.add(seen)
    wanted, plain = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], X, Y)
    assert np.allclose(value, wanted[0])
    assert aux.shape == (3,)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, plain)
    assert ut.Run(tmp_path).sites == ["Conv_1"]
    assert {r["site"] for r in ut.Run(tmp_path).table("channel_norm").to_pylist()} == {
        "Conv_1",
        "head.bias",
        "head.kernel",
    }


def plain_net():
    keys = jax.random.split(jax.random.key(0), 3)
    convs = [eqx.nn.Conv2d(3, 4, 3, key=keys[0]), eqx.nn.Conv2d(4, 4, 3, key=keys[1])]
    return Plain(convs, eqx.nn.Linear(4, 3, key=keys[2]))


def eqx_loss(net, x, y):
    return loss_of(jax.vmap(net)(x), y)


def test_an_equinox_module_mapped_over_the_batch(tmp_path):
    net, x = plain_net(), jnp.moveaxis(X, -1, 1)
    with ut.record(tmp_path, net, sites="conv, head") as recording:
        step = eqx.filter_jit(recording.value_and_grad(eqx_loss))
        with recording.batch(samples=["a", "b"]):
            loss, gradients, seen = step(net, x, Y)
            recording.add(seen)
    wanted, plain = eqx.filter_jit(eqx.filter_value_and_grad(eqx_loss))(net, x, Y)
    assert np.allclose(loss, wanted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradients, plain)
    run = ut.Run(tmp_path)
    assert run.sites == ["convs.0", "convs.1", "head"]
    assert run.manifest["sites"]["axes"] == {"convs.0": {"": "bc--"}, "convs.1": {"": "bc--"}, "head": {"": "bc"}}

    def second(h):
        return loss_of(jax.vmap(lambda h: net.head(jax.nn.relu(net.convs[1](jax.nn.relu(h))).mean((1, 2))))(h), Y)

    by = jax.jit(jax.grad(second))(jax.vmap(net.convs[0])(x))
    (row,) = (r for r in run.table("channel_norm").to_pylist() if (r["site"], r["name"]) == ("convs.0", "b"))
    assert np.allclose(row["values"], np.linalg.norm(by[1].reshape(4, -1), axis=1), rtol=1e-5)
    assert type(net.convs[0]) is eqx.nn.Conv2d


# --- functions, and what is around a place

W = jnp.asarray(NUMBERS.normal(size=(3, 4, 4)), jnp.float32)
V = jnp.asarray(NUMBERS.normal(size=(2, 4)), jnp.float32)


def marked(h):
    return checkpoint_name(h, "hidden")


def straight(v):
    return jnp.square(marked(v @ W[0])).sum()


def scanned(v):
    return jnp.square(jax.lax.scan(lambda h, w: (marked(jnp.tanh(h @ w)), None), v, W)[0]).sum()


def backwards(v):
    return jnp.square(jax.lax.scan(lambda h, w: (marked(jnp.tanh(h @ w)), None), v, W, reverse=True)[0]).sum()


def rematerialised(v):
    return jnp.square(jax.checkpoint(lambda h: marked(jnp.tanh(h @ W[0])) @ W[1])(v)).sum()


def jitted(v):
    return jnp.square(jax.jit(lambda h: marked(h @ W[0]))(v)).sum()


def steps(v, order=(0, 1, 2)):
    """The values and gradients at each step of the loop, by hand."""
    values, h = [], v
    for i in order:
        h = jnp.tanh(h @ W[i])
        values.append(h)

    def rest(n, h):
        for i in order[n + 1 :]:
            h = jnp.tanh(h @ W[i])
        return jnp.square(h).sum()

    return values, [jax.grad(functools.partial(rest, n))(h) for n, h in enumerate(values)]


def recorded(folder, loss, *arguments, **options):
    options = {"sites": "hidden", "phase": "both", "measures": ["channel-norm"], **options}
    with ut.record(folder, jax.jit(loss).trace(*arguments), **options) as recording:
        value, gradients, seen = jax.jit(recording.value_and_grad(loss))(*arguments)
        with recording.batch(samples=["a", "b"]):
            recording.add(seen)
    assert np.allclose(value, loss(*arguments), rtol=1e-6)
    assert np.allclose(gradients, jax.grad(loss)(*arguments), rtol=1e-5)
    table = ut.Run(folder).table("channel_norm").to_pylist()
    return {(r["phase"], r["call"], r["name"]): np.asarray(r["values"]) for r in table}


@pytest.mark.parametrize("loss", [straight, jitted, rematerialised])
def test_a_place_in_a_function(tmp_path, loss):
    found = recorded(tmp_path, loss, V)
    h = jnp.tanh(V @ W[0]) if loss is rematerialised else V @ W[0]
    rest = (lambda h: jnp.square(h @ W[1]).sum()) if loss is rematerialised else lambda h: jnp.square(h).sum()
    for sample, name in enumerate("ab"):
        assert np.allclose(found["forward", 0, name], np.abs(h[sample]), rtol=1e-5)
        assert np.allclose(found["backward", 0, name], np.abs(jax.grad(rest)(h)[sample]), rtol=1e-5)


@pytest.mark.parametrize(("loss", "order"), [(scanned, (0, 1, 2)), (backwards, (2, 1, 0))])
def test_a_place_in_a_loop_has_a_call_for_each_step(tmp_path, loss, order):
    found = recorded(tmp_path, loss, V)
    for call, (value, gradient) in enumerate(zip(*steps(V, order), strict=True)):
        assert np.allclose(found["forward", call, "b"], np.abs(value[1]), rtol=1e-4)
        assert np.allclose(found["backward", call, "b"], np.abs(gradient[1]), rtol=1e-4)


def test_what_leaves_a_named_scope(tmp_path):
    def loss(v):
        with jax.named_scope("block"):
            h = jnp.tanh(v @ W[0])
        return jnp.square(h @ W[1]).sum()

    found = recorded(tmp_path, loss, V, sites="block")
    wanted = jax.grad(lambda h: jnp.square(h @ W[1]).sum())(jnp.tanh(V @ W[0]))
    assert np.allclose(found["backward", 0, "a"], np.abs(wanted[0]), rtol=1e-5)


def test_several_passes_of_a_batch(tmp_path):
    with ut.record(tmp_path, jax.jit(straight).trace(V), sites="hidden") as recording:
        step = jax.jit(recording.value_and_grad(straight))
        with recording.batch(samples=list("abcd")):
            for factor in (1, 2):
                recording.add(step(V * factor)[2])
    found = {r["name"]: np.asarray(r["values"]) for r in ut.Run(tmp_path).table("channel_norm").to_pylist()}
    assert np.allclose(found["c"], 2 * found["a"])
    assert np.allclose(found["a"], np.abs(2 * (V @ W[0])[0]), rtol=1e-5)


def in_branch(v):
    return jax.lax.cond(v.sum() < 99, lambda h: marked(h @ W[0]), lambda h: h @ W[1], v).sum()


def under_vmap(v):
    return jax.vmap(lambda row: marked(W[0] @ row))(v).sum()


def under_vmap_in_loop(v):
    def row(h):
        return jax.lax.scan(lambda h, w: (marked(w @ h), None), h, W)[0]

    return jax.vmap(row)(v).sum()


@jax.custom_vjp
def own(h):
    return marked(h * 2)


own.defvjp(lambda h: (own(h), None), lambda _, g: (g * 2,))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (in_branch, "'hidden' is inside a branch"),
        (under_vmap, "'hidden' is marked inside jax.vmap"),
        (under_vmap_in_loop, "'hidden' is marked inside jax.vmap"),
        (lambda v: own(v @ W[0]).sum(), "'hidden' is inside custom_vjp_call"),
    ],
)
def test_where_no_place_can_be_seen_is_refused(tmp_path, loss, words):
    with pytest.raises(ut.InputError, match=words), ut.record(tmp_path, jax.jit(loss).trace(V), sites="hidden") as r:
        r.value_and_grad(loss)(V)


class Line(eqx.Module):
    first: eqx.nn.Linear

    def __call__(self, row):
        return self.first(row)


def line_loss(net, v):
    return jax.vmap(net)(v).sum()


def test_what_is_refused(tmp_path):
    net = Line(eqx.nn.Linear(4, 2, key=jax.random.key(0)))
    with pytest.raises(ut.InputError, match=r"a function has no modules.*jax.jit\(function\).trace"):
        ut.record(tmp_path / "a", jax.jit(straight))
    with pytest.raises(ut.InputError, match="names no place"):
        ut.record(tmp_path / "a", jax.jit(lambda v: v.sum()).trace(V))
    with pytest.raises(ut.InputError, match="optimizer= is of torch"):
        ut.record(tmp_path / "a", net, sites="params", optimizer=optax.sgd(0.1))
    with (
        pytest.warns(UserWarning, match=r"recording\.add"),
        pytest.raises(ut.InputError, match=r"nothing was recorded.*recording\.add"),
        ut.record(tmp_path / "b", net, sites="first") as recording,
        recording.batch(),
    ):
        line_loss(net, V)
    with ut.record(tmp_path / "c", net, sites="first") as recording:
        step = recording.value_and_grad(line_loss)
        with pytest.raises(ut.InputError, match="calls none of the recorded sites"):
            recording.value_and_grad(lambda v: v.sum())(V)
        with pytest.raises(ut.InputError, match=r"in parts, as eqx\.partition"):
            step(eqx.filter(net, lambda leaf: eqx.is_array(leaf) and leaf.ndim == 2), V)
        with pytest.raises(ut.TargetError, match="needs one number"):
            recording.value_and_grad(lambda net, v: jax.vmap(net)(v))(net, V)
        seen = step(net, V)[2]
        with pytest.raises(ut.InputError, match="no batch is being recorded"):
            recording.add(seen)
        with recording.batch():
            with pytest.raises(ut.InputError, match="third out of the function"):
                recording.add(seen.gradients)
            with pytest.raises(ut.InputError, match=r"inside jax\.jit"):
                eqx.filter_jit(lambda net: recording.add(step(net, V)[2]))(net)
            recording.add(seen)
    with (
        pytest.raises(ut.InputError, match="diagnose is not there for JAX"),
        ut.record(tmp_path / "d", net, sites="first", diagnose=1) as recording,
        recording.batch(),
    ):
        pass


def test_a_torch_network_has_no_value_and_grad(tmp_path):
    torch = pytest.importorskip("torch")

    with (
        pytest.raises(ut.ModelError, match=r"value_and_grad.* not there for PyTorch"),
        ut.record(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 2)), sites="linear") as recording,
    ):
        recording.value_and_grad(straight)


def test_sites_of_a_module():
    sites = ut.select(Net(nnx.Rngs(0)), "conv, linear", example=X)
    assert [(s.name, s.kind, s.shape, s.calls) for s in sites] == [
        ("blocks.0", "conv", (2, 6, 6, 4), 1),
        ("blocks.1", "conv", (2, 6, 6, 4), 1),
        ("head", "linear", (2, 3), 1),
    ]


def test_a_folder_of_photographs(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    (tmp_path / "photographs").mkdir()
    for name in "ab":
        Image.fromarray(image + ord(name)).save(tmp_path / "photographs" / f"{name}.png")
    (tmp_path / "net.py").write_text(
        "import jax\nfrom flax import linen\nfrom undertow.images import Preprocessing\n\n"
        "class Small(linen.Module):\n    @linen.compact\n    def __call__(self, x):\n"
        "        x = linen.relu(linen.Conv(4, (3, 3))(x)).mean((1, 2))\n"
        "        return linen.softmax(linen.Dense(3, name='head')(x))\n\n"
        "def build():\n    net = Small()\n    import numpy as np\n"
        "    variables = net.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))\n"
        "    return {'module': net.bind(variables), 'classes': ['x', 'y', 'z']}\n"
    )
    classifier = ut.load(f"jax:{tmp_path / 'net.py'}:build")
    result = record_photographs(classifier, tmp_path / "photographs", tmp_path / "run", sites="conv, linear")
    assert (result.photographs, result.failed) == (2, [])
    run = ut.Run(tmp_path / "run")
    assert (run.sites, run.manifest["model"]["mode"]) == (["Conv_0", "head"], "evaluation")
    x = np.stack([classifier.preprocessing.array(images.read(tmp_path / "photographs" / f"{n}.png")) for n in "ab"])
    variables = classifier.module.model.variables

    def rest(h):
        head = variables["params"]["head"]
        return (jax.nn.relu(h).mean((1, 2)) @ head["kernel"] + head["bias"]).max(1).sum()

    conv = variables["params"]["Conv_0"]
    h = linen.Conv(4, (3, 3)).apply({"params": conv}, np.moveaxis(x, 1, -1))
    by = jax.grad(rest)(h)
    (row,) = (r for r in run.table("channel_norm").to_pylist() if (r["site"], r["name"]) == ("Conv_0", "b.png"))
    assert np.allclose(row["values"], np.linalg.norm(np.float64(by[1]).reshape(-1, 4), axis=0), rtol=1e-4)
    samples = run.table("samples").to_pylist()
    assert [s["score"] for s in samples] == pytest.approx(list(np.asarray(rest_scores(variables, h))), rel=1e-5)


def rest_scores(variables, h):
    head = variables["params"]["head"]
    return (jax.nn.relu(h).mean((1, 2)) @ head["kernel"] + head["bias"]).max(1)
