"""Small networks, each with one fault planted in it, or none: what a diagnosis must find there, and nothing else.

A row says how the network is built, what is recorded, how a batch is run, and which causes must be found.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Planted:
    """A network and the causes that a diagnosis must name, with the sites that it must name for them."""

    name: str
    causes: frozenset[str]
    build: Callable[[], nn.Module]
    sites: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, _LAYERS)
    shape: tuple[int, ...] = (32, 3, 12, 12)
    batches: int = 2
    run: Callable[[nn.Module, torch.Tensor, int], None] | None = None
    at: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("zero-fraction", "moments")
    options: dict[str, object] = field(default_factory=dict)


def step(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Run one batch forward and backward; the labels are drawn from the batch's number."""
    scores = model(x)
    labels = torch.randint(scores.shape[1], (len(x),), generator=torch.Generator().manual_seed(number))
    F.cross_entropy(scores, labels).backward()


def initialised(model: nn.Module, slope: float = 0.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _LAYERS):
            nn.init.kaiming_normal_(module.weight, a=slope)
            nn.init.zeros_(module.bias)
    return model


def convolutions(*behind_first: nn.Module) -> nn.Module:
    """Build three convolutions and a linear layer; what is given stands behind the first convolution."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), *behind_first, nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 16, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 3, 12, 12))
    return initialised(model)


def volumes(axes: int) -> nn.Module:
    conv, pool = (getattr(nn, f"{kind}{axes}d") for kind in ("Conv", "MaxPool"))
    size = 5**axes
    layers = [conv(2, 4, 3, padding=1), nn.LeakyReLU(0.5), pool(2), nn.Flatten(), nn.Linear(4 * size, 5)]
    return initialised(nn.Sequential(*layers))


class Functional(nn.Module):
    """Every activation and pooling a function, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        initialised(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu_(self.first(x)), (3, 2), ceil_mode=True)
        return self.head(torch.tanh(self.second(x)).mean((2, 3)))


def biased(bias: float, channels: slice = slice(None), act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Build two convolutions whose first has a bias that closes its activation for some channels."""
    model = convolutions(act())
    with torch.no_grad():
        model[0].bias[channels] = bias
    return model


def dense(
    depth: int, act: Callable[[], nn.Module] | None, gain: float, norm: bool = False, width: int = 32
) -> nn.Module:
    """Build a deep stack of linear layers; `gain` is what weights multiply a gradient by."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, std=gain / width**0.5)
        layers += [layer, *([nn.BatchNorm1d(width)] if norm else []), *([act()] if act else [])]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def broken_at(layer: int, factor: float) -> nn.Module:
    model = dense(10, nn.Tanh, 1.0)
    with torch.no_grad():
        model[2 * layer].weight *= factor
    return model


class Residual(nn.Module):
    """A small residual network with batch norm, of pre- or post-activation, as they are trained."""

    def __init__(self, blocks: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(self._block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        conv = partial(nn.Conv2d, width, width, 3, padding=1, bias=False)
        return nn.Sequential(conv(), nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Two transformer layers over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.ModuleList([layer(norm_first=True), layer(norm_first=True)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Cut(nn.Module):
    """Three layers with something between the first and the second that keeps gradients back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.spare = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)
        if how == "frozen":
            self.first.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                h = torch.tanh(self.first(x))
        else:
            h = torch.tanh(self.first(x))
        h = {"detach": torch.Tensor.detach, "data": lambda t: t.data}.get(self.how, lambda t: t)(h)
        h = torch.tanh(self.second(h))
        if self.how == "unread":
            self.spare(h)
        elif self.how != "unused":
            h = h + torch.tanh(self.spare(h))
        return self.head(h)


class Overflowing(nn.Module):
    """The square root's derivative at 0 is infinite, and 0 times it is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(torch.tanh(self.first(x)))
        return self.head(torch.sqrt((h * (h > 0)).square()))


def in_half(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Compute in float16, with a loss so small that gradients sink."""
    (model(x.half()).float().square().mean() * 1e-4).backward()


def spiked(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Run an ordinary batch; the sixth is a thousand times as loud."""
    scores = model(x)
    F.cross_entropy(scores, torch.arange(len(x)) % scores.shape[1]).mul(1000.0 if number == 5 else 1.0).backward()


def decaying(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Run batches each of which is half as loud as the one before."""
    scores = model(x)
    F.cross_entropy(scores, torch.arange(len(x)) % scores.shape[1]).mul(0.5**number).backward()


def noisy(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Add noise, a hundred times the gradient, at one layer; all else is the same in each batch."""
    draw = torch.Generator().manual_seed(100 + number)

    def louder(g: torch.Tensor) -> torch.Tensor:
        return g + 100 * g.std() * torch.randn(g.shape, generator=draw)

    batch = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)) + 0.01 * x
    with ut.redirect(model, {"4": louder}):
        scores = model(batch)
        F.cross_entropy(scores, torch.arange(len(x)) % scores.shape[1]).backward()


def one_sided(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Run samples of one class alone, so that all pull the same way."""
    scores = model(x)
    F.cross_entropy(scores, torch.full((len(x),), 3)).backward()


def unnormalised(norm: bool) -> nn.Module:
    """Build four convolutions over inputs far from zero mean, with or without batch norm."""
    layers: list[nn.Module] = []
    for before in (3, 8, 8, 8):
        layers += [nn.Conv2d(before, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if norm else []), nn.Tanh()]
    return initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))


def _trained(model: nn.Module) -> nn.Module:
    """Train a few steps on a task that can be learnt: which third of the channels is brightest."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for number in range(12):
        x = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.mean((2, 3)).argmax(1)).backward()
        optimizer.step()
    return model


_row = Planted
_FLAT, _DEEP = (64, 12), (64, 32)
PLANTED = [
    _row(
        "max-pooling behind a leaky ReLU",
        frozenset({"pooling"}),
        lambda: convolutions(nn.LeakyReLU(0.5), nn.MaxPool2d(2)),
        at=("0",),
    ),
    _row(
        "max-pooling of 3 x 3, stride 2",
        frozenset({"pooling"}),
        lambda: convolutions(nn.Tanh(), nn.MaxPool2d(3, 2, 1)),
        at=("0",),
    ),
    _row("max-pooling and ReLU as functions", frozenset({"pooling"}), Functional, at=("first",)),
    _row("max-pooling of one axis", frozenset({"pooling"}), lambda: volumes(1), shape=(32, 2, 10), at=("0",)),
    _row("max-pooling of three axes", frozenset({"pooling"}), lambda: volumes(3), shape=(8, 2, 10, 10, 10), at=("0",)),
    _row(
        "adaptive max-pooling",
        frozenset({"pooling"}),
        lambda: convolutions(nn.Tanh(), nn.AdaptiveMaxPool2d(6)),
        at=("0",),
    ),
    _row("average pooling", frozenset({"pooling"}), lambda: convolutions(nn.Tanh(), nn.AvgPool2d(2)), at=("0",)),
    _row("a ReLU closed for most", frozenset({"activation"}), lambda: biased(-1.5), at=("0",)),
    _row("a ReLU6 closed for most", frozenset({"activation"}), lambda: biased(-1.5, act=nn.ReLU6), at=("0",)),
    _row(
        "a leaky ReLU, mostly negative",
        frozenset({"activation"}),
        lambda: biased(-1.5, act=lambda: nn.LeakyReLU(0.1)),
        at=("0",),
    ),
    _row("three dead channels of eight", frozenset({"dead-units"}), lambda: biased(-1e3, slice(3)), at=("0",)),
    _row(
        "dead features behind a linear layer",
        frozenset({"dead-units"}),
        lambda: dead_features(),
        shape=_FLAT,
        batches=3,
        at=("0",),
    ),
    _row("a dead layer", frozenset({"dead-layer"}), lambda: biased(-1e3), at=("0",)),
    _row("a dead layer behind batch norm", frozenset({"dead-layer"}), lambda: dead_behind_norm(), at=("0", "2")),
    _row("deep sigmoids", frozenset({"vanishing"}), lambda: dense(10, nn.Sigmoid, 1.0), shape=_DEEP),
    _row("deep linear layers, small weights", frozenset({"vanishing"}), lambda: dense(10, None, 0.3), shape=_DEEP),
    _row("one layer with tiny weights", frozenset({"vanishing"}), lambda: broken_at(5, 1e-8), shape=_DEEP),
    _row("deep linear layers, large weights", frozenset({"exploding"}), lambda: dense(10, None, 4.0), shape=_DEEP),
    _row("a square root at zero", frozenset({"non-finite"}), Overflowing, shape=_FLAT, at=("first", "second")),
    _row(
        "float16 with a small loss",
        frozenset({"underflow"}),
        lambda: dense(3, nn.Tanh, 1.0).half(),
        shape=_DEEP,
        run=in_half,
    ),
    _row("one class, nothing normalised", frozenset({"no-batch-norm"}), lambda: unnormalised(False), run=one_sided),
    _row("a layer that is never called", frozenset({"unreached"}), lambda: Cut("unused"), shape=_FLAT, at=("spare",)),
    _row("an output that nobody reads", frozenset({"unreached"}), lambda: Cut("unread"), shape=_FLAT, at=("spare",)),
    _row("frozen parameters", frozenset({"frozen"}), lambda: Cut("frozen"), shape=_FLAT, at=("first",)),
    _row("a detach on the way", frozenset({"detached"}), lambda: Cut("detach"), shape=_FLAT, at=("first",)),
    _row(".data on the way", frozenset({"detached"}), lambda: Cut("data"), shape=_FLAT, at=("first",)),
    _row("no_grad on the way", frozenset({"detached"}), lambda: Cut("no_grad"), shape=_FLAT, at=("first",)),
    _row(
        "one batch a thousand times as loud",
        frozenset({"jump"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        batches=12,
        run=spiked,
    ),
    _row(
        "a gradient that decays",
        frozenset({"jump"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        batches=14,
        run=decaying,
    ),
    _row(
        "noise at one layer",
        frozenset({"noise"}),
        lambda: dense(4, nn.Tanh, 1.0),
        shape=_DEEP,
        batches=10,
        run=noisy,
        at=("0", "2"),
    ),
    _row("residual, trained", frozenset(), lambda: _trained(Residual()), batches=8),
    _row("residual, sixteen layers", frozenset(), lambda: Residual(8)),
    _row("batch norm and one class", frozenset(), lambda: unnormalised(True), run=one_sided),
    _row("tanh, well initialised", frozenset(), lambda: dense(8, nn.Tanh, 1.0), shape=_DEEP, batches=10),
    _row("leaky convolutions", frozenset(), lambda: convolutions(nn.LeakyReLU(0.1)), batches=10),
    _row("ReLU and batch norm", frozenset(), lambda: dense(10, nn.ReLU, 1.4, norm=True), shape=_DEEP),
    _row("ReLU, He initialisation", frozenset(), lambda: convolutions(nn.ReLU())),
    _row("transformer layers", frozenset(), Attention, shape=(16, 6, 16), batches=10),
    _row(
        "float16, loss scaled",
        frozenset(),
        lambda: dense(3, nn.Tanh, 1.0).half(),
        shape=_DEEP,
        run=lambda m, x, n: m(x.half()).float().square().sum().backward(),
    ),
]


def dead_features() -> nn.Module:
    model = initialised(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5)))
    with torch.no_grad():
        model[0].bias[:4] = -1e3
    return model


def dead_behind_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(800, 10))
    nn.init.constant_(model[3].bias, -1e3)
    return model


def recorded(folder: str, planted: Planted) -> "ut.Run":
    """Record a planted network's batches, watching each."""
    torch.manual_seed(0)
    model = planted.build()
    with ut.record(
        folder, model, sites=planted.sites, measures=planted.measures, diagnose=1, **planted.options
    ) as recording:
        for number in range(planted.batches):
            x = torch.randn(planted.shape, generator=torch.Generator().manual_seed(50 + number))
            model.zero_grad()
            with recording.batch():
                (planted.run or step)(model, x, number)
    return ut.Run(folder)
