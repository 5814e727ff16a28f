"""Small networks, each with one fault planted in it, or none: what a diagnosis must find there, and nothing else.

A row says how the network is built, what is recorded, how a batch is run, and which causes must be found.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from diagnosis import architectures as nets

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_RECURRENT = (*_LAYERS, nn.RNNCellBase, nn.RNNBase)


@dataclass(frozen=True)
class Planted:
    """A network and the causes that a diagnosis must name, with the sites that it must name for them.

    `also` are informations that are true as well, and may come with them.
    """

    name: str
    causes: frozenset[str]
    build: Callable[[], nn.Module]
    sites: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, _LAYERS)
    shape: tuple[int, ...] = (32, 3, 12, 12)
    batches: int = 2
    run: Callable[[nn.Module, torch.Tensor, int], None] | None = None
    at: tuple[str, ...] | None = None
    measures: tuple[str, ...] = ("zero-fraction", "moments")
    options: dict[str, object] = field(default_factory=dict)
    also: frozenset[str] = frozenset()


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


def loss_of(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, torch.Tensor, int], None]:
    """Make a batch whose loss is a function of the scores."""
    return lambda model, x, number: loss(model(x)).backward()


def task(loss: Callable[[nn.Module, torch.Generator], torch.Tensor]) -> Callable[[nn.Module, torch.Tensor, int], None]:
    """Make a batch of a task in `architectures`, which draws its own input."""
    return lambda model, x, number: loss(model, torch.Generator().manual_seed(number)).backward()


def bytes_in(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Give inputs from 0 to 255, as images are before anybody has scaled them."""
    step(model, 128 + 60 * x, number)


def missing(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Put one missing value into the data of the second batch."""
    if number == 1:
        x = x.clone()
        x.view(-1)[7] = float("nan")
    step(model, x, number)


def sure(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Let every label be what the network is sure of."""
    scores = model(x)
    F.cross_entropy(scores, scores.argmax(1)).backward()


def stepped(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """From the seventh batch on, all gradients are a hundred times as large."""
    scores = model(x)
    F.cross_entropy(scores, torch.arange(len(x)) % scores.shape[1]).mul(100.0 if number > 5 else 1.0).backward()


def generate_detached(model: nn.Module, x: torch.Tensor, number: int) -> None:
    """Let the generator's loss be taken of fakes that were detached for the discriminator's."""
    fake = model.generator(torch.randn(32, 8, generator=torch.Generator().manual_seed(number))).detach()
    F.softplus(-model.discriminator(fake)).mean().backward()


def joined_by_numbers(how: str) -> Callable[[nn.Module, torch.Tensor, int], None]:
    """Join what two branches say by way of Python's numbers; the head learns from the rest."""

    def run(model: nn.Module, x: torch.Tensor, number: int) -> None:
        scores = model(x)
        parts = [scores[:, i].mean() for i in range(scores.shape[1])]
        if how == "item":
            joined = torch.tensor([part.item() for part in parts], requires_grad=True)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of this itself
                joined = torch.tensor(parts, requires_grad=True)
        joined.square().sum().backward()

    return run


class Gate(nn.Module):
    """A choice among experts by argmax, a comparison or Python's numbers: the gate that chooses gets no gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate, self.expert, self.head = how, nn.Linear(12, 4), nn.Linear(12, 12), nn.Linear(12, 5)
        self.table = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, scores = torch.tanh(self.expert(x)), self.gate(x)
        if self.how == "argmax":
            return self.head(h * self.table[scores.argmax(1)])
        if self.how == "compare":
            return self.head(h * (scores.sum(1, keepdim=True) > 0))
        weights = torch.tensor(scores.softmax(1).tolist()) if self.how == "tolist" else scores.mean().item()
        return self.head(h * (weights @ self.table if self.how == "tolist" else weights))


class ReZero(nn.Module):
    """Residual branches whose factor begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.alpha * self.second(torch.tanh(self.first(x))))


class Loop(nn.Module):
    """A recurrent network out of linear layers, one of which is called at each point of time."""

    def __init__(self, gain: float, width: int = 16, act: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.inputs, self.again, self.head = (
            nn.Linear(8, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, 5),
        )
        nn.init.orthogonal_(self.again.weight, gain)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(x), self.again.in_features)
        for now in x.unbind(1):
            h = self.act(self.inputs(now) + self.again(h))
        return self.head(h)


def relus(depth: int, conv: bool, he: bool = False) -> nn.Module:
    """Build a plain stack of ReLU layers as torch initialises them, or as He et al. do."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Conv2d(8, 8, 3, padding=1) if conv else nn.Linear(32, 32)
        if he:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, *([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)] if conv else ()))


def saturating(act: Callable[[], nn.Module], factor: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 24), act(), nn.Linear(24, 24), act(), nn.Linear(24, 5))
    with torch.no_grad():
        model[0].weight *= factor
    return model


def with_own_hooks(model: nn.Module) -> nn.Module:
    """Put a full backward hook that does nothing on every layer, as people do to look at gradients."""
    for module in model.modules():
        if not list(module.children()):
            module.register_full_backward_hook(lambda *_: None)
    return model


def broken_weight() -> nn.Module:
    model = dense(2, nn.Tanh, 1.0)
    with torch.no_grad():
        model[2].weight[3, 3] = float("inf")
    return model


def too_large_for_half() -> nn.Module:
    model = dense(2, None, 1.0)
    with torch.no_grad():
        model[1].weight *= 1e4
    return model.half()


def frozen_at(name: str, model: nn.Module) -> nn.Module:
    model.get_submodule(name).requires_grad_(False)
    return model


def scaled(model: nn.Module, name: str, factor: float) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(name).weight *= factor
    return model


def dense_residual(depth: int, factor: float) -> nn.Module:
    """Build linear layers beside a stream that each block multiplies by a factor."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return factor * x + self.layer(x)

    return nn.Sequential(*(Block() for _ in range(depth)), nn.Linear(32, 10))


def closed(model: nn.Module, name: str) -> nn.Module:
    nn.init.constant_(model.get_submodule(name).bias, -1e3)
    return model


def stream(factor: float) -> nn.Module:
    """Build a GPT without norms whose residual stream is multiplied by a factor in every block."""

    class Shrinking(nets.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = factor * x + self.attend(x)
            return x + self.down(F.gelu(self.up(x)))

    model = nets.GPT(layers=8)
    model.blocks = nn.ModuleList(Shrinking(32, first=True, causal=True) for _ in range(8))
    nets._bert_like(model)
    return model


_row = Planted
_FLAT, _DEEP, _LONG = (64, 12), (64, 32), (32, 60, 8)


def _recurrent(name: str, module: nn.Module) -> bool:
    return isinstance(module, _RECURRENT)


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
    _row(
        "every label ignored",
        frozenset({"no-gradient"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        run=loss_of(lambda y: F.cross_entropy(y, torch.full((64,), -100), reduction="sum")),
    ),
    _row(
        "a loss that is clipped",
        frozenset({"no-gradient"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        run=loss_of(lambda y: (y + 50).clamp(-1, 1).mean()),
    ),
    _row(
        "a hinge that is satisfied",
        frozenset({"no-gradient"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        run=loss_of(lambda y: (1 - (y + 50)).relu().mean()),
    ),
    _row(
        "scores that are rounded",
        frozenset({"no-gradient"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        run=loss_of(lambda y: (y.round() - 0.3).abs().mean()),
    ),
    _row(
        "a loss times zero",
        frozenset({"no-gradient"}),
        lambda: nets.MLP(12),
        shape=_FLAT,
        run=loss_of(lambda y: 0.0 * y.square().mean()),
    ),
    _row(
        "text whose labels are all padding",
        frozenset({"no-gradient"}),
        nets.GPT,
        run=task(
            lambda m, draw: (
                0 * m(nets._ids(draw)).sum()
                + F.cross_entropy(m(nets._ids(draw)).flatten(0, 1), torch.full((96,), -100), reduction="sum")
            )
        ),
    ),
    _row(
        "convolutions with ReLU, torch's weights",
        frozenset({"vanishing"}),
        lambda: relus(20, conv=True),
        shape=(8, 8, 8, 8),
        also=frozenset({"activation", "no-batch-norm", "dead-units"}),
    ),
    _row(
        "linear layers with ReLU, torch's weights",
        frozenset({"vanishing"}),
        lambda: relus(20, conv=False),
        shape=_DEEP,
        run=loss_of(lambda y: (y * torch.linspace(-1, 1, 32)).sum()),
        also=frozenset({"dead-units", "activation", "no-batch-norm"}),
    ),
    _row("a shrinking residual stream", frozenset({"vanishing"}), lambda: stream(0.2), run=task(nets.predict_next)),
    _row("residual blocks whose stream grows", frozenset({"exploding"}), lambda: dense_residual(12, 4.0), shape=_DEEP),
    _row(
        "a plain recurrent cell over 60 points",
        frozenset({"vanishing"}),
        lambda: nets.Cell(nn.RNNCell(8, 24)),
        sites=_recurrent,
        shape=_LONG,
    ),
    _row(
        "an LSTM cell over 60 points, last state read",
        frozenset({"vanishing"}),
        lambda: nets.Cell(nn.LSTMCell(8, 24)),
        sites=_recurrent,
        shape=_LONG,
    ),
    _row("a linear layer called 60 times", frozenset({"vanishing"}), lambda: Loop(0.6), shape=_LONG),
    _row(
        "a recurrent layer that explodes",
        frozenset({"exploding"}),
        lambda: Loop(1.4, act=lambda h: h),
        shape=_LONG,
        run=loss_of(lambda y: y.sum()),
        also=frozenset({"no-batch-norm"}),
    ),
    _row(
        "six linear layers that lose a factor of ten",
        frozenset({"vanishing"}),
        lambda: dense(6, None, 0.65),
        shape=_DEEP,
        run=loss_of(lambda y: (y * torch.linspace(-1, 1, 10)).sum()),
        also=frozenset({"no-batch-norm"}),
    ),
    _row(
        "a tanh network on bytes",
        frozenset({"saturated"}),
        lambda: saturating(nn.Tanh),
        shape=_FLAT,
        run=bytes_in,
        at=("0",),
        also=frozenset({"no-batch-norm"}),
    ),
    _row(
        "a sigmoid network on bytes",
        frozenset({"saturated"}),
        lambda: saturating(nn.Sigmoid, 4.0),
        shape=_FLAT,
        run=bytes_in,
        at=("0",),
        also=frozenset({"no-batch-norm", "underflow"}),
    ),
    _row(
        "hard tanh with large weights",
        frozenset({"saturated"}),
        lambda: saturating(nn.Hardtanh, 20.0),
        shape=_FLAT,
        at=("0",),
        also=frozenset({"no-batch-norm"}),
    ),
    _row(
        "a missing value in the data",
        frozenset({"non-finite"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        run=missing,
    ),
    _row("a weight that is infinite", frozenset({"non-finite"}), broken_weight, shape=_DEEP),
    _row(
        "an output too large for float16",
        frozenset({"non-finite"}),
        too_large_for_half,
        shape=_DEEP,
        run=lambda m, x, n: m(x.half()).float().square().sum().backward(),
    ),
    _row(
        "a logarithm of zero in the loss",
        frozenset({"non-finite"}),
        lambda: dense(2, nn.Tanh, 1.0),
        shape=_DEEP,
        run=loss_of(lambda y: torch.log((y * 0).abs()).sum()),
        also=frozenset(),
    ),
    _row(
        "scores sure beyond float32",
        frozenset({"underflow"}),
        lambda: scaled(dense(2, nn.Tanh, 1.0), "4", 150.0),
        shape=(256, 32),
        run=sure,
        also=frozenset({"activation", "no-batch-norm"}),
    ),
    _row(
        "one layer frozen amid others",
        frozenset({"frozen"}),
        lambda: frozen_at("2", nets.MLP(12)),
        shape=_FLAT,
        at=("2",),
    ),
    _row(
        "a backbone frozen, a head that learns",
        frozenset({"frozen"}),
        lambda: frozen_at("blocks", frozen_at("stem", nets.ResNet())),
        at=None,
    ),
    _row(
        "an embedding's block frozen in a transformer",
        frozenset({"frozen"}),
        lambda: frozen_at("blocks.1", nets.GPT()),
        run=task(nets.predict_next),
        at=("blocks.1.qkv", "blocks.1.out", "blocks.1.up", "blocks.1.down"),
    ),
    _row("a choice by argmax", frozenset({"detached"}), lambda: Gate("argmax"), shape=_FLAT, at=("gate",)),
    _row("a choice by a comparison", frozenset({"detached"}), lambda: Gate("compare"), shape=_FLAT, at=("gate",)),
    _row("a weight by .item()", frozenset({"detached"}), lambda: Gate("item"), shape=_FLAT, at=("gate",)),
    _row("weights by .tolist()", frozenset({"detached"}), lambda: Gate("tolist"), shape=_FLAT, at=("gate",)),
    _row(
        "losses joined by .item()",
        frozenset({"detached"}),
        lambda: nets.MLP(12),
        shape=_FLAT,
        run=joined_by_numbers("item"),
    ),
    _row(
        "losses joined by torch.tensor",
        frozenset({"detached"}),
        lambda: nets.MLP(12),
        shape=_FLAT,
        run=joined_by_numbers("tensor"),
    ),
    _row(
        "a generator behind detached fakes",
        frozenset({"detached"}),
        nets.GAN,
        run=generate_detached,
        at=("generator.0", "generator.2", "generator.4"),
        also=frozenset({"no-batch-norm", "activation"}),
    ),
    _row(
        "adapters in their first step",
        frozenset({"zero-weights"}),
        nets.lora,
        run=task(nets.predict_next),
        also=frozenset({"frozen"}),
    ),
    _row("last norms at zero", frozenset({"zero-weights"}), lambda: nets.ResNet(gamma=0.0)),
    _row(
        "branches whose factor begins at zero", frozenset({"zero-weights"}), ReZero, shape=_FLAT, at=("first", "second")
    ),
    _row(
        "max-pooling behind hooks of the user's own",
        frozenset({"pooling"}),
        lambda: with_own_hooks(convolutions(nn.LeakyReLU(0.5), nn.MaxPool2d(2))),
        at=("0",),
    ),
    _row(
        "a closed ReLU behind hooks of the user's own",
        frozenset({"activation"}),
        lambda: with_own_hooks(biased(-1.5)),
        at=("0",),
    ),
    _row("two poolings, one finding", frozenset({"pooling"}), nets.CNN, shape=(16, 3, 16, 16), at=("0", "3")),
    _row(
        "a dead layer in a CNN",
        frozenset({"dead-layer"}),
        lambda: closed(nets.CNN(), "3"),
        shape=(16, 3, 16, 16),
        at=("0", "3"),
    ),
    _row(
        "a dead generator",
        frozenset({"dead-layer"}),
        lambda: closed(nets.GAN(), "generator.2"),
        run=task(nets.play),
        batches=4,
        at=("generator.0", "generator.2"),
        also=frozenset({"no-batch-norm", "activation"}),
    ),
    _row(
        "gradients a hundred times as large from a batch on",
        frozenset({"jump"}),
        lambda: dense(3, nn.Tanh, 1.0),
        shape=_DEEP,
        batches=14,
        run=stepped,
    ),
    _row(
        "one loud batch of text",
        frozenset({"jump"}),
        nets.GPT,
        batches=12,
        measures=("moments",),
        run=lambda m, x, n: nets.predict_next(m, torch.Generator().manual_seed(n)).mul(1e3 if n == 8 else 1).backward(),
    ),
    _row(
        "a transformer in float16 with a small loss",
        frozenset({"underflow"}),
        lambda: Attention().half(),
        shape=(16, 6, 16),
        run=in_half,
        also=frozenset({"no-batch-norm"}),
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


def recorded(folder: str, planted: Planted, live: list[object] | None = None) -> "ut.Run":
    """Record a planted network's batches, watching each; `live` takes what was found at the end, before it was read."""
    torch.manual_seed(0)
    model = planted.build()
    # where no gradient arrives anywhere, the recording says so at its end; its run can be diagnosed all the same
    with (
        contextlib.suppress(ut.InputError),
        ut.record(
            folder, model, sites=planted.sites, measures=planted.measures, diagnose=1, **planted.options
        ) as recording,
    ):
        for number in range(planted.batches):
            x = torch.randn(planted.shape, generator=torch.Generator().manual_seed(50 + number))
            model.zero_grad()
            with recording.batch():
                (planted.run or step)(model, x, number)
        if live is not None:
            live += recording.check()
    return ut.Run(folder)
