"""Inputs that are recognised and then explained, or refused with what to do: other libraries' arrays, no batch axis."""

import subprocess
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut

IMAGE = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0))
CONV = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5)).eval()
POOLED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
NORMED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5)).eval()
ENDED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(4 * 49, 5)).eval()
DENSE = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)).eval()


@pytest.mark.parametrize(
    ("net", "x"),
    [(CONV, IMAGE), (POOLED, IMAGE), (NORMED, IMAGE), (ENDED, IMAGE), (DENSE, torch.randn(6)), (CONV, (IMAGE,))],
)
@pytest.mark.parametrize("options", [{}, {"target": 1}, {"estimator": "smoothgrad:2"}, {"rule": "gradient"}])
def test_a_sample_without_a_batch_axis_is_recognised(net, x, options):
    shape = tuple((x[0] if isinstance(x, tuple) else x).shape)
    with pytest.raises(ut.InputError) as said:
        ut.explain(net, x, **options)
    assert str(said.value) == (
        f"x of shape {shape} looks like one sample without a batch axis; pass x[None], of shape {(1, *shape)}"
    )


@pytest.mark.parametrize(
    ("net", "x", "kind"),
    [
        (CONV, IMAGE[None, :, :5], RuntimeError),  # a batch of the wrong size
        (CONV, IMAGE[:1], RuntimeError),  # of the wrong number of channels, with or without a batch axis
        (DENSE, torch.full((2, 6), float("nan")), ut.ModelError),
        (lambda x: 1 / 0, IMAGE, ZeroDivisionError),
    ],
)
def test_other_errors_are_left_as_they_are(net, x, kind):
    with pytest.raises(kind) as said:
        ut.explain(net, x, rule="gradient")
    assert "batch axis" not in str(said.value)


def test_a_wrong_class_is_the_error_for_a_batch():
    with pytest.raises(ut.TargetError, match="target 7 is out of range"):
        ut.explain(DENSE, torch.randn(2, 6), target=7)


def test_a_numpy_array_is_told_how():
    with pytest.raises(ut.InputError, match=r"x is a NumPy array, .*use torch\.from_numpy\(x\)"):
        ut.explain(CONV, IMAGE[None].numpy())
    with pytest.raises(ut.InputError, match=r"x is a NumPy array, not a torch tensor.* use torch\.from_numpy\(x\)"):
        ut.explain(lambda x: x, IMAGE[None].numpy())


JAX = """
import jax.numpy as jnp, numpy as np, torch, undertow as ut
from undertow.frameworks.base import as_numpy

net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2))
image = torch.arange(243.0).reshape(1, 3, 9, 9).sin()
net(image)
x = jnp.asarray(image.numpy())
try:
    ut.explain(net.eval(), x)
except ut.InputError as error:
    print(error)
a = ut.explain(net, torch.from_numpy(np.array(x)))  # as the message says
assert torch.equal(a.values, ut.explain(net, image).values)
assert np.array_equal(as_numpy(x), np.asarray(x))
"""


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed; the next test does without it")
def test_a_jax_array_is_recognised():
    # in a process of its own: JAX objects to the forks of other tests
    ended = subprocess.run([sys.executable, "-c", JAX], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("x is a JAX array, and the model takes a torch tensor")
    assert "torch.from_numpy(numpy.array(x))" in ended.stdout


@pytest.mark.parametrize(("module", "title"), [("jaxlib._jax", "a JAX array"), ("elsewhere", "a ArrayImpl")])
def test_an_array_is_recognised_by_its_module(module, title):
    class ArrayImpl:
        shape, dtype = (1, 3, 9, 9), np.dtype("float32")

    ArrayImpl.__module__ = module
    with pytest.raises(ut.InputError, match=f"x is {title}, and the model takes a torch tensor"):
        ut.explain(CONV, ArrayImpl())


def test_keras_on_another_backend_is_refused_before_anything_is_imported(monkeypatch):
    class Layer:
        def __call__(self, x):
            return x

    Layer.__module__ = "keras.src.models.sequential"
    keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: "openvino"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    for x in (np.ones((1, 4), np.float32), torch.ones(1, 4)):
        with pytest.raises(
            ut.FrameworkError, match="keras runs on openvino here, where this is not supported; set KERAS_BACKEND="
        ):
            ut.explain(Layer(), x)


class CudnnLike(torch.autograd.Function):
    """Fails in its backward as a cuDNN recurrent layer does in eval mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5))

    def forward(self, x):
        return self.last(CudnnLike.apply(self.first(x)))


@pytest.mark.parametrize("options", [{}, {"rule": "guided"}, {"estimator": "grad-cam:first"}])
def test_a_recurrent_layer_of_cudnn_in_eval_mode_has_a_sentence_of_its_own(options):
    with pytest.raises(ut.ModelError, match=r"no gradient in eval mode; explain inside `with torch\.backends\.cudnn"):
        ut.explain(Failing().eval(), IMAGE[None], **{"rule": "gradient", **options})
