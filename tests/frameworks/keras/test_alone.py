"""TensorFlow with Keras, where neither torch nor JAX can be imported: every verb, and a reference."""

import os
import subprocess
import sys

ALONE = """
import importlib.abc, sys

OTHERS = {"torch", "torchvision", "timm", "transformers", "jax", "jaxlib", "flax", "equinox"}

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import keras, numpy as np, tempfile, tensorflow as tf, undertow as ut
from keras import layers

net = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu", name="c"), layers.Flatten(),
                        layers.Dense(3, name="h")])
x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
assert ut.explain(net, x).rewired == 1
assert ut.explain(net, x, estimator="grad-cam:c", rule="gradient").values.shape == (2, 8, 8, 1)
assert len(ut.trust(net, x[:1]).answers) == 6
with ut.record(tempfile.mkdtemp(), net, sites="**", diagnose=1) as recording:
    with recording.batch():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x) ** 2)
        tape.gradient(loss, net.trainable_variables)
print(sorted(name for name, answer in ut.diagnose(recording.folder).checked.items() if answer == "checked"))
assert [call.verdict for call in ut.trace(net, x)] == ["equal"] * 3
with ut.redirect(net, {"c": ut.redirect.zero()}), tf.GradientTape() as tape:
    loss = tf.reduce_sum(net(x))
    tape.gradient(loss, net.trainable_variables)
assert ut.derive.from_model(net, x).order == ["x", "c", "flatten", "h"]
net.save(file := tempfile.mkdtemp() + "/net.keras")
print(len(ut.load(file).names))
try:
    ut.load("timm:resnet18")
except ut.FrameworkError as error:
    print(error)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "flax"}))
"""


def test_tensorflow_alone():
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    checked, names, refused, imported = done.stdout.strip().splitlines()[-4:]
    assert "pooling" in checked
    assert names == "3"
    assert "is not installed; run: pip install " in refused
    assert imported == "[]"
