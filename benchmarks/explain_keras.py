"""Guided backpropagation of Keras networks side by side: undertow, the plain input gradient, tf-keras-vis.

    pip install -c constraints.txt -e '.[keras]' tf-keras-vis
    python benchmarks/explain_keras.py --markdown benchmarks/explain_keras.md

All methods explain the same class of the same batch of the same network in one process, in a new random order each
round; a figure is the median over rounds of the ratio to the plain gradient of the same round. The plain gradient is
that of a `tf.GradientTape` inside a `tf.function`, which is the fastest that Keras people have; the same tape without
one stands beside it. The first call of each method, which traces, is timed apart. A method is marked where its map
differs from the guided map that `tests/frameworks/keras/references.py` gives.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import undertow as ut

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from frameworks.keras.references import reference

TARGET = 3
SMOOTH = ("EfficientNetB0 b4",)  # whose activations are not ReLUs: undertow is told activations="all"
Method = Callable[[Any, Any], Callable[[], Any]]


def mlp() -> keras.Model:
    """A hundred ReLUs and hardly any arithmetic: the method alone."""
    layers = [layer for _ in range(100) for layer in (keras.layers.Dense(64), keras.layers.ReLU())]
    return keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10)])


NETWORKS = {
    "ResNet50 b8": ("ResNet50", (8, 224, 224, 3)),
    "VGG16 b1": ("VGG16", (1, 224, 224, 3)),
    "DenseNet201 b2": ("DenseNet201", (2, 224, 224, 3)),
    "MobileNetV2 b8": ("MobileNetV2", (8, 224, 224, 3)),
    "EfficientNetB0 b4": ("EfficientNetB0", (4, 224, 224, 3)),
    "100-ReLU MLP": ("mlp", (1, 64)),
}


def load(name: str) -> tuple[keras.Model, Any]:
    network, shape = NETWORKS[name]
    keras.utils.set_random_seed(0)
    build = getattr(keras.applications, network, None)
    model = mlp() if build is None else build(weights=None, classifier_activation=None)
    return model, tf.constant(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def _gradient(model: keras.Model, x: Any) -> Any:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        scores = tf.reduce_sum(model(x, training=False)[:, TARGET])
    return tape.gradient(scores, x)


def plain(model: keras.Model, x: Any) -> Callable[[], Any]:
    traced = tf.function(lambda v: _gradient(model, v), autograph=False)
    return lambda: traced(x).numpy()


def eager(model: keras.Model, x: Any) -> Callable[[], Any]:
    return lambda: _gradient(model, x).numpy()


def undertow(model: keras.Model, x: Any, activations: str = "relu-like") -> Callable[[], Any]:
    options = {"rule": "guided", "target": TARGET, "activations": activations}
    return lambda: ut.explain(model, x, **options).values.numpy()


def tf_keras_vis(model: keras.Model, x: Any) -> Callable[[], Any]:
    from tf_keras_vis.saliency import Saliency
    from tf_keras_vis.utils.model_modifiers import GuidedBackpropagation
    from tf_keras_vis.utils.scores import CategoricalScore

    method = Saliency(model, model_modifier=GuidedBackpropagation(), clone=True)
    score, image = CategoricalScore([TARGET] * len(x)), x.numpy()
    return lambda: method(score, image, keepdims=True, normalize_map=False, gradient_modifier=None)


METHODS: dict[str, Method] = {
    "plain gradient, tf.function": plain,
    "plain gradient, eager": eager,
    "undertow": undertow,
    "tf-keras-vis": tf_keras_vis,
}


def agreement(method: str, values: np.ndarray, guided: np.ndarray, gradient: np.ndarray) -> str:
    """Say whether a map is the guided one; the plain gradient is not meant to be."""
    if method.startswith("plain"):
        return "-"
    off, from_plain = (np.linalg.norm(values - other) / np.linalg.norm(other) for other in (guided, gradient))
    if off < 1e-5:
        return f"right ({off:.0e} off)"
    return "the plain gradient" if from_plain < 1e-5 else f"{100 * off:.2g} % off"


def times(name: str, rounds: int) -> dict[str, tuple[float, float, float, str]]:
    """Return, for each method, the first call's seconds, median milliseconds and ratio, and whether it was right."""
    model, x = load(name)
    activations = "all" if name in SMOOTH else "relu-like"
    guided, _ = reference(model, x, TARGET, "guided", activations)
    gradient = _gradient(model, x).numpy()
    calls, verdicts, first = {}, {}, {}
    for method, make in METHODS.items():
        started = time.perf_counter()
        calls[method] = make(model, x) if method != "undertow" else undertow(model, x, activations)
        values = np.asarray(calls[method]())
        first[method] = time.perf_counter() - started
        verdicts[method] = agreement(method, values, guided, gradient)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method in random.sample(list(METHODS), len(METHODS)):
            started = time.perf_counter()
            calls[method]()
            seconds[method].append(time.perf_counter() - started)
    base = seconds["plain gradient, tf.function"]
    return {
        method: (
            first[method],
            1e3 * statistics.median(times_taken),
            statistics.median(t / b for t, b in zip(times_taken, base, strict=True)),
            verdicts[method],
        )
        for method, times_taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds for each network; the MLP gets 30 times as many")
    parser.add_argument("--only", choices=NETWORKS, help="one network")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        import tf_keras_vis  # noqa: F401
    except ImportError:
        del METHODS["tf-keras-vis"]
    machine = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python {platform.python_version()}"
    lines = [f"{machine}, {os.cpu_count()} cores; medians over rounds in random order.", ""]
    lines += [
        "| network | method | first call s | ms | x plain gradient | guided map |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name in [options.only] if options.only else NETWORKS:
        rounds = options.rounds * (30 if name.endswith("MLP") else 1)
        for method, (first, ms, ratio, verdict) in times(name, rounds).items():
            lines.append(f"| {name} | {method} | {first:.1f} | {ms:.1f} | {ratio:.3f} | {verdict} |")
            print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
