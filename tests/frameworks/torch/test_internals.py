"""This torch still has every private name that undertow uses, and each means what `internals.py` says of it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from undertow.frameworks.torch import internals
from undertow.frameworks.torch.hooks import ModuleHook


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_dispatch_modes_see_in_place_calls_on_views():
    calls = []

    class Recording(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func.overloadpacket, internals.is_view(args[0])))
            return func(*args, **(kwargs or {}))

    x = torch.randn(4)
    with Recording():
        x[:2].relu_()
    assert (torch.ops.aten.relu_, True) in calls


def test_trees_are_flattened_and_put_together_again():
    x = torch.ones(1)
    tree = {"a": [1, (x, None)]}
    leaves, structure = internals.tree_flatten(tree)
    assert [type(leaf) for leaf in leaves] == [int, torch.Tensor, type(None)]
    assert leaves[1] is x
    assert internals.tree_leaves(tree)[1] is x
    assert internals.tree_unflatten(["b", "c", "d"], structure) == {"a": ["b", ("c", "d")]}


@pytest.mark.parametrize(
    ("base", "members", "other"),
    [
        (internals.CONVOLUTION, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d), nn.Linear),
        (internals.NORM, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d), nn.LayerNorm),
        (internals.DROPOUT, (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout), nn.RReLU),
    ],
    ids=["convolution", "norm", "dropout"],
)
def test_base_classes(base, members, other):
    assert all(issubclass(member, base) for member in members)
    assert not issubclass(other, base)


def test_function_modes_do_not_see_calls_made_unseen():
    calls = []

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1)
    with Recording():
        with internals.unseen_by_function_modes():
            torch.relu(x)
        torch.tanh(x)
    assert calls == [torch.tanh]


def test_what_torch_compile_wrapped():
    module = nn.Sequential(nn.Linear(2, 2))
    assert internals.compiled_from(torch.compile(module, backend="eager")) is module
    assert internals.compiled_from(torch.compile(leaf, backend="eager")) is leaf
    assert internals.compiled_from(module) is None
    compiled = torch.compile(module, backend="eager")
    assert all(name.startswith(internals.COMPILED_PREFIX) for name in compiled.state_dict())


def test_modules_compiled_in_place():
    module = nn.Linear(2, 2)
    assert not internals.is_compiled(module)
    assert internals.is_compiled(torch.compile(module, backend="eager"))
    assert internals.eager_call(module) is module
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    module.compile(backend=backend)
    assert internals.is_compiled(module)
    x = torch.ones(1, 2)
    assert torch.equal(internals.eager_call(module)(x), nn.functional.linear(x, module.weight, module.bias))
    assert not calls


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.MultiheadAttention(4, 2)], ids=["public", "private"])
def test_weights_are_initialised_anew(module):
    before = [parameter.clone() for parameter in module.parameters() if parameter.ndim == 2]
    internals.reset_of(module)()
    after = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    assert not torch.equal(before[0], after[0])
    assert internals.reset_of(nn.ReLU()) is None


def test_a_tensor_hook_runs_inside_the_backward_pass_at_its_node():
    inside = []
    x = leaf(2)
    y = x.exp()
    y.register_hook(lambda g: inside.append((internals.in_backward_pass(), internals.current_node())))
    assert not internals.in_backward_pass()
    assert internals.current_node() is None
    y.sum().backward()
    assert inside == [(True, y.grad_fn)]
    assert not internals.in_backward_pass()


def test_a_call_after_the_backward_pass_is_the_last_of_those_asked_for():
    order, x = [], leaf(2)
    engine = torch.autograd.Variable._execution_engine

    def arrived(_):
        order.append(internals.backward_pass() >= 0)
        internals.after_backward_pass(lambda: order.append("ours"))
        engine.queue_callback(lambda: order.append("another's, asked for later"))

    x.register_post_accumulate_grad_hook(arrived)
    (x * 2).sum().backward()
    assert order == [True, "another's, asked for later", "ours"]
    assert internals.backward_pass() == -1


def test_the_engine_says_which_nodes_it_will_run():
    x, other = leaf(2), leaf(2)
    a, b = x.exp(), other.sin()
    answers = []
    total = (a + b).sum()
    total.register_hook(lambda _: answers.extend(map(internals.will_execute, (a.grad_fn, b.grad_fn))))
    torch.autograd.grad(total, x)
    assert answers == [True, False]


def test_nodes_are_numbered_in_the_order_in_which_they_are_made():
    x = leaf(2)
    before = internals.next_sequence_number()
    a = x.exp()
    b = a.sin()
    assert internals.sequence_number(a.grad_fn) == before
    assert internals.sequence_number(b.grad_fn) == before + 1
    assert internals.next_sequence_number() == before + 2
    accumulator = a.grad_fn.next_functions[0][0]
    assert internals.sequence_number(accumulator) > 1 << 62


def test_the_function_behind_a_node():
    assert internals.function_class(Double.apply(leaf(2)).grad_fn) is Double
    assert internals.function_class(leaf(2).exp().grad_fn) is None


def test_what_nodes_saved():
    x = leaf(3)
    clamped, largest = x.clamp(min=0.5), torch.maximum(x, torch.zeros(3))
    assert internals.saved(clamped.grad_fn, "min") == 0.5
    assert torch.equal(internals.saved(largest.grad_fn, "self"), x)
    assert torch.equal(internals.saved(largest.grad_fn, "other"), torch.zeros(3))


def test_a_shared_prehook_runs_once_before_each_node_until_it_is_cleared():
    x = leaf(2)
    a = x.exp()
    b = a.sin()
    calls = []

    def hook(g):
        calls.append(g)
        return 2 * g

    shared = internals.SharedPrehook(hook)
    shared.attach(a.grad_fn)
    shared.attach(b.grad_fn)
    (hooked,) = torch.autograd.grad(b.sum(), x, retain_graph=True)
    assert [g.tolist() for g in calls] == [[1, 1], (2 * a.cos()).tolist()]
    shared.clear()
    (plain,) = torch.autograd.grad(b.sum(), x)
    assert torch.equal(hooked, 4 * plain)
    assert len(calls) == 2


def test_a_hook_handle_knows_that_its_tensor_is_gone():
    y = leaf(2).exp()
    total = y.sum()
    handle = y.register_hook(lambda g: None)
    del y
    assert not internals.is_of_freed_tensor(handle)  # the graph holds it
    del total
    assert internals.is_of_freed_tensor(handle)


def test_views_and_their_bases():
    x = torch.randn(2, 3)
    assert internals.is_view(x.T)
    assert internals.base_of(x.T) is x
    assert not internals.is_view(x)
    assert internals.base_of(x) is None


def test_an_in_place_operation_on_a_view_drops_its_hooks_from_the_graph():
    """The reason why views are copied before they are hooked."""
    calls = []
    view = leaf(2, 3).clone().flatten()
    view.register_hook(calls.append)
    view.relu_().sum().backward()
    assert calls == []


def test_the_version_counts_changes_in_place():
    x = torch.zeros(3)
    before = internals.version(x)
    x.add_(1)
    x[:2].mul_(2)
    assert internals.version(x) == before + 2


def test_memory_holds_what_a_lazy_tensor_says():
    imaginary = torch.tensor([1 + 2j]).conj().imag  # negated lazily
    assert imaginary.is_neg()
    assert internals.in_memory(imaginary).numpy().tolist() == [-2.0]
    zero = torch._efficientzerotensor((2,))
    assert internals.in_memory(zero).numpy().tolist() == [0.0, 0.0]
    x = torch.ones(2)
    assert internals.in_memory(x) is x


def test_the_scale_of_a_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert internals.scale_of(scaler) is None  # made by the first call
    scaler.scale(torch.ones(1))
    assert float(internals.scale_of(scaler)) == scaler.get_scale() == 8.0


def test_a_copied_or_pickled_module_hook_does_nothing():
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(ModuleHook(lambda *_: calls.append("hook")))
    twin = copy.deepcopy(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    loaded = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other(torch.ones(1, 2)), nn.functional.linear(torch.ones(1, 2), module.weight, module.bias))
    assert calls == []
    module(torch.ones(1, 2))
    assert calls == ["hook"]


def test_a_pickled_module_hook_loads_without_undertow():
    pickled = pickle.dumps(ModuleHook(print))
    load = f"import pickle, sys; sys.modules['undertow'] = None; pickle.loads({pickled!r})(1, 2, 3)"
    run = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_dispatch_mode_runs_when_a_call_has_just_made_its_node():
    numbers = []

    class Recording(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            numbers.append((func.overloadpacket, internals.next_sequence_number() - 1))
            return func(*args, **(kwargs or {}))

    x, w = leaf(2, 3), torch.randn(4, 3)
    with Recording():
        y = torch.nn.functional.linear(x, w, torch.randn(4))
    assert (torch.ops.aten.addmm, internals.sequence_number(y.grad_fn)) in numbers


def test_a_checkpointed_segment_serves_each_reader_once():
    runs = []

    def segment(x):
        runs.append(1)
        return x.exp() * x.exp()

    x = leaf(3)
    y = torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=False)
    node, reader = y.grad_fn, internals.beside_the_engine()
    for name in ("self", "other"):
        assert torch.equal(internals.saved(node, name, reader), x.exp())
    assert len(runs) == 2
    with pytest.raises(RuntimeError, match="already unpacked once"):
        internals.saved(node, "self", reader)
    assert torch.equal(internals.saved(node, "self"), x.exp())  # another reader
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(g, 2 * (2 * x).exp())
    assert len(runs) == 4
