"""What each finding says: the cause, with its figures held to those computed by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import undertow as ut
from diagnosis import architectures as nets
from diagnosis.planted import Gate, dense, relus
from undertow.diagnosis.course import _jump
from undertow.diagnosis.depth import by_depth, levels
from undertow.diagnosis.evidence import Evidence, SiteOutput
from undertow.frameworks.torch.record.site_graph import END, first_readers


def watched(folder, model, loss, batches=1, **options):
    """Record batches of a loss that takes the model, each of them watched."""
    weighted = lambda name, module: isinstance(module, nn.Linear | nn.Conv2d)  # noqa: E731
    options = {"sites": weighted, "measures": "zero-fraction"} | options
    with ut.record(folder, model, diagnose=1, **options) as recording:
        for number in range(batches):
            with recording.batch():
                loss(model, number).backward()
    return ut.Run(folder)


def one(findings, cause):
    (finding,) = (finding for finding in findings if finding.cause == cause)
    return finding


def score(x):
    return lambda model, number: (model(x) * torch.linspace(-1, 1, model(x).shape[-1])).sum()


@pytest.mark.parametrize("conv", [False, True])
def test_a_vanishing_relu_stack_is_told_its_initialisation(conv, tmp_path):
    torch.manual_seed(0)
    model = relus(16, conv)
    model = model[:-3] if conv else model
    x = torch.randn(*((16, 8, 8, 8) if conv else (256, 32)))
    grad = torch.randn(model(x).shape)
    finding = one(ut.diagnose(watched(tmp_path, model, lambda m, _: (m(x) * grad).sum())), "vanishing")
    weights = [module.weight for module in model if hasattr(module, "weight")]
    assert finding.evidence["weight_std"] == pytest.approx(
        float(np.median([float(w.detach().std()) for w in weights])), rel=0.02
    )
    fan = 8 * 9 if conv else 32
    assert finding.evidence["keeping_std"] == pytest.approx((2 / fan) ** 0.5, rel=0.02)
    assert "initialisation" in finding.sentence
    assert "He's would be" in finding.sentence
    assert "ReLU in place" not in finding.remedy
    # with the weights that it names, the same stack keeps its gradient
    better = copy.deepcopy(model)
    for module in better:
        if hasattr(module, "weight"):
            nn.init.normal_(module.weight, std=finding.evidence["keeping_std"])
            nn.init.zeros_(module.bias)
    first = better[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad((better[1:](first) * grad).sum(), first)
    assert 0.03 < float(g.norm() / grad.norm()) < 30


def test_the_factor_of_a_relu_is_the_root_of_its_mean_square(tmp_path):
    """Half of the elements pass: the root mean square falls to sqrt(1/2), not to 1/2. By hand, at each layer."""
    torch.manual_seed(1)
    model = relus(12, conv=False)
    x, grad = torch.randn(4096, 32), torch.randn(4096, 32)
    run = watched(tmp_path, model, lambda m, _: (m(x) * grad).sum())
    outputs, h = [], x
    for module in model:
        h = module(h)
        outputs.append(h)
    gradients = torch.autograd.grad((h * grad).sum(), outputs[::2])
    sizes = [float(g.square().mean().sqrt()) for g in gradients]
    finding = one(ut.diagnose(run), "vanishing")
    assert list(finding.evidence["sizes"].values()) == pytest.approx(sizes, rel=1e-5)
    assert finding.evidence["observed"] == pytest.approx((sizes[0] / sizes[-1]) ** (1 / 11), rel=1e-5)
    factors = []
    for layer, before in zip(model[2::2], outputs[::2], strict=False):
        factors.append(float(layer.weight.detach().norm()) / 32**0.5 * float((before > 0).float().mean()) ** 0.5)
    assert finding.evidence["predicted"] == pytest.approx(float(np.exp(np.mean(np.log(factors)))), rel=1e-4)
    assert finding.evidence["predicted"] == pytest.approx(finding.evidence["observed"], rel=0.05)


def graph_of(draw, size):
    """Make a random network of additions: some of its tensors are sites."""
    leaf = torch.randn(2, requires_grad=True)
    tensors, reads = [leaf * 1.0], [[]]
    for number in range(1, size):
        read = [int(i) for i in draw.choice(number, min(number, int(draw.integers(1, 4))), replace=False)]
        tensors.append(sum(tensors[i] for i in read) * 1.0)
        reads.append(read)
    sites = sorted(int(i) for i in draw.choice(size, size // 2, replace=False))
    return tensors, reads, sites


@pytest.mark.parametrize("seed", range(5))
def test_which_site_reads_which_first_against_a_search_from_each(seed):
    draw = np.random.default_rng(seed)
    tensors, reads, sites = graph_of(draw, 24)
    root = tensors[-1].sum().grad_fn
    alive = {23}
    for i in range(23, -1, -1):
        alive |= set(reads[i]) if i in alive else set()
    readers = {i: [j for j in sorted(alive) if i in reads[j]] for i in range(24)}

    def first(i):
        found = {END} if i == 23 else set()
        for j in readers[i]:
            found |= {j} if j in sites else first(j)
        return found

    found = first_readers({tensors[i].grad_fn: i for i in sites if i in alive}, [root])
    assert {i: set(by) for i, by in found.items()} == {i: first(i) for i in sites if i in alive}


def test_depth_is_the_longest_way_and_the_largest_gradient_on_it_counts(tmp_path):
    outputs = [SiteOutput(str(n), 0, n, readers, 1.0) for n, readers in enumerate([(1, 2), (3,), (3,), (4, -1), (-1,)])]
    assert levels(outputs) == {4: 0, 3: 1, 2: 2, 1: 2, 0: 3}
    torch.manual_seed(0)
    model = nets.BERT()
    loss = lambda m, number: nets.classify_text(m, torch.Generator().manual_seed(number))  # noqa: E731
    depths = by_depth(Evidence(watched(tmp_path, model, loss)))
    assert [level.site for level in depths][-2:] == ["pooler", "head"]
    assert [level.site for level in depths][:4] == [f"blocks.0.{name}" for name in ("qkv", "out", "up", "down")]


class Branched(nets.Block):
    """A block behind whose norms query, key and value are layers of their own: branches, with small gradients."""

    def __init__(self, width, first, causal):
        super().__init__(width, first, causal)
        self.qkv = None
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def attend(self, x):
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("watch", [0, 1])
def test_the_branches_and_the_head_of_a_transformer_are_no_depth(layers, watch, tmp_path):
    """By hand: on the residual stream the gradient keeps its size, from the last block to the first."""
    torch.manual_seed(0)
    model = nets.BERT(layers)
    model.blocks = nn.ModuleList(Branched(32, first=False, causal=False) for _ in range(layers))
    nets._bert_like(model)
    stream = []
    handles = [block.register_forward_hook(lambda *call: stream.append(call[2])) for block in model.blocks]
    loss = nets.classify_text(model, torch.Generator().manual_seed(0))
    sizes = [float(g.norm()) for g in torch.autograd.grad(loss, stream)]
    for handle in handles:
        handle.remove()
    assert 0.2 < sizes[0] / sizes[-1] < 5
    with ut.record(tmp_path, model, sites="linear", measures="moments", diagnose=watch) as recording:
        for number in range(2):
            with recording.batch():
                nets.classify_text(model, torch.Generator().manual_seed(number)).backward()
    assert [f.sentence for f in ut.diagnose(ut.Run(tmp_path)) if f.cause in ("vanishing", "exploding")] == []


def test_the_calls_of_one_cell_are_depth(tmp_path):
    torch.manual_seed(0)
    model, x = nets.Cell(nn.RNNCell(8, 24)), torch.randn(16, 60, 8)
    run = watched(tmp_path, model, lambda m, _: m(x).square().sum(), sites=["cell", "head"])
    finding = one(ut.diagnose(run), "vanishing")
    assert finding.evidence["recurrent"] == "cell"
    assert len(finding.evidence["sizes"]) == 61
    assert "LSTM" in finding.remedy
    assert "call 0" in finding.sentence


def test_without_a_watched_batch_depth_through_calls_is_not_claimed_to_be_looked_at(tmp_path):
    torch.manual_seed(0)
    model, x = nets.Cell(nn.RNNCell(8, 24)), torch.randn(16, 20, 8)
    for name, sites in (("few", ["cell", "head"]), ("more", lambda _, m: True)):
        body = model if name == "few" else nn.Sequential(model, nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        with ut.record(tmp_path / name, body, sites=sites, measures="moments") as recording, recording.batch():
            body(x).square().sum().backward()
        checked = ut.diagnose(ut.Run(tmp_path / name)).checked["depth"]
        assert checked != "checked"
        assert "diagnose=True" in checked


def test_where_all_is_frozen_it_is_on_purpose(tmp_path):
    """So photographs are recorded: activations have no parameters, and make no difference."""
    model = nets.MLP(4).requires_grad_(False)
    x = torch.randn(16, 4, requires_grad=True)
    run = watched(tmp_path, model, lambda m, _: m(x).sum(), sites=lambda _, module: not list(module.children()))
    assert [finding.cause for finding in ut.diagnose(run) if finding.cause == "frozen"] == []


def test_calls_that_stand_beside_one_another_are_no_depth(tmp_path):
    """One head over sixty positions: each call reads the input, and none reads another."""
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    model = nn.Sequential(head)
    x = [torch.randn(4, 8) for _ in range(60)]
    run = watched(tmp_path, model, lambda m, _: sum(m(part).sum() * 0.1**i for i, part in enumerate(x)))
    findings = ut.diagnose(run)
    assert [finding.cause for finding in findings if finding.cause in ("vanishing", "exploding")] == []
    assert findings.checked["depth"].startswith("not checked")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda y: F.cross_entropy(y, torch.full((len(y),), 7), ignore_index=7, reduction="sum"),
            "ignores every label",
        ),
        (lambda y: (y.round() - 0.3).abs().mean(), "round"),
        (lambda y: torch.sign(y).sum(), "sign"),
        (lambda y: F.relu(y.abs().neg() - 1).sum(), "read by abs"),
    ],
)
def test_where_nothing_arrives_anywhere_the_finding_says_why(loss, words, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    findings = ut.diagnose(watched(tmp_path, dense(3, nn.Tanh, 1.0), lambda m, _: loss(m(x)), batches=3))
    assert [finding.cause for finding in findings] == ["no-gradient"]
    assert findings[0].severity == "error"
    assert words in findings[0].sentence


def test_data_weights_and_layers_that_break_are_told_apart(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    bad = x.clone()
    bad[3, 2] = bad[4, 1] = float("nan")

    def broken(name, model, x):
        finding = ut.diagnose(watched(tmp_path / name, model, lambda m, _: m(x).square().mean()))[0]
        assert finding.cause == "non-finite"
        return finding

    data = broken("data", dense(2, nn.Tanh, 1.0), bad)
    assert "2 of the network's inputs" in data.sentence
    assert "it is the data" in data.sentence
    assert data.evidence["first_site"] == "0"
    weights = dense(2, nn.Tanh, 1.0)
    weights[2].weight.data[0, 0] = float("nan")
    finding = broken("weights", weights, x)
    assert "weights are not finite" in finding.sentence
    assert finding.evidence["first_site"] == "2"
    loss = ut.diagnose(watched(tmp_path / "loss", dense(2, nn.Tanh, 1.0), lambda m, _: (m(x) * 0).abs().log().sum()))[0]
    assert "All outputs are finite" in loss.sentence
    assert "divisions" in loss.remedy
    assert "targets" in loss.remedy


def overflowing(folder, broken):
    """Record batches under a scaler's scale, of which some overflow, and its scale is halved behind each."""
    model = dense(2, nn.Tanh, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with ut.record(folder, model, sites="linear", measures="moments", scaler=scaler, diagnose=1) as recording:
        for number in range(8):
            optimizer.zero_grad()
            with recording.batch():
                loss = model(torch.ones(4, 32)).square().mean()
                scaler.scale(loss * (float("inf") if number in broken else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    return ut.diagnose(ut.Run(folder))


def test_a_scaler_that_looks_for_its_scale_is_no_alarm(tmp_path):
    first = one(overflowing(tmp_path / "first", {0}), "non-finite")
    assert first.severity == "info"
    assert "GradScaler" in first.sentence
    assert one(overflowing(tmp_path / "most", {0, 1, 2, 3, 4, 7}), "non-finite").severity == "error"


def test_whether_an_output_was_broken_is_not_claimed_where_nobody_looked(tmp_path):
    model = dense(2, nn.Tanh, 1.0)
    with ut.record(tmp_path, model, sites="linear", measures="moments", diagnose=2) as recording:
        for number in range(2):
            with recording.batch():
                model(torch.full((4, 32), float("nan") if number else 1.0)).sum().backward()
    finding = one(ut.diagnose(ut.Run(tmp_path)), "non-finite")
    assert "was not looked at" in finding.sentence
    assert "inputs" in finding.remedy


@pytest.mark.parametrize(
    ("how", "word"),
    [("argmax", "argmax in"), ("compare", "a comparison (gt) in"), ("item", ".item() in"), ("tolist", ".tolist() in")],
)
def test_what_has_no_gradient_is_named_as_the_cut(how, word, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 12)
    with pytest.warns(UserWarning, match="were not recorded"):
        run = watched(tmp_path, Gate(how), lambda m, _: m(x).square().mean())
    finding = one(ut.diagnose(run), "detached")
    assert finding.sites == ("gate",)
    assert word in finding.sentence
    assert "softmax" in finding.remedy or "stack" in finding.remedy or "sigmoid" in finding.remedy


def test_what_is_only_looked_at_is_no_cut(tmp_path):
    """An accuracy by argmax and a loss by .item() are for the log: a branch that nobody reads is still unread."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(12, 12), "head": nn.Linear(12, 5), "spare": nn.Linear(12, 5)})
    x, y = torch.randn(16, 12), torch.arange(16) % 5

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            h = torch.tanh(self.parts["body"](x))
            return self.parts["head"](h), self.parts["spare"](h)

    def loss(net, _):
        scores, spare = net(x)
        value = F.cross_entropy(scores, y)
        accuracy = (spare.argmax(1) == y).float().mean()
        assert 0 <= accuracy.item() <= 1
        assert value.item() > 0
        return value

    with pytest.warns(UserWarning, match="were not recorded"):
        findings = ut.diagnose(watched(tmp_path, Net(), loss))
    (finding,) = findings
    assert (finding.cause, finding.sites) == ("unreached", ("parts.spare",))


def test_a_target_network_is_no_alarm_and_a_layer_under_no_grad_is(tmp_path):
    class Net(nn.Module):
        def __init__(self, into_layer):
            super().__init__()
            self.first, self.second, self.into_layer = nn.Linear(4, 4), nn.Linear(4, 4), into_layer

        def forward(self, x):
            with torch.no_grad():
                h = self.first(x).relu()
            return self.second(h) if self.into_layer else (self.second(x) - h).square()

    severities = {}
    for into_layer in (False, True):
        with pytest.warns(UserWarning, match="were not recorded"):
            run = watched(tmp_path / str(into_layer), Net(into_layer), lambda m, _: m(torch.ones(8, 4)).sum())
        severities[into_layer] = one(ut.diagnose(run), "detached").severity
    assert severities == {False: "info", True: "warning"}


def test_reentrant_checkpointing_is_not_taken_for_no_grad(tmp_path):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(8, 4, requires_grad=True)
    run = watched(tmp_path, inner, lambda m, _: checkpoint(m, x, use_reentrant=True).sum())
    findings = ut.diagnose(run)
    assert [finding for finding in findings if finding.cause == "detached"] == []
    assert "checkpointing" in findings.checked["arrival"]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_a_rule_that_could_not_look_says_so(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.max_pool2d(Opaque.apply(self.conv(x)), 2).mean((2, 3)))

    x = torch.randn(4, 1, 8, 8)
    checked = ut.diagnose(watched(tmp_path, Net(), lambda m, _: m(x).sum())).checked
    for rule in ("pooling", "activation", "saturated", "dead"):
        assert checked[rule].startswith("checked, but not at conv")
    assert checked["arrival"] == "checked"


def test_adapters_at_zero_are_no_dead_layer_and_a_cut_branch_is(tmp_path):
    torch.manual_seed(0)
    loss = lambda m, number: nets.predict_next(m, torch.Generator().manual_seed(number))  # noqa: E731
    with pytest.warns(UserWarning, match="blocks.0.qkv.base"):
        findings = ut.diagnose(watched(tmp_path / "lora", nets.lora(), loss))
    finding = one(findings, "zero-weights")
    assert set(finding.sites) == {f"blocks.{i}.{name}.a" for i in range(3) for name in ("qkv", "up")}
    assert "blocks.0.qkv.b" in finding.sentence
    assert findings.worst() == "info"
    model, x = nets.MLP(4), torch.randn(64, 4)
    zeroed = watched(tmp_path / "clamped", model, lambda m, _: m[4](m[3](m[2](m[0](x).clamp(90, 91)))).sum())
    assert one(ut.diagnose(zeroed), "dead-layer").severity == "error"


def decays(n, factor, noise, seed):
    return -np.log2(factor) * np.arange(n) + noise * np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_a_jump_and_what_is_none(seed):
    for factor in (1.0, 1.2, 2.0, 4.0):
        assert _jump(decays(40, factor, 0.3, seed)) is None
    for at, size in ((6, 8.0), (20, 5.0), (39, 6.0)):
        spiked = decays(40, 1.1, 0.2, seed)
        spiked[at] += size
        found = _jump(spiked)
        assert found is not None
        assert found[0] == at
        assert found[1] == pytest.approx(size, abs=1.5)
        stepped = decays(40, 1.0, 0.2, seed)
        stepped[20:] += size
        assert _jump(stepped)[0] in (20, 21, 22)
        stepped[20:] -= 2 * size  # a fall that lasts, as of a layer that dies
        assert _jump(stepped)[0] in (20, 21, 22)
        empty = decays(40, 1.0, 0.2, seed)
        empty[20] -= size  # one batch of which nothing is wrong
        assert _jump(empty) is None


def test_the_remedy_is_one_that_the_framework_has(tmp_path):
    model = dense(3, nn.Tanh, 1.0)
    with ut.record(tmp_path, model, sites="linear") as recording, recording.batch():
        model(torch.randn(8, 32)).sum().backward()
    run = ut.Run(tmp_path)
    assert "diagnose=True" in ut.diagnose(run).checked["pooling"]
    run.manifest["model"]["framework"] = "keras 3.15.0"
    checked = ut.diagnose(run).checked
    assert "diagnose=True" in checked["pooling"]
    run.manifest["model"]["framework"] = "jax 0.10.2"
    assert ut.diagnose(run).checked["pooling"] == "not checked: watching batches is not there for JAX yet"
    assert "parameters of Keras on TensorFlow cannot be recorded yet" in checked["optimizer"]


def test_saturation_is_a_finding_of_its_own_with_its_own_remedy(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))
    x = torch.randint(0, 256, (256, 20)).float()
    finding = one(ut.diagnose(watched(tmp_path, model, lambda m, _: m(x).square().mean(), batches=2)), "saturated")
    slopes = 1 - torch.tanh(model[0](x)) ** 2
    assert finding.evidence["saturated"] == {"0": pytest.approx(float((slopes < 0.01).float().mean()), abs=1e-6)}
    assert finding.evidence["predicted"] == pytest.approx(finding.evidence["observed"], rel=1e-5)
    assert finding.severity == "warning"
    assert "Scale the inputs" in finding.remedy
    assert "leaky" not in finding.remedy
