"""Findings from parameters: what the optimizer makes of them, with figures held to those computed by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from diagnosis import architectures as nets
from diagnosis import planted as networks
from undertow import diagnosis

pytestmark = pytest.mark.filterwarnings("ignore:.*sites were not recorded")  # what no optimizer steps, has no rows
RULES = ("optimizer", "learning-rate", "clipping", "weight-decay")
CAUSES = ("not-in-optimizer", "no-step", "learning-rate", "clipped", "weight-decay")


def trained(folder, model, optimizer, loss=nets.classify, steps=16, live=None, before_step=None, **options):
    """Train with parameters as sites; return the run."""
    draw = torch.Generator().manual_seed(0)
    options = {"sites": ["params"], "measures": ["norm"], "optimizer": optimizer} | options
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    with ut.record(folder, model, **options) as recording:
        for _ in range(steps):
            with recording.batch():
                model.zero_grad()
                loss(model, draw).backward()
            if before_step is not None:
                before_step(model)
            for one in optimizers:
                one.step()
        if live is not None:
            live += recording.check()
    return ut.Run(folder)


def test_the_other_causes_are_planted_elsewhere():
    planted = {cause for _, _, cause in PLANTED.values()} | {"no-step"}
    assert planted == set(CAUSES)
    assert planted.isdisjoint(cause for row in networks.PLANTED for cause in row.causes)


def of_learning(findings):
    return {finding.cause: finding for finding in findings if finding.cause in CAUSES}


def mlp():
    torch.manual_seed(0)
    return nets.MLP()


def sgd(model, lr=0.01, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


def adamw(model, lr=1e-3, **options):
    return torch.optim.AdamW(model.parameters(), lr, **options)


def clip(norm):
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), norm)


PLANTED = {
    "one layer left out": (
        lambda m: torch.optim.SGD([*m[0].parameters(), *m[4].parameters()], 0.01),
        {},
        "not-in-optimizer",
    ),
    "a learning rate of 3 with Adam": (lambda m: torch.optim.Adam(m.parameters(), 3.0), {}, "learning-rate"),
    "a learning rate of 1e-9": (lambda m: sgd(m, 1e-9), {}, "learning-rate"),
    "a learning rate of 0": (lambda m: sgd(m, 0.0), {}, "learning-rate"),
    "clipped to a thousandth": (sgd, {"before_step": clip(1e-4)}, "clipped"),
    "decay a thousand times the gradient": (lambda m: sgd(m, 1e-3, weight_decay=50.0), {}, "weight-decay"),
    "decoupled decay": (lambda m: adamw(m, 1e-3, weight_decay=500.0), {}, "weight-decay"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_of_learning_is_found_and_while_it_trains_too(name, tmp_path):
    make, options, cause = PLANTED[name]
    model, live = mlp(), []
    run = trained(tmp_path, model, make(model), live=live, **options)
    findings = of_learning(ut.diagnose(run))
    assert findings[cause].severity in (("info",) if cause == "clipped" else ("warning", "error"))
    assert set(findings) <= {cause} | ({"learning-rate"} if cause in ("weight-decay", "clipped") else set())
    assert {"predicted", "observed"} <= findings[cause].evidence.keys()
    assert findings[cause].sentence.endswith(".")
    assert findings[cause].remedy.endswith(".")
    told = {f.cause: (f.severity, f.sites, f.sentence) for f in live if f.cause in CAUSES}
    assert told == {c: (f.severity, f.sites, f.sentence) for c, f in findings.items()}


def test_a_forgotten_step_is_an_error_and_one_of_two_a_warning(tmp_path):
    def run(folder, stepping):
        torch.manual_seed(0)
        model, draw = nets.GAN(), torch.Generator().manual_seed(0)
        optimizers = [sgd(model.generator), sgd(model.discriminator)]
        with ut.record(folder, model, sites="linear, params", measures=["norm"], optimizer=optimizers) as recording:
            for _ in range(10):
                with recording.batch():
                    model.zero_grad()
                    nets.play(model, draw).backward()
                for number in stepping:
                    optimizers[number].step()
        return of_learning(ut.diagnose(ut.Run(folder)))["no-step"]

    one, none = run(tmp_path / "one", [0]), run(tmp_path / "none", [])
    assert (one.severity, none.severity) == ("warning", "error")
    assert set(one.sites) == {f"discriminator.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert one.evidence["optimizers"] == [1]
    assert len(none.sites) == 12
    assert "optimizer.step()" in none.remedy


def test_the_ratio_and_the_share_are_those_computed_by_hand(tmp_path):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.5)
    draw, ratios, norms = torch.Generator().manual_seed(0), {}, []
    with ut.record(tmp_path, model, sites="params", measures=["norm"], optimizer=optimizer) as recording:
        for number in range(12):
            with recording.batch():
                model.zero_grad()
                nets.classify(model, draw).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.25)))
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            ratios[number] = {
                name: float((p.detach() - before[name]).norm() / before[name].norm())
                for name, p in model.named_parameters()
                if p.ndim > 1
            }
    findings = of_learning(ut.diagnose(ut.Run(tmp_path)))
    largest = max(ratios.values(), key=lambda of_step: sorted(of_step.values())[1])
    assert findings["learning-rate"].evidence["ratios"] == pytest.approx(largest, rel=1e-4)
    assert findings["learning-rate"].evidence["observed"] == pytest.approx(sorted(largest.values())[1], rel=1e-4)
    clipped = [norm for norm in norms if norm > 0.25 * 1.001]
    assert findings["clipped"].evidence["observed"] == pytest.approx(len(clipped) / 12)
    factor = torch.tensor([0.25 / norm for norm in clipped], dtype=torch.double).quantile(0.5)
    assert findings["clipped"].evidence["factor"] == pytest.approx(float(factor), rel=1e-4)


def test_a_look_at_the_findings_loses_no_step_that_follows_its_batch(tmp_path):
    rows = {}
    for name, options in (("plain", {}), ("told", {"on_finding": lambda finding: None, "every": 1})):
        model = mlp()
        run = trained(tmp_path / name, model, sgd(model), steps=5, **options)
        rows[name] = (run.table("steps").num_rows, run.table("norm").num_rows)
    assert rows["told"] == rows["plain"]
    assert rows["plain"][0] == 5


def test_a_fault_of_learning_is_told_while_it_trains(tmp_path):
    model, seen = mlp(), []
    trained(tmp_path, model, sgd(model, 1e-9), steps=24, on_finding=seen.append, every=10)
    assert [finding.cause for finding in seen if finding.severity != "info"] == ["learning-rate"]


@pytest.mark.parametrize("measure", ["norm", "moments", "channel-norm"])
def test_any_measure_that_knows_the_norm_will_do(measure, tmp_path):
    model = mlp()
    run = trained(tmp_path, model, torch.optim.Adam(model.parameters(), 3.0), measures=[measure])
    assert of_learning(ut.diagnose(run))["learning-rate"].severity == "warning"


def test_without_parameters_the_rules_say_what_to_record(tmp_path):
    model = mlp()
    with ut.record(tmp_path, model, sites="linear") as recording, recording.batch():
        F.cross_entropy(model(torch.randn(8, 16)), torch.arange(8) % 5).backward()
    checked = ut.diagnose(ut.Run(tmp_path)).checked
    for rule in RULES:
        assert checked[rule].startswith('not checked: record parameters: sites="params"')


@pytest.mark.parametrize("rule", RULES)
def test_with_a_rule_switched_off_its_rows_fail(rule, tmp_path, monkeypatch):
    runs = {}
    for name, (make, options, _) in PLANTED.items():
        model = mlp()
        runs[name] = trained(tmp_path / str(len(runs)), model, make(model), **options)
    monkeypatch.setattr(diagnosis, "RULES", {n: f for n, f in diagnosis.RULES.items() if n != rule})
    assert [name for name, run in runs.items() if PLANTED[name][2] not in of_learning(ut.diagnose(run))]


HEALTHY = {name: row for name, row in nets.HEALTHY.items() if name not in ("DQN", "LoRA on GPT")}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("make", [adamw, lambda m: sgd(m, 0.05, momentum=0.9, weight_decay=5e-4)], ids=["AdamW", "SGD"])
def test_a_network_that_learns_gives_no_alarm_of_learning(name, make, tmp_path):
    torch.manual_seed(0)
    build, loss = HEALTHY[name]
    model = build()
    run = trained(tmp_path, model, make(model), loss=loss, before_step=clip(1.0))
    findings = ut.diagnose(run)
    alarms = [(f.cause, f.sentence) for f in findings if f.severity != "info"]
    assert alarms == []
    assert all(math.isfinite(f.evidence["observed"]) for f in of_learning(findings).values())
