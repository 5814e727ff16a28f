"""What explain promises beyond the numbers: targets, refusals, and a model left as it was."""

import copy
import functools
import gc
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import undertow as ut


def small(seed: int = 23) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)).eval()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def own(g, local):
    return local(ut.rules.relu(g))


def test_no_map_that_is_compared_here_is_zero_or_that_of_another_sample(x):
    """As those of most seeds are under guided: comparing them could not fail."""
    values = ut.explain(small(), x, target=[list(range(5))] * 3, rule="guided").values
    assert (values.abs().amax(2) > 5e-4).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert ((values[i] - values[j]).abs().amax(1) > 5e-4).all()


# targets


def test_no_target_is_each_samples_predicted_class(x):
    net = small()
    a = ut.explain(net, x)
    assert torch.equal(a.targets, net(x).argmax(1))
    assert torch.equal(a.scores, net(x).max(1).values)
    assert not a.scores.requires_grad
    assert torch.equal(a.values, ut.explain(net, x, target=net(x).argmax(1)).values)


def test_several_targets_share_one_forward_pass(x):
    net, calls = small(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    ids = [[0, 4], [1, 1], [2, 3]]
    a = ut.explain(net, x, target=ids)
    assert len(calls) == 1
    assert a.values.shape == (3, 2, 4)
    assert a.targets.tolist() == ids
    for k in range(2):
        alone = ut.explain(net, x, target=torch.tensor(ids)[:, k])
        assert torch.equal(a.values[:, k], alone.values)
        assert torch.equal(a.scores[:, k], alone.scores)


def test_top_k_is_in_order_of_score(x):
    net = small()
    a = ut.explain(net, x, target="top:3")
    assert torch.equal(a.targets, net(x).topk(3).indices)
    assert a.values.shape == (3, 3, 4)


def test_a_function_of_the_output_as_target(x):
    net = small()
    a = ut.explain(net, x, target=lambda out: out[:, 0] - out[:, 1], rule="gradient")
    difference = ut.explain(net, x, target=[[0, 1]] * 3, rule="gradient").values
    assert a.targets is None
    assert torch.allclose(a.values, difference[:, 0] - difference[:, 1], atol=1e-7)


def test_each_sample_of_a_batch_has_its_own_map(x):
    net, x = small().double(), x.double()  # other sizes of a batch may have other kernels, which round otherwise
    for i in range(3):
        assert torch.allclose(ut.explain(net, x, target=2).values[i], ut.explain(net, x[i : i + 1], target=2).values[0])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "target 5 is out of range: the model has classes 0 to 4"),
        (-1, "target -1 is out of range"),
        ([0, 1], r"shape \(2,\) for a batch of 3"),
        (1.5, "class ids are integers"),
        (True, "class ids are integers"),
        ("top:9", "more classes than the model has"),
        ("cat", "'top:K', or a classifier of ut.load"),
        ("top:x", "'top:3'"),
        ([[0], [1, 2], [3]], "not understood"),
        (lambda out: out, "one score for each sample"),
    ],
)
def test_a_wrong_target_is_said(x, target, message):
    with pytest.raises(ut.TargetError, match=message):
        ut.explain(small(), x, target=target)


# inputs and outputs


@dataclass
class WithLogits:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [lambda y: (y, 1), lambda y: [y], WithLogits])
def test_outputs_in_a_wrapping(x, wrap):
    net = small()
    assert torch.equal(ut.explain(lambda v: wrap(net(v)), x).values, ut.explain(net, x).values)


def test_a_tuple_of_inputs_gives_a_tuple_and_integers_get_no_map(x):
    net, table = small(), torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([1, 2, 5])
    a = ut.explain(lambda v, i: net(v + table[i]), (x, ids), target=1)
    assert a.values[1] is None
    assert torch.equal(a.values[0], ut.explain(net, x + table[ids], target=1).values)
    assert a.numpy()[1] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_have_the_dtype_of_x(x, dtype):
    a = ut.explain(small().to(dtype), x.to(dtype))
    assert a.values.dtype == dtype
    assert a.numpy().dtype == (np.float64 if dtype == torch.float64 else np.float32)


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (torch.relu, np.ones((1, 2)), ut.InputError, "torch.from_numpy"),
        (torch.relu, torch.ones(2, 2, dtype=torch.long), ut.InputError, r"x.float\(\)"),
        (torch.relu, (), ut.InputError, "empty tuple"),
        (torch.relu, torch.ones(2, 2, dtype=torch.complex64), ut.InputError, "view_as_real"),
        (torch.add, (torch.ones(2, 2), torch.ones(3, 2)), ut.InputError, "first .batch. axis"),
        (lambda v: v.detach(), torch.ones(1, 2), ut.InputError, "do not depend on x"),
        (lambda v, w: v.relu(), (torch.ones(1, 2), torch.ones(1, 2)), ut.InputError, "input 1 does not influence"),
        (lambda v: 3, torch.ones(1, 2), ut.ModelError, "the model returned an int"),
        (lambda v: v.long(), torch.ones(1, 2), ut.ModelError, "int64 scores"),
        (lambda v: v.sum(1), torch.ones(2, 2), ut.ModelError, "pass target=lambda"),
        (lambda v: v * float("nan"), torch.ones(2, 2), ut.ModelError, "sample 0 is nan"),
        ("vgg16", torch.ones(2, 2), ut.InputError, "cannot be called"),
    ],
)
def test_what_cannot_be_explained_is_said(model, given, error, message):
    with pytest.raises(error, match=message):
        ut.explain(model, given)


def test_a_model_that_fails_keeps_its_error_and_gains_the_shape(x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        ut.explain(small(), x[:, :3])
    assert "(3, 3) torch.float32" in caught.value.__notes__[0]


# refusals


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


def test_a_users_own_function_is_listed_by_name(x):
    net = small()
    with pytest.warns(ut.UndertowWarning, match="guided: left alone on the way, as the gradient passes them: Own x1"):
        assert ut.explain(lambda v: net(v + Own.apply(v)), x).opaque == {"Own": 1}
    with pytest.raises(ut.RuleError, match=r"Own x1.*no rule reaches"):
        ut.explain(Own.apply, x)


def test_smooth_activations_are_listed_or_taken(x):
    layers = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(), nn.Sigmoid(), nn.Linear(4, 4)
    net = nn.Sequential(*layers).eval()
    with pytest.warns(ut.UndertowWarning, match=r"GeluBackward0 x1, SigmoidBackward0 x1; activations='all' takes the"):
        assert ut.explain(net, x).skipped == {"GeluBackward0": 1, "SigmoidBackward0": 1}
    with pytest.warns(ut.UndertowWarning, match="them: SigmoidBackward0 x1"):
        every = ut.explain(net, x, activations="all")
    assert (every.rewired, every.skipped) == (2, {"SigmoidBackward0": 1})
    assert ut.explain(net, x, rule="gradient").skipped == {}
    assert ut.explain(lambda v: F.normalize(layers[0](v)).relu(), x).skipped == {"ClampMinBackward0": 1}  # no warning
    with pytest.raises(ut.RuleError, match="activations='all' takes the smooth ones"):
        ut.explain(net[:2].eval(), x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_nodes_that_hide_a_computation_are_refused(x):
    net = small()
    compiled = torch.compile(small(), backend="aot_eager")
    hidden = {
        "use_reentrant=False": lambda v: checkpoint(net, v, use_reentrant=True),
        "given to torch.compile": lambda v: compiled(v) * 1,
    }
    for message, model in hidden.items():
        for rule in ("guided", "deconvnet", own):
            with pytest.raises(ut.RuleError, match=message):
                ut.explain(model, x, rule=rule)
    with pytest.raises(ut.RuleError, match="use_reentrant=False"):
        ut.explain(hidden["use_reentrant=False"], x, rule="gradient")


def test_a_scripted_graph_is_right_or_refused(x):
    net = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(net)
    messages = []
    for _ in range(3):  # TorchScript fuses after the first call
        try:
            assert torch.equal(ut.explain(scripted, x, target=1).values, ut.explain(net, x, target=1).values)
        except ut.RuleError as error:
            messages.append(str(error))
    assert messages
    assert all("the Python module that was scripted" in text for text in messages)


def test_an_activation_in_place_on_a_view_is_refused_and_an_assignment_is_not(x):
    net = small()

    def on_a_view(v):
        h = net[0](v)
        h[:, :3].relu_()
        return net[4](h)

    def assigned(v):
        h = net[0](v)
        h[:, :2] *= 2
        h[:, 3] = 0
        return net[4](h.relu())

    with pytest.raises(ut.RuleError, match="in place to a view"):
        ut.explain(on_a_view, x)
    assert ut.explain(assigned, x).rewired == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
def test_an_activation_that_is_decomposed_into_a_choice_is_refused(x):
    net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    program = torch.export.export(net, (x,)).run_decompositions().module()
    plain = ut.explain(program, x, rule="gradient", target=0)
    torch.testing.assert_close(plain.values, ut.explain(net, x, rule="gradient", target=0).values)
    with pytest.raises(ut.RuleError, match=r"explain the module before run_decompositions\(\)"):
        ut.explain(program, x, target=0)


@pytest.mark.parametrize(
    "choice",
    [
        lambda v: torch.where(v > 0, v, 0.1 * v),
        lambda v: torch.where(v <= 0, 0.1 * v, v),
        lambda v: torch.where(v > 0, v, torch.expm1(v)),
    ],
)
def test_a_choice_between_a_value_and_a_function_of_it_is_refused(choice, x):
    with pytest.raises(ut.RuleError, match=r"torch\.where chooses between a value and a function of it"):
        ut.explain(lambda v: choice(2 * v).relu(), x, target=0)
    mask = x > 0
    assert ut.explain(lambda v: torch.where(mask, v, -torch.ones(())).relu(), x, target=0).rewired == 1


def test_a_compiled_model_is_unwrapped(x):
    net = small()
    wanted = ut.explain(net, x).values
    assert torch.equal(ut.explain(torch.compile(net, backend="aot_eager"), x).values, wanted)
    function = torch.compile(lambda v: net(v), backend="aot_eager")
    assert torch.equal(ut.explain(function, x).values, wanted)
    in_place = small()
    in_place.compile(backend="aot_eager")
    for through in ("graph", "swap", "hook"):
        assert torch.equal(ut.explain(in_place, x, through=through).values, wanted)


def test_training_mode_is_refused_unless_asked_for(x):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
    for model in (net, net.forward, functools.partial(net)):
        with pytest.raises(ut.ModelError, match=r"BatchNorm1d, Dropout would act.*model.eval\(\)"):
            ut.explain(model, x)
    net.eval()[3].train()
    with pytest.raises(ut.ModelError, match="these acted: dropout x1"):
        ut.explain(net, x)
    net.train()
    before = copy.deepcopy(net.state_dict())
    attribution = ut.explain(net, x, training=True)
    assert (attribution.rewired, attribution.acting) == (1, {"batch norm in training": 1, "dropout": 1})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def behind(module):
    """A function, behind which no one sees that its module is in training mode."""
    return lambda v: module(v[:, None])[:, 0] if isinstance(module, nn.InstanceNorm1d) else module(v)


ACTING = {
    "a module behind a function": (behind(nn.Dropout()), {"dropout": 1}),
    "a function": (lambda v: F.dropout(v, 0.5), {"dropout": 1}),
    "two, one for whole channels": (lambda v: F.dropout(F.dropout1d(v, 0.5), 0.5), {"dropout": 2}),
    "of attention": (lambda v: F.scaled_dot_product_attention(v, v, v, dropout_p=0.5), {"dropout": 1}),
    "RReLU": (lambda v: F.rrelu(v, training=True), {"RReLU": 1}),
    "a user's own mask": (lambda v: v * torch.empty_like(v).bernoulli_(0.5), {"dropout": 1}),
    "noise": (lambda v: v + torch.randn_like(v), {"randn_like": 1}),
    "batch norm": (behind(nn.BatchNorm1d(4)), {"batch norm in training": 1}),
    "batch norm that keeps no statistics": (behind(nn.BatchNorm1d(4, track_running_stats=False)), {}),
    "instance norm": (behind(nn.InstanceNorm1d(1)), {}),
    "dropout of nothing": (lambda v: F.dropout(v, 0.0), {}),
}


@pytest.mark.parametrize("case", ACTING)
def test_what_acts_in_the_forward_pass_is_refused_or_listed(case, x):
    model, acting = ACTING[case]
    assert ut.explain(model, x, rule="gradient", target=0, training=True).acting == acting
    if acting:
        with pytest.raises(ut.ModelError, match=f"these acted: {next(iter(acting))} x"):
            ut.explain(model, x, rule="gradient", target=0)
    else:
        ut.explain(model, x, rule="gradient", target=0)


def test_a_module_in_training_mode_in_which_nothing_acts_is_explained(x):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 2))
    assert torch.equal(ut.explain(net.train(), x).values, ut.explain(net.eval(), x).values)


def test_random_numbers_of_another_thread_are_not_taken_for_the_models(x):
    def model(v):
        thread = threading.Thread(target=torch.rand, args=(3,))
        thread.start()
        thread.join()
        return v.relu()

    assert ut.explain(model, x, target=0).acting == {}


def test_a_missed_call_is_placed(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.head = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, v):
            return self.head(self.body(v).relu()[:, None])[:, 0]

    for through in ("swap", "hook"):
        with pytest.raises(ut.RuleError, match=r"missed 2 .*'head'.*own forward.*through='graph'") as caught:
            ut.explain(Net().eval(), x, through=through)
        assert "body" not in str(caught.value)


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
def test_a_rule_that_breaks_its_contract_is_named(x, through):
    for bad in (lambda g, local: g[:1], lambda g, local: local(g[:1]), lambda g, local: None):
        with pytest.raises((ut.RuleError, RuntimeError), match=r"lambda|shape|size"):
            ut.explain(small(), x, rule=bad, through=through)


# untouched


def state_of(model: nn.Module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, id(m), m.training, getattr(m, "inplace", None)) for name, m in model.named_modules()],
        "hooks": [[dict(getattr(m, kind)) for kind in hooks] for m in model.modules()],
        "parameters": [
            (id(p), p.requires_grad, p._version, None if p.grad is None else p.grad.clone().tolist())
            for p in model.parameters()
        ],
        "random": torch.get_rng_state().tolist(),
    }


class Boom(Exception):
    pass


def explode(*_):
    raise Boom


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
def test_everything_is_as_before_on_success_and_on_failure(x, through):
    class Noisy(nn.Module):
        def forward(self, v):
            return v + 0.1 * torch.rand_like(v)

    net = nn.Sequential(Noisy(), *small()).eval()
    net[1].weight.requires_grad_(False)
    net[5].weight.grad = torch.full_like(net[5].weight, 0.5)
    net[2].register_forward_hook(lambda *_: None)
    leaf = x.clone().requires_grad_()
    before, kept = state_of(net), x.clone()
    for rule in ("guided", "deconvnet", own):
        assert ut.explain(net, leaf, rule=rule, through=through).acting == {"rand_like": 1}
        assert state_of(net) == before
    with pytest.raises(Boom):
        ut.explain(net, leaf, rule=explode, through=through)
    with pytest.raises(ut.TargetError):
        ut.explain(net, leaf, target=99, through=through)
    with pytest.raises(Boom):
        ut.explain(net, leaf, target=explode, through=through)
    handle = net[3].register_forward_hook(explode)
    with pytest.raises(Boom):
        ut.explain(net, leaf, through=through)
    handle.remove()
    assert state_of(net) == before
    assert leaf.grad is None
    assert torch.equal(leaf.detach(), kept)


def test_a_graph_that_outlives_the_call_is_left_alone(x):
    """A weight made through a ReLU before the call is not on the way to x, and a kept activation keeps no hook."""
    net = small()
    source = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = (source * 2).relu()
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    plain = torch.autograd.grad(F.linear(net[:4](x), weight), source, g, retain_graph=True)[0]
    a = ut.explain(lambda v: F.linear(net[:4](v), weight), x)
    assert a.rewired == 2
    assert torch.equal(torch.autograd.grad(F.linear(net[:4](x), weight), source, g)[0], plain)


def test_under_no_grad_and_inference_mode(x):
    net = small()
    wanted = ut.explain(net, x).values
    with torch.no_grad():
        assert torch.equal(ut.explain(net, x).values, wanted)
    with torch.inference_mode():
        made_here = x.clone()
        assert torch.equal(ut.explain(net, made_here).values, wanted)


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
def test_weight_gradients_are_never_computed(x, through):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.relu = nn.Parameter(torch.eye(4)), nn.ReLU()

        def forward(self, v):
            return self.relu(F.linear(v, self.weight))

    net, fired = Net().eval(), []
    net.weight.register_hook(fired.append)
    ut.explain(net, x, through=through)
    assert fired == []
    assert net.weight.grad is None


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
def test_eight_threads_on_one_model_give_the_maps_of_one(through):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )
    net(torch.zeros(1, 3, 12, 12))
    net.eval()
    batches = [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    rules = ["guided", "deconvnet", "gradient", own] * 2
    wanted = [ut.explain(net, b, rule=r, through=through).values for b, r in zip(batches, rules, strict=True)]
    wrong, start = [], threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        for _ in range(20):
            if not torch.equal(ut.explain(net, batches[i], rule=rules[i], through=through).values, wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def grown(rule) -> int:
    """Explain 2,000 times without a garbage collector; return by how many KiB this process grew meanwhile."""
    net, x = small(), torch.randn(3, 4)
    gc.collect()
    gc.disable()
    before = 0
    for number in range(2200):
        if number == 200:
            before = resident_kib()
        ut.explain(net, x, rule=rule)
    return resident_kib() - before


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


@pytest.mark.slow
def test_memory_is_flat_over_thousands_of_explanations_without_a_garbage_collector():
    # in a process of its own: what earlier tests left to the allocator would be counted too
    code = "from test_explain import *; print(*[grown(rule) for rule in ('guided', 'deconvnet', own)])"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    grew = [int(word) for word in done.stdout.split()]
    assert len(grew) == 3, done.stderr
    assert max(grew) < 400, grew  # a leak of one node a call would be a MiB and more


@pytest.mark.slow
@pytest.mark.parametrize("through", ["swap", "hook"])
def test_swap_and_hook_leave_no_cycles_either(x, through):
    net = small()
    gc.collect()
    gc.disable()
    try:
        for rule in ("guided", own):
            ut.explain(net, x, rule=rule, through=through)
            before = len(gc.get_objects())
            for _ in range(50):
                ut.explain(net, x, rule=rule, through=through)
            assert len(gc.get_objects()) - before < 50
    finally:
        gc.enable()


# the result


def test_numpy_image_and_save(tmp_path):
    from safetensors.numpy import load_file

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    pictures = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(5))
    net(pictures)
    net.eval()
    a = ut.explain(net, pictures, target="top:2")
    assert a.numpy().shape == (2, 2, 3, 8, 6)
    assert a.numpy(channels_last=True).shape == (2, 2, 8, 6, 3)
    assert a.image(1, 1).size == (6, 8)
    assert a.image(0, 0, "colour").mode == "RGB"
    saved = load_file(a.save(tmp_path / "a.safetensors"))
    assert np.array_equal(saved["values"], a.values.numpy())
    assert np.array_equal(saved["targets"], a.targets.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    for wrong in (lambda: a.image(2), lambda: a.image(0, 2), lambda: a.image(style="colur"), lambda: a.save("a.png")):
        with pytest.raises(ut.InputError):
            wrong()


def test_a_series_has_no_picture(x):
    a = ut.explain(small(), x)
    with pytest.raises(ut.InputError, match=r"take .numpy\(\)"):
        a.image()
    with pytest.raises(ut.InputError, match="no channels"):
        a.numpy(channels_last=True)
