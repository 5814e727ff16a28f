"""Grad-CAM of layers in any layout, against autograd and torch's interpolation alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from frameworks.torch.references import grad_cam
from undertow.layouts import Layout, find_layout


class Shaped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def pooled(channels):
    return nn.Sequential(nn.Flatten(2), Shaped(lambda v: v.mean(2)), nn.Linear(channels, 3))


def class_token(v):
    return torch.cat([v.mean(1, keepdim=True), v], 1)


def plane():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), Shaped(lambda v: v.movedim(1, -1)))


def reference(net, x, target, layer, as_planes=lambda t: t):
    return grad_cam(net, x, lambda scores: scores[:, target], layer, as_planes, x.shape[2:])


def test_a_layer_behind_which_only_the_class_token_is_read_is_refused():
    tokens = nn.Sequential(nn.Flatten(1, 2), Shaped(class_token), nn.LayerNorm(8))
    net = nn.Sequential(plane(), tokens, Shaped(lambda v: v[:, 0]), nn.Linear(8, 3))
    with pytest.raises(ut.InputError, match="read only tokens without a place in the input"):
        ut.explain(net, torch.randn(1, 3, 16, 12), rule="gradient", target=1, estimator="grad-cam:1")


def test_tokens_are_not_laid_over_their_features():
    net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), Shaped(lambda v: v.mean(1)), nn.Linear(16, 3)).eval()
    texts = nn.Sequential(Shaped(lambda v: v.mT), nn.Conv1d(16, 5, 3), nn.ReLU(), pooled(5)).eval()
    for model, layer in ((net, "0"), (net, "1"), (net, "1:btc"), (texts, "1"), (texts, "2:bct")):
        with pytest.raises(ut.InputError, match=r"x of \(2, 7, 16\) may be tokens .* estimator='input-times'"):
            ut.explain(model, torch.randn(2, 7, 16), rule="gradient", target=1, estimator=f"grad-cam:{layer}")


def test_images_with_their_channels_last_are_refused():
    net = nn.Sequential(Shaped(lambda v: v.movedim(-1, 1)), nn.Conv2d(3, 8, 3, 2, 1), pooled(8)).eval()
    with pytest.raises(ut.InputError, match=r"looks like images \(B, H, W, C\).*wrap the model"):
        ut.explain(net, torch.randn(1, 16, 12, 3), rule="gradient", target=1, estimator="grad-cam:1")


def test_lines_that_could_be_tokens_are_asked_for():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv1d(12, 5, 4, 4), nn.GELU(), pooled(5)).double().eval()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    with pytest.raises(ut.InputError, match=r"if it is lines .* pass axes='bcl'"):
        ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:0")
    a = ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:0", axes="bcl")
    torch.testing.assert_close(a.values, reference(net, x, 1, net[0]))


def test_grad_cam_of_a_line_and_of_a_volume():
    torch.manual_seed(1)
    line = nn.Sequential(nn.Conv1d(2, 6, 4, 4), nn.GELU(), pooled(6)).double()
    x = torch.randn(2, 2, 32, dtype=torch.float64)
    attribution = ut.explain(line, x, rule="gradient", target=0, estimator="grad-cam:0")
    torch.testing.assert_close(attribution.values, reference(line, x, 0, line[0]))
    volume = nn.Sequential(nn.Conv3d(2, 6, (2, 4, 4), (2, 4, 4)), nn.GELU(), pooled(6)).double()
    x = torch.randn(2, 2, 4, 8, 12, dtype=torch.float64)
    attribution = ut.explain(volume, x, rule="gradient", target=0, estimator="grad-cam:0")
    torch.testing.assert_close(attribution.values, reference(volume, x, 0, volume[0]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), pooled(4)

    def forward(self, x):
        return self.head(self.shared(self.shared(self.first(x)).tanh()))


def test_a_layer_that_runs_twice_counts_with_both_calls():
    torch.manual_seed(2)
    net, x = Twice().double(), torch.randn(1, 3, 8, 6, dtype=torch.float64)
    both = ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:shared").values
    torch.testing.assert_close(both, reference(net, x, 1, net.shared))
    second = ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:shared@1").values
    assert not torch.allclose(second, both)
    with pytest.raises(ut.InputError, match="layer 'shared@2' is not on the way"):
        ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:shared@2")


def test_a_convolution_within_does_not_tell_of_tokens():
    """The 16 tokens have 16 channels each; the convolution's own are in second place, the tokens' are not."""
    torch.manual_seed(5)
    embedding = nn.Sequential(nn.Conv2d(3, 16, 4, 4), Shaped(lambda v: v.flatten(2).mT))
    net = nn.Sequential(embedding, Shaped(lambda v: v.tanh().mT), pooled(16)).double().eval()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ut.InputError, match="cannot be told; pass axes='btc' or 'bct'"):
        ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:0")
    wanted = reference(net, x, 1, net[0], lambda t: t.mT.unflatten(2, (4, 4)))
    a = ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:0", axes="btc")
    torch.testing.assert_close(a.values, wanted)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), pooled(4)

    def forward(self, a, b, column=None):
        scores = self.head(self.trunk(a)) * self.head(self.trunk(b))
        return scores if column is None else scores * column


def test_each_of_several_inputs_has_the_calls_that_read_it():
    torch.manual_seed(4)
    net, outputs = Siamese().double().eval(), []
    a, b = torch.randn(2, 3, 8, 6, dtype=torch.float64), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    handle = net.trunk.register_forward_hook(lambda _, __, output: outputs.append(output))
    gradients = torch.autograd.grad(net(a, b)[:, 1].sum(), outputs)
    handle.remove()
    wanted = [
        F.interpolate(
            (v.detach() * g.mean((2, 3), keepdim=True)).sum(1, keepdim=True).clamp(min=0), x.shape[2:], mode="bilinear"
        )
        for v, g, x in zip(outputs, gradients, (a, b), strict=True)
    ]
    values = ut.explain(net, (a, b), rule="gradient", target=1, estimator="grad-cam:trunk").values
    torch.testing.assert_close(values, tuple(wanted))
    second = ut.explain(net, {"a": a, "b": b}, rule="gradient", target=1, estimator="grad-cam:trunk@1").values
    assert second["a"] is None
    torch.testing.assert_close(second["b"], wanted[1])
    column = torch.ones(2, 3, dtype=torch.float64)
    values = ut.explain(net, (a, b, column), rule="guided", target=1, estimator="guided-grad-cam:trunk").values
    guided = ut.explain(net, (a, b), rule="guided", target=1).values
    torch.testing.assert_close(values, (guided[0] * wanted[0], guided[1] * wanted[1], None))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_of_a_graph_that_has_no_modules_are_refused():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), pooled(4)).eval(), torch.randn(1, 3, 8, 6)
    for graph in (torch.jit.trace(net, x), torch.export.export(net, (x,)).module()):
        with pytest.raises(ut.InputError, match="layer '0' does not run as a module in TorchScript or an exported"):
            ut.explain(graph, x, rule="gradient", target=1, estimator="grad-cam:0")


def test_a_cut_gradient_and_one_that_is_no_number_are_said_of_layers_too():
    x = torch.randn(1, 3, 8, 6)
    cut = nn.Sequential(nn.Conv2d(3, 4, 3), pooled(4), Shaped(torch.Tensor.detach)).eval()
    with pytest.raises(ut.InputError, match="do not depend on x by any gradient: it ends in '2'"):
        ut.explain(cut, x, rule="gradient", target=1, estimator="grad-cam:0")
    root = nn.Sequential(nn.Conv2d(3, 4, 3), Shaped(lambda v: (v - v.detach()).pow(2).sqrt()), pooled(4)).eval()
    with pytest.raises(ut.ModelError, match="gradient is NaN, first at PowBackward0"):
        ut.explain(root, x, rule="gradient", target=1, estimator="grad-cam:0")


@pytest.mark.parametrize("axes", ["bchw", "bhwc"])
def test_what_cannot_be_told_is_asked_for(axes):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), pooled(8)).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(ut.InputError, match=r"gives \(1, 8, 8, 8\).*cannot be told; pass axes='bchw' or 'bhwc'"):
        ut.explain(net, x, rule="gradient", target=1, estimator="grad-cam:1")
    wanted = reference(net, x, 1, net[1], (lambda t: t) if axes == "bchw" else (lambda t: t.movedim(-1, 1)))
    for options in ({"estimator": "grad-cam:1", "axes": axes}, {"estimator": f"grad-cam:1:{axes}"}):
        attribution = ut.explain(net, x, rule="gradient", target=1, **options)
        assert attribution.estimator == f"grad-cam:1:{axes}"
        torch.testing.assert_close(attribution.values, wanted)


@pytest.mark.parametrize(
    ("shape", "input_shape", "more", "layout"),
    [
        ((1, 512, 14, 14), (1, 3, 224, 224), {}, Layout(1, (14, 14))),
        ((1, 14, 14, 512), (1, 3, 224, 224), {}, Layout(-1, (14, 14))),
        ((1, 197, 768), (1, 3, 224, 224), {}, Layout(-1, (14, 14), 1)),
        ((1, 201, 384), (1, 3, 224, 224), {}, Layout(-1, (14, 14), 5)),
        ((1, 3136, 96), (1, 3, 224, 224), {}, Layout(-1, (56, 56))),
        ((1, 768, 49), (1, 3, 224, 224), {}, Layout(1, (7, 7))),
        ((1, 14, 13, 13), (1, 3, 28, 28), {}, Layout(1, (13, 13))),
        ((1, 64, 13, 20), (1, 3, 100, 150), {}, Layout(1, (13, 20), is_exact=False)),
        ((1, 512, 2, 7, 7), (1, 3, 16, 112, 112), {"channel_axis": 1}, Layout(1, (2, 7, 7), is_exact=False)),
        ((1, 8, 8, 8), (1, 3, 32, 32), {"channel_axis": -1}, Layout(-1, (8, 8))),
        ((1, 5, 2, 16), (1, 3, 64, 64), {"axes": "bcft"}, Layout(1, (2, 16), is_exact=False)),
    ],
)
def test_a_layout_is_found(shape, input_shape, more, layout):
    assert find_layout("layer", shape, input_shape, **more) == layout


@pytest.mark.parametrize(
    ("shape", "input_shape", "more", "message"),
    [
        ((1, 8, 8, 8), (1, 3, 32, 32), {}, "cannot be told; pass axes='bchw' or 'bhwc'"),
        (
            (1, 64, 7, 7),
            (1, 3, 28, 28),
            {"channel_axis": -1},
            "cannot be told",
        ),  # a module that lays its output out anew
        ((1, 5, 2, 16), (1, 3, 64, 64), {}, "cannot be told"),
        ((1, 92, 64), (1, 3, 224, 224), {"axes": "btc"}, "with axes 'btc' its tokens make no grid"),
        ((1, 28, 64), (1, 1, 28, 28), {}, "tokens make no grid"),  # rows, as an LSTM takes them
        ((1, 28, 64), (1, 1, 28, 28), {"channel_axis": -1}, "tokens make no grid"),
        ((1, 1569, 384), (1, 3, 16, 224, 224), {}, "tokens make no grid"),  # 8 x 14 x 14, not 2 x 28 x 28
        ((1, 100, 256), (1, 3, 640, 640), {"channel_axis": -1}, "tokens make no grid"),  # a detector's queries
        ((1, 8400, 4), (1, 3, 640, 640), {}, "tokens make no grid"),  # its boxes
        ((64, 49, 96), (1, 3, 224, 224), {}, "a place for each sample"),
        ((1, 8, 8, 8), (1, 3, 32, 32), {"axes": "bhcw"}, "axes 'bhcw' are not understood"),
        ((1, 8, 8, 8), (1, 3, 32, 32), {"axes": "bhw"}, "a letter for each of the layer's 4 axes"),
        ((1, 8), (1, 3, 32, 32), {}, "needs a layer of channels on a plane"),
    ],
)
def test_a_layout_that_is_none_is_refused(shape, input_shape, more, message):
    with pytest.raises(ut.InputError, match=message):
        find_layout("layer", shape, input_shape, **more)
