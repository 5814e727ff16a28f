"""JAX without the other frameworks, the others without JAX, and the names of JAX that it does not export."""

import subprocess
import sys

import jax

from undertow.frameworks.jax import internals
from undertow.frameworks.jax.graph import graph_of

BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
WITHOUT_OTHERS = """
import functools, jax, jax.numpy as jnp, undertow as ut

def network(params, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ params["w"]) @ params["v"]

params = {"w": jnp.ones((48, 6)) / 7, "v": jnp.eye(6)[:, :3]}
model, x = functools.partial(network, params), jnp.linspace(-1, 2, 48).reshape(1, 4, 4, 3)
a = ut.explain(model, x, target=1)
assert a.rewired == 1 and abs(float(a.values.sum()) - 48 / 7) < 1e-4
print(ut.explain(model, x, estimator="smoothgrad:2"), a.image(0).size)
verdict = ut.trust(model, jnp.tile(x, (1, 4, 4, 1))[:, :4, :4], rule="gradient")
print(sorted(verdict.answers))
try:
    ut.load("timm:resnet18")
except ut.FrameworkError as error:
    print(error)
"""
WITHOUT_JAX = """
import torch, undertow as ut
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
ut.explain(net, torch.ones(2, 4))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"jax", "jaxlib", "flax", "equinox"}))
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_jax_alone():
    out = run(BLOCKED.format(names={"torch", "torchvision", "timm", "tensorflow", "keras"}) + WITHOUT_OTHERS)
    assert "smoothgrad:2" in out
    assert "weights" in out
    assert "torch is not installed; run: pip install " in out


def test_torch_alone():
    assert run("import sys" + WITHOUT_JAX).strip() == "[]"
    assert run(BLOCKED.format(names={"jax", "jaxlib", "flax", "equinox"}) + WITHOUT_JAX).strip() == "[]"


def test_the_names_that_jax_does_not_export_are_there():
    closed = jax.make_jaxpr(lambda x: jax.nn.relu(jax.jit(lambda y: y * 2)(x)))(1.0)
    call, relu = closed.eqns
    assert internals.function_name(internals.body_of_custom(relu).jaxpr) == "relu"
    assert internals.is_of_jax(internals.body_of_custom(relu).jaxpr)
    assert not internals.is_of_jax(internals.body_of_call(call).jaxpr)
    assert internals.bind(graph_of(closed).nodes[0].eqn, [1.5, 2.0])[0] == 3.0


def test_settings_are_part_of_what_a_trace_depends_on():
    before = internals.trace_context()
    with jax.enable_x64(True):
        assert internals.trace_context() != before
    assert internals.trace_context() == before
