"""The table of awkward networks: every way to write an activation that has fooled some library.

Each row builds a fresh network in evaluation mode and its input, always the same ones, and touches neither the global
random state nor any other global. Scores are `(2, 4)` for every row. Inputs are asymmetric in every axis. Only torch is
needed: the big torchvision networks are listed where they are tested.
"""

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES = 4
IMAGE, VECTOR, SERIES, VOLUME, TOKENS = (2, 3, 7, 9), (2, 6), (2, 3, 11), (2, 2, 4, 6, 5), (2, 5, 8)

Model = Callable[..., Any]
Built = tuple[Model, Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Network:
    """One row.

    Attributes:
        name: unique in its table, fit for a test id.
        build: returns the network in evaluation mode, and its input: a tensor, or a tuple of them to call it with.
        rewired: how many ReLU-like calls lie between the input and the scores.
        swap: every activation is an `nn.Module` that a walk over the modules finds and can replace.
        note: what is awkward here.
        twin: the same network in Python, with the same numbers, where a function mode cannot see its activations.
        rewired_all: the count with `activations="all"`, where it is another.
    """

    name: str
    build: Callable[[], Built]
    rewired: int
    swap: bool
    note: str
    twin: Callable[[], Built] | None = None
    rewired_all: int | None = None

    def __str__(self) -> str:
        return self.name


def _row(
    name: str,
    make: Callable[[], Model],
    shape: tuple[Any, ...],
    rewired: int,
    note: str,
    swap: bool = False,
    twin: Callable[[], Model] | None = None,
    rewired_all: int | None = None,
) -> Network:
    """Return a row whose weights and input come from a seed of its own; a tuple of shapes makes a tuple of inputs."""

    def building(make: Callable[[], Model]) -> Callable[[], Built]:
        def build() -> Built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model = make()
                if isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule):  # an exported one
                    model.eval()
                several = isinstance(shape[0], tuple)
                parts = tuple(torch.randn(part) * 1.3 + 0.2 for part in (shape if several else (shape,)))
            return model, (parts if several else parts[0])

        return build

    return Network(name, building(make), rewired, swap, note, building(twin) if twin else None, rewired_all)


class Plain(nn.Module):
    """Convolutions, each followed by the same activation (a module is one object, reused), then linear scores."""

    def __init__(self, activation: Callable[[Tensor], Tensor], depth: int = 2, rank: int = 2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        first = 2 if rank == 3 else 3
        self.convs = nn.ModuleList(conv(first if i == 0 else 5, 5, 3, padding=1) for i in range(depth))
        self.activation = activation
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.activation(conv(x))
        return self.head(x.flatten(2).mean(2))


class Around(nn.Module):
    """A convolution, any function of its output that returns five channels, then linear scores."""

    def __init__(self, middle: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(3, 5, 3, padding=1), middle, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


class Vectors(nn.Module):
    """A multilayer perceptron with functional ReLUs, one linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shared, self.head = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enter(x))
        return self.head(F.relu(self.shared(F.relu(self.shared(h)))))


class NamedReLU(nn.ReLU):
    """A subclass that adds nothing."""


class ScaledReLU(nn.ReLU):
    """A subclass that adds to its forward: whoever puts a plain ReLU in its place changes the network."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.7 + 0.3


class Nested(nn.Module):
    """Modules in a ModuleDict in a ModuleList in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(5, 5, 1)))
        self.stages = nn.ModuleList([nn.ModuleDict({"body": inner, "gate": nn.ReLU(inplace=True)})])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ModuleList([nn.Linear(5, CLASSES)])[0])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage["gate"](stage["body"](x))
        return self.head(x)


class Preactivation(nn.Module):
    """A block of a pre-activation ResNet: the skip goes around the first ReLU, so its input has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = _settled(nn.BatchNorm2d(5)), nn.Conv2d(5, 5, 3, padding=1)
        self.bn2, self.conv2 = _settled(nn.BatchNorm2d(5)), nn.Conv2d(5, 5, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        before = self.bn1(x)
        return before + self.conv2(self.relu(self.bn2(self.conv1(self.relu(before)))))


def _settled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return a batch norm with statistics as after some training, so that it does something in evaluation."""
    with torch.no_grad():
        for value in (norm.running_mean, norm.weight, norm.bias):
            value.normal_(0.3, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return norm


def _normed(inplace: bool) -> nn.Module:
    blocks = [nn.Conv2d(3, 5, 3), _settled(nn.BatchNorm2d(5)), nn.ReLU(inplace)]
    blocks += [nn.Conv2d(5, 6, 2, stride=2), _settled(nn.BatchNorm2d(6)), nn.ReLU(inplace), nn.Dropout(0.5)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


class Attention(nn.Module):
    """Two encoder layers; each calls `F.relu` by a plain attribute, not by a module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class Outputs(nn.Module):
    """A network whose scores come wrapped; the second ReLU serves only what is returned beside them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.features, self.wrap = Plain(nn.ReLU()), wrap
        self.beside = nn.Sequential(nn.Flatten(), nn.Linear(3 * 7 * 9, 2), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.features(x), self.beside(x))


@dataclass
class WithLogits:
    """An output such as Hugging Face's."""

    logits: Tensor
    hidden: Tensor


class Hypernetwork(nn.Module):
    """The first ReLU acts on weights alone and no gradient at the input goes through it; the second is a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.enter, self.head = nn.Parameter(torch.randn(7, 6)), nn.Linear(6, 6), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(self.enter(x), F.relu(self.seed) - 0.4)))


class Recurrent(nn.Module):
    """`nn.RNN` with ReLU over three steps, or the same in Python."""

    def __init__(self, unrolled: bool):
        super().__init__()
        self.rnn, self.head, self.unrolled = nn.RNN(6, 7, nonlinearity="relu"), nn.Linear(7, CLASSES), unrolled

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, x * 0.7 - 0.2, x.flip(1)])
        if not self.unrolled:
            return self.head(self.rnn(steps)[0][-1])
        rnn, h = self.rnn, steps.new_zeros(len(x), 7)
        for step in F.linear(steps, rnn.weight_ih_l0, rnn.bias_ih_l0).unbind(0):
            h = F.relu(F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0) + step)
        return self.head(h)


class Pair(nn.Module):
    """Two inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.head = nn.Conv2d(3, 5, 3), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(F.relu(self.image(image)).mean((2, 3)) * torch.relu(self.vector(vector)))


class Edges(nn.Module):
    """Activations of halves of whole numbers, so that many lie on an edge, where torch's kernels differ."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10 * 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.detach() * 2).round() / 2 + (x - x.detach())  # exactly halves, and the derivative is 1
        kinds = [F.relu(x), x.clamp(min=0), x.clamp(0, 1), F.hardtanh(x), F.relu6(x * 3), torch.clip(x, 0, 2)]
        kinds += [F.leaky_relu(x, 0.2), F.threshold(x, 0.5, -1.5), torch.maximum(x, torch.zeros(1)), x.clamp_min(0)]
        return self.head(torch.cat(kinds, 1))


class Checkpointed(nn.Module):
    """The body may be computed again during backward; its graph is whole all the same."""

    def __init__(self, again: bool):
        super().__init__()
        self.body, self.again = Plain(nn.ReLU()), again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x * 1.5, use_reentrant=False) if self.again else self.body(x * 1.5)


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _traced(make: Callable[[], nn.Module]) -> Callable[[], Model]:
    def trace() -> Model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tracing is deprecated, and people still have traces
            return torch.jit.trace(make().eval(), torch.ones(IMAGE))

    return trace


def _exported(make: Callable[[], nn.Module]) -> Callable[[], Model]:
    """An exported module says `training` True whatever it was exported as; so it is left."""
    return lambda: torch.export.export(make().eval(), (torch.ones(IMAGE),)).module()


def _function() -> Model:
    kernel, head = torch.randn(5, 3, 3, 3) * 0.3, torch.randn(CLASSES, 5)
    return lambda x: F.linear(F.conv2d(x, kernel).relu().mean((2, 3)), head)


def _two_readers(h: Tensor) -> Tensor:
    return F.relu(h) * 1.3 - h * 0.4


def _read_before_and_after(h: Tensor) -> Tensor:
    before = h * 0.4
    h.relu_()
    return before - h * 1.3


def _normalised(h: Tensor) -> Tensor:
    h = F.normalize(F.relu(h), dim=1, eps=1e-6)
    return (h / h.norm(dim=1, keepdim=True).clamp(min=1e-3)).clamp(max=0.9)


def _relu_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(175, CLASSES))


def _many_kinds(h: Tensor) -> Tensor:
    nested = F.relu6(F.leaky_relu(h, 0.2)) + F.hardtanh(h).clamp(min=0)
    return nested + h.clamp_min(0) + torch.maximum(h, h.new_zeros(1))


AWKWARD: list[Network] = [
    # Spellings
    _row("functional", lambda: Plain(F.relu), IMAGE, 2, "F.relu: no module to find"),
    _row("functional_inplace", lambda: Plain(lambda x: F.relu(x, inplace=True)), IMAGE, 2, "F.relu(inplace=True)"),
    _row("tensor_relu", lambda: Plain(Tensor.relu), IMAGE, 2, "Tensor.relu"),
    _row("tensor_relu_", lambda: Plain(Tensor.relu_), IMAGE, 2, "Tensor.relu_"),
    _row("torch_relu", lambda: Plain(torch.relu), IMAGE, 2, "torch.relu"),
    _row("torch_relu_", lambda: Plain(torch.relu_), IMAGE, 2, "torch.relu_"),
    _row("aten_relu", lambda: Plain(torch.ops.aten.relu.default), IMAGE, 2, "the operator itself"),
    _row("function", _function, IMAGE, 1, "a plain function, not a module"),
    # Modules
    _row("batch_norm", lambda: _normed(False), IMAGE, 2, "nn.ReLU after batch norm; dropout in evaluation", swap=True),
    _row("batch_norm_inplace", lambda: _normed(True), IMAGE, 2, "nn.ReLU(inplace=True) after batch norm", swap=True),
    _row("inplace", lambda: Plain(nn.ReLU(inplace=True)), IMAGE, 2, "nn.ReLU(inplace=True) after conv", swap=True),
    _row("reused", lambda: Plain(nn.ReLU(), depth=3), IMAGE, 3, "one nn.ReLU called three times", swap=True),
    _row("nested", Nested, IMAGE, 2, "found by dotted name only", swap=True),
    _row("subclass", lambda: Plain(NamedReLU()), IMAGE, 2, "a subclass of nn.ReLU", swap=True),
    _row("subclass_forward", lambda: Plain(ScaledReLU()), IMAGE, 2, "a subclass with a forward of its own"),
    _row("relu_first", _relu_first, IMAGE, 2, "an in-place ReLU writes into the input itself", swap=True),
    # Shapes of the graph
    _row("preactivation", lambda: Around(Preactivation()), IMAGE, 2, "a skip around a reused ReLU", swap=True),
    _row("two_readers", lambda: Around(_two_readers), IMAGE, 1, "something else reads the pre-activation too"),
    _row("read_before_inplace", lambda: Around(_read_before_and_after), IMAGE, 1, "read, then changed in place"),
    _row("shared_weights", Vectors, VECTOR, 3, "one nn.Linear used twice; plain vectors"),
    _row("frozen", lambda: _frozen(Plain(nn.ReLU())), IMAGE, 2, "no parameter requires a gradient", swap=True),
    _row("hypernetwork", Hypernetwork, VECTOR, 1, "a ReLU on weights alone must not count"),
    _row("no_relu", lambda: Plain(torch.tanh), IMAGE, 0, "nothing to rewire"),
    _row(
        "checkpoint",
        lambda: Checkpointed(True),
        IMAGE,
        2,
        "computed again during backward, not reentrant",
        swap=True,
        twin=lambda: Checkpointed(False),
    ),
    # Inputs and outputs
    _row("series", lambda: Plain(nn.ReLU(), rank=1), SERIES, 2, "(B, C, T)", swap=True),
    _row("volume", lambda: Plain(F.relu, rank=3), VOLUME, 2, "(B, C, D, H, W)"),
    _row("two_inputs", Pair, (IMAGE, VECTOR), 2, "x is a tuple"),
    _row("tuple_output", lambda: Outputs(lambda *both: both), IMAGE, 2, "scores first; a third ReLU beside", swap=True),
    _row("logits_output", lambda: Outputs(WithLogits), IMAGE, 2, "scores in .logits; a third ReLU beside", swap=True),
    # Networks within networks
    _row("transformer", Attention, TOKENS, 2, "ReLU inside TransformerEncoderLayer"),
    _row("transformer_pre_norm", lambda: Attention(norm_first=True), TOKENS, 2, "the same, norm first"),
    _row("rnn", lambda: Recurrent(False), VECTOR, 3, "nn.RNN: one call, three steps", twin=lambda: Recurrent(True)),
    _row("traced", _traced(lambda: Plain(F.relu)), IMAGE, 2, "torch.jit.trace", twin=lambda: Plain(F.relu)),
    _row(
        "traced_kinds",
        _traced(lambda: Around(_many_kinds)),
        IMAGE,
        6,
        "torch.jit.trace of the other kinds",
        twin=lambda: Around(_many_kinds),
    ),
    _row("exported", _exported(lambda: Plain(F.relu)), IMAGE, 2, "torch.export: a graph of aten operators"),
    _row("exported_inplace", _exported(lambda: Plain(nn.ReLU(True))), IMAGE, 2, "aten.relu_ in an exported graph"),
    _row("exported_kinds", _exported(lambda: Around(_many_kinds)), IMAGE, 6, "the other kinds, exported"),
    # The other ReLU-like kinds
    _row("relu6", lambda: Plain(nn.ReLU6()), IMAGE, 2, "with a plateau", swap=True),
    _row("relu6_inplace", lambda: Plain(nn.ReLU6(inplace=True)), IMAGE, 2, "hardtanh_ underneath", swap=True),
    _row("hardtanh", lambda: Plain(nn.Hardtanh(-1.0, 1.0)), IMAGE, 2, "passes between -1 and 1", swap=True),
    _row("leaky_relu", lambda: Plain(nn.LeakyReLU(0.2)), IMAGE, 2, "a slope", swap=True),
    _row("leaky_relu_inplace", lambda: Plain(nn.LeakyReLU(0.2, True)), IMAGE, 2, "LeakyReluBackward1", swap=True),
    _row("prelu", lambda: Plain(nn.PReLU(5, 0.3)), IMAGE, 2, "a slope for each channel", swap=True),
    _row("prelu_single", lambda: Plain(nn.PReLU()), IMAGE, 2, "one slope for all", swap=True),
    _row("rrelu", lambda: Plain(nn.RReLU()), IMAGE, 2, "random slopes, their mean in evaluation", swap=True),
    _row("threshold", lambda: Plain(nn.Threshold(0.1, -0.5)), IMAGE, 2, "a jump", swap=True),
    _row("threshold_inplace", lambda: Plain(nn.Threshold(0.1, 0.0, True)), IMAGE, 2, "ThresholdBackward1", swap=True),
    _row("clamp_min", lambda: Plain(lambda x: x.clamp(min=0)), IMAGE, 2, "clamp(min=0)"),
    _row("clamp_min_", lambda: Plain(lambda x: x.clamp_min_(0)), IMAGE, 2, "in place"),
    _row("clamp_tensor", lambda: Plain(lambda x: x.clamp(min=torch.zeros(1))), IMAGE, 2, "the bound is a tensor"),
    _row("clip", lambda: Plain(lambda x: torch.clip(x, 0, 6)), IMAGE, 2, "clip(0, 6)"),
    _row("maximum", lambda: Plain(lambda x: torch.maximum(x, torch.zeros(1))), IMAGE, 2, "maximum(x, 0)"),
    _row("maximum_second", lambda: Plain(lambda x: torch.max(torch.zeros(1), x)), IMAGE, 2, "max(0, x)"),
    _row("normalize", lambda: Around(_normalised), IMAGE, 1, "clamps of a norm's epsilon, and clamp(max=) alone"),
    _row("edges", Edges, VECTOR, 10, "pre-activations on the very edge, where kernels differ"),
]


def _mixed(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return the maker of a network with a smooth activation twice, and a ReLU between."""

    def make() -> nn.Module:
        body = [nn.Conv2d(3, 5, 3), kind(), nn.Conv2d(5, 5, 2), nn.ReLU(), nn.Conv2d(5, 6, 2), kind()]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(90, CLASSES))

    return make


def _spelled(h: Tensor) -> Tensor:
    """Smooth activations by function, three of them in place."""
    h = F.gelu(F.softplus(F.relu(h), beta=2), approximate="tanh") - F.silu(h * 1.1, inplace=True)
    return F.hardswish(F.elu_(h * 1.2, 0.8)) + F.celu(F.selu(F.mish(h)), 1.3, inplace=True)


def _smooth(name: str, kind: Callable[[], nn.Module]) -> Network:
    return _row(name, _mixed(kind), IMAGE, 1, "twice, and a ReLU between", swap=True, rewired_all=3)


SMOOTH: list[Network] = [
    _smooth("gelu", nn.GELU),
    _smooth("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
    _smooth("silu", nn.SiLU),
    _smooth("silu_inplace", lambda: nn.SiLU(inplace=True)),
    _smooth("mish", nn.Mish),
    _smooth("elu", lambda: nn.ELU(0.7)),
    _smooth("elu_inplace", lambda: nn.ELU(0.7, inplace=True)),
    _smooth("selu", nn.SELU),
    _smooth("celu", lambda: nn.CELU(1.3)),
    _smooth("softplus", lambda: nn.Softplus(beta=2)),
    _smooth("hardswish", nn.Hardswish),
    _row("smooth_functions", lambda: Around(_spelled), IMAGE, 1, "by function", rewired_all=9),
    _row("transformer_gelu", lambda: Attention(activation="gelu"), TOKENS, 0, "no ReLU, two GELUs", rewired_all=2),
]
