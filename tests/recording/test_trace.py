"""One pass taken apart: against a worked example, plain autograd, closed formulas and finite differences."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import undertow as ut
from frameworks.torch.networks import AWKWARD, SMOOTH, Network
from undertow.frameworks.torch.inspect import formulas
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.recording.trace import trace

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # torch's remark on its own copy
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "known_answers.json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def two_layer_sigmoid() -> nn.Module:
    net = nn.Sequential()
    for name, module in {
        "fc1": nn.Linear(2, 2),
        "s1": nn.Sigmoid(),
        "fc2": nn.Linear(2, 2),
        "s2": nn.Sigmoid(),
    }.items():
        net.add_module(name, module)
    with torch.no_grad():
        net.fc1.weight.copy_(torch.tensor([[0.15, 0.25], [0.20, 0.30]]))
        net.fc2.weight.copy_(torch.tensor([[0.40, 0.50], [0.45, 0.55]]))
        net.fc1.bias.fill_(0.35)
        net.fc2.bias.fill_(0.60)
    return net


def test_the_worked_example_as_it_is_taught_with_one_bias_for_both_units():
    """A bias of one element is broadcast over the units, so its gradient is the sum over them."""
    W1, W2, b1, b2 = [[0.15, 0.25], [0.20, 0.30]], [[0.40, 0.50], [0.45, 0.55]], [0.35], [0.60]
    net = two_layer_sigmoid()
    for layer, weight, bias in ((net.fc1, W1, b1), (net.fc2, W2, b2)):
        layer.weight, layer.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))
    seen = trace(net, torch.tensor([[0.05, 0.10]]))
    assert {row.formula for row in seen.table()} == {"equal"}
    assert "DIFFERS" not in str(seen)

    def score(b1, b2):
        h = 1 / (1 + np.exp(-(np.array([0.05, 0.10]) @ np.array(W1).T + b1)))
        return (1 / (1 + np.exp(-(h @ np.array(W2).T + b2)))).sum()

    by_hand = [
        (score(0.35 + 1e-6, 0.6) - score(0.35 - 1e-6, 0.6)) / 2e-6,
        (score(0.35, 0.6 + 1e-6) - score(0.35, 0.6 - 1e-6)) / 2e-6,
    ]
    assert [seen[name].parameter_gradients["bias"].item() for name in ("fc1", "fc2")] == pytest.approx(
        by_hand, abs=1e-6
    )
    wrong = {"bias": 2 * seen["fc1"].parameter_gradients["bias"]}
    call = seen["fc1"]
    assert not formulas.formula_differences(net.fc1, call.inputs[0], call.output_gradients[0], wrong)["bias"].equal


@pytest.mark.parametrize("layer", ["conv", "linear", "batch norm"])
def test_a_long_sum_of_one_sign_may_be_off_by_its_rounding_and_no_more(layer):
    """Behind average pooling all gradients of a channel are equal; added one by one, float32 loses digits."""
    module = {"conv": nn.Conv2d(1, 2, 3), "linear": nn.Linear(1, 2), "batch norm": nn.BatchNorm2d(2)}[layer]
    n, x = 120 * 120, torch.randn((1, 120 * 120, 1) if layer == "linear" else (1, 1, 122, 122))
    x = torch.randn(1, 2, 120, 120) if layer == "batch norm" else x
    g = torch.full((1, n, 2) if layer == "linear" else (1, 2, 120, 120), 0.1)
    exact = g.double().sum().item() / 2
    for share, equal in ((0.5, True), (2.0, False)):
        bias = torch.full((2,), exact * (1 + share * n * 2.0**-24), dtype=torch.float64)
        assert formulas.formula_differences(module, x, g, {"bias": bias})["bias"].equal is equal


def test_worked_example_to_its_four_digits():
    expected = VECTORS["two_layer_sigmoid"]
    seen = trace(two_layer_sigmoid(), torch.tensor(expected["input"]), torch.tensor(expected["gradient_at_output"]))
    assert [call.name for call in seen] == ["fc1", "s1", "fc2", "s2"]

    def digits(tensor):
        return np.array(tensor.tolist()).round(4).tolist()

    assert [digits(call.outputs[0]) for call in seen] == expected["forward"]
    assert {call.name: digits(call.input_gradients[0]) for call in seen} == expected["backward_in"]
    for name, value in expected["parameters"].items():
        site, parameter = name.split(".")
        g = seen[site].parameter_gradients[parameter]
        assert digits(g.sum() if parameter == "bias" else g) == value  # each bias is one shared scalar
    assert {row.formula for row in seen.table()} == {"equal"}
    assert "0.1538, 0.1901" in str(seen)
    assert "0.0019, 0.0037" in str(seen)


FORMULAS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear_vector": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 7, 9)),
    "conv_strided": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(2, 1), dilation=(1, 2)), (2, 4, 8, 11)),
    "conv_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    "conv_depthwise": (lambda: nn.Conv2d(4, 8, 5, groups=4, stride=2, padding="valid"), (2, 4, 9, 8)),
    "conv_same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3), bias=False), (2, 4, 7, 12)),
    "conv_one_image": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 9)),
    "sigmoid": (nn.Sigmoid, (2, 3, 4)),
    "tanh": (nn.Tanh, (2, 3)),
    "relu": (nn.ReLU, (2, 3, 4)),
    "relu_inplace": (lambda: nn.ReLU(True), (2, 3, 4)),
    "max_pool": (lambda: nn.MaxPool2d(2), (2, 3, 7, 8)),
    "max_pool_overlapping": (lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0), dilation=(1, 2)), (2, 3, 9, 8)),
    "max_pool_ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 3, 8, 10)),
    "max_pool_one_image": (lambda: nn.MaxPool2d(3, return_indices=True), (3, 8, 10)),
    "avg_pool": (lambda: nn.AvgPool2d(2), (2, 3, 7, 8)),
    "avg_pool_padded": (lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 1), ceil_mode=True), (2, 3, 8, 7)),
    "avg_pool_inside": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 8, 7)),
    "avg_pool_divisor": (lambda: nn.AvgPool2d(3, 2, 1, divisor_override=4), (2, 3, 8, 7)),
    "adaptive_avg_pool": (lambda: nn.AdaptiveAvgPool2d((3, 5)), (2, 3, 7, 8)),
    "batch_norm": (lambda: settled(nn.BatchNorm2d(3)).eval(), (4, 3, 5, 6)),
    "batch_norm_plain": (lambda: settled(nn.BatchNorm2d(3, affine=False, eps=0.1)).eval(), (4, 3, 5, 6)),
    "batch_norm_1d": (lambda: settled(nn.BatchNorm1d(3)).eval(), (4, 3)),
    "batch_norm_series": (lambda: settled(nn.BatchNorm1d(3)).eval(), (4, 3, 5)),
    "batch_norm_training": (lambda: settled(nn.BatchNorm2d(3)), (4, 3, 5, 6)),
    "batch_norm_own": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), (4, 3, 5, 6)),
    "softmax": (lambda: nn.Softmax(1), (2, 5, 3)),
    "softmax_last": (lambda: nn.Softmax(-1), (4,)),
    "flatten": (lambda: nn.Flatten(2), (2, 3, 4, 5)),
}


def settled(norm):
    if norm.affine:
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def of(module, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    module = module.to(dtype)
    out = module(x.clone())
    out = out[0] if isinstance(out, tuple) else out
    return module, x, torch.randn_like(out.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", FORMULAS, ids=str)
def test_autograd_equals_the_formula(row, dtype):
    make, shape = FORMULAS[row]
    module, x, g = of(make(), shape, dtype)
    (call,) = trace(module, x, g)
    trained = {name for name, _ in module.named_parameters()}
    assert set(call.formula) == {"input"} | trained
    assert call.verdict == "equal"


@pytest.mark.parametrize("row", FORMULAS, ids=str)
def test_a_flipped_sign_in_any_gradient_differs(row):
    make, shape = FORMULAS[row]
    module, x, g = of(make(), shape, torch.float32)
    (call,) = trace(module, x, g)
    gradients = {"input": call.input_gradients[0], **call.parameter_gradients}
    for part, gradient in gradients.items():
        judged = formulas.formula_differences(module, x, g, {**gradients, part: -gradient})
        assert [name for name, difference in judged.items() if not difference.equal] == [part]
        nudged = gradient + 1e-3 * gradient.abs().amax() * torch.randn_like(gradient)
        assert not formulas.formula_differences(module, x, g, {part: nudged})[part].equal


@pytest.mark.parametrize("row", FORMULAS, ids=str)
def test_formulas_equal_finite_differences(row):
    """No autograd on either side: the formula against differences of the forward."""
    make, shape = FORMULAS[row]
    module, x, g = of(make(), shape, torch.float64)
    generator = torch.Generator().manual_seed(3)
    parts = formulas.FORMULAS[type(module)](module, x, g)

    def score(x):
        with torch.no_grad():
            out = module(x.clone())
        return float(((out[0] if isinstance(out, tuple) else out) * g).sum())

    def slope(tensor, way, run):
        values = []
        for sign in (1, -1):
            tensor.add_(sign * 1e-6 * way)
            values.append(run())
            tensor.sub_(sign * 1e-6 * way)
        return (values[0] - values[1]) / 2e-6

    point = x.clone()
    places = {"input": point} | {name: parameter.data for name, parameter in module.named_parameters()}
    for name, tensor in places.items():
        way = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        assert slope(tensor, way, lambda: score(point)) == pytest.approx(float((parts[name][0] * way).sum()), abs=1e-6)


def test_max_pool_ties_go_to_the_first():
    x = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    (call,) = trace(nn.MaxPool2d(2), x)
    assert call.input_gradients[0].tolist() == [[[[1.0, 0.0], [0.0, 0.0]]]]
    assert call.verdict == "equal"


@pytest.mark.parametrize("network", AWKWARD + SMOOTH, ids=str)
def test_calls_add_up_to_plain_autograd(network: Network):
    """Over every awkward network: parameter gradients, summed over calls, are autograd's; nothing is left behind."""
    model, x = network.build()
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        with pytest.raises(ut.InputError, match=r"nn\.Module's parts"):
            trace(model, x)
        return
    inputs = x if isinstance(x, tuple) else (x,)
    before = left(model)
    state, fed = torch.get_rng_state(), [part.clone() for part in inputs]
    seen = trace(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert left(model) == before
    assert all(map(torch.equal, fed, inputs))
    assert not any(call.note for call in seen if not call.name.startswith("beside"))
    assert all(call.verdict != "differs" for call in seen)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    out = model(*(part.clone() for part in inputs))
    out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple | list) else out.logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    if network.name in ("tuple", "list", "dict"):  # several outputs: ones at each
        return
    expected = torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)
    total: dict[int, torch.Tensor] = {}
    for call in seen:
        module = model.get_submodule(call.name)
        for name, g in call.parameter_gradients.items():
            if g is not None:
                key = id(module.get_parameter(name))
                total[key] = total.get(key, 0) + g
    for parameter, wanted in zip(parameters, expected, strict=True):
        ours = total.get(id(parameter))
        if ours is not None and wanted is not None:
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5), names[id(parameter)]


def left(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training) for m in model.modules()
    ]
    tensors = [(t._version, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    return hooks, tensors, [p.grad for p in model.parameters()]


def test_in_place_equals_out_of_place():
    def net(inplace):
        torch.manual_seed(1)
        parts = [nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.Flatten()]
        return nn.Sequential(*parts, nn.ReLU(inplace), nn.Dropout(), nn.ReLU6(inplace), nn.Linear(64, 3)).eval()

    x, g = torch.randn(2, 3, 8, 8), torch.randn(2, 3)
    for a, b in zip(trace(net(True), x, g), trace(net(False), x, g), strict=True):
        for ours, wanted in zip(
            (*a.inputs, *a.outputs, *a.input_gradients, *a.output_gradients, *a.parameter_gradients.values()),
            (*b.inputs, *b.outputs, *b.input_gradients, *b.output_gradients, *b.parameter_gradients.values()),
            strict=True,
        ):
            assert torch.equal(ours, wanted)


class Twice(nn.Module):
    """A layer used twice, whose input has three readers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.same = nn.Identity()

    def forward(self, x):
        first = self.fc(x)
        return self.fc(first) * first + self.same(first)


def test_each_call_of_a_reused_module_has_its_own_gradients():
    net, x = Twice().double(), torch.randn(2, 3).double()
    seen = trace(net, x)
    w, b = net.fc.weight.detach(), net.fc.bias.detach()
    first = x @ w.T + b
    second = first @ w.T + b
    at_second, at_first = first, second + first @ w + 1
    assert torch.allclose(seen["fc", 1].output_gradients[0], at_second)
    assert torch.allclose(seen["fc", 1].input_gradients[0], at_second @ w)  # this reader alone
    assert torch.allclose(seen["fc", 1].parameter_gradients["weight"], at_second.T @ first)
    assert torch.allclose(seen["fc", 0].output_gradients[0], at_first)  # all three readers
    assert torch.allclose(seen["fc", 0].parameter_gradients["weight"], at_first.T @ x)
    assert torch.allclose(seen["fc", 0].parameter_gradients["bias"], at_first.sum(0))
    assert torch.equal(seen["same"].output_gradients[0], torch.ones(2, 3).double())  # not the other readers' too
    with pytest.raises(ut.InputError, match="called 2 times"):
        seen["fc"]
    with pytest.raises(ut.InputError, match="did you mean fc"):
        seen["fcc"]


class Several(nn.Module):
    """A tuple out, an integer in, a part under no_grad and a frozen one."""

    def __init__(self):
        super().__init__()
        self.split = Split()
        self.dark, self.frozen, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.embedding = nn.Embedding(5, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x, ids):
        a, b = self.split(x)
        with torch.no_grad():
            c = self.dark(b)
        return self.frozen(a) + c + self.embedding(ids), a


class Split(nn.Module):
    def forward(self, x):
        return x[:, :2] * 2, x[:, 2:] * 3


def test_tuples_integers_no_grad_and_frozen():
    net, x = Several().double(), torch.randn(2, 4).double()
    g = torch.randn(2, 2).double(), torch.randn(2, 2).double()
    seen = trace(net, (x, torch.tensor([1, 3])), g)
    through = g[0] @ net.frozen.weight.detach()
    assert seen["split"].output_gradients[1] is None
    assert torch.allclose(seen["split"].output_gradients[0], through + g[1])
    assert torch.allclose(seen["split"].input_gradients[0], torch.cat([2 * (through + g[1]), torch.zeros(2, 2)], 1))
    assert seen["dark"].output_gradients == (None,)
    assert "no_grad" in seen["dark"].note
    assert seen["frozen"].parameter_gradients == {"weight": None, "bias": None}
    assert torch.allclose(seen["frozen"].input_gradients[0], through)
    assert seen["frozen"].verdict == "equal"
    assert seen["embedding"].input_gradients == (None,)
    assert torch.equal(seen["embedding"].parameter_gradients["weight"][[1, 3]], g[0])
    assert seen.unreached == ("unused",)
    assert "not called: unused" in str(seen)


def test_weights_made_by_hooks_and_parametrizations():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    net = nn.Sequential(normed, nn.Linear(3, 2))
    x = torch.randn(4, 3)
    seen = trace(net, x)
    net(x).sum().backward()
    assert [call.name for call in seen] == ["0", "1"]
    assert len(seen["0"].parameter_gradients) == 3
    for name, g in seen["0"].parameter_gradients.items():
        assert torch.allclose(g, normed.get_parameter(name).grad, atol=1e-6)


def test_training_mode_repeats_dropout_and_puts_statistics_back():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    mean = net[1].running_mean.clone()
    seen = trace(net, torch.randn(5, 6))
    drop = seen["2"]
    passed = drop.outputs[0] != 0
    assert torch.equal(drop.input_gradients[0], drop.output_gradients[0] * passed * 2)
    assert torch.equal(net[1].running_mean, mean)
    assert int(net[1].num_batches_tracked) == 0
    assert seen["1"].verdict == "equal"


def test_a_call_that_does_not_repeat_says_so():
    class Counting(nn.Module):
        count = 0

        def forward(self, x):
            self.count += 1
            return x * self.count

    seen = trace(nn.Sequential(nn.Linear(2, 2), Counting()), torch.randn(1, 2))
    assert seen["1"].input_gradients == (None,)
    assert "run again" in seen["1"].note
    assert seen["1"].note in str(seen)


def test_checkpointed_calls_are_seen_once():
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(True))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    seen = trace(Saving(), torch.randn(2, 3))
    assert [(call.name, call.call, call.verdict) for call in seen] == [("body.0", 0, "equal"), ("body.1", 0, "equal")]


def test_multihead_attention_is_one_call_with_all_its_parameters():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    net, x = Attending().eval(), torch.randn(2, 3, 4)
    (call,) = trace(net, x)
    net(x).sum().backward()
    assert len(call.inputs) == 1
    for name, g in call.parameter_gradients.items():
        assert torch.allclose(g, net.attention.get_parameter(name).grad, atol=1e-6)


@pytest.mark.slow
def test_vgg_pieces_all_agree_and_add_up():
    torch.manual_seed(0)
    net = import_torchvision().models.vgg11_bn(weights=None, num_classes=7, init_weights=False).eval()
    x = torch.randn(1, 3, 64, 64)
    seen = trace(net, x)
    verdicts = {row.kind: row.formula for row in seen.table()}
    assert verdicts.pop("Dropout") == "none"
    assert set(verdicts.values()) == {"equal"}
    assert all(p.grad is None for p in net.parameters())
    net(x).sum().backward()
    for call in seen:
        for name, g in call.parameter_gradients.items():
            assert torch.equal(g, net.get_submodule(call.name).get_parameter(name).grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(dtype)
    assert {row.formula for row in trace(net, torch.randn(2, 3, 8, 8).to(dtype)).table()} == {"equal"}


def test_autocast_inside_the_model_repeats():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x).float()

    seen = trace(Mixed(), torch.randn(2, 4))
    assert seen["fc"].note == ""
    assert seen["fc"].parameter_gradients["weight"].dtype == torch.float32
    assert seen["fc"].verdict == "equal"


# Custom functions


class RightSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.factor * ctx.saved_tensors[0] * g, None


class WrongSquare(RightSquare):
    @staticmethod
    def backward(ctx, g):
        return ctx.factor * ctx.saved_tensors[0] * g, None  # the 2 is missing


class FlippedProduct(torch.autograd.Function):
    """With `setup_context`; wrong in its second argument alone."""

    @staticmethod
    def forward(x, weight):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, -(g * x).sum(0)


class InPlaceDouble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x.mul_(2))
        return x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.randn_like(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Single(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.float() * 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Applying(nn.Module):
    def __init__(self, function, *rest):
        super().__init__()
        self.apply_function, self.rest = function.apply, rest
        self.scale = nn.Parameter(torch.rand(3) + 1)

    def forward(self, x):
        rest = [self.scale if part == "scale" else part for part in self.rest]
        return self.apply_function(x * 1.0, *rest)


def checks(*modules):
    net = nn.Sequential(nn.Linear(3, 3), *modules, nn.Linear(3, 2))
    return trace(net, torch.randn(4, 3))


def test_a_wrong_backward_is_found_and_named():
    seen = checks(Applying(RightSquare, 1.5), Applying(WrongSquare, 1.5), nn.Tanh())
    assert [(f.function, f.name, f.status) for f in seen.functions] == [
        ("RightSquare", "1", "correct"),
        ("WrongSquare", "2", "wrong"),
    ]
    (wrong,) = seen.wrong
    assert wrong.differences == pytest.approx(2 * wrong.backward, rel=1e-6)
    assert "WRONG backward: WrongSquare in 2 (call 0), argument x" in str(seen)


def test_the_wrong_argument_is_named():
    (checked,) = checks(Applying(FlippedProduct, "scale")).functions
    assert (checked.status, checked.reason) == ("wrong", "argument weight")
    assert checked.backward == pytest.approx(-checked.differences, rel=1e-6)


def test_in_place_functions_pass_and_others_say_why_they_were_not_checked():
    seen = checks(Applying(InPlaceDouble), Applying(Noisy), Applying(Single))
    assert [f.status for f in seen.functions] == ["correct", "not checked", "not checked"]
    assert "each time" in seen.functions[1].reason
    assert "float64" in seen.functions[2].reason


def test_a_function_called_in_a_container_is_named_by_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return WrongSquare.apply(self.fc(WrongSquare.apply(x, 1.0)), 2.0)

    seen = trace(nn.Sequential(Outer()), torch.randn(2, 3))
    assert [(f.name, f.status) for f in seen.wrong] == [("0", "wrong"), ("0", "wrong")]


def test_the_class_of_a_function_is_as_before():
    own, inherited = RightSquare.__dict__["forward"], "forward" in WrongSquare.__dict__
    checks(Applying(RightSquare, 1.5), Applying(WrongSquare, 1.5))
    assert RightSquare.__dict__["forward"] is own
    assert ("forward" in WrongSquare.__dict__) is inherited is False


# What is refused


def test_refusals():
    net = nn.Linear(2, 2)
    x = torch.randn(1, 2)
    with pytest.raises(ut.InputError, match=r"shape \(3,\) where the output has \(1, 2\)"):
        trace(net, x, torch.ones(3))
    with pytest.raises(ut.InputError, match=r"2 part\(s\) for 1 output"):
        trace(net, x, (torch.ones(1, 2), torch.ones(1, 2)))
    with pytest.raises(ut.InputError, match="not numbers"):
        trace(net, x, "ones")
    with pytest.raises(ut.InputError, match="is a function"):
        trace(F.relu, x)
    with pytest.raises(ut.InputError, match="torch tensor"):
        trace(net, np.ones((1, 2)))
    with pytest.raises(ut.InputError, match="empty tuple"):
        trace(net, ())

    class Detached(nn.Module):
        def forward(self, x):
            return x.detach()

    with pytest.raises(ut.InputError, match="depends on nothing"):
        trace(Detached(), x)


def test_a_view_overwritten_and_read_again_is_refused():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.relu = nn.Flatten(), nn.ReLU(True)

        def forward(self, x):
            h = x * 1.0
            return self.relu(self.flat(h)).sum() + h.sum()

    with pytest.raises(ut.ModelError, match="inplace=False"):
        trace(Overwriting(), torch.randn(2, 3, 2))


def test_an_exception_leaves_nothing():
    class Failing(nn.Module):
        def forward(self, x):
            raise OSError("no")

    net = nn.Sequential(nn.Linear(2, 2), Failing())
    before = left(net)
    with pytest.raises(OSError, match="no"):
        trace(net, torch.randn(1, 2))
    assert left(net) == before


def test_facts_are_json():
    facts = json.loads(json.dumps(checks(Applying(Noisy)).to_dict(), allow_nan=False))
    assert facts["functions"][0]["backward"] == "nan"
    assert facts["calls"][0]["parameter_gradients"].keys() == {"weight", "bias"}


# The command


def test_command(tmp_path, capsys):
    from click.testing import CliRunner

    from undertow.cli.trace import trace as command

    (tmp_path / "net.py").write_text(
        "from torch.nn import *\n"
        "def load():\n"
        "    return Sequential(Conv2d(3, 2, 3), ReLU(True), AvgPool2d(37), Flatten(), Linear(72, 4))\n"
    )
    reference = f"{tmp_path / 'net.py'}:load"
    shape = ["--shape", "2,3,224,224", "--device", "cpu"]
    done = CliRunner().invoke(command, ["--model", reference, *shape], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.splitlines()[0].split()[:4] == ["name", "kind", "call", "input"]
    assert "2x3x224x224" in done.output
    rows = json.loads(CliRunner().invoke(command, ["--model", reference, *shape, "--json"]).output)
    assert [row["formula"] for row in rows["calls"]] == ["equal"] * 5
    wrong = CliRunner().invoke(command, ["--model", reference, "--shape", "2,x"])
    assert isinstance(wrong.exception, ut.InputError)


def test_the_command_fails_on_a_wrong_backward(tmp_path, capsys):
    from undertow.cli import main

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Wrong(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x: 2 * x)\n"
        "    backward = staticmethod(lambda ctx, g: 3 * g)\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return Wrong.apply(x.flatten(1))\n"
        "load = Net\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["trace", "--model", f"{tmp_path / 'net.py'}:load", "--shape", "1,3,2,2", "--device", "cpu"])
    assert left.value.code == 1
    assert "WRONG backward: Wrong" in capsys.readouterr().out
