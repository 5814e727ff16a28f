"""Quiet on the healthy: networks that learn, of every architecture that people train, give no warning and no error."""

import pytest
import torch
from torch import nn

import undertow as ut
from diagnosis.architectures import HEALTHY

_WATCHED = (nn.Conv2d, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.Embedding)
INFORMATIONS = {
    "MLP": {"dead-units"},
    "CNN": {"dead-units", "pooling", "activation"},
    "VAE": {"activation", "dead-units"},
    "GAN": {"activation", "dead-units", "no-batch-norm", "vanishing"},
    "LoRA on GPT": {"frozen"},
    "regression, shifted target": {"dead-units", "no-batch-norm", "activation"},
    "DQN": {"activation", "dead-units", "frozen", "no-batch-norm"},
}
"""What is said of them, and is true: on these samples some units of a ReLU layer are never active, and so on."""

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


def trained(folder, name, seed, **options):
    """Record a few steps of training."""
    build, loss = HEALTHY[name]
    torch.manual_seed(seed)
    model, draw = build(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    with ut.record(folder, model, sites=lambda _, m: isinstance(m, _WATCHED), **options) as recording:
        for _ in range(16):
            optimizer.zero_grad()
            with recording.batch():
                value = loss(model, draw)
                value.backward()
            optimizer.step()
            losses.append(value.item())
    return ut.Run(folder), losses


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("ignore:.* sites were not recorded")  # a target network's
def test_a_network_that_learns_gives_no_alarm(name, seed, tmp_path):
    run, _ = trained(tmp_path / "r", name, seed, diagnose=2)
    findings = ut.diagnose(run)
    assert [(finding.cause, finding.sentence) for finding in findings if finding.severity != "info"] == []
    assert {finding.cause for finding in findings} <= INFORMATIONS.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.filterwarnings("ignore:.* sites were not recorded")
def test_nor_does_it_without_a_watched_batch(name, tmp_path):
    run, _ = trained(tmp_path / "r", name, 0)
    alarms = [finding for finding in ut.diagnose(run) if finding.severity != "info"]
    assert [finding.sentence for finding in alarms if finding.cause != "unreached"] == []  # frozen ones are not told


def test_the_table_has_every_architecture():
    named = ["MLP", "CNN", "ResNet", "U-Net", "GPT", "BERT", "ViT", "VAE", "GAN", "LSTM", "GRU", "LoRA", "DQN"]
    assert all(any(name.startswith(word) for name in HEALTHY) for word in named)
