"""What the tests of all trainers share: real data, a small network, and the loop that one writes by hand."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import undertow as ut

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist
SITES = "conv, linear, params"
MEASURES = ("norm", "channel-norm", "zero-fraction")


def fashion_mnist(count):
    """The first images of the training set, `(count, 1, 28, 28)` about zero, and their labels."""
    with gzip.open(FASHION_MNIST / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + count * 784), np.uint8, offset=16).reshape(count, 1, 28, 28)
    with gzip.open(FASHION_MNIST / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(127.5) - 1).float(), torch.from_numpy(labels.astype(np.int64))


def noise(count, seed=0):
    """As many small images of noise, and labels."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 12, 12, generator=draw), torch.randint(10, (count,), generator=draw)


class SmallNet(nn.Module):
    """Two convolutions and two linear layers; the second convolution checkpointed, if asked."""

    def __init__(self, side=12, checkpointed=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Sequential(nn.Linear(8 * ((side - 4 + 1) // 2) ** 2, 16), nn.ReLU(), nn.Linear(16, 10))
        self.checkpointed = checkpointed

    def forward(self, x):
        h = self.first(x).relu()
        h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h)
        return self.head(h.flatten(1))

    def middle(self, h):
        return self.second(h).relu_()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def plain_loop(folder, x, y, *, size, epochs=1, accumulate=1, clip=None, names=True, side=None, network=None):
    """Train as one does by hand, `ut.record` around it; the run and the network."""
    model = network or SmallNet(side or x.shape[-1])
    optimizer = sgd(model)
    positions = torch.arange(len(x)).split(size)
    with ut.record(folder, model, sites=SITES, measures=MEASURES, optimizer=optimizer) as recording:
        for epoch in range(epochs):
            for start in range(0, len(positions), accumulate):
                step = positions[start : start + accumulate]
                samples = [f"{i}.png" for i in torch.cat(step).tolist()] if names else None
                with recording.batch(samples=samples, epoch=epoch):
                    for micro in step:
                        (F.cross_entropy(model(x[micro]), y[micro]) / accumulate).backward()
                    if clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
    return ut.Run(folder), model


KEYS = ("epoch", "batch", "rank", "site", "call", "phase", "output", "repeat")


def assert_same_rows(ours, theirs, prefix="", rtol=1e-4, atol=1e-7):
    """Hold the tables of a callback's run to those of the loop by hand; `prefix` is the network's name."""
    for table in ("norm", "channel_norm", "zero_fraction"):
        rows, wanted = (run.table(table).to_pylist() for run in (ours, theirs))
        assert len(rows) == len(wanted) > 0, table
        by_key = {(*(row[key] for key in KEYS), row.get("sample")): row for row in wanted}
        for row in rows:
            row["site"] = row["site"].removeprefix(prefix)
            twin = by_key.pop((*(row[key] for key in KEYS), row.get("sample")))
            assert row.get("name") == twin.get("name")
            if table == "norm":
                np.testing.assert_allclose(row["norm"], twin["norm"], rtol=rtol, atol=atol, err_msg=str(row))
            elif table == "channel_norm":
                np.testing.assert_allclose(row["values"], twin["values"], rtol=rtol, atol=atol)
            else:
                assert row["total"] == twin["total"]
                assert abs(row["zeros"] - twin["zeros"]) <= max(4, row["total"] // 500)  # a ReLU's edge is rounding's
        assert not by_key


def assert_nothing_stays(model, optimizer=None):
    """No hook of a recording is left."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
    if optimizer is not None:
        assert not optimizer._optimizer_step_pre_hooks
