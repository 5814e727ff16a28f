"""Every awkward network, every rule and every way, against the independent twin, to the last bit."""

import pytest
import torch

import undertow as ut
from frameworks.torch.networks import AWKWARD, SMOOTH, Network
from frameworks.torch.references import reference

RULES = ("gradient", "deconvnet", "guided")
pytestmark = pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")


def own_guided(g, local):
    return local(ut.rules.relu(g))


def own_mixture(g, local):
    """Ask for `local` twice and mix: nothing that a fast path could stand in for."""
    return local(ut.rules.relu(g)) - 0.5 * local(ut.rules.relu(-g))


def equal(a, b) -> bool:
    a, b = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", [*RULES, own_guided, own_mixture])
@pytest.mark.parametrize("activations", ["relu-like", "all"])
@pytest.mark.parametrize("network", AWKWARD + SMOOTH, ids=str)
def test_graph_equals_the_twin(network: Network, activations: str, rule):
    wanted = network.rewired if activations == "relu-like" or network.rewired_all is None else network.rewired_all
    model, x = network.build()
    if wanted == 0 and rule != "gradient":
        with pytest.raises(ut.RuleError, match="found no activation to rewire"):
            ut.explain(model, x, rule=rule, target=1, activations=activations)
        return
    values, calls = reference(*(network.twin or network.build)(), 1, rule, activations)
    a = ut.explain(model, x, rule=rule, target=1, activations=activations)
    assert equal(a.values, values)
    assert a.rewired == (0 if rule == "gradient" else wanted)
    assert calls == wanted


@pytest.mark.parametrize("through", ["swap", "hook"])
@pytest.mark.parametrize("rule", ["deconvnet", "guided", own_mixture])
@pytest.mark.parametrize("network", [n for n in AWKWARD if n.rewired], ids=str)
def test_swap_and_hook_agree_or_say_what_they_missed(network: Network, rule, through: str):
    model, x = network.build()
    if not network.swap:
        with pytest.raises(ut.RuleError, match=r"missed|needs an nn.Module|could not copy|cannot see into"):
            ut.explain(model, x, rule=rule, target=1, through=through)
        return
    values, _ = reference(*(network.twin or network.build)(), 1, rule)
    a = ut.explain(model, x, rule=rule, target=1, through=through)
    assert equal(a.values, values)
    assert a.rewired == network.rewired
