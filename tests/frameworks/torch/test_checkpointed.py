"""Rules that are tables on checkpointed models: the same map, to the bit, as of the model without."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import undertow as ut
from frameworks.torch.real_models import built, drawn
from frameworks.torch.test_lrp import Dense, Plain, Residual, ready
from frameworks.torch.test_relevance import MODELS, Around, perturbed

TABLES = sorted(ut.rules.TABLES)
TARGETS = [[0, 1], [2, 0]]
without_reentrance = partial(checkpoint, use_reentrant=False)


def whole(net):
    return lambda x: without_reentrance(net, x)


def nested(net):
    return lambda x: without_reentrance(lambda y: without_reentrance(net, y), x)


class Counted(nn.Module):
    """Counts how often its module runs."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("rule", TABLES)
@pytest.mark.parametrize(
    ("make", "size", "how"), [(Plain, 10, whole), (Residual, 8, nested), (Dense, 8, nested), (Plain, 10, nested)]
)
def test_every_table(make, size, how, rule, frozen):
    net, x = ready(make).requires_grad_(not frozen), drawn(2, 3, size, size)
    wanted = ut.explain(net, x, rule=rule, target=TARGETS)
    a = ut.explain(how(net), x, rule=rule, target=TARGETS)
    assert torch.equal(a.values, wanted.values)
    assert a.rewired == wanted.rewired


def without_dropout(model):
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
    return model


def switched_on(model):
    """A library's own switch; that of transformers acts in training mode alone."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
        return model
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})
    return without_dropout(model).train()


@pytest.mark.parametrize("rule", ["attnlrp", "cp-lrp", "deeplift", "attention-rollout", "attention-gradient"])
@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "BERT", "GPT-2, eager", "Llama", "T5"])
@pytest.mark.filterwarnings("ignore:.*left alone on the way:undertow.UndertowWarning")
def test_models_of_libraries_by_their_own_switch(name, rule):
    model, x, _, target = MODELS[name]()
    if rule.startswith("attention") and name in ("timm Swin", "T5"):  # in windows, or across two sequences
        with pytest.raises(ut.RuleError):
            ut.explain(switched_on(perturbed(model)), x, rule=rule, target=target)
        return
    wanted = ut.explain(perturbed(model), x, rule=rule, target=target).values
    values = ut.explain(switched_on(model), x, rule=rule, target=target).values
    if not isinstance(x, torch.Tensor):
        wanted, values = wanted[next(iter(x))], values[next(iter(x))]
    # torch may take another kernel of attention in training mode
    assert (values - wanted).norm() <= (1e-14 * wanted.norm() if name == "T5" else 0)


@pytest.mark.parametrize("rule", ["attnlrp", "lrp:epsilon-plus-flat"])
def test_segments_of_a_sequence_run_once_more_for_the_rule(rule):
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.SiLU()) for _ in range(4)]
    net, x = built(lambda: nn.Sequential(*(Counted(layer) for layer in layers))), drawn(2, 6)
    wanted = ut.explain(net, x, rule=rule, target=TARGETS).values
    for part in net:
        part.runs = 0
    a = ut.explain(lambda v: checkpoint_sequential(net, 2, v, use_reentrant=False), x, rule=rule, target=TARGETS)
    assert torch.equal(a.values, wanted)
    assert [part.runs for part in net] == [4, 4, 1, 1]  # forward, once for the rule, and once for each target


def test_a_row_may_call_local_twice_and_read_at_will():
    def split(g, local, op):
        assert op.input.shape == op.output.shape
        return local(g.clamp(min=0)) - 0.5 * local(g.clamp(max=0)) + 0.25 * local(g)

    net, x, rule = built(lambda: Around(nn.functional.gelu)), drawn(2, 6), ut.Rule({"smooth": split, "relu": split})
    assert torch.equal(
        ut.explain(whole(net), x, rule=rule, target=1).values, ut.explain(net, x, rule=rule, target=1).values
    )


def test_nodes_that_are_told_by_what_they_saved_leave_it_to_the_backward_pass():
    def net(x):
        zero, power = torch.zeros_like(x), torch.full_like(x, 2.0)
        return (torch.maximum(x, zero) ** power).clamp(min=zero) + torch.addcmul(x, x, x.sigmoid())

    for rule in ("attnlrp", "cp-lrp", "gradient"):
        wanted = ut.explain(net, drawn(2, 6), rule=rule, target=1).values
        assert torch.equal(ut.explain(whole(net), drawn(2, 6), rule=rule, target=1).values, wanted)


@pytest.mark.parametrize("rule", ["attnlrp", "lrp:epsilon-gamma-box"])
def test_threads_do_not_meet(rule):
    net, x = ready(Plain), drawn(2, 3, 10, 10)
    wanted = [ut.explain(net, x, rule=rule, target=k).values for k in range(3)]
    with ThreadPoolExecutor(3) as pool:
        maps = list(pool.map(lambda k: ut.explain(whole(net), x, rule=rule, target=k % 3).values, range(9)))
    assert all(torch.equal(values, wanted[k % 3]) for k, values in enumerate(maps))


def test_under_autocast_segments_are_rounded_alike():
    net, x = ready(Plain).float(), drawn(2, 3, 10, 10).float()

    def run(f, v):
        with torch.autocast("cpu", torch.bfloat16):
            return f(v)

    for rule in ("attnlrp", "lrp:epsilon-plus-flat"):
        wanted = ut.explain(partial(run, net), x, rule=rule, target=1).values
        assert torch.equal(ut.explain(partial(run, whole(net)), x, rule=rule, target=1).values, wanted)


def test_reentrant_checkpointing_is_refused():
    net = built(lambda: Around(nn.functional.gelu))
    with pytest.raises(ut.RuleError, match="use_reentrant=False"):
        ut.explain(lambda x: checkpoint(net, x, use_reentrant=True), drawn(2, 6), rule="attnlrp")


def test_selective_checkpointing_which_lets_a_segment_run_once_is_refused():
    net = built(lambda: Around(nn.functional.gelu))

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return without_reentrance(net, x, context_fn=partial(create_selective_checkpoint_contexts, policy))

    with pytest.raises(ut.RuleError, match="switch checkpointing off"):
        ut.explain(run, drawn(2, 6), rule="attnlrp")
