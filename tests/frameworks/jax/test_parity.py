"""The same weights in torch and in Flax give the same maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import undertow as ut
from frameworks.keras.parity import NETWORKS, InTorch, _affine, _statistics, _weights, images, nearest

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
        return x


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
