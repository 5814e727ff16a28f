"""LRP on convolutional networks as they are, against explicit sums over all pairs of an input and an output.

The twin goes through the layers by hand. Each layer is a dense matrix, got by applying it to every unit vector, and
each rule is written out over the table of contributions x_i w_ij.
"""

import pytest
import torch
from torch import Tensor, nn

import undertow as ut
from frameworks.torch.real_models import built, drawn

EPSILON = 1e-6
BOX = (-4.0, 4.0)


def sign(z):
    return torch.where(z < 0, -1.0, 1.0).to(z)


def share(contributions: Tensor, whole: Tensor, relevance: Tensor) -> Tensor:
    """Share R_j over i: (B, n, m) of a whole (B, m)."""
    return (contributions * (relevance / (whole + EPSILON * sign(whole)))[:, None]).sum(-1)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole; 0 where nothing is."""
    return torch.where(whole == 0, 0, part / whole)


class Layer:
    """A layer as a matrix (n, m) and a bias (m,), flattened; a batch norm multiplies and shifts both."""

    def __init__(self, module: nn.Module, x: Tensor, norm: nn.Module | None = None):
        def linear(v: Tensor) -> Tensor:
            v = v.reshape(-1, *x.shape[1:])
            if isinstance(module, nn.Conv2d):
                return nn.functional.conv2d(v, module.weight, None, module.stride, module.padding, 1, module.groups)
            return nn.functional.linear(v, module.weight) if isinstance(module, nn.Linear) else module(v)

        self.shape, unit = x.shape, torch.eye(x[0].numel(), dtype=x.dtype)
        out = linear(unit)
        self.W, self.x = out.flatten(1), x.flatten(1)
        self.connected = linear_of_ones(module, x, unit)
        bias = getattr(module, "bias", None)
        planes = torch.zeros(out.shape[1:], dtype=x.dtype)
        planes = planes if bias is None else planes + (bias[:, None, None] if out.ndim == 4 else bias)
        if norm is not None:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.W = (out * scale[:, None, None]).flatten(1)
            planes = (planes - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        self.b = planes.flatten()
        self.z = self.x[:, :, None] * self.W  # contributions
        self.y = self.z.sum(1) + self.b

    def back(self, rule: str, relevance: Tensor) -> Tensor:
        return getattr(self, rule)(relevance.flatten(1)).reshape(self.shape)

    def epsilon(self, R):
        return share(self.z, self.y, R)

    def parts(self, sign_, R):
        z = (sign_ * self.z).clamp(min=0) * sign_
        b = (sign_ * self.b).clamp(min=0) * sign_
        return share(z, z.sum(1) + b, R)

    def plus(self, R):
        return self.parts(1, R)

    def alpha2_beta1(self, R):
        return 2 * self.parts(1, R) - self.parts(-1, R)

    def gamma(self, R, by=0.25):
        total = 0
        for direction in (1, -1):
            favoured = (direction * self.z).clamp(min=0) * direction
            z = self.z + by * favoured
            b = self.b + by * (direction * self.b).clamp(min=0) * direction
            total = total + share(z, z.sum(1) + b, R * (direction * self.y > 0))
        return total

    def flat(self, R):
        z = self.connected.expand_as(self.z)
        return share(z, z.sum(1), R)

    def box(self, R):
        low, high = BOX
        z = self.z - low * self.W.clamp(min=0) - high * self.W.clamp(max=0)
        return share(z, z.sum(1), R)

    def excitation(self, R):
        z = self.x.clamp(min=0)[:, :, None] * self.W.clamp(min=0)
        return share(z, z.sum(1), R)


def linear_of_ones(module: nn.Module, x: Tensor, unit: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        ones, v = torch.ones_like(module.weight), unit.reshape(-1, *x.shape[1:])
        return nn.functional.conv2d(v, ones, None, module.stride, module.padding, 1, module.groups).flatten(1)
    return torch.ones(x[0].numel(), getattr(module, "out_features", 1), dtype=x.dtype)


def back_through_pool(pool: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    """Where max-pooling: all to the winner. Where a mean: in proportion to what each gave."""
    x = x.detach().requires_grad_()
    y = pool(x)
    (g,) = torch.autograd.grad(y, x, torch.where(y == 0, 0, relevance.reshape(y.shape) / y))
    return (x * g).detach()


RULES = {
    "lrp:epsilon": ("epsilon", "epsilon", "epsilon"),
    "lrp:epsilon-plus-flat": ("flat", "plus", "epsilon"),
    "lrp:epsilon-alpha2-beta1": ("alpha2_beta1", "alpha2_beta1", "epsilon"),
    "lrp:epsilon-gamma-box": ("box", "gamma", "epsilon"),
    "excitation": ("excitation", "excitation", "excitation"),
}


def rule_of(name):
    bounded = ut.rules.composite("bounded", ut.lrp.gamma(), ut.lrp.box(*BOX))
    return bounded if name == "lrp:epsilon-gamma-box" else name


def scored(y: Tensor, target: int) -> Tensor:
    R = torch.zeros_like(y)
    R[:, target] = y[:, target]
    return R


class Plain(nn.Module):
    """Convolutions with and without batch norm, in groups, both poolings, two linear layers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.c, self.d = nn.Linear(6, 5), nn.Linear(5, 3)
        self.maximum, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x):
        h = self.maximum(torch.relu_(self.norm(self.a(x))))
        h = self.mean(self.b(h).relu()).flatten(1)
        return self.d(nn.functional.leaky_relu(self.c(h)))

    def twin(self, x, rules, target):
        first, conv, linear = rules
        a = Layer(self.a, x, self.norm)
        y = a.y.reshape(len(x), 4, 10, 10).relu()
        p = self.maximum(y)
        b = Layer(self.b, p)
        z = b.y.reshape(len(x), 6, 2, 2).relu()
        c = Layer(self.c, self.mean(z).flatten(1))
        d = Layer(self.d, nn.functional.leaky_relu(c.y))
        R = c.back(linear, d.back(linear, scored(d.y, target)))
        R = b.back(conv, back_through_pool(self.mean, z, R))
        return a.back(first, back_through_pool(self.maximum, y, R))


class Residual(nn.Module):
    """A block whose input goes round it, and one convolution that is used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.twice, self.last, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.stem(x)))
        h = self.twice(self.twice(x).relu()).relu()
        return self.head((self.norm2(self.last(h)) + x).relu().mean((2, 3)))

    def twin(self, x, rules, target):
        first, conv, linear = rules
        planes = (len(x), 4, 6, 6)
        stem = Layer(self.stem, x, self.norm)
        h = stem.y.reshape(planes).relu()
        once = Layer(self.twice, h)
        again = Layer(self.twice, once.y.reshape(planes).relu())
        last = Layer(self.last, again.y.reshape(planes).relu(), self.norm2)
        branch = last.y.reshape(planes)
        total = branch + h
        pooled = total.relu()
        head = Layer(self.head, pooled.mean((2, 3)))
        R = head.back(linear, scored(head.y, target))
        R = ratio(pooled, pooled.sum((2, 3), keepdim=True)) * R[:, :, None, None]
        around = again.back(conv, last.back(conv, R * ratio(branch, total)))
        return stem.back(first, once.back(conv, around) + R * ratio(h, total))


class Dense(nn.Module):
    """Channels joined, and batch norms before convolutions: each a layer of its own, under the ε rule with 0."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.grow = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.final, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x, self.grow(self.norm(x).relu())], 1)
        return self.head(self.final(x).relu().mean((2, 3)))

    def twin(self, x, rules, target):
        first, conv, linear = rules
        planes = (len(x), 4, 6, 6)
        stem = Layer(self.stem, x)
        h = stem.y.reshape(planes).relu()
        normed = self.norm(h)
        grow = Layer(self.grow, normed.relu())
        joined = torch.cat([h, grow.y.reshape(planes)], 1)
        final = self.final(joined)
        pooled = final.relu()
        head = Layer(self.head, pooled.mean((2, 3)))
        R = head.back(linear, scored(head.y, target))
        R = ratio(pooled, pooled.sum((2, 3), keepdim=True)) * R[:, :, None, None]
        R = R * joined * scale_of(self.final) / final
        before = grow.back(conv, R[:, 4:]) * h * scale_of(self.norm) / normed
        return stem.back(first, R[:, :4] + before)


def scale_of(norm):
    return (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]


def ready(make):
    """A network in which no batch norm is idle."""
    net, generator = built(make), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                lows = (module.weight, 0.5), (module.bias, -0.3), (module.running_mean, -0.2), (module.running_var, 0.6)
                for t, low in lows:
                    t.copy_(low + torch.rand(t.shape, generator=generator, dtype=t.dtype))
    return net


def distance(values, wanted):
    return float((values - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("make", "size"), [(Plain, 10), (Residual, 8), (Dense, 8)])
def test_an_unmodified_network_equals_the_sums_over_all_pairs(make, size, rule, frozen):
    net, x = ready(make).requires_grad_(not frozen), drawn(2, 3, size, size)
    a = ut.explain(net, x, rule=rule_of(rule), target=1)
    with torch.no_grad():
        assert torch.equal(a.scores, net(x)[:, 1])
    wanted = ready(make).requires_grad_(False).twin(x, RULES[rule], 1)
    assert distance(a.values, wanted) < 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_without_biases_the_relevance_is_the_score(rule):
    def make():
        layers = (
            nn.Conv2d(3, 16, 3, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, bias=False),
            nn.ReLU(),
        )
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3, bias=False))

    net, x = built(make), drawn(2, 3, 12, 12).abs()
    with torch.no_grad():
        net[-1].weight.abs_()  # a sum of one sign, which no rule has to balance
        for layer in (net[0], net[3]):
            layer.weight.mul_(5)
    a = ut.explain(net, x, rule=rule, target=[[0, 1], [2, 0]])
    assert torch.tensor(a.conservation).sub(1).abs().max() < 1e-5
    layers = ut.explain(net, x, rule=rule, target=[[0, 1], [2, 0]], at=["1", "3", "5"])
    for conserved in layers.conservation.values():
        assert torch.tensor(conserved).sub(1).abs().max() < 1e-5


def test_what_scales_the_input_passes_relevance_as_it_is():
    net, x = ready(Plain), drawn(2, 3, 10, 10).abs()
    for scaled in (lambda v: (v - 0.5) / 0.25, lambda v: -v + 0.5):
        wanted = ut.explain(net, scaled(x), rule="lrp:epsilon-plus-flat", target=1)
        a = ut.explain(lambda v, scaled=scaled: net(scaled(v)), x, rule="lrp:epsilon-plus-flat", target=1)
        assert distance(a.values, wanted.values) < 1e-12


@pytest.mark.parametrize("rule", ["lrp:epsilon", "lrp:epsilon-gamma-box", "lrp:epsilon-alpha2-beta1"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, of run_decompositions
@pytest.mark.parametrize("spelling", ["functional", "exported", "decomposed", "channels last"])
def test_any_spelling_of_a_network_is_the_same_to_it(rule, spelling):
    net, x = ready(Plain), drawn(2, 3, 10, 10)
    wanted = ut.explain(net, x, rule=rule, target=1).values
    if spelling in ("exported", "decomposed"):
        exported = torch.export.export(net, (x,))
        net = (exported if spelling == "exported" else exported.run_decompositions()).module()
    elif spelling == "functional":
        state = {name: value.detach() for name, value in net.state_dict().items()}
        net = (lambda inner: lambda v: torch.func.functional_call(inner, state, (v,)))(ready(Plain))
    else:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert distance(ut.explain(net, x, rule=rule, target=1).values, wanted) < 1e-12


def test_a_box_by_default_is_each_samples_own():
    net, x = ready(Plain), drawn(2, 3, 10, 10)
    both = ut.explain(net, x, rule="lrp:epsilon-gamma-box", target=1).values
    low, high = x[:1].amin((2, 3), keepdim=True), x[:1].amax((2, 3), keepdim=True)
    own = ut.explain(net, x[:1], rule=ut.rules.composite("own", ut.lrp.gamma(), ut.lrp.box(low, high)), target=1).values
    assert distance(both[:1], own) < 1e-12


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.cat([self.conv(x).relu(), x], 1).mean((2, 3)))


def pooled_before():
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Beside, "beside the first layers"),
        (pooled_before, "between x and the first layer"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1)), "no convolution or matrix product"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Unknown(), nn.Flatten(), nn.Linear(256, 3)), "no row for Cumprod"),
    ],
)
def test_what_would_be_wrong_is_refused(make, line):
    with pytest.raises(ut.RuleError, match=line):
        ut.explain(
            built(make), drawn(1, 3, 10, 10)[..., :10, :10], rule="lrp:epsilon-plus-flat", head="as is", target=1
        )


class Unknown(nn.Module):
    def forward(self, x):
        return x.cumprod(1)


def test_a_bias_that_was_overwritten_is_an_error_and_never_zero():
    net, x = ready(Plain).requires_grad_(False), drawn(1, 3, 10, 10)

    def run(v):
        y = net(v)
        net.d.bias.add_(0)  # nobody can say what it was
        return y

    with pytest.raises(ut.RuleError, match="bias of AddmmBackward0"):
        ut.explain(run, x, rule="lrp:epsilon", target=1)


def test_a_verdict_asks_all_its_questions():
    v = ut.trust(ready(Plain), drawn(1, 3, 10, 10), rule="lrp:epsilon-plus-flat", names=["a", "b", "c"])
    assert v.unanswered == {}


def test_a_target_may_weigh_the_scores():
    net, x = ready(Plain), drawn(2, 3, 10, 10)
    weights = torch.eye(3, dtype=torch.float64)[1]
    a = ut.explain(net, x, rule="lrp:epsilon-plus-flat", target=lambda y: y @ weights)
    assert distance(a.values, ut.explain(net, x, rule="lrp:epsilon-plus-flat", target=1).values) < 1e-4


@pytest.mark.parametrize("rule", ["lrp:epsilon", "lrp:epsilon-plus-flat", "attnlrp", "deeplift"])
@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x.clamp(min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.maximum(torch.zeros(1, dtype=x.dtype), x),
        lambda x: nn.functional.threshold(x, 0.0, 0.0),
        lambda x: nn.functional.hardtanh(x, 0.0, 1e9),
        lambda x: nn.functional.leaky_relu(x, 0.0),
        torch.relu_,
    ],
)
def test_a_relu_is_a_relu_however_it_is_written(spelling, rule):
    def explained(f):
        first, last = built(lambda: nn.Linear(6, 8)), built(lambda: nn.Linear(8, 3))
        return ut.explain(lambda x: last(f(first(x))), drawn(2, 6), rule=rule, target=1).values

    assert distance(explained(spelling), explained(torch.relu)) < 1e-12


@pytest.mark.parametrize("rule", ["attnlrp", *RULES])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_in_bfloat16_it_is_nearly_the_same_map(how, rule):
    net, x = ready(Plain).float(), drawn(2, 3, 10, 10).float()
    wanted = ut.explain(net, x, rule=rule, target=1).values
    if how == "bfloat16":
        net, x = net.bfloat16(), x.bfloat16()

    def run(v):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return net(v)

    a = ut.explain(run, x, rule=rule, target=1)
    assert a.values.dtype == x.dtype
    assert distance(a.values.float(), wanted) < 0.1
