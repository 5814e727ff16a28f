"""Networks of JAX by reference, in Python and on the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import undertow as ut

NET = """
import jax, jax.numpy as jnp
import equinox as eqx
from flax import linen

SIZE = {"resize": 16, "crop": 16}

def function():
    w = jax.random.normal(jax.random.key(0), (768, 8))
    return {"module": lambda x: jax.nn.relu(x.reshape(len(x), -1) @ w) @ jnp.eye(8)[:, :3],
            "preprocessing": SIZE, "classes": ["ant", "bee", "cow"]}

class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.relu(linen.Conv(4, (3, 3))(x)).mean((1, 2)))

def pair():
    net = Net()
    return {"module": (net, net.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))), "preprocessing": SIZE}

class Unbatched(eqx.Module):
    conv: eqx.nn.Conv2d

    def __call__(self, x):
        return jax.nn.relu(self.conv(x)).mean((1, 2))

def unbatched():
    return {"module": Unbatched(eqx.nn.Conv2d(3, 5, 3, key=jax.random.key(0))), "preprocessing": SIZE}

def nothing():
    return 3

def failing():
    return lambda x: x @ jnp.ones((7, 7))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jax")
    (folder / "net.py").write_text(NET)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder / "net.py"


@pytest.mark.parametrize(("name", "classes", "layers"), [("function", 3, 0), ("pair", 3, 4), ("unbatched", 5, 2)])
def test_what_a_file_returns(file, name, classes, layers):
    classifier = ut.load(f"jax:{file}:{name}")
    assert len(classifier.classes) == classes
    assert len(classifier.module.weights) == layers
    batch = classifier.prepare(file.with_name("photo.png"))
    assert batch.shape == (1, 16, 16, 3)
    a = ut.explain(classifier, batch, target=classifier.id(1))
    assert (a.values.shape, a.rewired, a.channels_last) == (batch.shape, 1, True)
    assert a.names == {1: classifier.classes[1]}


def test_a_module_needs_no_prefix(file):
    assert ut.load(f"{file}:pair").weights_sha256 == ut.load(f"jax:{file}:pair").weights_sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "must return a network, or a dict with module, preprocessing, classes, output, not int"),
        ("failing", r"does not run on an input \(1, 224, 224, 3\)"),
    ],
)
def test_what_is_no_network_is_refused(file, name, message):
    with pytest.raises(ut.ModelError, match=message):
        ut.load(f"jax:{file}:{name}")
    with pytest.raises(ut.ModelError, match="must load its weights itself"):
        ut.load(f"jax:{file}:function", weights="w.safetensors")
    with pytest.raises(ut.ModelError, match="unknown model 'jax:resnet'"):
        ut.load("jax:resnet")


def test_the_command(file, tmp_path):
    command = [sys.executable, "-m", "undertow", "explain", str(file.with_name("photo.png")), "--model"]
    options = ["--target", "bee", "--out", str(tmp_path), "--json"]
    done = subprocess.run([*command, f"jax:{file}:function", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bee" in json.dumps(json.loads(done.stdout))
    assert any(tmp_path.rglob("*.png"))
