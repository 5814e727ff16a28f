"""A guard that needs no clock: what a guided pass does beyond the plain gradient, counted."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision

NETWORKS = {"resnet18": 17, "vgg11": 10, "mobilenet_v2": 35}
HEAVY = ("aten::convolution", "aten::convolution_backward", "aten::max_pool2d_with_indices", "aten::addmm", "aten::mm")


def counted(call) -> tuple[Counter, int]:
    """Return how often each operator ran, and how many bytes were allocated."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [event for event in prof.events() if event.name.startswith("aten::")]
    names = Counter(event.name for event in events)
    return names, sum(max(0, event.self_cpu_memory_usage) for event in events)


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
    by_hand, bytes_by_hand = counted(lambda: plain(network, x))
    guided, bytes_guided = counted(lambda: ut.explain(network, x, rule="guided", target=3))
    for name in HEAVY:
        assert guided[name] == by_hand[name], name
    # besides the rule's ReLU: a few operators that choose the target and look for NaN, none of them for each layer
    extra = guided - by_hand
    assert extra["aten::relu"] == relus
    assert sum(extra.values()) <= 2 * relus + 90, extra
    assert sum(extra[name] for name in ("aten::copy_", "aten::clone", "aten::contiguous")) <= 12, extra
    assert bytes_guided <= 1.35 * bytes_by_hand


def test_a_map_does_without_imports_that_take_half_a_second():
    code = (
        "import sys, torch, undertow as ut\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()\n"
        "ut.explain(net, torch.ones(2, 4), rule='guided', target='top:2')\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
