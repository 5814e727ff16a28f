"""Parameters as sites: what is recorded of each step equals what one computes from `.grad` and the weights by hand."""

import copy
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import undertow as ut
from undertow.errors import InputError

MEASURES = ["norm", "moments", "histogram", "zero-fraction", "keep"]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recorded(folder, model, optimizer, **more):
    return ut.record(folder, model, **{"sites": "params", "measures": MEASURES, "optimizer": optimizer, **more})


class ByHand:
    """What a careful script writes down around each step of an optimizer: copies, by (phase, name, step, closure)."""

    def __init__(self, model):
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.tensors = defaultdict(dict)
        self.left = {}
        self.counts = defaultdict(int)

    def backward_ended(self, scale=1.0):
        """Note what the backward pass has left, the loss scale divided out."""
        self.left = {p: dense(p.grad) / scale for p in self.names if p.grad is not None}

    def gradients(self, optimizer, repeat=0):
        for p in owned(optimizer):
            if p.grad is not None:
                key = (self.names[p], self.counts[p], repeat)
                self.tensors["gradient"][key] = dense(p.grad)
                if p in self.left:
                    self.tensors["accumulated"][key] = self.left[p]

    def step(self, optimizer, step=None, closure=None):
        before = {p: p.detach().clone() for p in owned(optimizer)}
        if closure is None:
            self.gradients(optimizer)
        (step or optimizer.step)(*([] if closure is None else [closure]))
        for p in owned(optimizer):
            key = (self.names[p], self.counts[p], 0)
            if key in self.tensors["gradient"]:
                self.tensors["weight"][key] = before[p]
                self.tensors["update"][key] = p.detach() - before[p]
                self.counts[p] += 1


def dense(tensor):
    return (tensor.to_dense() if tensor.layout is not torch.strided else tensor).detach().clone()


def owned(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def figures(tensor):
    """Each measure's columns, from the tensor itself."""
    codes, counts = torch.unique(tensor.float().view(torch.int32) >> 16 & 0xFFFF, return_counts=True)
    mean = tensor.mean()
    return {
        "norm": {"norm": float(tensor.norm())},
        "zero_fraction": {"zeros": int((tensor == 0).sum()), "total": tensor.numel()},
        "moments": {
            "count": tensor.numel(),
            "mean": float(mean),
            "m2": float(((tensor - mean) ** 2).sum()),
            "min": float(tensor.min()),
            "max": float(tensor.max()),
        },
        "histogram": {"codes": codes.tolist(), "counts": counts.tolist()},
    }


def assert_equal_to_the_last_bit(run, hand, batch=0):
    """Hold every table of a run to the tensors that were written down."""
    wanted = {(phase, *key): tensor for phase, keyed in hand.tensors.items() for key, tensor in keyed.items()}
    kept = {
        (row["phase"], row["site"], row["call"], row["repeat"]): array
        for row, array in run.tensors(batch=batch)
        if row["phase"] != "backward"
    }
    assert kept.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert np.array_equal(kept[key], tensor.numpy()), key
    expected = {key: figures(tensor) for key, tensor in wanted.items()}
    for table in ("norm", "zero_fraction", "moments", "histogram"):
        rows = [row for row in run.table(table).to_pylist() if row["batch"] == batch and row["phase"] != "backward"]
        assert len(rows) == len(wanted)
        for row in rows:
            key = (row["phase"], row["site"], row["call"], row["repeat"])
            assert {name: row[name] for name in expected[key][table]} == expected[key][table], (table, key)


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model, seed=0, size=5):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(size, 2, 6, 6, generator=draw), torch.randint(2, (size,), generator=draw)
    return F.cross_entropy(model(x), y)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("where", ["inside", "behind"])
def test_a_clipped_step(tmp_path, make, where):
    model = network()
    optimizer, hand = make(model), ByHand(model)

    def step():
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        hand.step(optimizer)

    with recorded(tmp_path, model, optimizer) as recording:
        with recording.batch(samples=list("abcde")):
            loss_of(model).backward()
            hand.backward_ended()
            if where == "inside":
                step()
        if where == "behind":
            step()
    run = ut.Run(tmp_path)
    assert_equal_to_the_last_bit(run, hand)
    assert run.parameters == [name for name, _ in model.named_parameters()]
    assert run.sites == []
    norms = {(r["phase"], r["site"]): r["norm"] for r in run.table("norm").to_pylist()}
    assert all(norms["gradient", name] < norms["accumulated", name] for name in run.parameters)
    [step] = run.table("steps").to_pylist()
    wanted = {"class": type(optimizer).__name__, "lr": optimizer.defaults["lr"], "weight_decay": 0.01}
    assert {key: step[key] for key in wanted} == wanted


def test_accumulation_in_one_batch_and_over_several(tmp_path):
    model = network()
    optimizer, hand = sgd(model), ByHand(model)
    with recorded(tmp_path / "one", model, optimizer) as recording, recording.batch():
        for part in range(4):
            (loss_of(model, part) / 4).backward()
        hand.backward_ended()
        hand.step(optimizer)
    assert_equal_to_the_last_bit(ut.Run(tmp_path / "one"), hand)
    optimizer.zero_grad()
    hand = ByHand(model)
    with recorded(tmp_path / "several", model, optimizer) as recording:
        for part in range(4):
            with recording.batch():
                (loss_of(model, part) / 4).backward()
                hand.backward_ended()
            if part == 3:
                nn.utils.clip_grad_value_(model.parameters(), 0.001)
                hand.step(optimizer)
    assert_equal_to_the_last_bit(ut.Run(tmp_path / "several"), hand, batch=3)


@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("init_scale", [1024.0, 1000.0])
def test_amp(tmp_path, unscaled_first, init_scale):
    model = network()
    optimizer, hand = sgd(model), ByHand(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    options = {"sites": "params", "measures": MEASURES, "optimizer": optimizer, "scaler": scaler}
    with ut.record(tmp_path, model, **options) as recording, recording.batch():
        scaler.scale(loss_of(model)).backward()
        twin = copy.deepcopy(model)
        inverse = float(torch.tensor(init_scale, dtype=torch.float64).reciprocal().float())
        hand.left = {p: p.grad * inverse for p in model.parameters()}
        if unscaled_first:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            hand.step(optimizer, step=lambda: scaler.step(optimizer))
        else:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad * inverse
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                hand.tensors["gradient"][hand.names[p], 0, 0] = q.grad
                hand.tensors["accumulated"][hand.names[p], 0, 0] = hand.left[p]
            before = {p: p.detach().clone() for p in model.parameters()}
            scaler.step(optimizer)
            for p in model.parameters():
                hand.tensors["weight"][hand.names[p], 0, 0] = before[p]
                hand.tensors["update"][hand.names[p], 0, 0] = p.detach() - before[p]
        scaler.update()
    assert_equal_to_the_last_bit(ut.Run(tmp_path), hand)


def test_a_step_that_amp_skips_is_not_recorded(tmp_path):
    model = network()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"sites": "params", "measures": MEASURES, "optimizer": optimizer, "scaler": scaler}
    with ut.record(tmp_path, model, **options) as recording:
        for number in range(2):
            optimizer.zero_grad()
            with recording.batch():
                scaler.scale(loss_of(model) * (float("inf") if number == 0 else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
    run = ut.Run(tmp_path)
    assert set(run.table("norm")["batch"].to_pylist()) == set(run.table("steps")["batch"].to_pylist()) == {1}


def test_a_fused_step_is_given_scaled_gradients_and_unscales_them_itself(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    scaler, hand = torch.amp.GradScaler("cpu", init_scale=1024.0), ByHand(model)
    options = {"sites": "params", "measures": MEASURES, "optimizer": optimizer, "scaler": scaler}
    with ut.record(tmp_path, model, **options) as recording, recording.batch():
        scaler.scale(loss_of(model)).backward()
        wanted = {name: p.grad / 1024 for name, p in model.named_parameters()}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.step(optimizer)
    for name, p in model.named_parameters():
        for phase in ("gradient", "accumulated"):
            hand.tensors[phase][name, 0, 0] = wanted[name]
        hand.tensors["weight"][name, 0, 0] = before[name]
        hand.tensors["update"][name, 0, 0] = p.detach() - before[name]
    assert_equal_to_the_last_bit(ut.Run(tmp_path), hand)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_the_gradient_is_what_the_optimizer_uses_also_where_the_scale_is_forgotten(tmp_path, fused, told):
    """A fused step unscales for itself, whether or not we were told; a step past the scaler uses scaled gradients."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with recorded(tmp_path, model, optimizer, scaler=scaler if told else None) as recording, recording.batch():
        scaler.scale(loss_of(model)).backward()
        wanted = {name: p.grad / 1024 if fused else p.grad.clone() for name, p in model.named_parameters()}
        scaler.step(optimizer) if fused else optimizer.step()
    run = ut.Run(tmp_path)
    for name, gradient in wanted.items():
        assert np.array_equal(run.tensor(site=name, phase="gradient"), gradient.numpy())


def test_two_optimizers_of_a_gan(tmp_path):
    model = nn.ModuleDict({"g": nn.Linear(3, 4), "d": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))})
    g, d = torch.optim.Adam(model["g"].parameters(), 0.01), torch.optim.RMSprop(model["d"].parameters(), 0.01)
    hand = ByHand(model)
    with recorded(tmp_path, model, [g, d]) as recording, recording.batch():
        for critic in range(2):
            d.zero_grad()
            fake = model["g"](torch.randn(6, 3)).detach()
            (model["d"](fake).mean() - model["d"](torch.randn(6, 4) + critic).mean()).backward()
            hand.backward_ended()
            hand.step(d)
        g.zero_grad()
        (-model["d"](model["g"](torch.randn(6, 3))).mean()).backward()
        hand.backward_ended()
        hand.step(g)
    run = ut.Run(tmp_path)
    assert_equal_to_the_last_bit(run, hand)
    assert {(row["optimizer"], row["step"], row["class"]) for row in run.table("steps").to_pylist()} == {
        (0, 0, "Adam"),
        (1, 0, "RMSprop"),
        (1, 1, "RMSprop"),
    }


@pytest.mark.parametrize("by_name", [False, True])
def test_each_evaluation_of_a_closure_is_read(tmp_path, by_name):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    hand, evaluations = ByHand(model), []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        hand.backward_ended()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        hand.gradients(optimizer, repeat=len(evaluations))
        evaluations.append(loss)
        return loss

    with recorded(tmp_path, model, optimizer) as recording, recording.batch():
        hand.step(optimizer, step=(lambda c: optimizer.step(closure=c)) if by_name else None, closure=closure)
    assert len(evaluations) > 2
    assert_equal_to_the_last_bit(ut.Run(tmp_path), hand)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_gradient_that_was_emptied_in_place_is_not_left_over_from_before(tmp_path, scale):
    """The second pass reaches one head; the other's gradient is the zeros that `zero_grad` has put there."""
    body, heads = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    model = nn.ModuleDict({"body": body, "heads": heads})
    optimizer, hand = sgd(model), ByHand(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with recorded(tmp_path, model, optimizer, scaler=scaler) as recording, recording.batch():
        x = torch.randn(4, 3)
        sum(head(body(x)).square().sum() for head in heads).backward()
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(heads[0](body(x)).square().sum()).backward()
        hand.backward_ended(scale or 1.0)
        scaler.unscale_(optimizer)
        hand.step(optimizer)
    assert not hand.tensors["accumulated"]["heads.1.weight", 0, 0].any()
    assert_equal_to_the_last_bit(ut.Run(tmp_path), hand)


def test_a_gradient_that_was_clipped_before_another_pass_is_told_as_it_was(tmp_path):
    body, heads = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    model = nn.ModuleDict({"body": body, "heads": heads})
    optimizer = sgd(model)
    with recorded(tmp_path, model, optimizer) as recording, recording.batch():
        x = torch.randn(4, 3)
        heads[1](body(x)).square().sum().backward()
        left = heads[1].weight.grad.clone()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        heads[0](body(x)).square().sum().backward()
        optimizer.step()
    run = ut.Run(tmp_path)
    assert np.array_equal(run.tensor(site="heads.1.weight", phase="accumulated"), left.numpy())


def test_sparse_gradients(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    optimizer, hand = torch.optim.SGD(model.parameters(), 0.1), ByHand(model)
    with recorded(tmp_path, model, optimizer) as recording, recording.batch():
        for part in ([[1, 2, 1]], [[7, 1, 2]]):
            model(torch.tensor(part)).square().sum().backward()
        hand.backward_ended()
        hand.step(optimizer)
    run = ut.Run(tmp_path)
    assert_equal_to_the_last_bit(run, hand)
    rows = {(row["site"], row["phase"]): row for row in run.table("zero_fraction").to_pylist()}
    assert rows["0.weight", "gradient"]["zeros"] == 6 * 4


def test_tied_frozen_and_forgotten_parameters(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.frozen = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.unused, self.left_out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.left_out(self.frozen(self.mid(self.embed(ids)))))

    model = Tied()
    model.frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if not name.startswith("left")], 0.1)
    hand = ByHand(model)

    def loop():
        with recorded(tmp_path, model, optimizer) as recording:
            with recording.batch():
                model(torch.tensor([[1, 2], [3, 5]])).square().sum().backward()
            hand.backward_ended()
            hand.step(optimizer)

    with pytest.warns(UserWarning, match="4 of 9 sites"):
        loop()
    run = ut.Run(tmp_path)
    assert_equal_to_the_last_bit(run, hand)
    assert {row["site"] for row in run.table("norm").to_pylist()} == {"embed.weight", "mid.weight", "mid.bias"}
    said = run.manifest["unreached"]
    assert "frozen" in said["frozen.bias"]
    assert "no optimizer" in said["left_out.bias"]
    assert "had a gradient for it" in said["unused.weight"]
    facts = run.manifest["parameters"]
    assert facts["left_out.bias"] == {"shape": [4], "trainable": True, "optimizer": None, "group": None}
    assert facts["frozen.weight"]["trainable"] is False
    assert facts["mid.weight"]["optimizer"] == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments(tmp_path, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(lambda h: self.b(torch.tanh(self.a(h))), x, use_reentrant=reentrant)
            return x

    model = Checkpointed()
    optimizer, hand = sgd(model), ByHand(model)
    with recorded(tmp_path, model, optimizer) as recording, recording.batch():
        model(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
        hand.backward_ended()
        hand.step(optimizer)
    assert_equal_to_the_last_bit(ut.Run(tmp_path), hand)


def test_a_step_within_the_backward_pass(tmp_path):
    """An optimizer for each parameter that steps as soon as its gradient is there, and frees it."""
    model = network()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    wanted = {}

    def step(p):
        wanted[p] = (p.grad.clone(), p.detach().clone())
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    options = {"measures": MEASURES, "optimizer": list(optimizers.values())}
    with ut.record(tmp_path, model, sites="params", **options) as recording, recording.batch():
        loss_of(model).backward()
    for handle in handles:
        handle.remove()
    run = ut.Run(tmp_path)
    for name, p in model.named_parameters():
        gradient, before = (tensor.numpy() for tensor in wanted[p])
        assert np.array_equal(run.tensor(site=name, phase="gradient"), gradient)
        assert np.array_equal(run.tensor(site=name, phase="weight"), before)
        assert np.array_equal(run.tensor(site=name, phase="update"), p.detach().numpy() - before)


def test_without_an_optimizer_the_gradient_is_what_the_batch_left(tmp_path):
    model = network()
    with ut.record(tmp_path, model, sites=["3.weight", "0"], measures=[*MEASURES, "channel-norm"]) as recording:
        for number in range(2):
            model.zero_grad()
            with recording.batch(samples=["only"]):
                for part in range(3):
                    loss_of(model, part + number, size=1).backward()
    run = ut.Run(tmp_path)
    assert (run.sites, run.parameters) == (["0"], ["3.weight"])
    rows = [row for row in run.table("norm").to_pylist() if row["site"] == "3.weight"]
    assert [(row["batch"], row["phase"], row["repeat"]) for row in rows] == [(0, "gradient", 0), (1, "gradient", 0)]
    assert rows[1]["norm"] == float(model[3].weight.grad.norm())
    assert np.array_equal(run.tensor(site="3.weight", batch=1), model[3].weight.grad.numpy())
    by_channel = [row for row in run.table("channel_norm").to_pylist() if row["site"] == "3.weight"]
    assert [row["name"] for row in by_channel] == [None, None]  # no row of a parameter is a sample's
    np.testing.assert_allclose(by_channel[1]["values"], model[3].weight.grad.norm(dim=1).numpy(), rtol=1e-6)


def test_hooks_are_there_for_scheduled_batches_alone(tmp_path):
    model = network()
    optimizer = sgd(model)
    parameter = next(model.parameters())

    def hooked():
        return bool(parameter._post_accumulate_grad_hooks), bool(optimizer._optimizer_step_pre_hooks)

    every = ut.Schedule(every=2)
    with recorded(tmp_path, model, optimizer, measures="norm", schedule=every) as recording:
        seen = []
        for _ in range(4):
            with recording.batch():
                loss_of(model).backward()
                seen.append(hooked())
            optimizer.step()
            seen.append(hooked())
    assert seen == [(True, True), (False, True), (False, False), (False, False)] * 2
    assert hooked() == (False, False)
    assert set(ut.Run(tmp_path).table("norm")["batch"].to_pylist()) == {0, 2}


def test_an_exception_leaves_nothing_behind(tmp_path):
    model = network()
    optimizer = sgd(model)
    with recorded(tmp_path, model, optimizer, measures="norm") as recording:
        with pytest.raises(ZeroDivisionError), recording.batch():
            loss_of(model).backward(torch.ones(()) / (0 // 0))
        assert not next(model.parameters())._post_accumulate_grad_hooks
        assert not optimizer._optimizer_step_pre_hooks
        with recording.batch():
            loss_of(model).backward()
            optimizer.step()
    assert ut.Run(tmp_path).table("batches").num_rows == 1


def test_a_model_and_its_optimizer_can_be_copied_inside_a_batch(tmp_path):
    model = network()
    optimizer = sgd(model)
    with recorded(tmp_path, model, optimizer, measures="norm") as recording, recording.batch():
        loss_of(model).backward()
        twin, other = copy.deepcopy((model, optimizer))
        torch.save(model, tmp_path / "model.pt")
        optimizer.step()
        loss_of(twin).backward()
        other.step()
    assert ut.Run(tmp_path).table("norm").num_rows == 4 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("sites", "wanted"),
    [
        ("params", ["body.conv1.weight", "body.conv1.bias", "body.conv2.weight", "body.conv2.bias", "fc.weight"]),
        ("params:body", ["body.conv1.weight", "body.conv1.bias", "body.conv2.weight", "body.conv2.bias"]),
        ("params:body.conv*", ["body.conv1.weight", "body.conv1.bias", "body.conv2.weight", "body.conv2.bias"]),
        ("params:linear", ["fc.weight"]),
        ("params:Sequential", ["body.conv1.weight", "body.conv1.bias", "body.conv2.weight", "body.conv2.bias"]),
        ("params:**.bias", ["body.conv1.bias", "body.conv2.bias"]),
        ("params[:2]", ["body.conv1.weight", "body.conv1.bias"]),
        ("params:body[-1]", ["body.conv2.bias"]),
        ("body.*.weight", ["body.conv1.weight", "body.conv2.weight"]),
        (["body.conv2.bias", "params:fc"], ["body.conv2.bias", "fc.weight"]),
        ("tied.weight", ["fc.weight"]),
        ("*", []),
        ("conv, body.conv1.bias", ["body.conv1.bias"]),
    ],
)
def test_selections_of_parameters(sites, wanted):
    body = nn.Sequential()
    body.conv1, body.conv2 = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3)
    model = nn.Module()
    model.body, model.fc = body, nn.Linear(2, 2, bias=False)
    model.tied = nn.Linear(2, 2, bias=False)
    model.tied.weight = model.fc.weight
    selected = ut.select(model, sites)
    assert [site.name for site in selected if site.kind == "parameter"] == wanted
    assert [site.shape for site in selected if site.name == "fc.weight"] in ([(2, 2)], [])


def test_what_cannot_be_is_said_before_anything_is_made(tmp_path):
    model = network()
    optimizer = sgd(model)
    for options, said in (
        ({"sites": "params:layer9"}, "select no parameter"),
        ({"sites": "9.weight"}, "select nothing; did you mean"),
        ({"sites": "conv", "optimizer": optimizer}, "add 'params'"),
        ({"sites": "params", "optimizer": sgd(network())}, "made for a copy"),
        ({"sites": "params", "optimizer": "sgd"}, "is a str"),
    ):
        with pytest.raises(InputError, match=said):
            ut.record(tmp_path / "run", model, **options)
    assert not (tmp_path / "run").exists()
    with (
        pytest.raises(InputError, match="no step of its optimizer"),
        ut.record(tmp_path / "run", model, sites="params", optimizer=optimizer) as recording,
        recording.batch(),
    ):
        loss_of(model).backward()


def test_quantiles_and_comparisons_read_parameters(tmp_path, capsys, monkeypatch):
    from undertow.cli import main

    for name, lr, sites in (("a", 0.1, "params:3"), ("b", 0.2, "params:3"), ("a", 0.1, "params")):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr)
        options = {"measures": ["norm", "histogram"], "optimizer": optimizer}
        with ut.record(tmp_path / name / sites, model, sites=sites, **options) as recording, recording.batch():
            loss_of(model).backward()
            optimizer.step()
    run, other = ut.Run(tmp_path / "a" / "params:3"), ut.Run(tmp_path / "b" / "params:3")
    rows = {(row.site, row.phase): row for row in run.quantiles([0.5], of="norm")}
    assert next(iter(rows))[0] == "3.weight"  # in the order of definition
    assert rows["3.weight", "gradient"].values == (float(model[3].weight.grad.norm()),)
    ratios = {(row.sites[0], row.phase): row.ratios[1] for row in ut.runs.compare([run, other], [0.5])}
    assert ratios["3.weight", "gradient"] == (1.0,)
    assert ratios["3.weight", "update"][0] == pytest.approx(2, rel=2**-7)
    printed = {}
    monkeypatch.setenv("COLUMNS", "200")
    for sites in ("params:3", "params"):
        with pytest.raises(SystemExit, match="0"):
            main(["quantiles", str(tmp_path / "a" / sites), "--of", "norm", "--step", "0.45"])
        printed[sites] = capsys.readouterr().out
    assert "3.weight update" in printed["params:3"].splitlines()[0]  # a column each
    assert any(line.split()[:2] == ["3.weight", "update"] for line in printed["params"].splitlines())  # a line each


def test_updates_of_short_floats_are_exact(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    with recorded(tmp_path, model, optimizer, measures="keep") as recording, recording.batch():
        model(torch.randn(2, 3).bfloat16()).square().sum().backward()
        before = model[0].weight.detach().float()
        optimizer.step()
    update = ut.Run(tmp_path).tensor(site="0.weight", phase="update")
    np.testing.assert_array_equal(update, (model[0].weight.detach().float() - before).numpy())


def test_frozen_parameters_are_no_surprise(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    with recorded(tmp_path, model, optimizer) as recording, recording.batch():  # and no warning
        loss_of(model).backward()
        optimizer.step()
    assert set(ut.Run(tmp_path).manifest["unreached"]) == {"0.weight", "0.bias"}


def test_a_killed_run_goes_on(tmp_path):
    def train(stop):
        torch.manual_seed(0)
        model = network()
        optimizer = sgd(model)
        with recorded(tmp_path / "run", model, optimizer, measures="norm", group=1) as recording:
            for number in range(4):
                if number == stop:
                    raise KeyboardInterrupt
                optimizer.zero_grad()
                with recording.batch():
                    loss_of(model, number).backward()
                optimizer.step()
            return recording.skipped

    with pytest.raises(KeyboardInterrupt):
        train(2)
    before = ut.Run(tmp_path / "run").table("norm").to_pylist()
    assert {row["batch"] for row in before} == {0, 1}  # the step behind the last batch included
    assert train(None) == 2
    after = ut.Run(tmp_path / "run").table("norm").to_pylist()
    assert after[: len(before)] == before
    assert len(after) == 2 * len(before)
    assert ut.Run(tmp_path / "run").table("steps")["batch"].to_pylist() == [0, 1, 2, 3]


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("several", [lambda o: o, lambda o: [o], lambda o: {"main": o}, Wrapper])
def test_an_optimizer_may_be_wrapped(tmp_path, several):
    model = network()
    optimizer = sgd(model)
    with recorded(tmp_path, model, several(optimizer), measures="norm") as recording, recording.batch():
        loss_of(model).backward()
        optimizer.step()
    assert ut.Run(tmp_path).table("norm").num_rows == 4 * 6


def test_the_command_lists_parameters(capsys, tmp_path):
    from undertow.cli import main

    layers = "nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)"
    (tmp_path / "nets.py").write_text(f"from torch import nn\ndef load():\n    return nn.Sequential({layers}).float()")
    with pytest.raises(SystemExit, match="0"):
        main(["sites", "--model", f"{tmp_path}/nets.py:load", "conv, params"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0.weight", "parameter", "2", "x", "3", "x", "3", "x", "3"] in lines
    assert ["0.bias", "parameter", "2"] in lines


@pytest.mark.parametrize("measure", ["norm", "moments", "zero-fraction", "histogram"])
def test_quantiles_of_whatever_was_recorded(tmp_path, measure):
    model = network()
    with ut.record(tmp_path, model, sites="params:3", measures=[measure]) as recording:
        wanted = []
        for number in range(5):
            model.zero_grad()
            with recording.batch():
                loss_of(model, number).backward()
            wanted.append(model[3].weight.grad)
    row = ut.runs.quantiles(ut.Run(tmp_path), [0.5])[0]
    by_hand = {
        "norm": lambda g: g.norm(),
        "rms": lambda g: g.square().mean().sqrt(),
        "zero_fraction": lambda g: (g == 0).double().mean(),
    }
    each = torch.cat([g.abs().flatten() for g in wanted]) if row.of == "magnitude" else None
    values = torch.stack([by_hand[row.of](g) for g in wanted]) if each is None else each
    middle = float(np.quantile(values.numpy(), 0.5, method="inverted_cdf"))
    assert row.values[0] == pytest.approx(middle, rel=2**-8 if each is not None else 1e-12)
    assert (row.site, row.phase, row.nonfinite) == ("3.weight", "gradient", 0)


TWO_PROCESSES = """
import os, sys, torch, undertow as ut
import torch.distributed as dist
from torch import nn
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=2)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
model = nn.parallel.DistributedDataParallel(plain)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
x = torch.randn(2, 5, 3)[rank]
measures = ["norm", "keep"]
with ut.record(folder, model, sites="params", measures=measures, optimizer=optimizer) as recording:
    with recording.batch():
        model(x).square().mean().backward()
        left = {name: p.grad.clone() for name, p in plain.named_parameters()}
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        given = {name: p.grad.clone() for name, p in plain.named_parameters()}
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        optimizer.step()
        update = {name: p.detach() - before[name] for name, p in plain.named_parameters()}
dist.barrier()
run = ut.Run(folder)
for phase, wanted in (("accumulated", left), ("gradient", given), ("weight", before), ("update", update)):
    for name, tensor in wanted.items():
        kept = torch.from_numpy(run.tensor(site=name, phase=phase, rank=rank))
        assert torch.equal(kept, tensor), (phase, name, rank)
        assert torch.equal(kept, torch.from_numpy(run.tensor(site=name, phase=phase, rank=1 - rank)))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_see_the_averaged_gradient(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", TWO_PROCESSES]
    both = [subprocess.Popen([*command, str(r), str(tmp_path / "run")], stderr=subprocess.PIPE) for r in range(2)]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
