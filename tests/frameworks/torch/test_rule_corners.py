"""Rules that are tables, at operations written in unusual ways: each against a formula or another spelling of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from frameworks.torch.real_models import built, drawn
from undertow import lrp, rules

pytestmark = pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.7, 2.0], dtype=torch.float64)
CONSTANT = torch.tensor([0.5, 2.0, -1.0, 1.5, -0.3, 0.8], dtype=torch.float64)


def distance(values, wanted) -> float:
    return float((values - wanted).norm() / wanted.norm())


def explained(f, x, rule, weights=WEIGHTS):
    """The map of a weighted sum of what f gives; of one operation, it is the terms of the sum."""
    return ut.explain(lambda *given: f(*given) * weights, x, rule=rule, target=lambda y: y.sum(-1))


ONE_FUNCTION = {
    "a constant by x": lambda x: CONSTANT / x,
    "a power of a number": lambda x: 2.0**x,
    "a power of a constant": lambda x: CONSTANT.abs() ** x,
    "x to a constant": lambda x: x.abs() ** CONSTANT,
    "a threshold and another value": lambda x: F.threshold(x, 0.1, 0.7),
    "a hard swish, in place": lambda x: F.hardswish(x.clone(), inplace=True),
    "softsign": F.softsign,
    "x less its tanh": F.tanhshrink,
    "a mixture of itself": lambda x: torch.lerp(x, x.tanh(), x.sigmoid()),
    "a fused sum of products": lambda x: torch.addcmul(x, x, x, value=0.5),
    "hard swish written out": lambda x: x * F.relu6(x + 3) / 6,
}


@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", ONE_FUNCTION)
def test_a_function_of_one_tensor_keeps_all_of_its_relevance(name, rule):
    f, x = ONE_FUNCTION[name], drawn(2, 6)
    assert distance(explained(f, x, rule).values, f(x) * WEIGHTS) < 1e-12


@pytest.mark.parametrize("name", [*ONE_FUNCTION, "PReLU", "RReLU", "GLU", "sums of products", "an outer product"])
def test_deeplift_gives_all_of_the_difference_to_it(name):
    others = {
        "PReLU": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
        "RReLU": F.rrelu,
        "GLU": lambda x: F.glu(torch.cat([x, x.flip(-1)], -1)),
        "sums of products": lambda x: torch.addcmul(x, x.tanh(), x.flip(-1)),
        "an outer product": lambda x: (x.unsqueeze(-1) * x.flip(-1).unsqueeze(-2)).sum(-1),
    }
    a = ut.explain(
        lambda x: (ONE_FUNCTION | others)[name](x) * WEIGHTS,
        drawn(2, 6),
        rule="deeplift",
        baseline=drawn(2, 6, seed=9),
        target=lambda y: y.sum(-1),
    )
    assert abs(a.completeness).max() < 1e-10


def test_a_glu_is_a_product_with_a_gate():
    x = drawn(2, 12)
    y = F.glu(x) * WEIGHTS
    assert distance(explained(F.glu, x, "attnlrp").values, torch.cat([y / 2, y / 2], -1)) < 1e-12
    assert distance(explained(F.glu, x, "cp-lrp").values, torch.cat([y, 0 * y], -1)) < 1e-12
    a = explained(lambda x: F.glu(x.unflatten(-1, (2, 6)), 1).flatten(1), x, "attnlrp")
    assert distance(a.values, torch.cat([y / 2, y / 2], -1)) < 1e-12


TWO = {
    "gate": (lambda a, b: a * b.sigmoid(), 1),
    "one less a gate": (lambda a, b: a.tanh() * (1 - b.sigmoid()), 1),
    "a gate of relu6": (lambda a, b: a.relu() * (F.relu6(b + 3) / 6), 1),
    "an activation of its own": (lambda a, b: F.silu(a) * b, 0),
    "a capped activation": (lambda a, b: F.relu6(a) * b, 0),
    "neither": (lambda a, b: a * b, None),
    "a fused mixture": (lambda a, b: torch.lerp(torch.zeros_like(a), a, b.sigmoid()), 1),
    "a dynamic sum": (lambda a, b: torch.addcmul(torch.zeros_like(a), a, b.sigmoid()), 1),
}


@pytest.mark.parametrize("name", TWO)
def test_a_product_of_two_inputs_is_shared_or_given_to_what_is_weighed(name):
    f, gate = TWO[name]
    x = drawn(2, 6), drawn(2, 6, seed=9)
    y = f(*x) * WEIGHTS
    for values, share in zip(
        explained(f, x, "cp-lrp").values, {0: (0, 1), 1: (1, 0), None: (0.5, 0.5)}[gate], strict=True
    ):
        assert torch.allclose(values, share * y, atol=1e-12)
    first, second = explained(f, x, "attnlrp").values
    assert torch.allclose(first, y / 2, atol=1e-12)
    if "one" not in name and "relu6" not in name:  # whose constants take a part
        assert torch.allclose(second, y / 2, atol=1e-12)


def mixed_heads(scores, values):
    """Attention whose weights are mixed by constants after the softmax."""
    return (scores.unflatten(-1, (2, 3)).softmax(-1).mT @ drawn(2, 2)).mT.flatten(1) * values


@pytest.mark.parametrize(
    "f",
    [
        lambda scores, values: scores.softmax(-1) * values,
        mixed_heads,
        lambda scores, values: ((scores / 2).softmax(-1).unsqueeze(-2) @ values.unsqueeze(-1))[..., 0] / 1.5,
    ],
)
def test_what_a_softmax_alone_gave_is_a_weight_however_it_is_mixed(f):
    x = drawn(2, 6), drawn(2, 6, seed=9)
    weights = WEIGHTS[: f(*x).shape[-1]]
    scores, values = explained(f, x, "cp-lrp", weights).values
    assert not scores.any()
    assert torch.allclose(values.sum(-1), (f(*x) * weights).sum(-1), rtol=1e-12)


def test_a_statistic_that_is_read_elsewhere_too_counts_there():
    def shared(x):
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.cat([x * inverse, inverse.expand(-1, 6)], -1)

    def twice(x):
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.cat([x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), inverse.expand(-1, 6)], -1)

    x, weights = drawn(2, 6), torch.cat([WEIGHTS, WEIGHTS])
    assert (
        distance(explained(shared, x, "attnlrp", weights).values, explained(twice, x, "attnlrp", weights).values)
        < 1e-12
    )


def test_an_exponential_that_is_read_twice_is_no_softmax():
    def f(x):
        e = x.exp()
        return e / e.sum(-1, keepdim=True) + e

    a = explained(f, drawn(2, 6), "attnlrp")
    assert a.skipped == {"DivBackward0": 1}


def test_a_value_that_nothing_kept_is_an_error():
    with pytest.raises(ut.RuleError, match="the value of ThresholdBackward1"):
        explained(lambda x: F.threshold(x.clone(), 0.1, 0.7, inplace=True), drawn(2, 6), "attnlrp")


def test_a_sum_of_picked_elements_has_the_gradient():
    x = drawn(2, 6)

    def f(x):
        largest = x.max(-1, keepdim=True).values + x.amax(-1, keepdim=True) - x.topk(2, -1).values.sum(-1, keepdim=True)
        picked = torch.zeros_like(x).index_add(1, torch.arange(6), x.sort(-1).values)
        return torch.maximum(picked - largest, x.flip(-1))

    a = ut.explain(lambda x: F.silu(f(x)) * WEIGHTS, x, rule="attnlrp", target=lambda y: y.sum(-1))
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (g,) = torch.autograd.grad((y * (F.silu(y) / y).detach() * WEIGHTS).sum(), leaf)
    assert distance(a.values, g * x) < 1e-12
    assert a.skipped == {}


W = drawn(5, 6, seed=3)
ON_THE_LEFT = {
    "W @ x": lambda x: (W @ x.mT).mT,
    "W @ each x": lambda x: torch.stack([W @ v for v in x]),
    "einsum": lambda x: torch.einsum("oi,bi->bo", W, x),
    "with a bias": lambda x: torch.addmm(W[:, :1], W, x.mT, beta=0.5, alpha=2).mT,
}


@pytest.mark.parametrize("rule", ["lrp:epsilon", "lrp:epsilon-gamma-box", "excitation"])
@pytest.mark.parametrize("name", ON_THE_LEFT)
def test_a_layer_may_have_its_weights_on_the_left(name, rule):
    head = drawn(3, 5, seed=4)
    with_bias = name == "with a bias"

    def usual(x):
        return F.linear(x, 2 * W, 0.5 * W[:, 0]) if with_bias else F.linear(x, W)

    maps = [
        ut.explain(lambda x, f=f: F.linear(f(x).relu(), head), drawn(2, 6), rule=rule, target=1).values
        for f in (ON_THE_LEFT[name], usual)
    ]
    assert distance(maps[0], maps[1]) < 1e-12


@pytest.mark.parametrize("values", ["relu", "identity"])
def test_a_linear_layer_of_tokens_is_one_of_its_rows(values):
    a, b = drawn(5, 4, seed=1), drawn(3, 5, seed=2)
    f = F.relu if values == "relu" else (lambda x: x)
    x, rule = drawn(2, 3, 4), rules.composite("all", lrp.epsilon(), linear=lrp.alpha_beta(2, 1))
    tokens = ut.explain(lambda x: F.linear(f(F.linear(x, a, b[0])), b).mean(1), x, rule=rule, target=1).values
    rows = ut.explain(lambda x: F.linear(f(F.linear(x, a, b[0])), b), x.flatten(0, 1), rule=rule, target=1).values
    assert distance(tokens, rows.reshape(x.shape) / 3) < 1e-12


def test_a_filter_that_the_input_makes_has_its_gradient():
    signal, x = drawn(1, 1, 8, seed=4), drawn(2, 3)

    def f(x):
        return F.conv1d(signal, x.unsqueeze(1))[0]

    y = f(x)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((f(leaf) * F.silu(y) / y * WEIGHTS).sum(), leaf)
    assert distance(explained(lambda x: F.silu(f(x)), x, "attnlrp").values, g * x) < 1e-12


CONVOLUTIONS = {
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1),
    "transposed, in groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
}


@pytest.mark.parametrize(
    "rule", ["lrp:epsilon", "lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box", "lrp:epsilon-alpha2-beta1"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_batch_norm_is_one_with_a_convolution_of_any_kind(name, rule):
    def make():
        conv = CONVOLUTIONS[name]()
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())

    net, x = built(make), drawn(2, 3, 6, 6)
    conv, norm = net[2], net[3]
    with torch.no_grad():
        for i, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            t.copy_(0.5 + drawn(*t.shape, seed=i).abs())
    merged = nn.Sequential(net[0], net[1], built(CONVOLUTIONS[name]), nn.ReLU())
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        merged[2].bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
        if isinstance(conv, nn.ConvTranspose2d):
            own = scale.view(conv.groups, -1).repeat_interleave(conv.in_channels // conv.groups, 0)
            merged[2].weight.copy_(conv.weight * own[:, :, None, None])
        else:
            merged[2].weight.copy_(conv.weight * scale[:, None, None, None])
        assert distance(net(x), merged(x)) < 1e-12

    def score(y):
        return y.flatten(1) @ drawn(y[0].numel(), seed=8)

    maps = [ut.explain(f, x, rule=rule, target=score).values for f in (net, merged)]
    assert distance(maps[0], maps[1]) < 1e-12


def last(f):
    """A function of tensors whose channels are first, applied to such whose channels are last."""
    return lambda y, *constants: f(y.permute(0, 2, 3, 1), *(c[:, 0, 0] for c in constants)).permute(0, 3, 1, 2)


def in_place(y, mean, spread, weight, bias):
    y -= mean
    y /= spread
    y *= weight
    y += bias
    return y


NORMS = {
    "a scale and a shift": lambda y, mean, spread, weight, bias: (
        y * (weight / spread) + (bias - mean * weight / spread)
    ),
    "as its formula": lambda y, mean, spread, weight, bias: weight * ((y - mean) / spread) + bias,
    "turned twice": lambda y, mean, spread, weight, bias: bias - (mean - y) * (weight / spread),
    "in place": in_place,
    "channels last": last(lambda y, mean, spread, weight, bias: (y - mean) / spread * weight + bias),
    "transposed": lambda y, *of: last(lambda y, m, s, w, b: (y - m) / s * w + b)(y.transpose(2, 3), *of).transpose(
        2, 3
    ),
}


@pytest.mark.parametrize("rule", ["lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box", "lrp:epsilon-alpha2-beta1"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", [(2, 7), (1, 3)])
def test_a_batch_norm_is_one_with_its_convolution_in_any_spelling(name, rule, size):
    a, b = built(lambda: nn.Conv2d(3, 4, 2, bias=False)), built(lambda: nn.Conv2d(4, 5, 2))
    norms = [built(lambda n=n: nn.BatchNorm2d(n)) for n in (4, 5)]
    with torch.no_grad():
        for k, norm in enumerate(norms):
            for i, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
                t.copy_(drawn(*t.shape, seed=k + i) if i != 3 else 0.5 + drawn(*t.shape, seed=i).abs())

    def written(y, norm):
        spread = (norm.running_var + norm.eps).sqrt()
        return NORMS[name](y, *(t[:, None, None] for t in (norm.running_mean, spread, norm.weight, norm.bias)))

    def network(norms):
        return lambda x: norms[1](b(norms[0](a(x)).relu())).relu().mean((2, 3))

    x = drawn(size[0], 3, size[1], size[1], seed=3)
    maps = [
        ut.explain(f, x, rule=rule, target=lambda y: y @ drawn(5, seed=8).abs()).values
        for f in (network(norms), network([lambda y, norm=norm: written(y, norm) for norm in norms]))
    ]
    assert distance(maps[1], maps[0]) < 1e-10


@pytest.mark.parametrize("rule", ["lrp:epsilon-plus-flat", "lrp:epsilon-gamma-box"])
def test_a_bias_may_be_added_in_a_step_of_its_own(rule):
    layer, x = built(lambda: nn.Conv2d(3, 4, 2)), drawn(2, 3, 5, 5)
    apart = [lambda x: F.conv2d(x, layer.weight) + layer.bias[:, None, None]]
    apart += [lambda x: F.conv2d(x, layer.weight).add(layer.bias[:, None, None] / 2, alpha=2)]
    expected, *others = [
        ut.explain(lambda x, f=f: f(x).relu().mean((2, 3)), x, rule=rule, target=2).values for f in (layer, *apart)
    ]
    assert max(distance(values, expected) for values in others) < 1e-12


def test_what_is_added_to_each_place_is_no_bias():
    layer, x, places = built(lambda: nn.Conv2d(3, 4, 2)), drawn(2, 3, 5, 5), drawn(4, 4, 4, seed=5)
    rule = "lrp:epsilon-plus-flat"
    is_open = layer(x) + places > 0
    expected = ut.explain(lambda x: (layer(x) * is_open).mean((2, 3)), x, rule=rule, target=2).values
    values = ut.explain(lambda x: (layer(x) + places).relu().mean((2, 3)), x, rule=rule, target=2).values
    assert distance(values, expected) < 1e-12


ON_THE_WAY = {
    **dict.fromkeys(("attnlrp", "cp-lrp"), ("qkv", "kv", "qv", "v", "qk", "k")),
    "lrp:epsilon": ("qkv", "kv", "qv"),  # a product with constant weights or values is a layer by LRP
}


@pytest.mark.parametrize(("rule", "on_the_way"), [(rule, names) for rule, ways in ON_THE_WAY.items() for names in ways])
def test_attention_is_the_same_in_one_operation_and_in_five(rule, on_the_way):
    def attention(q, k, v):
        return ((q @ k.mT) / 2).softmax(-1) @ v

    weights, constants = drawn(4, 4, 4, seed=6), drawn(3, 2, 5, 4, seed=7)

    def net(x, f):
        made = zip("qkv", weights[:3], constants, strict=True)
        heads = ((F.linear(x, w) if name in on_the_way else c).unsqueeze(1) for name, w, c in made)
        return F.gelu(f(*heads).squeeze(1) + F.linear(x, weights[3])).mean(1)

    first, second = (
        ut.explain(lambda x, f=f: net(x, f), drawn(2, 5, 4), rule=rule, target=1).values
        for f in (F.scaled_dot_product_attention, attention)
    )
    assert distance(first, second) < 1e-12


class Encoder(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.layers(x).mean(1 if self.batch_first else 0))


def test_a_rule_with_a_baseline_refuses_operations_whose_samples_are_not_first():
    for length in (3, 4):
        x = drawn(1, length, 8)
        with pytest.raises(ut.RuleError, match="batch_first=True"):
            ut.explain(built(lambda: Encoder(False)), x, rule="deeplift", target=1)
        ut.explain(built(lambda: Encoder(True)), x, rule="deeplift", target=1)
    maps = [ut.explain(built(lambda f=f: Encoder(f)), x, rule="attnlrp", target=1).values for f in (True, False)]
    assert distance(maps[0], maps[1]) < 1e-12


POOLS = {
    "windows": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 2, 1),
    "adaptive": nn.AdaptiveMaxPool2d(2),
}


@pytest.mark.parametrize("name", POOLS)
def test_deeplift_follows_maxima(name):
    def make():
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), POOLS[name], nn.Flatten(), nn.LazyLinear(3))

    net, x, baseline = built(make), drawn(2, 2, 8, 8), drawn(2, 2, 8, 8, seed=9)
    net(x)
    a = ut.explain(net.double(), x, rule="deeplift", baseline=baseline, target=1)
    assert abs(a.completeness).max() < 1e-10


def test_a_rise_of_a_maximum_goes_to_the_places_that_held_it():
    pool, x, baseline = nn.MaxPool2d(2), drawn(2, 1, 4, 4), drawn(2, 1, 4, 4, seed=9)
    weights = drawn(1, 1, 2, 2, seed=4)
    a = ut.explain(
        lambda x: (pool(x) * weights).flatten(1), x, rule="deeplift", baseline=baseline, target=lambda y: y.sum(1)
    )
    (y, places), (y0, places0) = (F.max_pool2d(v, 2, return_indices=True) for v in (x, baseline))
    higher = torch.maximum(y, y0)
    risen = F.max_unpool2d((higher - y0) * weights, places, 2) + F.max_unpool2d((y - higher) * weights, places0, 2)
    assert distance(a.values, risen) < 1e-12


class Recurrent(nn.Module):
    def __init__(self, by_cells: bool = False):
        super().__init__()
        self.lstm, self.head, self.by_cells = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3), by_cells

    def forward(self, x):
        if not self.by_cells:
            return self.head(self.lstm(x)[0][:, -1])
        h = c = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            gates = F.linear(x[:, t], self.lstm.weight_ih_l0, self.lstm.bias_ih_l0) + F.linear(
                h, self.lstm.weight_hh_l0, self.lstm.bias_hh_l0
            )
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp", "lrp:epsilon", "deeplift"])
def test_a_recurrent_layer_is_its_cells_or_is_refused(rule):
    x = drawn(2, 5, 4)
    wanted = ut.explain(built(lambda: Recurrent(True)), x, rule=rule, target=1).values
    close = 1e-2 if rule == "lrp:epsilon" else 1e-10  # whose ε stands at each of the sums, which are others
    assert distance(ut.explain(built(Recurrent), x, rule=rule, target=1).values, wanted) < close
    narrow = built(Recurrent).float()
    fused = type(narrow.lstm(x.float())[0].grad_fn.next_functions[0][0]).__name__
    if fused == "MkldnnRnnLayerBackward0":
        with pytest.raises(ut.RuleError, match="mkldnn"):
            ut.explain(narrow, x.float(), rule=rule, target=1)
    with torch.backends.mkldnn.flags(enabled=False):
        a = ut.explain(narrow, x.float(), rule=rule, target=1)
    assert distance(a.values.double(), wanted) < max(close, 1e-4)


@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp", "lrp:epsilon"])
def test_a_function_of_complex_numbers_is_that_of_their_parts(rule):
    first, last = built(lambda: nn.Linear(6, 8)), built(lambda: nn.Linear(8, 3))

    def of_parts(x):
        a, b = first(x).unflatten(-1, (4, 2)).unbind(-1)
        return last(torch.stack([a * a - b * b, 2 * a * b], -1).flatten(1))

    def of_numbers(x):
        h = torch.view_as_complex(first(x).unflatten(-1, (4, 2)))
        return last(torch.view_as_real(h * h).flatten(1))

    maps = [ut.explain(f, drawn(2, 6), rule=rule, target=1).values for f in (of_parts, of_numbers)]
    assert distance(maps[1], maps[0]) < 1e-12
    with pytest.raises(ut.RuleError, match="compares real numbers"):
        ut.explain(of_numbers, drawn(2, 6), rule="deeplift", target=1)
