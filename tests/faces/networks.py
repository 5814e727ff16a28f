"""Networks that Captum reads right, and the same written so that it does not."""

import torch
from torch import nn
from torch.nn import functional as F


class Modules(nn.Module):
    """Each activation a module of its own, as Captum's hooks need it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(36, 5)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(5, 4)

    def forward(self, x, scale=None, flip=False):
        h = self.pool(self.relu1(self.conv(x)))
        h = self.relu2(self.conv2(h))
        h = self.head(self.relu3(self.linear(h.flatten(1))))
        h = h if scale is None else h * scale
        return h.flip(1) if flip else h


class Functional(Modules):
    """The same activations as functions."""

    def forward(self, x, scale=None, flip=False):
        h = self.pool(F.relu(self.conv(x)))
        h = torch.relu(self.conv2(h))
        return self.head(self.linear(h.flatten(1)).clamp(min=0))


class Reused(Modules):
    """The same activations as one module."""

    def forward(self, x, scale=None, flip=False):
        h = self.pool(self.relu1(self.conv(x)))
        h = self.relu1(self.conv2(h))
        return self.head(self.relu1(self.linear(h.flatten(1))))


class TwoInputs(nn.Module):
    """Takes two batches and a vector of which nothing is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(3, 5)
        self.relu = nn.ReLU()
        self.head = nn.Linear(5, 4)

    def forward(self, a, b, offset=None):
        h = self.relu(self.first(a) * 2 + self.second(b))
        h = self.head(h)
        return h if offset is None else h + offset * h


class Residual(nn.Module):
    """A sum written as `+`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        for layer in (self.first, self.second, self.head):
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        h = F.relu(self.first(x))
        h = h + F.relu(self.second(h))
        return self.head(h)


def built(cls, seed=0):
    """Return a network with weights of float64, the same for each class of the same layers."""
    torch.manual_seed(seed)
    return cls().double().eval()
