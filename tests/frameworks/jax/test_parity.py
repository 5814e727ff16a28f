"""The same weights in torch and in Flax give the same maps."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

import undertow as ut
from frameworks.keras.parity import (
    CAM,
    CLASSES,
    NETWORKS,
    RULES,
    InTorch,
    _affine,
    _statistics,
    _weights,
    images,
    nearest,
    on_backend,
    torch_maps,
)

pytestmark = pytest.mark.slow


class InFlax:
    """Calls Flax layers with the same weights, transposed; inside a compact method of linen."""

    def __init__(self, dtype, seed):
        self.dtype, self.numbers, self.statistics = dtype, np.random.default_rng(seed), []

    def _as(self, array):
        return lambda *_: jnp.asarray(array, self.dtype)

    def conv(self, x, inside, outside, size, stride=1, pad=0):
        kernel, bias = _weights(self.numbers, outside, inside, size, size), self.numbers.normal(size=outside) * 0.1
        options = {"kernel_init": self._as(kernel.transpose(2, 3, 1, 0)), "bias_init": self._as(bias)}
        return linen.Conv(outside, (size, size), stride, padding=pad, param_dtype=self.dtype, **options)(x)

    def depthwise(self, x, width, size, stride=1, pad=0):
        kernel = self._as(_weights(self.numbers, width, 1, size, size).transpose(2, 3, 1, 0))
        options = {"feature_group_count": width, "use_bias": False, "kernel_init": kernel, "param_dtype": self.dtype}
        return linen.Conv(width, (size, size), stride, padding=pad, **options)(x)

    def norm(self, x, width):
        mean, variance, scale, shift = _statistics(self.numbers, width)
        self.statistics.append((mean, variance))
        return linen.BatchNorm(
            use_running_average=True,
            epsilon=1e-5,
            param_dtype=self.dtype,
            scale_init=self._as(scale),
            bias_init=self._as(shift),
        )(x)

    def dense(self, x, inside, outside):
        kernel = self._as(_weights(self.numbers, outside, inside).T)
        return linen.Dense(outside, use_bias=False, kernel_init=kernel, param_dtype=self.dtype)(x)

    relu, relu6 = staticmethod(jax.nn.relu), staticmethod(jax.nn.relu6)

    def max_pool(self, x):
        return linen.max_pool(x, (2, 2), (2, 2))

    def average_pool(self, x):
        return linen.avg_pool(x, (2, 2), (2, 2))

    def add(self, x, y):
        return x + y

    def cat(self, x, y):
        return jnp.concatenate([x, y], -1)

    def flatten(self, x):
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1)

    def mean(self, x):
        return x.mean((1, 2))

    def tokens(self, x):
        return x.reshape(len(x), -1, x.shape[-1])

    def layer_norm(self, x, width):
        scale, shift = map(self._as, _affine(self.numbers, width))
        return linen.LayerNorm(epsilon=1e-5, scale_init=scale, bias_init=shift, param_dtype=self.dtype)(x)

    def attend(self, q, key, value, width):
        return jax.nn.softmax(q @ key.swapaxes(1, 2) / width**0.5) @ value

    def mean_token(self, x):
        return x.mean(1)

    def mark(self, x):
        return checkpoint_name(x, "mark")


STATISTICS: list[tuple[np.ndarray, np.ndarray]] = []  # means and variances of the norms that ran last, in order


class Net(linen.Module):
    name_of_network: str
    dtype: str

    @linen.compact
    def __call__(self, x):
        kit = InFlax(self.dtype, 11)
        scores = NETWORKS[self.name_of_network][0](kit, x)
        STATISTICS[:] = kit.statistics
        return scores


def in_flax(name, dtype, x):
    """Return the network as a bound module, the statistics of its norms put in their places in order."""
    net = Net(name, dtype)
    variables = net.init(jax.random.key(0), x)
    if "batch_stats" in variables:
        for i, (mean, variance) in enumerate(STATISTICS):
            variables["batch_stats"][f"BatchNorm_{i}"] = {
                "mean": jnp.asarray(mean, dtype),
                "var": jnp.asarray(variance, dtype),
            }
    return net.bind(variables)


def difference(name, rule, dtype):
    network, _ = NETWORKS[name]
    x = images(dtype)
    options = {"rule": rule, "target": 2, "activations": "all"}
    a = ut.explain(lambda x: network(InTorch(getattr(torch, dtype), 11), x), torch.from_numpy(x), **options)
    ours = jnp.asarray(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
    b = ut.explain(in_flax(name, dtype, ours), ours, **options)
    assert b.values.dtype == dtype
    wanted, values = a.numpy(), b.numpy().transpose(0, 3, 1, 2)
    assert np.abs(np.asarray(a.scores) - np.asarray(b.scores)).max() <= 1e-4
    return float(np.abs(values - wanted).max() / np.abs(wanted).max()), a.rewired, b.rewired


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_torchs(name):
    assert nearest(name) > 1e-5
    for rule in ("gradient", "deconvnet", "guided"):
        relative, in_torch, in_jax = difference(name, rule, "float32")
        assert relative <= 1e-5, rule
        assert in_torch == in_jax == (0 if rule == "gradient" else NETWORKS[name][1])
    with jax.enable_x64(True):
        for rule in ("gradient", "deconvnet", "guided"):
            assert difference(name, rule, "float64")[0] <= 1e-10, rule


def apart(values, wanted):
    return float(np.abs(values - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_equals_torchs(name):
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-10)):
        with jax.enable_x64(dtype == "float64"):
            x = jnp.asarray(np.ascontiguousarray(images(dtype).transpose(0, 2, 3, 1)))
            options = {"rule": "gradient", "estimator": CAM, "target": [list(range(CLASSES))] * 2}
            cam = ut.explain(in_flax(name, dtype, x), x, **options)
            assert apart(cam.numpy()[..., 0], torch_maps(name, dtype)[CAM]) <= limit


WITHOUT_NORMS = ("VGG-style",)


@pytest.mark.parametrize(("dtype", "names"), [("float32", NETWORKS), ("float64", WITHOUT_NORMS)])
def test_maps_by_keras_on_jax(tmp_path, dtype, names):
    """In float64 without norms alone: Keras 3.15 on JAX computes those of a float64 network in float32."""
    found = on_backend(tmp_path, "jax", dtype)
    for name in names:
        for key in (*RULES, CAM):
            limit = 1e-5 if dtype == "float32" else 1e-10
            assert apart(found[f"{name} {key}"], torch_maps(name, dtype)[key]) <= limit, (name, key)
        assert found[f"{name} rewired"].tolist() == [0, NETWORKS[name][1], NETWORKS[name][1]]


class Vgg(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 5, (3, 3), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(jax.nn.relu(self.first(x)), (2, 2), (2, 2))
        return self.head(jax.nn.relu(self.second(x)).mean((1, 2)))


def torchs(net):
    """Return the network in torch, with the same weights and names."""
    convs = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 5, 3, padding=1)]
    head = torch.nn.Linear(5, 3)
    for ours, theirs in zip((net.first, net.second, net.head), (*convs, head), strict=True):
        kernel = np.array(ours.kernel[...])
        theirs.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T.copy())
        theirs.bias.data = torch.from_numpy(np.array(ours.bias[...]))
    layers = {"first": convs[0], "a": torch.nn.ReLU(), "b": torch.nn.MaxPool2d(2), "second": convs[1]}
    layers |= {"c": torch.nn.ReLU(), "d": torch.nn.AdaptiveAvgPool2d(1), "e": torch.nn.Flatten(), "head": head}
    return torch.nn.Sequential(OrderedDict(layers))


def test_rows_of_a_record_equal_torchs(tmp_path):
    net = Vgg(nnx.Rngs(0))
    twin, x = torchs(net), np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    measures = ["channel-norm", "zero-fraction", "moments", "channel-sums", "histogram", "keep"]
    options = {"sites": "conv, linear", "measures": measures, "phase": "both", "loss_reduction": "sum"}
    with ut.record(tmp_path / "jax", net, **options) as recording, recording.batch(samples=["a", "b"]):
        step = nnx.jit(recording.value_and_grad(lambda net, x: net(x)[:, 1].sum()))
        recording.add(step(net, jnp.asarray(x))[2])
    with ut.record(tmp_path / "torch", twin, **options) as recording, recording.batch(samples=["a", "b"]):
        twin(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))[:, 1].sum().backward()
    ours, theirs = ut.Run(tmp_path / "jax"), ut.Run(tmp_path / "torch")
    assert ours.sites == theirs.sites == ["first", "second", "head"]
    for table in ("channel_norm", "zero_fraction", "moments", "channel_sums"):
        for a, b in zip(*(run.table(table).to_pylist() for run in (ours, theirs)), strict=True):
            assert a.keys() == b.keys()
            for key, value in b.items():
                if isinstance(value, float | list):
                    assert np.allclose(a[key], value, rtol=1e-4, atol=1e-6), (table, b["site"], b["phase"], key)
                else:
                    assert a[key] == value, (table, key)
    for a, b in zip(*(run.quantiles([0.5, 0.9]) for run in (ours, theirs)), strict=True):
        assert (a.site, a.phase, a.count, a.zeros) == (b.site, b.phase, b.count, b.zeros)
        assert np.allclose(a.values, b.values, rtol=2**-6)


TABLES = ("attnlrp", "cp-lrp")


@pytest.mark.parametrize("name", ["residual", "vision transformer"])
def test_tables_equal_torchs(name):
    assert nearest(name) > 1e-5
    for rule in TABLES:
        assert difference(name, rule, "float32")[0] <= 1e-5, rule
    with jax.enable_x64(True):
        for rule in TABLES:
            assert difference(name, rule, "float64")[0] <= 1e-10, rule


COMPOSITES = {
    "residual": ("lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box", "lrp:epsilon-alpha2-beta1", "excitation"),
    "pre-activation dense": ("lrp:epsilon-alpha2-beta1",),  # batch norms before convolutions
    "VGG-style": ("lrp:epsilon-gamma-box",),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_equal_torchs(name):
    with jax.enable_x64(True):
        for rule in COMPOSITES[name]:
            assert difference(name, rule, "float64")[0] <= 1e-10, rule
    assert difference(name, COMPOSITES[name][0], "float32")[0] <= 1e-5


WIDTH, HEADS = 8, 2


def llama(kit, x):
    """Two blocks as Llama has them: RMS norms, rotary positions, two heads, SwiGLU; `kit` is torch's or JAX's."""
    numbers = np.random.default_rng(7)

    def matrix(*shape):
        return kit.array(numbers.normal(size=shape) / shape[0] ** 0.5)

    def rms(x):
        return x * ((x * x).mean(-1, keepdims=True) + 1e-5) ** -0.5 * kit.array(numbers.uniform(0.5, 1.5, WIDTH))

    def turned(x):
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[-2])[:, None] / 10.0 ** np.arange(half)
        cos, sin = (kit.array(f(np.concatenate([angle, angle], 1))) for f in (np.cos, np.sin))
        return x * cos + kit.concatenate((-x[..., half:], x[..., :half])) * sin

    def heads(x):
        return x.reshape(len(x), -1, HEADS, WIDTH // HEADS).swapaxes(1, 2)

    for _ in range(2):
        h = rms(x)
        q, k, v = (heads(h @ matrix(WIDTH, WIDTH)) for _ in range(3))
        scores = turned(q) @ turned(k).swapaxes(2, 3) / (WIDTH / HEADS) ** 0.5
        mask = kit.array(np.triu(np.full((x.shape[1],) * 2, -1e9), 1))
        mixed = (kit.softmax(scores + mask) @ v).swapaxes(1, 2)
        x = x + mixed.reshape(x.shape) @ matrix(WIDTH, WIDTH)
        h = rms(x)
        x = x + (kit.silu(h @ matrix(WIDTH, 12)) * (h @ matrix(WIDTH, 12))) @ matrix(12, WIDTH)
    return rms(x)[:, -1] @ matrix(WIDTH, 5)


class Torch:
    def __init__(self, dtype):
        self.array = lambda a: torch.tensor(a, dtype=getattr(torch, dtype))

    silu = staticmethod(torch.nn.functional.silu)
    concatenate = staticmethod(lambda parts: torch.cat(parts, -1))
    softmax = staticmethod(lambda x: x.softmax(-1))


class Jax:
    def __init__(self, dtype):
        self.array = lambda a: jnp.asarray(a, dtype)

    silu, softmax = staticmethod(jax.nn.silu), staticmethod(jax.nn.softmax)
    concatenate = staticmethod(lambda parts: jnp.concatenate(parts, -1))


@pytest.mark.parametrize("rule", TABLES)
def test_llama_has_torchs_maps(rule):
    for dtype, allowed in (("float64", 1e-10), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            x = np.random.default_rng(3).normal(size=(2, 6, WIDTH)).astype(dtype)
            a = ut.explain(lambda x, d=dtype: llama(Torch(d), x), torch.from_numpy(x), rule=rule, target=2)
            b = ut.explain(lambda x, d=dtype: llama(Jax(d), x), jnp.asarray(x), rule=rule, target=2)
            assert b.values.dtype == dtype
            assert np.abs(a.numpy() - b.numpy()).max() <= allowed * np.abs(a.numpy()).max()
            assert np.allclose(a.conservation, b.conservation, atol=1e-4)
            assert (b.skipped, b.opaque) == ({}, {})
