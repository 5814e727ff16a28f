"""Five architectures, each written once and built in both frameworks with the same weights.

A network is a function of a kit and an image. `InTorch` calls torch's functions on `(B, C, H, W)`; `InKeras` builds a
functional model on `(B, H, W, C)`. Weights are drawn in the order of the calls, in torch's layout, and transposed for
Keras; both kits draw them from the same seed. `mark` is a place whose Grad-CAM is compared.

Keras may run on torch too: `python parity.py FILE`, in a process of its own, writes the maps there.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from keras import layers
from torch.nn import functional as F

SIDE, CLASSES = 32, 5


def vgg(k: Any, x: Any) -> Any:
    for i, (inside, outside) in enumerate([(3, 8), (8, 8), (8, 12), (12, 12)]):
        x = k.relu(k.conv(x, inside, outside, 3, pad=1))
        x = k.max_pool(x) if i % 2 else x
    x = k.relu(k.dense(k.flatten(k.mark(x)), 12 * (SIDE // 4) ** 2, 24))
    return k.dense(k.relu(k.dense(x, 24, 16)), 16, CLASSES)


def residual(k: Any, x: Any) -> Any:
    x = k.max_pool(k.relu(k.norm(k.conv(x, 3, 8, 7, stride=2, pad=3), 8)))
    for inside, outside, stride in [(8, 8, 1), (8, 12, 2)]:
        y = k.relu(k.norm(k.conv(x, inside, outside, 3, stride=stride, pad=1), outside))
        y = k.norm(k.conv(y, outside, outside, 3, pad=1), outside)
        skip = x if stride == 1 else k.norm(k.conv(x, inside, outside, 1, stride=stride), outside)
        x = k.relu(k.add(y, skip))
    return k.dense(k.mean(k.mark(x)), 12, CLASSES)


def dense(k: Any, x: Any) -> Any:
    x = k.max_pool(k.relu(k.norm(k.conv(x, 3, 8, 3, pad=1), 8)))
    width = 8
    for block in range(2):
        for _ in range(2):
            y = k.conv(k.relu(k.norm(x, width)), width, 12, 1)
            y = k.conv(k.relu(k.norm(y, 12)), 12, 6, 3, pad=1)
            x, width = k.cat(x, y), width + 6
        if block == 0:
            x, width = k.average_pool(k.conv(k.relu(k.norm(x, width)), width, width // 2, 1)), width // 2
    return k.dense(k.mean(k.mark(k.relu(k.norm(x, width)))), width, CLASSES)


def inverted(k: Any, x: Any) -> Any:
    x = k.relu6(k.norm(k.conv(x, 3, 8, 3, stride=2, pad=1), 8))
    for inside, outside, stride in [(8, 8, 1), (8, 12, 2), (12, 12, 1)]:
        y = k.relu6(k.norm(k.conv(x, inside, 4 * inside, 1), 4 * inside))
        y = k.relu6(k.norm(k.depthwise(y, 4 * inside, 3, stride=stride, pad=1), 4 * inside))
        y = k.norm(k.conv(y, 4 * inside, outside, 1), outside)
        x = k.add(x, y) if stride == 1 and inside == outside else y
    return k.dense(k.mean(k.mark(k.relu6(k.norm(k.conv(x, 12, 24, 1), 24)))), 24, CLASSES)


def vit(k: Any, x: Any) -> Any:
    """Patches of 8, two blocks of attention with one head, and ReLUs in the perceptrons."""
    width = 12
    x = k.tokens(k.conv(x, 3, width, 8, stride=8))
    for _ in range(2):
        y = k.layer_norm(x, width)
        q, key, value = (k.dense(y, width, width) for _ in range(3))
        x = k.add(x, k.dense(k.attend(q, key, value, width), width, width))
        y = k.relu(k.dense(k.layer_norm(x, width), width, 2 * width))
        x = k.add(x, k.dense(y, 2 * width, width))
    return k.dense(k.mean_token(k.mark(k.layer_norm(x, width))), width, CLASSES)


NETWORKS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {  # with the number of its activations
    "VGG-style": (vgg, 6),
    "residual": (residual, 5),
    "pre-activation dense": (dense, 11),
    "inverted residual, ReLU6": (inverted, 8),
    "vision transformer": (vit, 2),
}


def _weights(numbers: np.random.Generator, *shape: int) -> np.ndarray:
    return numbers.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5


class InTorch:
    """Calls torch's functions with weights drawn from a seed, the same at each call."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.numbers = dtype, np.random.default_rng(seed)

    def _of(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=self.dtype)

    def conv(self, x: Any, inside: int, outside: int, size: int, stride: int = 1, pad: int = 0) -> Any:
        kernel, bias = _weights(self.numbers, outside, inside, size, size), self.numbers.normal(size=outside) * 0.1
        return F.conv2d(x, self._of(kernel), self._of(bias), stride, pad)

    def depthwise(self, x: Any, width: int, size: int, stride: int = 1, pad: int = 0) -> Any:
        kernel = _weights(self.numbers, width, 1, size, size)
        return F.conv2d(x, self._of(kernel), None, stride, pad, groups=width)

    def norm(self, x: Any, width: int) -> Any:
        return F.batch_norm(x, *map(self._of, _statistics(self.numbers, width)), eps=1e-5)

    def dense(self, x: Any, inside: int, outside: int) -> Any:
        return F.linear(x, self._of(_weights(self.numbers, outside, inside)))

    relu, relu6 = staticmethod(F.relu), staticmethod(F.relu6)

    def max_pool(self, x: Any) -> Any:
        return F.max_pool2d(x, 2)

    def average_pool(self, x: Any) -> Any:
        return F.avg_pool2d(x, 2)

    def add(self, x: Any, y: Any) -> Any:
        return x + y

    def cat(self, x: Any, y: Any) -> Any:
        return torch.cat([x, y], 1)

    def flatten(self, x: Any) -> Any:
        return x.flatten(1)

    def mean(self, x: Any) -> Any:
        return x.mean((2, 3))

    def mark(self, x: Any) -> Any:
        self.marked = x
        return x

    def tokens(self, x: Any) -> Any:
        return x.flatten(2).transpose(1, 2)

    def layer_norm(self, x: Any, width: int) -> Any:
        return F.layer_norm(x, (width,), *map(self._of, _affine(self.numbers, width)), eps=1e-5)

    def attend(self, q: Any, key: Any, value: Any, width: int) -> Any:
        return (q @ key.transpose(1, 2) / width**0.5).softmax(-1) @ value

    def mean_token(self, x: Any) -> Any:
        return x.mean(1)


class Nearest(InTorch):
    """Notes how near the nearest choice is: of a ReLU about 0, of a cap, or of the largest of a window.

    In units of the standard deviation of what is chosen from. float32 moves values by up to 3e-6 of it here, on each
    processor otherwise; a choice nearer than that might be another one there, and the map differ by more than rounding.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(torch.float64, seed)
        self.distance = float("inf")

    def _note(self, distances: torch.Tensor, x: torch.Tensor) -> None:
        self.distance = min(self.distance, float(distances.min() / x.std()))

    def relu(self, x: Any) -> Any:
        self._note(x.abs(), x)
        return F.relu(x)

    def relu6(self, x: Any) -> Any:
        self._note(torch.minimum(x.abs(), (x - 6).abs()), x)
        return F.relu6(x)

    def max_pool(self, x: Any) -> Any:
        first, second = F.unfold(x.flatten(0, 1)[:, None], 2, stride=2).topk(2, 1).values.unbind(1)
        self._note((first - second)[first > 0], x)  # among zeros any choice is without a gradient
        return F.max_pool2d(x, 2)


def _statistics(numbers: np.random.Generator, width: int) -> Iterator[np.ndarray]:
    """Running mean and variance, weight and bias."""
    yield numbers.normal(size=width) * 0.3
    yield numbers.uniform(0.5, 1.5, size=width)
    yield numbers.normal(size=width) * 0.2 + 1
    yield numbers.normal(size=width) * 0.3


def _affine(numbers: np.random.Generator, width: int) -> Iterator[np.ndarray]:
    yield numbers.normal(size=width) * 0.2 + 1
    yield numbers.normal(size=width) * 0.3


class InKeras:
    """Builds layers with the same weights, transposed."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.dtype, self.numbers = dtype, np.random.default_rng(seed)

    def _apply(self, layer: Any, x: Any, *weights: np.ndarray) -> Any:
        y = layer(x)
        layer.set_weights(weights)
        return y

    def conv(self, x: Any, inside: int, outside: int, size: int, stride: int = 1, pad: int = 0) -> Any:
        kernel, bias = _weights(self.numbers, outside, inside, size, size), self.numbers.normal(size=outside) * 0.1
        layer = layers.Conv2D(outside, size, stride, dtype=self.dtype)
        return self._apply(layer, self._padded(x, pad), kernel.transpose(2, 3, 1, 0), bias)

    def depthwise(self, x: Any, width: int, size: int, stride: int = 1, pad: int = 0) -> Any:
        kernel = _weights(self.numbers, width, 1, size, size)
        layer = layers.DepthwiseConv2D(size, stride, use_bias=False, dtype=self.dtype)
        return self._apply(layer, self._padded(x, pad), kernel.transpose(2, 3, 0, 1))

    def _padded(self, x: Any, pad: int) -> Any:
        return layers.ZeroPadding2D(pad, dtype=self.dtype)(x) if pad else x

    def norm(self, x: Any, width: int) -> Any:
        mean, variance, weight, bias = _statistics(self.numbers, width)
        return self._apply(layers.BatchNormalization(epsilon=1e-5, dtype=self.dtype), x, weight, bias, mean, variance)

    def dense(self, x: Any, inside: int, outside: int) -> Any:
        layer = layers.Dense(outside, use_bias=False, dtype=self.dtype)
        return self._apply(layer, x, _weights(self.numbers, outside, inside).T)

    def relu(self, x: Any) -> Any:
        return layers.ReLU(dtype=self.dtype)(x)

    def relu6(self, x: Any) -> Any:
        return layers.ReLU(6.0, dtype=self.dtype)(x)

    def max_pool(self, x: Any) -> Any:
        return layers.MaxPooling2D(dtype=self.dtype)(x)

    def average_pool(self, x: Any) -> Any:
        return layers.AveragePooling2D(2, dtype=self.dtype)(x)

    def add(self, x: Any, y: Any) -> Any:
        return layers.Add(dtype=self.dtype)([x, y])

    def cat(self, x: Any, y: Any) -> Any:
        return layers.Concatenate(dtype=self.dtype)([x, y])

    def flatten(self, x: Any) -> Any:
        return layers.Flatten(dtype=self.dtype)(layers.Permute((3, 1, 2), dtype=self.dtype)(x))

    def mean(self, x: Any) -> Any:
        return layers.GlobalAveragePooling2D(dtype=self.dtype)(x)

    def mark(self, x: Any) -> Any:
        return layers.Identity(dtype=self.dtype, name="mark")(x)

    def tokens(self, x: Any) -> Any:
        return layers.Reshape((-1, x.shape[-1]), dtype=self.dtype)(x)

    def layer_norm(self, x: Any, width: int) -> Any:
        layer = layers.LayerNormalization(epsilon=1e-5, dtype=self.dtype)
        return self._apply(layer, x, *_affine(self.numbers, width))

    def attend(self, q: Any, key: Any, value: Any, width: int) -> Any:
        scores = keras.ops.matmul(q, keras.ops.transpose(key, (0, 2, 1))) / width**0.5
        return keras.ops.matmul(keras.ops.softmax(scores, -1), value)

    def mean_token(self, x: Any) -> Any:
        return keras.ops.mean(x, 1)


@functools.cache
def both(name: str, dtype: str, seed: int = 11) -> tuple[Callable[[torch.Tensor], torch.Tensor], keras.Model]:
    """Return one network as a function in torch and as a model in Keras."""
    network, _ = NETWORKS[name]
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    x = keras.Input((SIDE, SIDE, 3), dtype=dtype)
    model = keras.Model(x, network(InKeras(dtype, seed), x))
    keras.config.set_floatx(before)
    return lambda image: network(InTorch(getattr(torch, dtype), seed), image), model


def images(dtype: str) -> np.ndarray:
    """Return two images whose choices are far enough apart for float32: see `Nearest`."""
    return np.random.default_rng(17).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32).astype(dtype)


def nearest(name: str, seed: int = 11) -> float:
    """Return the distance of the nearest choice that a network makes on the images."""
    kit = Nearest(seed)
    NETWORKS[name][0](kit, torch.from_numpy(images("float64")))
    return kit.distance


RULES = ("gradient", "deconvnet", "guided")
CAM = "grad-cam:mark"


@functools.cache
def keras_maps(name: str, dtype: str) -> dict[str, np.ndarray]:
    """Return the maps of Keras's network under each rule, `(B, C, H, W)`, Grad-CAMs, `(B, K, H, W)`, and counts."""
    import undertow as ut

    model = both(name, dtype)[1]
    x = np.ascontiguousarray(images(dtype).transpose(0, 2, 3, 1))
    x = torch.from_numpy(x) if keras.backend.backend() == "torch" else x
    found = {rule: ut.explain(model, x, rule=rule, target=2) for rule in RULES}
    maps = {rule: a.numpy().transpose(0, 3, 1, 2) for rule, a in found.items()}
    cam = ut.explain(model, x, rule="gradient", estimator=CAM, target=[list(range(CLASSES))] * 2)
    return maps | {CAM: cam.numpy()[..., 0], "rewired": np.array([a.rewired for a in found.values()])}


@functools.cache
def torch_maps(name: str, dtype: str) -> dict[str, np.ndarray]:
    """Return the same of torch's network; its Grad-CAM by hand, from the equations of arXiv 1610.02391."""
    import undertow as ut

    x = torch.from_numpy(images(dtype))
    found = {rule: ut.explain(both(name, dtype)[0], x, rule=rule, target=2) for rule in RULES}
    kit = InTorch(getattr(torch, dtype), 11)
    scores = NETWORKS[name][0](kit, x.clone().requires_grad_())
    planes = []
    for k in range(CLASSES):
        (gradient,) = torch.autograd.grad(scores[:, k].sum(), kit.marked, retain_graph=True)
        value = kit.marked.detach()
        if value.ndim == 3:  # tokens, row by row
            value, gradient = (t.transpose(1, 2).unflatten(2, (SIDE // 8, SIDE // 8)) for t in (value, gradient))
        planes.append((value * gradient.mean((2, 3), keepdim=True)).sum(1).relu())
    cam = F.interpolate(torch.stack(planes, 1), (SIDE, SIDE), mode="bilinear").numpy()
    counts = np.array([a.rewired for a in found.values()])
    return {rule: a.numpy() for rule, a in found.items()} | {CAM: cam, "rewired": counts}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference of two maps, of the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def on_backend(folder: Path, backend: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return the maps of all networks by Keras on torch or JAX, from a process of its own, by name and rule."""
    file = folder / f"maps-{dtype}.npz"
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_ENABLE_X64": str(int(dtype == "float64"))}
    subprocess.run([sys.executable, __file__, str(file), dtype], env=environment, check=True, capture_output=True)
    with np.load(file) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    maps = {f"{name} {key}": values for name in NETWORKS for key, values in keras_maps(name, sys.argv[2]).items()}
    np.savez(sys.argv[1], **maps)
