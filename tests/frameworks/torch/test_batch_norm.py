"""Gradients of a single sample through batch norm, which torch 2.13 on the CPU misreads where they are transposed."""

import pytest
import torch
from torch import nn

import undertow as ut


class Stem(nn.Module):
    """A stem of a transformer: channels become the features of tokens."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.relu, self.head = norm, nn.ReLU(), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.norm(self.relu(x)).flatten(2).transpose(1, 2).flatten(1))


class Written(nn.Module):
    """Batch norm in eval mode and instance norm by their formulas."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        def by_channel(v):
            return v.view(1, -1, 1, 1)

        if isinstance(self.norm, nn.BatchNorm2d):
            mean, variance = by_channel(self.norm.running_mean), by_channel(self.norm.running_var)
        else:
            mean = x.mean((2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((2, 3), keepdim=True)
        normal = (x - mean) / (variance + self.norm.eps).sqrt()
        return normal * by_channel(self.norm.weight) + by_channel(self.norm.bias)


def networks(kind):
    """Return a network, and the same with its norm written out."""
    norm = kind(4, affine=True)
    for values in (norm.weight, norm.bias):
        nn.init.uniform_(values, 0.5, 2)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    net = Stem(norm).double().eval()
    written = Stem(Written(norm)).double().eval()
    written.head = net.head
    return net, written


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("rule", ["gradient", "guided", "deconvnet"])
def test_a_transposed_gradient_passes_as_by_the_formula(kind, samples, rule):
    net, written = networks(kind)
    x = torch.randn(samples, 4, 3, 2, dtype=torch.float64)
    a, b = (ut.explain(f, x, rule=rule, target=1).values for f in (net, written))
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_grad_cam_in_front_of_batch_norm_too():
    net, written = networks(nn.BatchNorm2d)
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    maps = []
    for f in (net, written):
        before = nn.Sequential(nn.Conv2d(4, 4, 1), f).double().eval()
        nn.init.eye_(before[0].weight.data[:, :, 0, 0])
        nn.init.zeros_(before[0].bias)
        maps.append(torch.as_tensor(ut.explain(before, x, estimator="grad-cam:0", target=1).values))
    torch.testing.assert_close(*maps)
