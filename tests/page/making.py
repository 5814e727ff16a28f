"""Small real networks, explained, recorded and traced, for the pages of the tests."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import undertow as ut

NETS = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 5, stride=2), torch.nn.Conv2d(8, 8, 3)
        self.pool, self.head = torch.nn.MaxPool2d(2), torch.nn.Linear(8, {n_classes})
    def forward(self, x):
        h = self.pool(torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(h)).mean((2, 3)))
def load():
    torch.manual_seed(0)
    return {{"module": Net(), "preprocessing": {{"resize": 40, "crop": 40}}, "classes": {names!r}}}
"""


def write_nets(folder: Path, names: list[str]) -> str:
    path = folder / "nets.py"
    path.write_text(NETS.format(n_classes=len(names), names=names), encoding="utf-8")
    return f"{path}:load"


def command(*words) -> None:
    """Run `undertow`; it must do all that it was asked for."""
    from undertow.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0


@contextmanager
def seeded(seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def recorded(folder: Path, net: nn.Module, batches: int = 4, shape=(4, 1, 10, 10), scale: float = 1.0, **how) -> ut.Run:
    """Record a few batches of noise into a run."""
    how = {"sites": "**", "measures": ["histogram", "channel-norm"], **how}
    with seeded(), ut.record(folder, net, **how) as recording:
        for _ in range(batches):
            with recording.batch():
                (scale * net(torch.randn(shape)).square().sum()).backward()
    return ut.Run(folder)


def small_net(seed: int = 0, channels: int = 4) -> nn.Sequential:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, channels, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 3),
        )  # fmt: skip
