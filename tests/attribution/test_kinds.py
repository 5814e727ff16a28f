"""Every kind of input with every kind of layer and of output: maps in the structure of `x`, equal to the references."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten

import undertow as ut
from attribution.kinds import HEIGHT, IMAGE, INPUTS, LAYERS, OUTPUTS, WIDTH, OneList, OneSequence, network
from frameworks.torch.references import grad_cam, ruled, smoothgrad

CLASS = 2


def plain(x: Any) -> Any:
    """Return `x` as the references take it."""
    inputs = (*x,) if type(x) is list and len({getattr(t, "ndim", None) for t in x}) > 1 else x
    return dict(inputs) if isinstance(inputs, UserDict) else inputs


def of_class(outputs: str, target: int = CLASS) -> Any:
    return lambda output: OUTPUTS[outputs][2](output)[:, target]


def assert_same(values: Any, wanted: Any) -> None:
    """Compare maps in any structure, one for each leaf of `x`, with their references; none is zero."""
    found, expected = tree_flatten(plain(values))[0], tree_flatten(wanted)[0]
    assert [v is None for v in found] == [v is None for v in expected]
    for v, w in zip(found, expected, strict=True):
        if w is not None:
            assert w.abs().sum() > 0
            torch.testing.assert_close(v, w, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_every_input_with_every_layer_and_output(inputs, layers):
    x = INPUTS[inputs][1]
    for outputs, (_, path, _) in OUTPUTS.items():
        net = network(inputs, layers, outputs)
        a = ut.explain(net, x, rule="guided", target=CLASS, output=path)
        wanted, calls = ruled(net, plain(x), of_class(outputs), "guided")
        assert_same(a.values, wanted)
        assert a.rewired == calls == LAYERS[layers].rewired, outputs
        assert type(a.values) is type(x)


@pytest.mark.parametrize("rule", ["gradient", "deconvnet"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_other_rules_and_a_function_of_the_whole_output(inputs, rule):
    x, net = INPUTS[inputs][1], network(inputs, "convolution", "last of a list")
    wanted, _ = ruled(net, plain(x), lambda out: out[0][:, 1] - out[1][:, 2], rule)
    assert_same(ut.explain(net, x, rule=rule, target=lambda out: out[0][:, 1] - out[1][:, 2]).values, wanted)


@pytest.mark.parametrize("inputs", INPUTS)
def test_smoothgrad_of_every_input(inputs):
    x, net = INPUTS[inputs][1], network(inputs, "attention behind a class token", "second of a tuple")
    a = ut.explain(net, x, rule="gradient", target=CLASS, output=1, estimator="smoothgrad:3", seed=2)
    assert_same(a.values, smoothgrad(net, plain(x), of_class("second of a tuple"), 3, seed=2))


@pytest.mark.parametrize("estimator", ["gradient", "smoothgrad:3", "input-times", "grad-cam:layers.0"])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_several_classes_of_every_output(outputs, estimator):
    """Each of them is as asked alone, of a model that returns nothing else."""
    x, path = INPUTS["tensor"][1], OUTPUTS[outputs][1]
    a = ut.explain(network("tensor", "convolution", outputs), x, target="top:2", estimator=estimator, output=path)
    bare = network("tensor", "convolution")
    for place in range(2):
        alone = ut.explain(bare, x, target=a.targets[:, place], estimator=estimator)
        torch.testing.assert_close(a.values[:, place], alone.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [name for name, kind in LAYERS.items() if kind.layer is not None])
@pytest.mark.parametrize("inputs", [name for name, (cls, _) in INPUTS.items() if cls not in (OneList, OneSequence)])
def test_grad_cam_of_every_layer_and_input(inputs, layers):
    """The image has a map; the column beside it, over which no layer lies, has none."""
    x, kind, net = INPUTS[inputs][1], LAYERS[layers], network(inputs, layers, "a path")
    layer = net.layers.get_submodule(kind.layer)
    wanted = grad_cam(net, plain(x), of_class("a path"), layer, kind.as_planes, (HEIGHT, WIDTH))
    maps = [wanted if leaf is IMAGE else None for leaf in tree_flatten(plain(x))[0]]
    for target, path in ((CLASS, "heads.1.b"), (of_class("a path"), None)):
        a = ut.explain(net, x, rule="gradient", target=target, output=path, estimator=f"grad-cam:layers.{kind.layer}")
        assert_same(a.values, maps)
        assert type(a.values) is type(x)


@pytest.mark.parametrize(
    ("inputs", "layers", "layer", "message"),
    [
        ("tensor", "LSTM over rows", "2", "its tokens make no grid"),
        ("a list that is one argument", "convolution", "0", "pass one tensor"),
        ("a list in a tuple", "linear over tokens", "1", "pass one tensor"),
        ("a packed sequence", "linear over tokens", "1", "a place for each sample"),
        ("tensor", "convolution", "1.4", "no layer 'layers.1.4'"),
        ("tuple", "convolution", "1.3", "needs a layer of channels on a plane"),
    ],
)
def test_a_layer_that_does_not_lie_over_the_input_is_refused(inputs, layers, layer, message):
    with pytest.raises(ut.InputError, match=message) as caught:
        ut.explain(network(inputs, layers), INPUTS[inputs][1], target=CLASS, estimator=f"grad-cam:layers.{layer}")
    assert "\n" not in str(caught.value)


def test_a_packed_sequence_has_no_map_of_its_sizes():
    x = INPUTS["a packed sequence"][1]
    a = ut.explain(network("a packed sequence", "convolution"), x, rule="gradient", target=CLASS)
    assert isinstance(a.values, PackedSequence)
    assert a.values.batch_sizes is None
