"""Rules on arrays of any framework, against the paper's own figure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import undertow as ut
from undertow import rules

KNOWN = json.loads(Path(__file__).with_name("vectors").joinpath("known_answers.json").read_text())
FIGURE = KNOWN["springenberg_2014_figure_1"]


@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_figure_1_of_springenberg_in_numpy_and_torch(rule):
    x, g, wanted = (np.array(FIGURE[name], float) for name in ("forward_input", "gradient_above", rule))
    assert np.array_equal(rules.RULES[rule](g, lambda h: h * (x > 0)), wanted)
    a = ut.explain(torch.relu, torch.tensor(x)[None], rule=rule, target=lambda y: (y * torch.tensor(g)).sum((1, 2)))
    assert np.array_equal(a.numpy()[0], wanted)


@pytest.mark.parametrize("through", ["graph", "swap", "hook"])
@pytest.mark.parametrize("rule", ["gradient", "deconvnet", "guided"])
def test_one_convolution(rule, through):
    known = KNOWN["one_convolution"]
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        torch.nn.ReLU(inplace=True),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
        torch.nn.ReLU(inplace=True),
    )
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.copy_(torch.tensor([-50.0, -75.0]))
        net[3].weight.copy_(torch.tensor([1.0, 1, 1, 1, 1, -1, -1, -1]).expand(4, 8))
        net[3].bias.zero_()
    a = ut.explain(net.eval(), torch.arange(16.0).view(1, 1, 4, 4), rule=rule, target=known["target"], through=through)
    assert a.values[0, 0].tolist() == known[rule]
    assert a.rewired == (0 if rule == "gradient" else 2)


def test_guided_beyond_a_plateau_and_on_a_negative_slope():
    """What `undertow.rules` writes down in its table."""
    x = torch.tensor([[-1.0, 3.0, 7.0]])
    for g in (2.0, -2.0):
        weights = torch.full((3,), g)
        maps = {
            name: ut.explain(f, x, rule="guided", target=lambda y, w=weights: (y * w).sum(1)).values[0].tolist()
            for name, f in {
                "relu6": torch.nn.functional.relu6,
                "leaky": lambda v: torch.nn.functional.leaky_relu(v, 0.25),
            }.items()
        }
        up = max(g, 0.0)
        assert maps == {"relu6": [0.0, up, 0.0], "leaky": [0.25 * up, up, up]}


def test_nan_is_not_swallowed():
    assert np.isnan(rules.relu(np.array([np.nan]))).all()
    assert torch.relu(torch.tensor([float("nan")])).isnan().all()


def test_unknown_rule_is_named():
    with pytest.raises(ut.InputError, match="did you mean guided"):
        ut.explain(torch.relu, torch.ones(1, 2), rule="giuded")
