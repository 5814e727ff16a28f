"""Whatever a model takes and returns: maps in the structure of the input, equal to autograd's, or one true line."""

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import undertow as ut
from undertow import inputs, outputs
from undertow.structures import tensors_with_paths

torch.manual_seed(1)
FIRST, SECOND, HEAD, OTHER = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 5), nn.Linear(16, 3)
A, B, IDS = torch.randn(3, 6), torch.randn(3, 4), torch.tensor([[0, 2], [1, 1], [2, 0]])


def hidden(a, b):
    return torch.relu(FIRST(a) + SECOND(b))


class Two(nn.Module):
    """Takes two tensors, and perhaps whole numbers."""

    def forward(self, a, b, ids=None):
        return HEAD(hidden(a, b) + (0 if ids is None else ids.sum(1, keepdim=True)))


def test_a_target_function_gets_the_whole_output_and_the_input_where_it_takes_both():
    def two(a):
        return HEAD(hidden(a, B)), OTHER(hidden(a, B))

    leaf = A.clone().requires_grad_()
    OTHER(hidden(leaf, B))[:, 0].sum().backward()
    assert torch.equal(ut.explain(two, A, rule="gradient", target=lambda out: out[1][:, 0]).values, leaf.grad)
    weighed = ut.explain(two, A, rule="gradient", target=lambda out, x: out[1][:, 0] * (x is A)).values
    assert torch.equal(weighed, leaf.grad)
    part = ut.explain(two, A, rule="gradient", target=lambda scores: scores[:, 0], output=1).values
    assert torch.equal(part, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int8])
def test_one_hot_labels_are_the_classes_that_they_name(dtype):
    labels = torch.tensor([4, 0, 3])
    hot = nn.functional.one_hot(labels, 5).to(dtype)
    for target in (hot, hot.tolist(), hot.numpy()):
        a = ut.explain(lambda a: HEAD(hidden(a, B)), A, target=target)
        assert torch.equal(a.targets, labels)
    both = ut.explain(lambda a: OTHER(hidden(a, B)), A, target=[[0, 1], [1, 0], [0, 1]])
    assert both.targets.tolist() == [[0, 1], [1, 0], [0, 1]]  # of two, which are class ids as ever


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({}, "dict without a tensor in it"),
        ((), "empty tuple"),
        ([None, 3], "list without a tensor in it"),
        ("cat.jpg", "x is a str, not a torch tensor"),
        ((A, torch.tensor([0, 1, 2])), r"loader's batch .* target=x\[1\]"),
        (pack_padded_sequence(torch.randn(2, 5, 6), [5, 3], batch_first=True), "cannot be called with x"),
        (torch.nested.nested_tensor([A[:2], A[:1]], layout=torch.jagged), "nested tensor"),
    ],
)
def test_inputs_that_cannot_be_used_are_said_in_one_line(x, message):
    with pytest.raises(ut.InputError, match=message):
        ut.explain(nn.Linear(6, 5).eval(), x, rule="gradient")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lgits", "no part 'lgits'; did you mean logits"),
        (7, "no part 7; it has hidden, logits"),
        ("logits.0.a", "no part 0; it is one tensor"),
        ("", "names no part"),
        ([], "names no part"),
    ],
)
def test_a_part_of_the_output_that_is_not_there(path, message):
    with pytest.raises(ut.InputError, match=message):
        ut.explain(lambda a: {"hidden": a, "logits": HEAD(hidden(a, B))}, A, output=path)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_input_is_as_the_dense_one():
    net, x = nn.Linear(6, 3).eval(), torch.randn(4, 6).relu()
    for estimator in ("gradient", "input-times", "integrated:4"):
        wanted = ut.explain(net, x, rule="gradient", target=1, estimator=estimator).values
        for sparse in (x.to_sparse(), x.to_sparse_csr()):
            values = ut.explain(net, sparse, rule="gradient", target=1, estimator=estimator).values
            torch.testing.assert_close(values if values.layout == torch.strided else values.to_dense(), wanted)


class Trunk(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.trunk, self.head, self.cut = nn.Linear(6, 8), nn.Linear(8, 3), cut

    def forward(self, x):
        if self.cut == "no_grad":
            with torch.no_grad():
                h = self.trunk(x)
        else:
            h = self.trunk(x).detach()
        return self.head(h.relu())


@pytest.mark.parametrize(("cut", "where"), [("no_grad", "in 'trunk'"), ("detach", "in the model's own forward")])
def test_a_gradient_that_is_cut_is_said_to_be_cut(cut, where):
    with pytest.raises(ut.InputError, match=f"does not reach input 0: it ends {where}") as caught:
        ut.explain(Trunk(cut).eval(), A, rule="gradient")
    assert "not influence" not in str(caught.value)
    with pytest.raises(ut.InputError, match="input 1 does not influence"):
        ut.explain(lambda a, b: HEAD(hidden(a, B)), (A, B), rule="gradient")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_frozen_torchscript_network_is_explained():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    frozen = torch.jit.freeze(torch.jit.script(net))
    wanted = ut.explain(net, A, rule="gradient", target=1).values
    torch.testing.assert_close(ut.explain(frozen, A, rule="gradient", target=1).values, wanted)


@pytest.mark.parametrize("estimator", ["gradient", "integrated:4"])
def test_a_finite_score_with_a_gradient_of_nan_is_refused_with_its_node(estimator):
    def distance(a):
        return torch.stack([(a - a.detach()).pow(2).sum(1).sqrt(), a.sum(1)], 1)

    with pytest.raises(ut.ModelError, match="gradient is NaN, first at PowBackward0"):
        ut.explain(distance, A, rule="gradient", target=0, estimator=estimator)
    assert not torch.is_anomaly_enabled()


def test_points_are_stacked_only_where_that_changes_no_score():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    x, total = torch.randn(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    for k in range(8):
        point = (x * ((k + 0.5) / 8)).requires_grad_()
        total += torch.autograd.grad(net(point)[0, 2], point)[0]
    values = ut.explain(net, x, rule="gradient", target=2, estimator="integrated:8").values
    torch.testing.assert_close(values, total / 8 * x, rtol=1e-4, atol=1e-6)


def test_integrated_gradients_of_float64_are_exact():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x, total = A.double() * 3, 0
    for k in range(50):
        point = (x * ((k + 0.5) / 50)).requires_grad_()
        total = total + torch.autograd.grad(net(point)[:, 1].sum(), point)[0]
    values = ut.explain(net, x, rule="gradient", target=1, estimator="integrated:50").values
    torch.testing.assert_close(values, total / 50 * x, rtol=1e-12, atol=1e-14)


def test_a_saved_map_is_loaded(tmp_path):
    for x in (A, {"a": A, "b": B, "ids": IDS}):
        a = ut.explain(
            Two().eval() if isinstance(x, dict) else nn.Linear(6, 5).eval(), x, rule="gradient", target="top:2"
        )
        b = ut.Attribution.load(a.save(tmp_path / "a.safetensors"))
        for path, tensor in tensors_with_paths(a.values):
            np.testing.assert_array_equal(b.values[path] if path else b.values, tensor)
        np.testing.assert_array_equal(b.scores, a.scores)
        np.testing.assert_array_equal(b.targets, a.targets)
        assert b.to_dict() == a.to_dict()
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name, message in (("b", "holds no saved attribution"), ("none", "there is no file .*none")):
        with pytest.raises(ut.InputError, match=message):
            ut.Attribution.load(tmp_path / f"{name}.safetensors")


def test_arguments_are_taken_apart_and_put_together():
    arguments = inputs.arguments_of({"a": A, "deep": [{"b": B}, None]}, lambda a, deep: None)
    assert [t is s for t, s in zip(arguments.tensors, (A, B), strict=True)] == [True, True]
    _, kwargs = arguments.fill(["first", "second"])
    assert kwargs == {"a": "first", "deep": [{"b": "second"}, None]}
    assert not arguments.is_plain
    assert inputs.arguments_of((A, B), lambda a, b: None).is_plain
    assert outputs.head_of((1, 2)) == 1


@pytest.mark.parametrize("facts", ["[]", "3", "{}", '{"rule": 1', "[" * 9999, '{"scores": 1}'], ids=lambda f: f[:9])
@pytest.mark.parametrize("names", [["scores", "values"], ["values"], []], ids=len)
def test_a_file_of_somebody_elses_is_no_attribution(tmp_path, facts, names):
    arrays = {name: np.zeros(2, np.float32) for name in names}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays, {"undertow": facts}))
    with pytest.raises(ut.InputError, match="holds no saved attribution"):
        ut.Attribution.load(path)
