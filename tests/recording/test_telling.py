"""Findings while it trains: the same as afterwards, each told once, to whom was asked."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut
from undertow.diagnosis.channels import agreements
from undertow.diagnosis.evidence import Evidence
from undertow.diagnosis.live import MAX_BATCHES, Live


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def train(recording, model, batches, broken_from=10**9, scale=1.0):
    for number in range(batches):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        x[0, 0] = float("nan") if number >= broken_from else x[0, 0]
        with recording.batch():
            (scale * model(x).square().sum()).backward()


def test_a_function_is_given_each_finding_once_and_soon(tmp_path):
    seen, model = [], network()
    recording = ut.record(
        tmp_path, model, sites="linear", on_finding=lambda f: seen.append((recording.batches, f)), every=5
    )
    with recording:
        train(recording, model, 20, broken_from=7)
    assert [(n, finding.cause, finding.severity) for n, finding in seen] == [(11, "non-finite", "error")]
    assert [finding.cause for finding in ut.diagnose(ut.Run(tmp_path)) if finding.severity == "error"] == ["non-finite"]


def test_nothing_arrives_is_told_after_the_first_batch(tmp_path):
    seen = []
    model = network()
    with ut.record(tmp_path, model, sites="linear", on_finding=seen.append) as recording:
        train(recording, model, 3, scale=0.0)
    assert [finding.cause for finding in seen] == ["no-gradient"]


def test_raise_stops_and_keeps_the_batch(tmp_path):
    model = network()
    with (
        pytest.raises(ut.FindingError, match="non-finite: In batch 2") as excinfo,
        ut.record(tmp_path, model, sites="linear", on_finding="raise", every=1) as recording,
    ):
        train(recording, model, 6, broken_from=2)
    assert isinstance(excinfo.value, ut.UndertowError)
    assert [finding.cause for finding in excinfo.value.findings] == ["non-finite"]
    assert "\n" not in str(excinfo.value)
    run = ut.Run(tmp_path)
    assert not run.finished
    assert run.table("batches").num_rows == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_log_speaks_at_the_level_of_the_finding_and_info_does_not_raise(tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    for name, how in (("log", "log"), ("raise", "raise")):
        with (
            caplog.at_level(logging.INFO, "undertow"),
            ut.record(tmp_path / name, model, sites="conv", on_finding=how) as recording,
            recording.batch(),
        ):
            model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert caplog.records[0].getMessage().startswith("pooling: ")


def test_check_is_for_between_batches(tmp_path):
    model = network()
    with ut.record(tmp_path, model, sites="linear", diagnose=1) as recording:
        train(recording, model, 1)
        assert recording.check().checked["arrival"] == "checked"
        with recording.batch():
            with pytest.raises(ut.InputError, match="leave it before"):
                recording.check()
            model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(ut.InputError, match="not open"):
        recording.check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_finding": "mail"}, "on_finding='mail'"),
        ({"on_finding": "log", "every": 0}, "every=0"),
        ({"every": True}, "every"),
    ],
)
def test_what_cannot_be_used_is_refused(options, words, tmp_path):
    with pytest.raises(ut.InputError, match=words):
        ut.record(tmp_path, network(), sites="linear", **options)


@pytest.mark.parametrize("measures", ["moments", "channel-norm", "histogram"])
def test_the_course_in_memory_is_that_of_the_run(measures, tmp_path):
    model = network()
    with ut.record(tmp_path, model, sites="linear", measures=[measures, "zero-fraction", "channel-sums"]) as recording:
        train(recording, model, 9)
        recording.check()
        live = recording._writer.live
    run = ut.Run(tmp_path)
    in_memory, on_disk = live.evidence(run), Evidence(run)
    assert list(in_memory.course) == ["0", "2"]
    for site in ("0", "2"):
        np.testing.assert_allclose(in_memory.course[site], on_disk.course[site], rtol=1e-6)
        assert in_memory.zeros[site] == on_disk.zeros[site]
    assert agreements(in_memory) == agreements(on_disk)


def test_memory_is_bounded():
    live = Live()
    site = {"site": "a", "phase": "backward", "dtype": "float32", "call": 0}
    for number in range(MAX_BATCHES + 300):
        key = {"epoch": 0, "batch": number, "rank": 0}
        live.begin(key, [{"step": 0}])
        live.add({**site, **key}, {"moments": {"count": [4], "mean": [0.0], "m2": [float(number)]}})
    assert len(live.course["a"]) == MAX_BATCHES
    assert len(live.watched) == 8
    assert next(iter(live.course["a"])) == (0, 300)


def test_what_kept_tensors_take_is_told_after_the_first_batch(tmp_path, caplog):
    caplog.set_level(logging.INFO, "undertow")
    model = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 3))
    with ut.record(tmp_path / "norms", model, sites="linear", measures="norm") as recording:
        train(recording, model, 2)
    assert not caplog.records
    with ut.record(tmp_path / "kept", model, sites="linear", measures="keep") as recording:
        train(recording, model, 1)
        [told] = caplog.messages
        train(recording, model, 2)
    assert caplog.messages == [told]
    kept = sum(array.nbytes for _, array in ut.Run(tmp_path / "kept").tensors(batch=0))
    assert float(told.removeprefix("tensors take about ").partition(" MB")[0]) * 1e6 == pytest.approx(kept, rel=0.02)
    assert "the disk has room for" in told
