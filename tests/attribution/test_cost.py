"""A guard that needs no clock: what a guided pass does beyond the plain gradient, counted."""

import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import undertow as ut
from undertow.attribution.explain import explain_rules
from undertow.frameworks.torch.zoo.importing import import_torchvision

NETWORKS = {"resnet18": 17, "vgg11": 10, "mobilenet_v2": 35}
HEAVY = ("aten::convolution", "aten::convolution_backward", "aten::max_pool2d_with_indices", "aten::addmm", "aten::mm")


def counted(call) -> tuple[Counter, list[int]]:
    """Return how often each operator ran, and the bytes of each allocation."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    names = Counter(event.name for event in prof.events() if event.name.startswith("aten::"))
    return names, [nbytes for nbytes in memory_records(prof) if nbytes > 0]


def memory_records(prof) -> list[int]:
    """Return the bytes that were taken (and given back, below zero), in order."""
    records = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]


@pytest.fixture(params=NETWORKS)
def case(request):
    torch.manual_seed(0)
    network = getattr(import_torchvision().models, request.param)(weights=None).eval()
    return network, torch.randn(2, 3, 64, 64), NETWORKS[request.param]


def plain(network, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(network(leaf)[:, 3].sum(), leaf)[0]


def test_a_guided_pass_runs_one_small_operator_more_for_each_activation(case):
    network, x, relus = case
    by_hand, taken_by_hand = counted(lambda: plain(network, x))
    guided, taken = counted(lambda: ut.explain(network, x, rule="guided", target=3))
    for name in HEAVY:
        assert guided[name] == by_hand[name], name
    # besides the rule's ReLU: a few operators that choose the target and look for NaN, none of them for each layer
    extra = guided - by_hand
    assert extra["aten::relu"] == relus
    assert sum(extra.values()) <= 2 * relus + 90, extra
    assert sum(extra[name] for name in ("aten::copy_", "aten::clone", "aten::contiguous")) <= 12, extra
    # an allocation for each rule's ReLU, of the gradient's size, and small ones for the rest
    assert len(taken) - len(taken_by_hand) <= relus + 25
    assert sum(taken) <= 1.2 * sum(taken_by_hand)


def peak(call) -> int:
    """Return how many bytes of tensors there were at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    return max(accumulate(memory_records(prof)))


@pytest.fixture(scope="module")
def plain_layers():
    torch.manual_seed(0)
    layers = [layer for c in (3, 8, 8) for layer in (nn.Conv2d(c, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16 * 16, 300)).eval(), torch.randn(2, 3, 16, 16)


def forward_passes(network, call) -> int:
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    call()
    handle.remove()
    return len(calls)


def test_many_targets_take_one_forward_pass_one_graph_and_their_maps(plain_layers):
    network, x = plain_layers
    many = partial(ut.explain, network, x, rule="guided", target="top:160")
    assert forward_passes(network, many) == 1
    names, _ = counted(many)
    assert names["aten::convolution"] == 3
    assert names["aten::convolution_backward"] == 3 * 160
    maps = 160 * x.numel() * x.element_size()
    two = peak(partial(ut.explain, network, x, rule="guided", target="top:2"))
    assert maps < peak(many) < two + 1.1 * maps


def test_several_rules_take_one_forward_pass_and_give_what_each_gives_alone(plain_layers):
    network, x = plain_layers
    rules = ["gradient", "deconvnet", "guided", lambda g, local: local(g) * 2]
    each = [ut.explain(network, x, rule=rule, target="top:3") for rule in rules]
    assert forward_passes(network, lambda: list(explain_rules(network, x, rules, target="top:3"))) == 1
    for alone, shared in zip(each, explain_rules(network, x, rules, target="top:3"), strict=True):
        assert torch.equal(alone.values, shared.values)
        assert alone.to_dict() == shared.to_dict()


@pytest.mark.parametrize(
    "how",
    [{"through": "swap"}, {"estimator": "smoothgrad:2"}, {"rules": ["gradient", "attnlrp"]}, {"at": "0"}],
    ids=str,
)
def test_what_cannot_share_a_forward_pass_has_its_own(plain_layers, how):
    network, x = plain_layers
    rules = how.get("rules", ["gradient", "guided"])
    options = {"target": 3} | {name: value for name, value in how.items() if name != "rules"}
    for rule, shared in zip(rules, explain_rules(network, x, rules, **options), strict=True):
        assert torch.equal(ut.explain(network, x, rule=rule, **options).values, shared.values)


def test_a_rule_that_fails_among_several_leaves_the_network_as_it_was(plain_layers):
    network, x = plain_layers

    def fails(g, local):
        raise ValueError("no rule")

    wanted = ut.explain(network, x, rule="guided", target=3).values
    with pytest.raises(ValueError, match="no rule"):
        list(explain_rules(network, x, ["guided", fails, "gradient"], target=3))
    assert torch.equal(ut.explain(network, x, rule="guided", target=3).values, wanted)


def test_a_map_does_without_imports_that_take_half_a_second():
    code = (
        "import sys, torch, undertow as ut\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()\n"
        "ut.explain(net, torch.ones(2, 4), rule='guided', target='top:2')\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
