"""Prepared copies give the same maps, are taken only where they measure quicker, and leave the original alone."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.attribution.preparing import prepared_for
from undertow.errors import InputError, ModelError
from undertow.frameworks.torch import prepare as steps_of_torch
from undertow.frameworks.torch.zoo.importing import import_torchvision

FOLDED, LAST, HALF = steps_of_torch.STEPS


class Tricky(nn.Module):
    """Batch norms that may be folded, and some that may not: a reused layer, one behind a ReLU, one in training."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.reused, self.reused_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.behind = nn.BatchNorm2d(6)
        self.head, self.head_norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.reused_norm(self.reused(x)))
        x = self.behind(torch.relu(self.reused(x)))
        return self.head_norm(self.head(x.mean((2, 3))))


class ReadTwice(nn.Module):
    """A convolution whose output is normalised, and added as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(self.norm(y) + y).mean((2, 3))


def trained(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights as a training leaves them: none of them the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight.data, 0.5)):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return network.eval()


NETWORKS = {
    "tricky": (Tricky, (4, 3, 10, 10), 2),
    "resnet18": (lambda: import_torchvision().models.resnet18(weights=None), (2, 3, 48, 48), 20),
    "mobilenet": (lambda: import_torchvision().models.mobilenet_v2(weights=None), (2, 3, 48, 48), 52),
    "densenet": (lambda: import_torchvision().models.densenet121(weights=None), (1, 3, 48, 48), 59),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", ["guided", "gradient"])
def test_each_step_is_exact_but_for_rounding(name, rule):
    build, shape, foldable = NETWORKS[name]
    network, x = trained(build()).double(), torch.randn(shape, dtype=torch.float64)
    plain = ut.explain(network, x, rule=rule)
    for steps in ((), (FOLDED,), (LAST,), (FOLDED, LAST)):
        copy = steps_of_torch.prepared(network, steps, x)
        a = ut.explain(copy, x, rule=rule)
        scale = float(plain.values.abs().max())
        np.testing.assert_allclose(a.numpy() / scale, plain.numpy() / scale, atol=1e-11)
        assert a.rewired == plain.rewired
        assert [n for n, _ in copy.named_modules()] == [n for n, _ in network.named_modules()]
        identities = sum(isinstance(module, nn.Identity) for module in copy.modules())
        assert identities == (foldable if FOLDED in steps else 0)


def test_the_original_is_left_alone():
    network, x = trained(Tricky()), torch.randn(2, 3, 10, 10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fast = ut.prepare(network, x)
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in fast.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert {trial.step for trial in fast.trials} == {FOLDED, LAST}
    assert str(fast).startswith("frozen")


def test_a_step_that_changes_the_map_is_not_taken():
    fast = ut.prepare(trained(ReadTwice()), torch.randn(2, 3, 10, 10))
    trial = next(trial for trial in fast.trials if trial.step == FOLDED)
    assert not trial.taken
    assert trial.difference > 0.1
    assert "its maps differ by" in str(trial)


def test_a_step_that_cannot_be_taken_says_why():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    fast = ut.prepare(network, torch.randn(2, 3, 2, 2))
    assert fast.steps == ()
    assert [trial.reason for trial in fast.trials] == [
        "no batch norm in eval mode follows a convolution or a linear layer at once",
        "no convolution of images has weights to lay out",
    ]


def is_last(module):
    return module.first.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("slow", "taken"), [(is_last, (FOLDED,)), (lambda m: not is_last(m), (FOLDED, LAST))])
def test_what_measures_slower_is_not_taken(slow, taken):
    """The seconds of a map are what they are made to be: folded takes less, and channels last more or still less."""

    def maps(module):
        folded = isinstance(module.first_norm, nn.Identity)
        time.sleep(0.06 * (2 if slow(module) else 1) * (1 if folded else 2))
        return [np.ones((1, 3))]

    prepared = prepared_for(trained(Tricky()), torch.randn(2, 3, 10, 10), maps)
    assert prepared.steps == taken
    for trial in prepared.trials:
        assert trial.taken == (trial.seconds < 0.97 * trial.before)


def test_bfloat16_is_taken_only_where_it_is_asked_for_and_agrees():
    network, x = trained(Tricky()), torch.randn(4, 3, 10, 10)
    fast = ut.prepare(network, x, precision="bfloat16")
    trial = fast.trials[-1]
    assert (trial.step, trial.taken) == (HALF, trial.difference <= 0.1)
    assert trial.difference > 1e-5
    copy = steps_of_torch.prepared(network, (HALF,), x)
    a = ut.explain(copy, x, rule="gradient")
    assert a.values.dtype == a.scores.dtype == torch.float32
    plain = ut.explain(network, x, rule="gradient", target=a.targets)
    assert 1e-5 < float((a.values - plain.values).norm() / plain.values.norm()) < 0.2
    assert ut.prepare(network, x, precision="auto").trials[-1].step == HALF


def test_what_cannot_be_prepared_is_told():
    with pytest.raises(InputError, match=r"unknown precision 'bfloat61'; did you mean bfloat16"):
        ut.prepare(Tricky(), torch.randn(2, 3, 10, 10), precision="bfloat61")
    with pytest.raises(InputError, match=r"only a torch.nn.Module can be prepared, not a function"):
        ut.prepare(lambda x: x.mean((2, 3)).relu(), torch.randn(2, 3, 10, 10))
    with pytest.raises(ModelError, match=r"BatchNorm1d, BatchNorm2d would act as in training"):
        ut.prepare(Tricky().train(), torch.randn(2, 3, 10, 10))
