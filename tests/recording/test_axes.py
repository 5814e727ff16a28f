"""Samples and channels: only one sample is in the loss, so by autograd every other one's rows are zero."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.errors import InputError
from undertow.frameworks.torch.record.axes import Axes, Layouts, arranged, from_letters
from undertow.measures import stats

NAMES = list("abcd")


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    """A block of tokens, of a class that nobody knows, with GPT-2's layers in it."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.c_fc, self.c_proj = nn.LayerNorm(width), Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, x):
        return x + self.c_proj(torch.tanh(self.c_fc(self.norm(x))))


class RootMeanSquare(nn.Module):
    """A norm over features with a weight, as language models write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


class ChannelsLast(nn.Module):
    """ConvNeXt's block: (B, H, W, C) inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Attends(nn.Module):
    def __init__(self, width, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=batch_first)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class First(nn.Module):
    """The first output of a recurrent layer, so that the rest can be a sequence."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def tokens(batch_axis, width=6, length=5, n=4):
    return torch.randn((n, length, width) if batch_axis == 0 else (length, n, width))


ENCODER = {"d_model": 6, "nhead": 1, "dim_feedforward": 7, "dropout": 0.0}


def encoder(first):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**ENCODER, batch_first=first), 2, enable_nested_tensor=False
    )


# network, the site in it, the input, the axes (samples, channels) of the site's output
TABLE = {
    "LSTM": (First(nn.LSTM(6, 3)), "rnn", tokens(1), (1, 2)),
    "LSTM, batch first": (First(nn.LSTM(6, 3, batch_first=True)), "rnn", tokens(0), (0, 2)),
    "GRU, both ways": (First(nn.GRU(6, 3, bidirectional=True)), "rnn", tokens(1), (1, 2)),
    "RNN, two layers": (First(nn.RNN(6, 3, num_layers=2)), "rnn", tokens(1), (1, 2)),
    "attention": (Attends(6, False), "attention", tokens(1), (1, 2)),
    "attention, batch first": (Attends(6, True), "attention", tokens(0), (0, 2)),
    "encoder": (nn.Sequential(encoder(False)), "0", tokens(1), (1, 2)),
    "encoder, batch first": (nn.Sequential(encoder(True)), "0", tokens(0), (0, 2)),
    "in an encoder": (encoder(False), "layers.0.linear1", tokens(1), (1, 2)),
    "norm in an encoder": (encoder(False), "layers.1.norm1", tokens(1), (1, 2)),
    "in an encoder, batch first": (encoder(True), "layers.0.linear1", tokens(0), (0, 2)),
    "linear behind time": (nn.Sequential(First(nn.LSTM(6, 3)), nn.Linear(3, 2)), "1", tokens(1), (1, 2)),
    "activation behind time": (nn.Sequential(First(nn.LSTM(6, 3)), nn.Tanh()), "1", tokens(1), (1, 2)),
    "embedding before time": (
        nn.Sequential(nn.Embedding(9, 6), First(nn.LSTM(6, 3))),
        *("0", torch.arange(20).reshape(5, 4) % 9, (1, 2)),
    ),
    "convolution before time": (
        nn.Sequential(nn.Conv1d(6, 6, 1), nn.Tanh(), nn.Flatten(2), First(nn.LSTM(5, 3, batch_first=True))),
        *("0", torch.randn(4, 6, 5), (0, 1)),
    ),
    "GPT-2's linear": (nn.Sequential(Block(6)), "0.c_fc", tokens(0), (0, 2)),
    "GPT-2's block": (nn.Sequential(Block(6), nn.Linear(6, 2)), "0", tokens(0), (0, 2)),
    "a norm of one's own": (nn.Sequential(nn.Linear(6, 3), RootMeanSquare(3)), "1", tokens(0), (0, 2)),
    "activation among linears": (nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 2)), "1", tokens(0), (0, 2)),
    "activation among convolutions": (
        nn.Sequential(nn.Conv1d(6, 3, 3, padding=1), nn.GELU(), nn.Conv1d(3, 2, 1)),
        *("1", torch.randn(4, 6, 5), (0, 1)),
    ),
    "layer norm of an image": (
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.LayerNorm([3, 5, 6])),
        *("1", torch.randn(4, 2, 5, 6), (0, 1)),
    ),
    "layer norm, channels last": (nn.Sequential(nn.LayerNorm(6)), "0", torch.randn(4, 5, 3, 6), (0, 3)),
    "ConvNeXt's activation": (
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), ChannelsLast(6)),
        *("1.act", torch.randn(4, 2, 5, 5), (0, 3)),
    ),
    "ConvNeXt's block": (
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Sequential(nn.Conv2d(6, 6, 1), ChannelsLast(6))),
        *("1.0", torch.randn(4, 2, 5, 5), (0, 1)),
    ),
    "pool": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2)), "1", torch.randn(4, 2, 7, 9), (0, 1)),
    "transposed convolution": (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), "0", torch.randn(4, 2, 3, 5), (0, 1)),
    "linear": (nn.Sequential(nn.Linear(6, 3)), "0", torch.randn(4, 6), (0, 1)),
}


@pytest.mark.parametrize("diagnose", [False, 1], ids=["plain", "watched"])
@pytest.mark.parametrize(("model", "site", "x", "axes"), TABLE.values(), ids=TABLE)
def test_rows_bear_their_own_samples_names(model, site, x, axes, diagnose, tmp_path):
    (samples, channels), outputs = axes, []
    handle = model.get_submodule(site).register_forward_hook(
        lambda _, __, y: outputs.append(y if isinstance(y, torch.Tensor) else y[0])
    )

    def loss():
        out = model(x)
        axis = next(i for i, size in enumerate(out.shape) if size == len(NAMES))
        return out.select(axis, 2).square().sum()

    by_autograd = torch.autograd.grad(loss(), outputs[0])[0]
    handle.remove()
    kept_in = {"channel-norm": "channel_norm", "keep": "kept"}
    options = {"sites": [site], "measures": list(kept_in), "diagnose": diagnose}
    with ut.record(tmp_path, model, **options) as recording, recording.batch(samples=NAMES):
        loss().backward()
    run = ut.Run(tmp_path)
    rows = [row for row in run.table("channel_norm").to_pylist() if row["output"] in ("", "0")]
    assert [row["name"] for row in rows] == NAMES
    in_order = by_autograd.movedim((samples, channels), (0, 1))
    wanted = in_order.reshape(*in_order.shape[:2], -1).norm(dim=2)
    np.testing.assert_allclose(np.array([row["values"] for row in rows]), wanted, rtol=1e-5, atol=1e-7)
    assert [bool(np.any(row["values"])) for row in rows] == [False, False, True, False]
    kept = [array for row, array in run.tensors(site=site) if row["output"] in ("", "0")]
    np.testing.assert_array_equal(kept[0], by_autograd.numpy())
    assert run.table("batches")["size"].to_pylist() == [4]
    letters = run.manifest["sites"]["axes"][site]
    assert next(letters[key] for key in ("", "0") if key in letters) == Axes(samples, channels).letters(
        by_autograd.ndim
    )


def test_as_many_steps_as_samples_are_told_apart_by_class_or_by_the_user_alone(tmp_path):
    model, x = nn.Sequential(First(nn.LSTM(5, 5)), nn.Linear(5, 5)), torch.randn(4, 4, 5)

    def rows(folder, sites, **options):
        options |= {"sites": sites, "measures": "channel-norm"}
        with ut.record(folder, model, **options) as recording, recording.batch(samples=NAMES):
            model(x)[:, 2].square().sum().backward()
        run = ut.Run(folder)
        rows = [row for row in run.table("channel_norm").to_pylist() if row["output"] in ("", "0")]
        return run, {row["name"]: bool(np.any(row["values"])) for row in rows}

    third = dict(zip(NAMES, (False, False, True, False), strict=True))
    assert rows(tmp_path / "rnn", "0.rnn")[1] == third
    with pytest.warns(UserWarning, match=r"no names at 1: it is not sure .* axes={'head': 'tbc'}"):
        run, found = rows(tmp_path / "unsure", "1")
    assert found == {None: True}
    assert run.manifest["sites"]["axes"]["1"] == {"": "--c"}
    assert run.manifest["sites"]["unsure"] == {"1": "which axis holds the samples"}
    assert run.table("batches")["size"].to_pylist() == [4]
    run, found = rows(tmp_path / "said", "1", axes={"linear": "tbc"})
    assert found == third
    assert run.manifest["axes"] == {"linear": "tbc"}
    assert run.manifest["sites"]["unsure"] == {}
    assert rows(tmp_path / "for all", "1", axes="tbc")[1] == third


def test_the_number_of_samples_is_that_of_the_time_first_layer_or_unknown(tmp_path):
    model = nn.Sequential(First(nn.LSTM(5, 5)), nn.Linear(5, 5))
    with ut.record(tmp_path / "a", model, sites="1", measures="histogram") as recording, recording.batch():
        model(torch.randn(6, 4, 5)).mean().backward()
    assert ut.Run(tmp_path / "a").table("batches")["size"].to_pylist() == [4]
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 4, 5), torch.tensor([6, 3, 2, 1]))
    with ut.record(tmp_path / "b", model, sites="0.rnn", measures="histogram") as recording, recording.batch():
        model[0](packed).data.sum().backward()
    assert ut.Run(tmp_path / "b").table("batches")["size"].to_pylist() == [4]
    tokens = nn.Sequential(nn.Flatten(0, 1), nn.Tanh())
    with ut.record(tmp_path / "c", tokens, sites="1", measures="histogram", axes="-c") as recording, recording.batch():
        tokens(torch.randn(2, 3, 5, requires_grad=True)).mean().backward()
    assert ut.Run(tmp_path / "c").table("batches")["size"].to_pylist() == [1]


def test_a_mean_cannot_be_undone_where_the_samples_are_unknown(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), First(nn.LSTM(5, 5)))
    with ut.record(tmp_path, model, sites="0.0", measures="histogram") as recording, recording.batch():
        model[0](torch.randn(3, 3, 5)).mean().backward()  # the recurrent layer, which would tell, does not run
    run = ut.Run(tmp_path)
    assert run.table("batches")["size"].to_pylist() == [0]
    assert run.quantiles([0.5], of="value")[0].count == 45
    with pytest.raises(InputError, match=r"how many samples .* samples= or axes="):
        run.quantiles([0.5], of="value", per_sample=True)


@pytest.mark.parametrize("letters", ["", "xyz", "bbc", 3])
def test_axes_that_say_nothing_are_refused(letters, tmp_path):
    with pytest.raises(InputError, match="a letter for each"):
        ut.record(tmp_path / "run", nn.Linear(2, 2), sites="linear", axes={"linear": letters})
    with pytest.raises(InputError, match="select nothing"):
        ut.record(tmp_path / "run", nn.Linear(2, 2), sites="linear", axes={"conv": "bc"})


@pytest.mark.parametrize(
    ("letters", "equation"),
    [
        ("bchw", "bchw->bchw"),
        ("hbwc", "hbwc->bchw"),
        ("cbhw", "cbhw->bchw"),
        ("hwcb", "hwcb->bchw"),
        ("chwb", "chwb->bchw"),
        ("hwbt", "hwbt->bhwt"),
        ("thwc", "thwc->cthw"),
    ],
)
def test_arrangements_by_hand(letters, equation):
    x = torch.randn(2, 3, 4, 5)
    wanted = torch.einsum(equation, x)
    assert torch.equal(arranged(nn.Identity(), x, from_letters(letters)), wanted if "b" in letters else wanted[None])


def test_letters_that_do_not_fit_are_told_at_the_first_batch(tmp_path):
    model = nn.Sequential(nn.Linear(5, 3))

    def record(**options):
        with ut.record(tmp_path, model, sites="0", measures="norm", **options) as recording, recording.batch():
            model(torch.randn(2, 5)).sum().backward()

    with pytest.raises(InputError, match="axes 'tbc' were given for 0, whose output has 2 axes"):
        record(axes={"linear": "tbc"})


def test_axes_of_a_network_of_one_layer(tmp_path):
    model, x = nn.Linear(5, 3), torch.randn(6, 4, 5)
    options = {"sites": "linear", "measures": "channel-norm", "axes": "tbc", "phase": "forward"}
    with ut.record(tmp_path, model, **options) as recording, recording.batch(samples=NAMES):
        out = model(x)
    rows = ut.Run(tmp_path).table("channel_norm").to_pylist()
    assert [row["name"] for row in rows] == NAMES
    np.testing.assert_allclose([row["values"] for row in rows], out.detach().norm(dim=0), rtol=1e-5)


def test_gpt2s_conv1d_is_linear():
    model = nn.Sequential(Block(4), nn.Conv1d(1, 1, 1))
    assert [site.name for site in ut.select(model, "linear")] == ["0.c_fc", "0.c_proj"]
    assert [site.name for site in ut.select(model, "conv")] == ["1"]
    assert json.dumps([site.kind for site in ut.select(model, "0.*")]) == '["norm", "linear", "linear"]'


def test_each_sample_is_kept_with_its_own_axes(tmp_path):
    model, x = First(nn.LSTM(5, 3)), torch.randn(6, 4, 5)
    options = {"sites": "rnn", "measures": "keep:sample", "phase": "forward"}
    with ut.record(tmp_path, model, **options) as recording, recording.batch(samples=NAMES):
        out = model(x)
    for i, name in enumerate(NAMES):
        kept = ut.Run(tmp_path).tensor(name=name, output="0")
        np.testing.assert_array_equal(kept, out[:, i].detach().numpy())


def test_the_shape_decides_without_weights_to_go_by():
    layouts = Layouts({"": nn.Identity()}, {})
    assert layouts.of("", "", (4, 3, 5, 6)).channels == 1
    assert layouts.of("", "", (4, 3, 5)).channels is None
    assert layouts.of("", "", (4,)) == Axes(0, None, certain=False)
    assert layouts.of("", "", ()).samples is None
    assert stats(arranged(nn.Identity(), torch.tensor(-3.0))).norms.item() == 3
