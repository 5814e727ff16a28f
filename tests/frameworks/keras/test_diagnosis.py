"""Findings of a Keras network on TensorFlow: those of the same network in torch, with the same weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers
from torch import nn

import undertow as ut
from undertow.frameworks.base import capability

MEASURES = ["zero-fraction", "channel-norm", "histogram", "channel-sums"]


def put(network, *, dead=(), factor=1.0, shift=0.0, seed=0):
    """Give each layer with a kernel weights of its own, the same in both frameworks; return the network."""
    numbers = np.random.default_rng(seed)
    named = network.named_modules() if isinstance(network, nn.Module) else [(v.name, v) for v in network.layers]
    for name, layer in named:
        if isinstance(layer, nn.Linear | nn.Conv2d | layers.Dense | layers.Conv2D):
            is_torch = isinstance(layer, nn.Module)
            shape = (*layer.weight.shape[2:], *layer.weight.shape[1::-1]) if is_torch else tuple(layer.kernel.shape)
            kernel = numbers.normal(size=shape) * factor * (2 / np.prod(shape[:-1])) ** 0.5
            bias = numbers.normal(size=shape[-1]) * 0.1 + (shift if name == "a" else 0)
            bias[list(dead) if name == "a" else []] = -100.0
            if is_torch:
                order = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
                layer.weight.data = torch.tensor(kernel.transpose(order), dtype=torch.float32)
                layer.bias.data = torch.tensor(bias, dtype=torch.float32)
            else:
                layer.set_weights([kernel, bias])
    return network


def in_torch(**modules):
    network = nn.Sequential()
    for name, module in modules.items():
        network.add_module(name, module)
    return network.eval()


def in_keras(shape, **made):
    for name, layer in made.items():
        layer.name = name
    return keras.Sequential([keras.Input(shape), *made.values()])


def images(seed=1, n=8):
    return np.random.default_rng(seed).normal(size=(n, 16, 16, 3)).astype("float32")


def rows(seed=1, n=128, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, 12))).astype("float32")


def conv(n=6, of=3):
    return nn.Conv2d(of, n, 3), layers.Conv2D(n, 3)


def head_of_torch(n):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 5))


def planted(name):
    """One network in torch and in Keras, a batch, and how its weights are made."""
    pooled = {
        "max": (nn.MaxPool2d(2), layers.MaxPooling2D(2)),
        "average": (nn.AvgPool2d(2), layers.AveragePooling2D(2)),
        "overlapping": (nn.MaxPool2d(3, 2), layers.MaxPooling2D(3, 2)),
    }
    gates = {
        "relu": (nn.ReLU(), layers.ReLU()),
        "leaky": (nn.LeakyReLU(0.1), layers.LeakyReLU(0.1)),
        "relu6": (nn.ReLU6(), layers.ReLU(6.0)),
        "scaled": (nn.LeakyReLU(0.2), layers.ReLU(negative_slope=0.2)),
    }
    gate, pool, options = {
        "max pooling": ("relu", "max", {}),
        "average pooling": ("relu", "average", {}),
        "overlapping windows": ("relu6", "overlapping", {}),
        "dead units": ("relu", "max", {"dead": (1, 4)}),
        "a dead layer": ("relu", "max", {"dead": range(6)}),
        "a gate nearly shut": ("relu", "average", {"shift": -2.0}),
        "a leaky gate": ("leaky", "average", {"shift": -2.0}),
        "a ReLU with a slope": ("scaled", "max", {"shift": -2.0}),
    }[name]
    (a, ka), (b, kb) = conv(), conv(4, 6)
    (g, kg), (p, kp) = gates[gate], pooled[pool]
    (t1, t2, t3), (k1, k2, k3) = head_of_torch(4), (layers.GlobalAveragePooling2D(), layers.Flatten(), layers.Dense(5))
    t = in_torch(z=nn.Conv2d(3, 3, 1), a=a, g=g, p=p, b=b, t1=t1, t2=t2, head=t3)
    k = in_keras((16, 16, 3), z=layers.Conv2D(3, 1), a=ka, g=kg, p=kp, b=kb, t1=k1, t2=k2, head=k3)
    return put(t, **options), put(k, **options), images()


def stack(name):
    gate, options, scale = {
        "vanishing by weights": (nn.ReLU, {"factor": 0.2}, 1.0),
        "vanishing by slopes": (nn.Sigmoid, {}, 1.0),
        "saturation": (nn.Tanh, {"factor": 3.0}, 30.0),
        "healthy": (nn.ReLU, {}, 1.0),
    }[name]
    activation = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}[gate]
    t, k = {}, {}
    for i in range(8):
        t |= {f"l{i}": nn.Linear(12, 12), f"g{i}": gate()}
        k |= {f"l{i}": layers.Dense(12), f"g{i}": layers.Activation(activation)}
    t, k = in_torch(**t, head=nn.Linear(12, 3)), in_keras((12,), **k, head=layers.Dense(3))
    return put(t, **options), put(k, **options), rows(scale=scale)


def findings_in_torch(network, x, folder, sites):
    with ut.record(folder, network, sites=sites, measures=MEASURES, diagnose=1) as recording:
        for batch in (x, x + 0.1):
            with recording.batch():
                given = torch.tensor(np.moveaxis(batch, -1, 1) if batch.ndim == 4 else batch)
                network(given).square().mean().backward()
    return ut.diagnose(folder)


def findings_in_keras(network, x, folder, sites="conv, linear", loss=lambda y: tf.reduce_mean(tf.square(y))):
    with ut.record(folder, network, sites=sites, measures=MEASURES, diagnose=1) as recording:
        for batch in (x, x + 0.1):
            with recording.batch():
                with tf.GradientTape() as tape:
                    value = loss(network(tf.constant(batch), training=False))
                tape.gradient(value, network.trainable_variables)
    return ut.diagnose(folder)


CAUSES = {  # what must be among the findings of each
    "max pooling": "pooling",
    "average pooling": "pooling",
    "overlapping windows": "pooling",
    "dead units": "dead-units",
    "a dead layer": "dead-layer",
    "a gate nearly shut": "activation",
    "a leaky gate": "activation",
    "a ReLU with a slope": "activation",
}
STACKS = {"vanishing by weights": "vanishing", "vanishing by slopes": "vanishing", "saturation": "saturated"}


@pytest.mark.parametrize("name", [*CAUSES, *STACKS, "healthy"])
def test_findings_are_those_of_torch(name, tmp_path):
    t, k, x = planted(name) if name in CAUSES else stack(name)
    sites = "conv, linear" if name in CAUSES else "linear"
    theirs = findings_in_torch(t, x, tmp_path / "torch", sites)
    ours = findings_in_keras(k, x, tmp_path / "keras", sites)
    for a, b in zip(theirs, ours, strict=True):
        assert (a.cause, a.severity, a.sites) == (b.cause, b.severity, b.sites)
        for key in ("predicted", "observed"):
            assert a.evidence[key] == pytest.approx(b.evidence[key], rel=1e-3, nan_ok=True)
        assert a.evidence.get("foretold_exactly") == b.evidence.get("foretold_exactly")
    causes = {finding.cause for finding in ours}
    assert (CAUSES | STACKS).get(name, "activation") in causes
    assert name != "healthy" or ours.worst() == "info"
    answers = [[answer.partition(":")[0] for answer in found.checked.values()] for found in (theirs, ours)]
    assert answers[0] == answers[1]


def test_an_activation_within_a_layer_is_seen(tmp_path):
    """As Keras networks are mostly written; the site's output is what the activation gives."""
    z, pool, mean, h = (lambda: layers.Conv2D(3, 1)), layers.MaxPooling2D, layers.GlobalAveragePooling2D, layers.Dense
    apart = {"a": layers.Conv2D(6, 3), "g": layers.ReLU()}
    fused = {"a": layers.Conv2D(6, 3, activation="relu")}
    apart, fused = (
        put(in_keras((16, 16, 3), z=z(), **made, p=pool(), f=mean(), h=h(5)), dead=(1, 4)) for made in (apart, fused)
    )
    found = [findings_in_keras(net, images(), tmp_path / name) for name, net in (("1", apart), ("2", fused))]
    dead = [[f for f in findings if f.cause == "dead-units"] for findings in found]
    assert [f.sites for f in dead[0]] == [f.sites for f in dead[1]] == [("a",)]
    assert dead[0][0].evidence == dead[1][0].evidence
    (pooled,) = [f for f in found[1] if f.cause == "pooling"]
    assert pooled.evidence["zeros"] == pytest.approx(0.75, abs=0.02)  # at the output itself the ReLU makes none


def test_a_stack_of_layers_with_activations_vanishes(tmp_path):
    net = in_keras((12,), **{f"l{i}": layers.Dense(12, activation="sigmoid") for i in range(8)}, head=layers.Dense(3))
    (finding,) = [f for f in findings_in_keras(put(net), rows(), tmp_path / "a", "linear") if f.cause == "vanishing"]
    assert finding.evidence["predicted"] == pytest.approx(finding.evidence["observed"], rel=0.3)
    assert "sigmoid, at most 0.25" in finding.sentence


class Functional(keras.Model):
    """Functions in the place of layers, and something between the first layer and the second."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.head = layers.Dense(12, name="a"), layers.Dense(12, name="b"), layers.Dense(3, name="head")
        self.between = between

    def call(self, x):
        return self.head(tf.nn.relu(self.b(self.between(keras.ops.relu(self.a(x))))))


def functional(between=lambda h: h, **options):
    net = Functional(between)
    net(rows())
    return put(net, **options)


def test_functions_are_seen(tmp_path):
    found = findings_in_keras(functional(shift=-100.0), rows(), tmp_path / "a", "linear")
    assert ("dead-layer", "a") in {(f.cause, f.sites[-1]) for f in found} | {(f.cause, f.sites[0]) for f in found}
    net = Pooled()
    with pytest.raises(ut.InputError, match="the model has no weights yet; call it once on a batch, then record it"):
        findings_in_keras(net, images(), tmp_path / "c")
    net(images())
    (pooled,) = [f for f in findings_in_keras(net, images(), tmp_path / "b") if f.cause == "pooling"]
    assert (pooled.sites, pooled.evidence["kernel_size"]) == (("a",), [3, 3])


class Pooled(keras.Model):
    """Pooling by a function, whose "same" padding differs from side to side."""

    def __init__(self):
        super().__init__()
        self.a, self.head = layers.Conv2D(4, 3, name="a"), layers.Dense(3, name="head")

    def call(self, x):
        return self.head(keras.ops.mean(keras.ops.max_pool(self.a(x), 3, 2, "same"), (1, 2)))


CUTS = {
    "stop_gradient": (tf.stop_gradient, "detached", "cut off by tf.stop_gradient in the call of the network itself"),
    "keras.ops": (keras.ops.stop_gradient, "detached", "cut off by tf.stop_gradient in the call of the network itself"),
    "round": (tf.round, "detached", "cut off by round in the call of the network itself"),
    "argmax": (
        lambda h: tf.one_hot(tf.argmax(h, 1), 12),
        "detached",
        "cut off by argmax in the call of the network itself",
    ),
    "comparison": (
        lambda h: tf.cast(h > 0, tf.float32),
        "detached",
        "cut off by a comparison (greater) in the call of the network itself",
    ),
    "numpy": (lambda h: tf.constant(h.numpy()), "unreached", "that the tape saw (.numpy() is none)"),
    "unread": (tf.zeros_like, "unreached", "does not depend on its output"),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.filterwarnings("ignore:1 of 3 sites were not recorded")
def test_a_gradient_that_is_cut_off(name, tmp_path):
    between, cause, sentence = CUTS[name]
    found = findings_in_keras(functional(between), rows(), tmp_path / "a", "linear")
    (finding,) = [f for f in found if f.sites == ("a",) and f.cause in ("detached", "unreached")]
    assert finding.cause == cause
    assert sentence in finding.sentence


def test_a_sign_gives_zeros_and_a_custom_gradient_is_not_looked_into(tmp_path):
    (finding,) = [f for f in findings_in_keras(functional(tf.sign), rows(), tmp_path / "a", "a") if f.cause]
    assert (finding.cause, finding.evidence["flat"]) == ("no-gradient", "sign in the call of the network itself")

    @tf.custom_gradient
    def straight(h):
        return tf.round(tf.nn.relu(h)), lambda g: g

    net = functional()
    net.a.activation = lambda h: h
    found = findings_in_keras(functional(straight), rows(), tmp_path / "b", "a, b")
    assert not any(f.sites == ("a",) for f in found)  # the ReLU within is none for the gradient
    row = next(r for r in ut.Run(tmp_path / "b").table("diagnosis").to_pylist() if (r["site"], r["step"]) == ("a", 1))
    assert row["readers"] == '["tf.custom_gradient straight"]'


@pytest.mark.filterwarnings("ignore:. of 3 sites were not recorded")
def test_frozen_and_off_the_tape(tmp_path):
    net = functional()
    net.a.trainable = False
    with ut.record(tmp_path / "a", net, sites="linear", diagnose=1) as recording, recording.batch():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in net.trainable_variables])
            loss = tf.reduce_sum(net(rows()))
        tape.gradient(loss, net.trainable_variables)
    (finding,) = [f for f in ut.diagnose(tmp_path / "a") if f.cause == "frozen"]
    assert (finding.sites, finding.severity) == (("a",), "info")
    assert "nothing up to here is trainable" in finding.sentence
    net = functional()
    net.b.trainable = False  # Keras alone knows it: the tape watches the weights that there were
    (finding,) = [f for f in findings_in_keras(net, rows(), tmp_path / "d", "linear") if f.cause == "frozen"]
    assert "b: a gradient passes, but trainable is False for all of its weights" in finding.sentence
    net = functional()
    with ut.record(tmp_path / "b", net, sites="linear", diagnose=1) as recording, recording.batch():
        h = net.a(tf.constant(rows()))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net.head(net.b(h)))
        tape.gradient(loss, net.trainable_variables)
    (finding,) = [f for f in ut.diagnose(tmp_path / "b") if f.sites == ("a",)]
    assert (finding.cause, "run where no tf.GradientTape records" in finding.sentence) == ("detached", True)


def test_a_function_of_tensorflows_is_not_looked_into(tmp_path):
    net = functional(tf.function(lambda h: tf.nn.relu(h - 100.0)))
    found = findings_in_keras(net, rows(), tmp_path / "a", "a")
    assert {f.cause for f in found} == {"no-gradient"}
    assert "Its output is read by" in found[0].sentence


def test_what_is_not_finite_is_told_where_it_began(tmp_path):
    net = functional(lambda h: tf.math.log(h - 1e6))
    causes = {f.cause: f for f in findings_in_keras(net, rows(), tmp_path / "a", "linear")}
    assert "b" in causes["non-finite"].sites
    net = functional()
    net.b.kernel.assign(np.full((12, 12), np.nan))
    causes = {f.cause: f for f in findings_in_keras(net, rows(), tmp_path / "b", "linear")}
    assert "weights" in causes["non-finite"].sentence
    net, x = functional(), rows()
    x[3, 2] = np.nan
    with ut.record(tmp_path / "c", net, sites="linear", diagnose=1) as recording, recording.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x))
        tape.gradient(loss, net.trainable_variables)
    row = ut.Run(tmp_path / "c").table("diagnosis").to_pylist()[0]
    assert row["broken_data"] == 1


@pytest.mark.filterwarnings("ignore:1 of 2 sites were not recorded")
def test_a_softmax_that_losses_pass_by_is_not_looked_at(tmp_path):
    net = put(in_keras((12,), a=layers.Dense(8, activation="relu"), head=layers.Dense(3, activation="softmax")))
    loss = lambda y: keras.losses.sparse_categorical_crossentropy(np.zeros(len(y)), y)  # noqa: E731
    found = findings_in_keras(net, rows(), tmp_path / "a", "linear", loss)
    assert not any("head" in f.sites for f in found)
    assert "not at head: Keras's losses go on from the logits" in found.checked["arrival"]
    assert "of Keras on TensorFlow" in found.checked["optimizer"]


def test_a_watched_batch_changes_nothing_and_leaves_nothing(tmp_path):
    net, x = put(in_keras((12,), a=layers.Dense(8, activation="relu"), n=layers.BatchNormalization(),
                          head=layers.Dense(3))), tf.constant(rows())  # fmt: skip
    original, before = tf.GradientTape.gradient, [sorted(vars(layer)) for layer in net.layers]

    def gradients():
        with tf.GradientTape(persistent=True) as tape:
            y = net(x)
            losses = tf.reduce_sum(y**2), tf.reduce_sum(y)
        return [g.numpy() for loss in losses for g in tape.gradient(loss, net.trainable_variables)]

    plain = gradients()
    with ut.record(tmp_path / "a", net, sites="**", diagnose=1) as recording:
        with recording.batch():
            watched = gradients()
        with pytest.raises(ZeroDivisionError), recording.batch():
            raise ZeroDivisionError
    assert all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert tf.GradientTape.gradient is original
    assert [sorted(vars(layer)) for layer in net.layers] == before
    again = gradients()
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_batch_norm_is_one_step(tmp_path):
    net = in_keras((16, 16, 3), a=layers.Conv2D(4, 3), n=layers.BatchNormalization(), g=layers.Activation("gelu"),
                   f=layers.GlobalAveragePooling2D(), head=layers.Dense(3))  # fmt: skip
    with ut.record(tmp_path / "a", put(net), sites="conv", diagnose=1) as recording, recording.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(net(images(), training=True)))
        tape.gradient(loss, net.trainable_variables)
    rows = ut.Run(tmp_path / "a").table("diagnosis").to_pylist()
    assert [(row["op"], row["module"]) for row in rows] == [("", "a"), ("batch_norm", "n"), ("gelu", "g")]
    assert rows[2]["readers"] == '["mean"]'
    assert abs(np.sum(rows[0]["sums"])) < 1e-4 * np.sum(rows[0]["absolutes"])


def test_the_callback_watches_a_compiled_fit(tmp_path):
    from undertow.keras import GradientRecorder

    net = put(in_keras((12,), a=layers.Dense(8, activation="relu"), head=layers.Dense(3)), shift=-100.0)
    net.compile("sgd", "mse", jit_compile=True)
    recorder = GradientRecorder(tmp_path / "a", sites="linear", diagnose=1, schedule=ut.Schedule(every=2))
    net.fit(rows(n=256), np.zeros((256, 3)), batch_size=128, callbacks=[recorder], verbose=0)
    assert "dead-layer" in {f.cause for f in ut.diagnose(tmp_path / "a")}


def test_a_scaled_loss_gives_the_same_evidence(tmp_path):
    net, x = functional(), tf.constant(rows())
    found = []
    for name, optimizer in (("a", None), ("b", keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), 256.0))):
        if optimizer is not None:
            optimizer.build(net.trainable_variables)
        with ut.record(tmp_path / name, net, sites="linear", diagnose=1, scaler=optimizer) as r, r.batch():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(net(x)))
                loss = loss if optimizer is None else optimizer.scale_loss(loss)
            tape.gradient(loss, net.trainable_variables)
        found.append(ut.Run(tmp_path / name).table("diagnosis").to_pylist())
    for plain, scaled in zip(*found, strict=True):
        for key in ("absolute", "expected_absolute", "zeros", "expected_zeros", "norm"):
            assert plain[key] == pytest.approx(scaled[key], rel=1e-5, nan_ok=True)


def test_layouts_and_calls(tmp_path):
    """Channels first, a layer that runs twice, and a nested model: each call has its own chain."""
    inner = keras.Sequential([layers.Conv2D(4, 3, padding="same", name="c"), layers.ReLU(name="g")], name="inner")
    given = keras.Input((16, 16, 3))
    h = layers.Conv2D(4, 3, padding="same", name="first")(given)
    net = keras.Model(given, layers.GlobalAveragePooling2D()(layers.Add()([inner(inner(h)), h])))
    found = findings_in_keras(net, images(), tmp_path / "a", "conv")
    rows = [r for r in ut.Run(tmp_path / "a").table("diagnosis").to_pylist() if r["batch"] == 0]
    assert {(r["site"], r["call"]) for r in rows if r["op"] == "relu"} == {("inner.c", 0), ("inner.c", 1)}
    first = next(r for r in rows if r["site"] == "first")
    numbers = {(r["site"], r["call"]): r["number"] for r in rows if r["step"] == 0}
    assert sorted(first["read_by"]) == [-1, numbers["inner.c", 0]]  # by the next layer, and by the sum at the end
    assert (first["joins"], first["arrival"]) == (1, "arrived")
    assert found.checked["arrival"] == "checked"


def test_the_recorder_is_there():
    assert capability("keras", "record").new_probe({}, [], frozenset(["backward"]), None, None).watched is None
