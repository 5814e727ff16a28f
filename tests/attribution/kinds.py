"""What a model takes, what it returns and what layers it has, as three tables whose rows fit together.

A network is `Network(input kind, layer kind, output kind)`: the input kind reads an image `(2, 3, 8, 6)` out of the
model's arguments, the layer kind makes features `(2, 16)` of it, and the output kind returns their scores among other
things. Classes are scored by `HEAD`; `OTHER` is a second head, never asked for.
"""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 8, 6
CLASSES = 5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGE, COLUMN = drawn(BATCH, CHANNELS, HEIGHT, WIDTH, seed=1), drawn(BATCH, CHANNELS, seed=2)
IDS, MASK = torch.tensor([[0, 2], [1, 1]]), drawn(BATCH, 1, HEIGHT, WIDTH, seed=3) > 0
PLACES = torch.tensor([1, 0, 2, 0, 1])  # of another length than the batch, as a graph's edges


class Network(nn.Module):
    """Takes one tensor."""

    def __init__(self, layers: nn.Module, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.give = layers, give

    def forward(self, image: Tensor) -> Any:
        return self.give(self.layers(image))


class Several(Network):
    """Takes two tensors, and perhaps more."""

    def forward(self, image: Tensor, column: Tensor, ids: Any = None, mask: Any = None, scale: float = 1) -> Any:
        h = (image + column[..., None, None]) * scale
        h = h if ids is None else h + ids.sum() / 10
        return super().forward(h if mask is None else h * mask)


class OneMapping(Several):
    """Takes one mapping with a pair inside."""

    def forward(self, batch: Any) -> Any:
        return super().forward(batch["pair"][0], batch["pair"][1], batch.get("ids"))


class OneList(Network):
    """Takes a list of images, each without a batch axis."""

    def forward(self, images: list[Tensor]) -> Any:
        assert isinstance(images, list)
        return super().forward(torch.stack(images))


class OneSequence(Network):
    """Takes a packed sequence of an image's channels."""

    def forward(self, sequence: PackedSequence) -> Any:
        assert isinstance(sequence, PackedSequence)
        steps = pad_packed_sequence(sequence, batch_first=True)[0]
        return super().forward(steps.unflatten(2, (HEIGHT, WIDTH)))


PACKED = pack_padded_sequence(IMAGE.flatten(2), [CHANNELS, CHANNELS - 1], batch_first=True)

# name: (class, x)
INPUTS: dict[str, tuple[type[Network], Any]] = {
    "tensor": (Network, IMAGE),
    "tuple": (Several, (IMAGE, COLUMN)),
    "list": (Several, [IMAGE, COLUMN]),
    "dict": (Several, {"column": COLUMN, "image": IMAGE}),
    "dict with whole numbers, a mask, None and a number": (
        Several,
        {"column": COLUMN, "image": IMAGE, "ids": IDS, "mask": MASK, "scale": 2},
    ),
    "a mapping of the user's own class": (Several, UserDict(image=IMAGE, column=COLUMN, ids=IDS)),
    "None in a tuple": (Several, (IMAGE, COLUMN, None)),
    "a number in a tuple": (Several, (IMAGE, COLUMN, None, None, 3)),
    "a mask in a tuple": (Several, (IMAGE, COLUMN, IDS, MASK)),
    "whole numbers of another length": (Several, (IMAGE, COLUMN, PLACES)),
    "nested in one argument": (OneMapping, ({"pair": [IMAGE, COLUMN], "ids": IDS},)),
    "a list that is one argument": (OneList, list(IMAGE)),
    "a list in a tuple": (OneList, (list(IMAGE),)),
    "a packed sequence": (OneSequence, PACKED),
}


class Tokens(nn.Module):
    """An image as tokens `(B, positions, channels)`, behind a token that has no place where `extra` is set."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.flatten(2).mT
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1) if self.extra else tokens


class Moved(nn.Module):
    """An image with its channels last, or back."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.axes = source, target

    def forward(self, image: Tensor) -> Tensor:
        return image.movedim(*self.axes)


class First(nn.Module):
    """The first of what a layer returns."""

    def forward(self, output: Any) -> Tensor:
        return output[0]


def tail(size: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(size, 16), nn.ReLU())


def as_tokens(t: Tensor) -> Tensor:
    return t[:, -HEIGHT * WIDTH :].mT.unflatten(2, (HEIGHT, WIDTH))


@dataclass(frozen=True)
class LayerKind:
    """Layers from an image to features.

    Attributes:
        build: a Sequential.
        layer: which of it Grad-CAM is asked of; None where it has no place for each position.
        as_planes: from what that layer returns to `(B, channels, h, w)`.
        rewired: how many ReLUs there are.
    """

    build: Callable[[], nn.Sequential]
    layer: str | None
    as_planes: Callable[[Tensor], Tensor] = lambda t: t
    rewired: int = 2


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(CHANNELS, 1, 7, dropout=0.0, batch_first=True)


PIXELS = HEIGHT * WIDTH
LAYERS = {
    "convolution": LayerKind(lambda: nn.Sequential(nn.Conv2d(3, 5, 2, 2), tail(5 * 12)), "0"),
    "group norm": LayerKind(lambda: nn.Sequential(nn.GroupNorm(1, 3), tail(3 * PIXELS)), "0"),
    "linear, channels last": LayerKind(
        lambda: nn.Sequential(Moved(1, -1), nn.Linear(3, 5), tail(5 * PIXELS)), "1", lambda t: t.movedim(-1, 1)
    ),
    "layer norm, channels last": LayerKind(
        lambda: nn.Sequential(Moved(1, -1), nn.LayerNorm(3), tail(3 * PIXELS)), "1", lambda t: t.movedim(-1, 1)
    ),
    "linear over tokens": LayerKind(
        lambda: nn.Sequential(Tokens(False), nn.Linear(3, 5), tail(5 * PIXELS)), "1", as_tokens
    ),
    "attention behind a class token": LayerKind(
        lambda: nn.Sequential(Tokens(True), attention(), tail(3 * (PIXELS + 1))), "1", as_tokens, 3
    ),
    "LSTM over rows": LayerKind(
        lambda: nn.Sequential(
            Moved(2, 1), nn.Flatten(2), nn.LSTM(3 * WIDTH, 5, batch_first=True), First(), tail(HEIGHT * 5)
        ),
        None,
    ),
}


@dataclass
class Heads:
    """What a model of somebody's own returns."""

    boxes: Tensor
    scores: Tensor


@dataclass
class Logits:
    """What a model of transformers returns."""

    logits: Tensor
    hidden: Tensor


Pair = namedtuple("Pair", ["aux", "scores"])
torch.manual_seed(6)
HEAD, OTHER = nn.Linear(16, CLASSES).double(), nn.Linear(16, 3).double()

# name: (from features to what is returned, output=, the scores in it)
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Any, Callable[[Any], Tensor]]] = {
    "tensor": (lambda h: HEAD(h), None, lambda out: out),
    "first of a tuple": (lambda h: (HEAD(h), OTHER(h)), None, lambda out: out[0]),
    "second of a tuple": (lambda h: (OTHER(h), HEAD(h)), 1, lambda out: out[1]),
    "last of a list": (lambda h: [OTHER(h), HEAD(h)], -1, lambda out: out[-1]),
    "of a namedtuple": (lambda h: Pair(OTHER(h), HEAD(h)), "scores", lambda out: out.scores),
    "logits of a mapping": (lambda h: {"hidden": h, "logits": HEAD(h)}, None, lambda out: out["logits"]),
    "a name in a mapping": (
        lambda h: OrderedDict(aux=OTHER(h), out=HEAD(h)),
        "out",
        lambda out: out["out"],
    ),
    "logits of an object": (lambda h: Logits(HEAD(h), h), None, lambda out: out.logits),
    "an attribute": (lambda h: Heads(OTHER(h), HEAD(h)), "scores", lambda out: out.scores),
    "a path": (
        lambda h: {"heads": [OTHER(h), {"b": HEAD(h)}]},
        "heads.1.b",
        lambda out: out["heads"][1]["b"],
    ),
    "a path as a list": (
        lambda h: {"heads": [OTHER(h), {"b": HEAD(h)}]},
        ["heads", 1, "b"],
        lambda out: out["heads"][1]["b"],
    ),
}


def network(inputs: str, layers: str, outputs: str = "tensor") -> Network:
    """Return a network in eval mode, of float64, the same weights each time."""
    cls = INPUTS[inputs][0]
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return cls(LAYERS[layers].build(), OUTPUTS[outputs][0]).double().eval()
