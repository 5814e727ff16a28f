"""A model as blocks: which edges there are, what they carry, and that nothing is left behind."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.derive import from_model
from undertow.frameworks.torch.zoo.importing import import_torchvision


class Residual(nn.Module):
    """A residual addition, a concatenation, a shared module, a function read twice, and a module that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.bend, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(12, 5)
        self.shared, self.quiet, self.inner = nn.Tanh(), nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.shared(self.enter(x))
        h = h + self.shared(self.bend(self.quiet(h)) * self.scale)
        s = torch.sin(h)
        return self.head(torch.cat([s, self.inner(s), h.clone()], 1))


@pytest.fixture
def net() -> tuple[Residual, torch.Tensor]:
    model = Residual().double()
    return model, torch.randn(2, 3, dtype=torch.float64)


def test_edges_by_hand(net):
    blocks = from_model(*net)
    expected = [
        ("x", "enter"), ("enter", "shared#0"), ("shared#0", "bend"), ("shared#0", "add"), ("bend", "shared#1"),
        ("shared#1", "add"), ("add", "sin"), ("add", "cat"), ("sin", "inner"), ("sin", "cat"), ("inner", "cat"),
        ("cat", "head"), ("head", "E"),
    ]  # fmt: skip
    assert sorted((edge.source, edge.target) for edge in blocks.edges) == sorted(expected)
    assert blocks.order == ["x", "enter", "shared#0", "bend", "shared#1", "add", "sin", "inner", "cat", "head"]
    assert blocks.passed_on == ("quiet",)
    deeper = from_model(*net, depth=2).order
    assert [name for name in deeper if name.startswith("inner")] == ["inner.0", "inner.1"]


def test_what_each_edge_carries_by_hand(net):
    """The same network written out, with a leaf in front of every reader: autograd gives each edge's own gradient."""
    model, x = net
    inputs_of_readers = {}

    def edge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        inputs_of_readers[name] = tensor.clone()
        inputs_of_readers[name].retain_grad()
        return inputs_of_readers[name]

    h = model.shared(edge("enter>shared#0", model.enter(edge("x>enter", x.clone().requires_grad_()))))
    bent = model.shared(edge("bend>shared#1", model.bend(edge("shared#0>bend", h))) * model.scale)
    h = edge("shared#0>add", h) + edge("shared#1>add", bent)
    s = torch.sin(edge("add>sin", h))
    inner = model.inner(edge("sin>inner", s))
    cat = torch.cat([edge("sin>cat", s), edge("inner>cat", inner), edge("add>cat", h)], 1)
    scores = edge("head>E", model.head(edge("cat>head", cat)))
    scores.gather(1, torch.tensor([[4], [1]])).sum().backward()
    blocks = from_model(model, x, target=[4, 1])
    assert {f"{e.source}>{e.target}" for e in blocks.edges} == set(inputs_of_readers)
    for e in blocks.edges:
        assert e.norm == pytest.approx(float(inputs_of_readers[f"{e.source}>{e.target}"].grad.norm()), rel=1e-12), e
    norms = {block.name: block.gradient for block in blocks.blocks}
    total = inputs_of_readers["shared#0>bend"].grad + inputs_of_readers["shared#0>add"].grad
    assert norms["shared#0"] == pytest.approx(float(total.norm()), rel=1e-12)


def test_finite_differences_of_a_blocks_output(net):
    """Move the output of one block along its total gradient: E moves by the squared norm."""
    model, x = net
    blocks = from_model(model, x, target=2)
    norms = {block.name: block.gradient for block in blocks.blocks}
    for name in ("enter", "bend", "inner", "head"):
        out = []
        with model.get_submodule(name).register_forward_hook(lambda m, a, y, out=out: out.append(y)):
            scores = model(x)
        (g,) = torch.autograd.grad(scores[:, 2].sum(), out)
        moved = []
        for step in (1e-6, -1e-6):
            with model.get_submodule(name).register_forward_hook(lambda m, a, y, move=step * g: y + move):
                moved.append(float(model(x)[:, 2].sum().detach()))
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(norms[name] ** 2, rel=1e-6)


def test_the_chain_rule_over_blocks(net):
    d = from_model(*net).derivative("bend")
    assert d.text == (
        "∂E/∂bend = ((δ(cat) · ∂cat/∂inner · ∂inner/∂sin + δ(cat) · ∂cat/∂sin) · ∂sin/∂add + δ(cat) · ∂cat/∂add)"
        " · ∂add/∂(shared#1) · ∂(shared#1)/∂bend\n"
        "  where δ(cat) = ∂E/∂cat = ∂E/∂head · ∂head/∂cat"
    )
    assert d.operations.paths == 3
    assert str(d.expanded).count("∂E/∂head*∂head/∂cat*") == 3
    assert d.check() < 1e-12


def test_jacobians_multiply_to_the_gradient(net):
    """The factored formula with real Jacobian matrices in it is autograd's gradient."""
    model, x = net[0], net[1][:1]
    blocks = from_model(model, x, target=3)
    parts = {
        "shared": model.shared, "head": model.head, "inner": model.inner, "bend": model.bend, "sin": torch.sin,
    }  # fmt: skip
    h0 = model.shared(model.enter(x))
    bent = model.bend(h0)
    h1 = h0 + model.shared(bent * model.scale)
    s = torch.sin(h1)
    cat = torch.cat([s, model.inner(s), h1], 1)

    def jacobian(f, at: torch.Tensor) -> np.ndarray:
        return torch.autograd.functional.jacobian(f, at).squeeze().numpy()

    eye, none = np.eye(4), np.zeros((4, 4))
    values = {
        "∂E/∂head": np.eye(5)[3:4], "∂head/∂cat": jacobian(parts["head"], cat),
        "∂cat/∂sin": np.vstack([eye, none, none]), "∂cat/∂inner": np.vstack([none, eye, none]),
        "∂cat/∂add": np.vstack([none, none, eye]), "∂inner/∂sin": jacobian(parts["inner"], s),
        "∂sin/∂add": jacobian(torch.sin, h1), "∂add/∂(shared#1)": eye, "∂add/∂(shared#0)": eye,
        "∂(shared#1)/∂bend": jacobian(lambda b: model.shared(b * model.scale), bent),
        "∂bend/∂(shared#0)": jacobian(parts["bend"], h0),
        "∂(shared#0)/∂enter": jacobian(parts["shared"], model.enter(x).detach()),
        "∂enter/∂x": jacobian(model.enter, x),
    }  # fmt: skip

    def value(node) -> np.ndarray:
        if node.is_Symbol:
            return values[node.name]
        operands = [value(arg) for arg in node.args]
        total = operands[0]
        for operand in operands[1:]:
            total = total @ operand if node.is_Mul else total + operand
        return total

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf)[0, 3], leaf)
    for form in (blocks.derivative("x").expression, blocks.derivative("x").expanded):
        assert np.allclose(value(form), g.numpy(), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("resnet18", 3), ("densenet121", 3), ("vgg11", 2), ("googlenet", 2)])
def test_torchvision(name, depth):
    make = getattr(import_torchvision().models, name)
    model = make(weights=None, **({"init_weights": False} if name == "googlenet" else {})).eval()
    x = torch.randn(1, 3, 64, 64)
    blocks = from_model(model, x, depth=depth)
    calls = {name.partition("#")[0] for name in blocks.order}
    leaves = {n for n, m in model.named_modules() if n and not any(m.children()) and n.count(".") < depth}
    assert {leaf for leaf in leaves if not leaf.startswith("aux")} - set(blocks.passed_on) <= calls
    assert blocks.derivative("x").check() < 1e-5
    if name == "resnet18":
        adds = [name for name in blocks.order if name.endswith(".add")]
        assert len(adds) == 8
        assert sum(edge.target == "layer2.0.add" for edge in blocks.edges) == 2
        assert blocks.derivative("x").operations.paths == 2**8
    if name == "densenet121":
        parents = [edge.source for edge in blocks.edges if edge.target == "features.denseblock1.denselayer6"]
        assert parents == ["features.pool0", *(f"features.denseblock1.denselayer{i}" for i in range(1, 6))]
        assert sum(edge.target == "features.denseblock4.cat" for edge in blocks.edges) == 17
    if name == "vgg11":
        assert blocks.derivative("x").operations.paths == 1


def test_a_resnets_block_prints_as_a_product():
    model = import_torchvision().models.resnet18(weights=None).eval()
    d = from_model(model, torch.randn(1, 3, 64, 64), depth=2).derivative("layer2.0")
    assert d.text == (
        "∂E/∂(layer2.0) = ∂E/∂fc · ∂fc/∂avgpool · ∂avgpool/∂(layer4.1) · ∂(layer4.1)/∂(layer4.0) · "
        "∂(layer4.0)/∂(layer3.1) · ∂(layer3.1)/∂(layer3.0) · ∂(layer3.0)/∂(layer2.1) · ∂(layer2.1)/∂(layer2.0)"
    )


def test_a_lost_edge_is_seen_by_the_check(net, monkeypatch):
    from undertow.frameworks.torch.inspect import blocks as torch_blocks

    sent_gradients = torch_blocks.NodeGrouping.sent_gradients

    def lossy(self):
        sent, totals = sent_gradients(self)
        most_read = max(sent.values(), key=len)
        most_read.pop(next(iter(most_read)))
        return sent, totals

    monkeypatch.setattr(torch_blocks.NodeGrouping, "sent_gradients", lossy)
    assert from_model(*net).derivative("x").check() > 1e-2


class Heads(nn.Module):
    """E is read off the same tensor by two ways: directly, and through a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x)
        return h, self.more(h)


def test_a_block_that_reaches_the_objective_by_two_ways():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = Heads()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.heads(x))

    blocks = from_model(Both(), torch.randn(2, 3), depth=2, target=lambda out: out[0].sum(1) + out[1].sum(1))
    text = blocks.derivative("heads.body").text
    assert "∂stack/∂(heads.body)" in text
    assert "∂(heads.more)/∂(heads.body)" in text
    direct = from_model(Heads(), torch.randn(2, 3), target=lambda out: out[0].sum(1))
    assert direct.derivative("body").text == "∂E/∂body = ∂E/∂body"  # the second output is not part of E


def test_checkpointed_and_in_place_parts():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.a, self.b, self.c, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True), reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=self.reentrant)
            h = self.b(h)
            h += x
            h[:, 0] = 0
            return self.c(h)

    blocks = from_model(Checkpointed(False), torch.randn(2, 3))
    assert blocks.order[:3] == ["x", "a", "b"]
    assert ("x", "add") in blocks.carried
    assert blocks.derivative("x").check() < 1e-6
    with pytest.raises(ut.ModelError, match="use_reentrant=False"):
        from_model(Checkpointed(True), torch.randn(2, 3))


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3)
    state = torch.get_rng_state()
    from_model(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert model.training
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks

    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    model.append(Fails(2, 2))
    with pytest.raises(ValueError, match="no"):
        from_model(model, x)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_what_cannot_be_used_is_said(net):
    model, x = net
    blocks = from_model(model, x)
    for name, message in (
        ("shared", "called 2 times; use shared#0 or shared#1"),
        ("quiet", "returned its input unchanged"),
        ("inner.0", "a greater depth would show it"),
        ("hed", "did you mean head"),
    ):
        with pytest.raises(ut.InputError, match=re.escape(message)):
            blocks.derivative(name)
    with pytest.raises(ut.InputError, match=re.escape("its submodules are blocks: inner.0, inner.1")):
        from_model(model, x, depth=2).derivative("inner")
    with pytest.raises(ut.InputError, match="have no closed form"):
        blocks.derivative("head", substitute=True)
    for depth in (0, 1.5, True):
        with pytest.raises(ut.InputError, match="not a nesting depth"):
            from_model(model, x, depth=depth)
    with pytest.raises(ut.InputError, match="empty tuple"):
        from_model(model, ())
    with pytest.raises(ut.ModelError, match="not a torch"):
        from_model(lambda x: x, x)
    with pytest.raises(ut.TargetError, match="out of range"):
        from_model(model, x, target=9)
    with pytest.raises(ut.ModelError, match="compiled"):
        from_model(torch.compile(model, backend="eager"), x)
    with pytest.raises(ut.InputError, match="depend on nothing by any gradient"):
        from_model(Detached(), x)


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_a_scripted_part_is_refused():
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        scripted = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(ut.ModelError, match="1 is scripted or traced"):
        from_model(nn.Sequential(nn.Linear(3, 3), scripted), torch.randn(2, 3))


def test_modules_with_the_names_of_the_input_and_the_objective():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.E, self.x = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.x(self.E(x))

    blocks = from_model(Named(), torch.randn(2, 3))
    assert blocks.order == ["x", "E#0", "x#0"]
    assert list(blocks.carried) == [("x", "E#0"), ("E#0", "x#0"), ("x#0", "E")]


def test_a_model_that_is_one_layer():
    assert from_model(nn.Linear(3, 2), torch.randn(1, 3)).order == ["x", "(model)"]


def test_two_inputs_have_names():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) * self.b(y)

    blocks = from_model(Two(), (torch.randn(2, 3), torch.randn(2, 2)))
    assert blocks.derivative("x[1]").text == "∂E/∂(x[1]) = ∂E/∂mul · ∂mul/∂b · ∂b/∂(x[1])"


class Twice(nn.Module):
    """Reads its input by two nodes, so what it sends back is a sum; and gives two outputs, one made of the other."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * torch.sigmoid(x)
        return y, y.exp()


def test_a_block_that_reads_twice_and_gives_two_outputs():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.twice, self.b, self.c = nn.Linear(3, 4), Twice(), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = self.twice(self.a(x))
            return self.b(y) + self.c(z)

    model, x = Around().double(), torch.randn(2, 3, dtype=torch.float64)
    blocks = from_model(model, x, target=1)
    h = model.a(x)
    (total,) = torch.autograd.grad(model.b(model.twice(h)[0])[:, 1].sum() + model.c(model.twice(h)[1])[:, 1].sum(), h)
    assert blocks.carried["a", "twice"] == pytest.approx(float(total.norm()), rel=1e-12)
    to_y, to_z = model.b.weight[1].detach().repeat(2, 1), model.c.weight[1].detach().repeat(2, 1)
    assert blocks.carried["twice", "b"] == pytest.approx(float(to_y.norm()), rel=1e-12)
    assert blocks.carried["twice", "c"] == pytest.approx(float(to_z.norm()), rel=1e-12)
    norm = {block.name: block.gradient for block in blocks.blocks}["twice"]
    assert norm == pytest.approx(float(torch.cat([to_y, to_z]).norm()), rel=1e-12)
    assert blocks.derivative("x").check() < 1e-12
