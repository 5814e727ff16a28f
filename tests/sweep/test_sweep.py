"""A sweep: every image once, whatever the engine, the interruptions and the failures."""

import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

import undertow as ut
from sweep.photographs import NETS, classifier, crops, network
from undertow import rules
from undertow.classifier import Classifier
from undertow.errors import InputError, ModelError, RunError, TargetError
from undertow.recording.photographs import record_photographs
from undertow.sweep.folder import write_json
from undertow.sweep.sources import source_of

COUNT = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    crops(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def small():
    return classifier()


def explained(folder, small, out, **options):
    options = {"rule": ["guided", "gradient"], "shard_size": 8, "batch_size": 3, "device": "cpu"} | options
    return ut.sweep.explain(folder, small, out, **options)


@pytest.fixture(scope="module")
def whole(folder, small, tmp_path_factory):
    return explained(folder, small, tmp_path_factory.mktemp("out") / "maps")


def test_each_map_is_that_of_its_image_alone(whole, folder, small):
    assert len(whole) == len(whole.names) == COUNT
    for name in whole.names:
        for rule in ("guided", "gradient"):
            alone = ut.explain(small, small.prepare(folder / name), rule=rule)
            np.testing.assert_allclose(whole.map(name, rule=rule), alone.numpy()[0], rtol=1e-4, atol=1e-6)


def test_the_table_has_a_row_for_each_map(whole, folder, small):
    rows = whole.table().to_pylist()
    assert [(row["name"], row["rule"]) for row in rows] == [(n, r) for n in whole.names for r in ("guided", "gradient")]
    for row in rows[::5]:
        scores = small.module(small.prepare(folder / row["name"]))[0].detach()
        assert (row["target"], row["class_name"]) == (int(scores.argmax()), "abcdef"[int(scores.argmax())])
        assert row["score"] == pytest.approx(float(scores.max()), rel=1e-5)
        assert (row["rewired"], row["skipped"]) == ((2 if row["rule"] == "guided" else 0), "{}")
    glob = f"{whole.folder}/parts/*/index.parquet"
    assert duckdb.sql(f"SELECT count(*), max(\"offset\") FROM '{glob}'").fetchall() == [(2 * COUNT, 7)]
    assert [row["index"] for row, _ in whole.maps("guided")] == list(range(COUNT))
    for (row, values), name in zip(whole.maps("gradient"), whole.names, strict=True):
        assert np.array_equal(values, whole.map(name, rule="gradient")), row


def test_several_targets_are_maps_of_their_own(folder, small, tmp_path):
    sweep = explained(folder, small, tmp_path, rule="guided", target=["b", 4], limit=5)
    for name in sweep.names:
        alone = ut.explain(small, small.prepare(folder / name), rule="guided", target=[[1, 4]]).numpy()[0]
        for k, class_id in enumerate((1, 4)):
            np.testing.assert_allclose(sweep.map(name, target=class_id), alone[k], rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"several maps of a/0000.png; choose one of: rule='guided' target=1, "):
        sweep.map("a/0000.png")
    with pytest.raises(InputError, match=r"no map of"):
        sweep.map("a/0000.png", target=3)


def test_a_map_is_found_by_name_or_position(whole):
    assert np.array_equal(whole.map(3, "guided"), whole.map(whole.names[3], "guided"))
    with pytest.raises(InputError, match=r"a/00000.png is not among the 22 images; did you mean a/0000.png"):
        whole.map("a/00000.png")
    with pytest.raises(InputError, match=r"no image 22 among 22"):
        whole.map(22)
    with pytest.raises(InputError, match=r"is a run: use"):
        ut.Sweep.table(type("Recorded", (), {"task": "record"})())


def test_the_same_command_goes_on_and_does_nothing_twice(whole, folder, small):
    parts = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*") if path.is_file()}
    again = explained(folder, small, whole.folder)
    assert again.digest() == whole.digest()
    assert {path: path.stat().st_mtime_ns for path in parts} == parts


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", range(1, COUNT // 3 + 1))
def test_an_interruption_at_any_batch_loses_nothing_that_was_published(whole, folder, small, tmp_path, after):
    calls = iter(range(after))

    def advance(done, failed):
        if next(calls, None) is None:
            raise Stop

    with pytest.raises(Stop):
        explained(folder, small, tmp_path, advance=advance)
    half = ut.Sweep(tmp_path)
    assert len(half.done) == min(after // 3, 2)
    assert half.missing == half.names[8 * len(half.done) :]
    assert half.status().missing == len(half.missing)
    assert not list((tmp_path / "parts").glob(".*"))
    if half.missing:
        with pytest.raises(RunError, match=r"is not done yet"):
            half.map(COUNT - 1, "guided")
        with pytest.raises(RunError, match=r"shards of .* are missing"):
            half.digest()
    assert explained(folder, small, tmp_path).digest() == whole.digest()


def test_what_a_killed_process_left_half_written_is_cleared(whole, folder, small, tmp_path):
    (tmp_path / "names.parquet").write_bytes(b"of a sweep that never began")
    assert explained(folder, small, tmp_path).digest() == whole.digest()
    left = tmp_path / "parts" / ".undertow-0123-000001"
    left.mkdir()
    (left / "guided.safetensors").write_bytes(b"half")
    assert explained(folder, small, tmp_path).digest() == whole.digest()
    assert not left.exists()


def test_a_sweep_of_something_else_is_refused(whole, folder, small, tmp_path):
    with pytest.raises(RunError, match=r"settings rules \['guided', 'gradient'\], not \['guided'\]; choose another"):
        explained(folder, small, whole.folder, rule="guided")
    with pytest.raises(RunError, match=r"source count 22, not 5"):
        explained(folder, small, whole.folder, limit=5)
    with pytest.raises(RunError, match=r"settings batch_size 3, not 4"):
        explained(folder, small, whole.folder, batch_size=4)
    assert explained(folder, small, whole.folder, batch_size=None, shard_size=None).digest() == whole.digest()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds thesis.tex and is no sweep"):
        explained(folder, small, tmp_path)
    with pytest.raises(RunError, match=r"is no sweep: it holds no sweep.json"):
        ut.Sweep(tmp_path)


def test_two_sweeps_do_not_write_into_one_folder(whole, folder, small):
    def advance(done, failed):
        raise AssertionError

    def begin(done, count):
        with pytest.raises(RunError, match=r"another sweep writes into .* at this moment"):
            explained(folder, small, whole.folder)

    assert explained(folder, small, whole.folder, begin=begin, advance=advance).digest() == whole.digest()


def test_a_folder_that_cannot_be_written_to_is_named(folder, small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write into .*file"):
        explained(folder, small, tmp_path / "file")
    if os.path.isdir("/proc"):
        with pytest.raises(RunError, match=r"cannot write into /proc/maps"):
            explained(folder, small, "/proc/maps")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(locked, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(RunError, match=r"locked"):
        explained(folder, small, locked)


def test_a_failed_image_is_written_down_with_its_reason(folder, small, tmp_path):
    photographs = tmp_path / "photographs"
    names = crops(photographs, 12)
    (photographs / names[3]).write_bytes(b"no photograph")
    (photographs / names[9]).unlink()
    (photographs / "list.txt").write_text("\n".join(names))
    sweep = explained(photographs / "list.txt", small, tmp_path / "out")
    assert [(f.index, f.name) for f in sweep.failed] == [(3, names[3]), (9, names[9])]
    assert "is not a photograph" in sweep.failed[0].error
    assert "does not exist" in sweep.failed[1].error
    status = sweep.status()
    assert (status.done, status.failed, status.missing, status.finished) == (10, 2, 0, True)
    with pytest.raises(RunError, match=r"could not be done: .* does not exist"):
        sweep.map(names[9], "guided")
    np.testing.assert_allclose(
        sweep.map(names[10], "gradient"),
        ut.explain(small, small.prepare(photographs / names[10]), rule="gradient").numpy()[0],
        rtol=1e-4,
        atol=1e-6,
    )
    assert sweep.check().whole


def test_too_many_failures_end_a_sweep_that_can_go_on(folder, small, tmp_path):
    photographs = tmp_path / "photographs"
    names = crops(photographs, 16)
    for name in (*names[9:11], names[13]):
        (photographs / name).write_bytes(b"no photograph")
    with pytest.raises(RunError, match=r"3 images have failed, more than 2; .* a larger --max-failures goes on"):
        explained(photographs, small, tmp_path / "out", max_failures=2)
    assert ut.Sweep(tmp_path / "out").done == [0]
    sweep = explained(photographs, small, tmp_path / "out", max_failures=3)
    assert (sweep.status().failed, sweep.status().missing) == (3, 0)


class NoNumber(torch.nn.Module):
    """Gives no number for an image whose first value is over 0.9."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        scores = self.inner(x)
        return torch.where(x[:, :1, 0, 0] > 0.9, torch.nan, 1.0) * scores


def test_an_image_that_cannot_be_computed_fails_alone(tmp_path):
    items = [np.full((3, 20, 20), 0.01 * n, np.float32) for n in range(12)]
    items[4][:] = 1
    sweep = ut.sweep.explain(items, NoNumber().eval(), tmp_path, batch_size=5, shard_size=10)
    assert [failure.name for failure in sweep.failed] == ["4"]
    assert [row["name"] for row in sweep.table().to_pylist()] == [str(n) for n in range(12) if n != 4]


def test_a_network_that_can_compute_nothing_ends_the_sweep_at_once(tmp_path):
    items = [np.ones((3, 20, 20), np.float32)] * 30
    with pytest.raises(ModelError, match=r"none of the first 10 images could be done; 0: "):
        ut.sweep.explain(items, NoNumber().eval(), tmp_path, batch_size=5)
    assert ut.Sweep(tmp_path).done == []


class Greedy(torch.nn.Module):
    """Takes two images at most, as where memory is scarce."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_a_batch_that_memory_does_not_suffice_for_is_halved(tmp_path):
    items = [np.full((3, 20, 20), 0.1 * n, np.float32) for n in range(9)]
    with pytest.warns(ut.UndertowWarning, match=r"memory did not suffice for 8 images at once; 2 were taken"):
        sweep = ut.sweep.explain(items, Greedy().eval(), tmp_path / "a", batch_size=8)
    plain = ut.sweep.explain(items, network(), tmp_path / "b", batch_size=2)
    for n in range(9):
        np.testing.assert_allclose(sweep.map(n), plain.map(n), rtol=1e-4, atol=1e-6)


def test_remarks_are_told_once(tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.GELU(), torch.nn.ReLU())
    items = [np.full((3, 2, 2), 0.1 * n, np.float32) for n in range(9)]
    with pytest.warns(ut.UndertowWarning, match=r"GeluBackward0 x1") as caught:
        ut.sweep.explain(items, net.eval(), tmp_path, batch_size=2)
    assert len(caught) == 1


def test_a_rule_of_ones_own_and_names_that_are_no_text(small, tmp_path):
    def damped(g, local):
        return 0.5 * rules.guided(g, local)

    names = crops(tmp_path / "photographs", 2)
    odd = os.fsdecode(b"\xff\n.png")
    os.rename(tmp_path / "photographs" / names[0], tmp_path / "photographs" / odd)
    sweep = ut.sweep.explain(tmp_path / "photographs", small, tmp_path / "out", rule=[damped, "guided"])
    assert sweep.map(odd, "damped").shape == (3, 20, 20)
    np.testing.assert_allclose(4 * sweep.map(odd, "damped"), sweep.map(odd, "guided"), rtol=1e-5)
    again = ut.sweep.explain(tmp_path / "photographs", small, tmp_path / "out", rule=[damped, "guided"])
    assert again.digest() == sweep.digest()


def test_rules_of_one_name_are_refused(small, folder, tmp_path):
    with pytest.raises(InputError, match=r"two rules have the name '<lambda>', by which their maps are kept"):
        explained(folder, small, tmp_path, rule=[lambda g, local: local(g), lambda g, local: local(-g)])


def test_a_sweep_that_is_written_is_not_repaired(whole, folder, small, tmp_path):
    sweep = explained(folder, small, tmp_path)
    path = tmp_path / "parts" / "000000" / "guided.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    def begin(done, count):
        with pytest.raises(RunError, match=r"another sweep writes into .* at this moment"):
            sweep.check(repair=True)

    explained(folder, small, tmp_path, begin=begin)
    assert sweep.check(repair=True).missing == 8
    assert explained(folder, small, tmp_path).digest() == whole.digest()


@pytest.mark.slow
def test_a_keras_network_is_swept_over_too(folder, tmp_path):
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.Input((20, 20, 3)), keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(6)])
    kera = Classifier("keras", model, classifier().preprocessing, tuple("abcdef"), "given", "0" * 64)
    sweep = ut.sweep.explain(folder, kera, tmp_path / "a", batch_size=3, limit=5, pictures=1)
    for name in sweep.names:
        alone = ut.explain(kera, kera.prepare(folder / name), rule="guided").numpy()[0]
        np.testing.assert_allclose(sweep.map(name), alone, rtol=1e-4, atol=1e-6)
    data = ut.sweep.explain(ut.images.Folder(folder, kera), kera, tmp_path / "b", batch_size=3, limit=5)
    assert all(np.array_equal(data.map(i), sweep.map(i)) for i in range(5))
    assert (tmp_path / "a" / "pictures" / "000000-a_0000" / "panel.png").exists()


@pytest.mark.parametrize("option", ["batch_size", "shard_size", "workers"])
def test_numbers_that_cannot_be_used(folder, small, tmp_path, option):
    with pytest.raises(InputError, match=f"{option}=0 must be a whole number of at least 1"):
        explained(folder, small, tmp_path, **{option: 0})


def test_engines_options_and_targets_that_there_are_not(folder, small, tmp_path):
    with pytest.raises(InputError, match=r"a sweep has no option 'worker'; did you mean workers"):
        explained(folder, small, tmp_path, worker=3)
    with pytest.raises(InputError, match=r"processes is an option of the engine ray, not of local"):
        explained(folder, small, tmp_path, processes=3)
    with pytest.raises(InputError, match=r"unknown engine 'rai'; did you mean ray"):
        explained(folder, small, tmp_path, engine="rai")
    with pytest.raises(TargetError, match=r"no class 'zebra' among 6"):
        explained(folder, small, tmp_path, target="zebra")
    with pytest.raises(InputError, match=r"--engine torchrun needs torchrun"):
        explained(folder, small, tmp_path, engine="torchrun")


def test_pictures_are_drawn_of_what_is_there_already(whole, folder, small):
    sweep = explained(folder, small, whole.folder, pictures=2)
    assert sorted(path.name for path in (whole.folder / "pictures").iterdir()) == ["000000-a_0000", "000001-a_0002"]
    picture = whole.folder / "pictures" / "000001-a_0002"
    assert {"panel.png", "result.json", "guided-overlay.png"} <= {path.name for path in picture.iterdir()}
    kept = ut.Attribution.load(picture / "guided.safetensors")
    assert np.array_equal(kept.values[0, 0], sweep.map("a/0002.png", "guided"))
    assert sweep.check().strangers == ()


def values_of(run, table, column):
    rows = run.table(table).to_pylist()
    return {(row["name"], row["site"]): np.array(row[column]) for row in rows}


def test_what_is_recorded_in_shards_is_a_run_and_that_of_one_process(folder, small, tmp_path):
    options = {"sites": "conv", "measures": ["channel-norm", "norm"]}
    sweep = ut.sweep.record(folder, small, tmp_path / "sweep", shard_size=8, batch_size=3, options=options)
    record_photographs(small, folder, tmp_path / "run", batch_size=4, **options)
    run, plain = sweep.run(), ut.Run(tmp_path / "run")
    assert run.check().whole
    assert [run.table("samples").num_rows, run.sites] == [COUNT, plain.sites]
    a, b = (values_of(r, "channel_norm", "values") for r in (run, plain))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-7)
    assert len(run.quantiles([0.5], of="norm")) == 2


def test_a_recording_goes_on_and_its_rows_are_the_same(folder, small, tmp_path):
    how = {"shard_size": 8, "batch_size": 3, "options": {"sites": "conv", "measures": ["histogram"]}}
    whole = ut.sweep.record(folder, small, tmp_path / "whole", **how)
    calls = iter(range(4))

    def advance(done, failed):
        if next(calls, None) is None:
            raise Stop

    with pytest.raises(Stop):
        ut.sweep.record(folder, small, tmp_path / "half", advance=advance, **how)
    half = ut.Sweep(tmp_path / "half")
    assert half.done == [0]
    with pytest.raises(RunError, match=r"is not finished; see: undertow status"):
        half.run()
    again = ut.sweep.record(folder, small, tmp_path / "half", **how)
    assert again.digest() == whole.digest()
    assert again.run().table("histogram").equals(whole.run().table("histogram"))


def test_a_damaged_part_is_taken_out_and_done_again(folder, small, tmp_path):
    how = {"shard_size": 8, "batch_size": 3, "options": {"sites": "conv"}}
    sweep = ut.sweep.record(folder, small, tmp_path, **how)
    digest = sweep.digest()
    path = next((tmp_path / "parts" / "000001" / "run" / "channel_norm").iterdir())
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    assert set(sweep.check().faults) == {1}
    assert "has changed since it was written" in sweep.check(repair=True).faults[1]
    assert (sweep.check().whole, sweep.check().missing) == (True, 8)
    assert ut.sweep.record(folder, small, tmp_path, **how).digest() == digest
    assert ut.Run(tmp_path).check().whole


def test_labels_are_the_folders_of_the_photographs(folder, small, tmp_path):
    sweep = ut.sweep.record(folder, small, tmp_path, objective="label", options={"sites": "conv", "measures": ["norm"]})
    rows = sweep.run().table("samples").to_pylist()
    assert {(Path(row["name"]).parts[0], row["class_name"]) for row in rows} == {("a", "a"), ("b", "b")}


@pytest.mark.slow
def test_trust_leaves_a_row_for_each_answer(folder, small, tmp_path):
    sweep = ut.sweep.trust(folder, small, tmp_path, rule=["guided", "gradient"], limit=2)
    rows = sweep.table().to_pylist()
    assert {(row["index"], row["rule"]) for row in rows} == {(i, r) for i in (0, 1) for r in ("guided", "gradient")}
    verdict = ut.trust(small.module, small.prepare(folder / sweep.names[1]), rule="guided", names=small.classes)
    of_one = {row["question"]: row for row in rows if (row["index"], row["rule"]) == (1, "guided")}
    assert of_one["verdict"]["sentence"] == verdict.sentence
    for question, answer in verdict.answers.items():
        assert (of_one[question]["answer"], of_one[question]["value"]) == (answer.level, pytest.approx(answer.value))


def test_every_source_gives_the_same_maps(whole, folder, small, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(str(folder / name) for name in whole.names))
    sweep = explained(tmp_path / "list.txt", small, tmp_path / "out")
    assert all(np.array_equal(sweep.map(i, "guided"), whole.map(i, "guided")) for i in range(COUNT))
    data = ut.images.Folder(folder, small)
    sweep = explained(data, small, tmp_path / "data")
    assert sweep.names == whole.names
    assert all(np.array_equal(sweep.map(i, "guided"), whole.map(i, "guided")) for i in range(COUNT))
    assert source_of(data).where == "Folder"


STEPS = ["batch norm folded", "channels last"]


def normed():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 16 * 16, 5)).eval()


def test_a_long_sweep_measures_once_whether_a_prepared_network_is_quicker(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    items = [generator.normal(size=(3, 20, 20)).astype(np.float32) for _ in range(9)]
    plain = ut.sweep.explain(items, normed(), tmp_path / "plain", batch_size=2, shard_size=4, fast="off")
    assert plain.prepared == []
    monkeypatch.setattr("undertow.sweep.fast.FEWEST", 5)
    swept = ut.sweep.explain(items, normed(), tmp_path / "auto", batch_size=2, shard_size=4)
    assert [line.split(":")[0] for line in swept.prepared] == STEPS
    for i in range(9):
        np.testing.assert_allclose(swept.map(i), plain.map(i), rtol=1e-3, atol=1e-4)
    with pytest.raises(RunError, match=r"settings fast 'auto', not 'off'"):
        ut.sweep.explain(items, normed(), tmp_path / "auto", batch_size=2, shard_size=4, fast="off")
    with pytest.raises(InputError, match=r"fast='on' is neither 'auto' nor 'off'"):
        ut.sweep.explain(items, normed(), tmp_path / "on", fast="on")


def test_all_processes_go_by_the_choice_of_the_first(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    items = [generator.normal(size=(3, 20, 20)).astype(np.float32) for _ in range(9)]

    def begin(done, count):
        if not (out / "prepared.json").exists():
            write_json(out / "prepared.json", {"steps": STEPS, "trials": ["x"]}, new=True)

    digests = []
    for out in (tmp_path / "a", tmp_path / "b"):
        for limit_of_calls in (3, 99):
            calls = iter(range(limit_of_calls))

            def advance(done, failed, calls=calls):
                if next(calls, None) is None:
                    raise Stop

            with suppress(Stop):
                how = {"batch_size": 2, "shard_size": 4, "begin": begin, "advance": advance}
                swept = ut.sweep.explain(items, normed(), out, **how)
        digests.append(swept.digest())
    plain = ut.sweep.explain(items, normed(), tmp_path / "plain", batch_size=2, shard_size=4, fast="off")
    assert digests[0] == digests[1] != plain.digest()
    for i in range(9):
        np.testing.assert_allclose(swept.map(i), plain.map(i), rtol=1e-3, atol=1e-4)
    write_json(out / "prepared.json", {"steps": ["overclocked"], "trials": []}, new=False)
    for path in (out / "parts" / "000001").iterdir():
        path.unlink()
    (out / "parts" / "000001").rmdir()
    with pytest.raises(InputError, match=r"names a step that there is not: 'overclocked'"):
        ut.sweep.explain(items, normed(), out, batch_size=2, shard_size=4)


FULL = """
import resource, sys
from undertow.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_leaves_a_sweep_that_goes_on(folder, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    words = ["explain", str(folder), "--model", f"{tmp_path / 'nets.py'}:load", "--rule", "guided", "--engine", "local"]
    words += ["--shard-size", "5", "--batch-size", "3", "--out", str(tmp_path / "out")]
    full, wide = (
        subprocess.run([sys.executable, "-c", FULL, limit, *words], capture_output=True, text=True, timeout=200)
        for limit in ("15000", "1000000")  # a part of 5 maps has 24 kB, the last one, of 2, less
    )
    assert full.returncode == 2
    assert f"error: cannot write into {tmp_path / 'out'}: " in full.stderr
    assert "the parts that are there are whole, and the same command goes on from them" in full.stderr
    assert "Traceback" not in full.stderr
    assert wide.returncode == 0, wide.stderr
    sweep = ut.Sweep(tmp_path / "out")
    assert (sweep.check().whole, sweep.status().done) == (True, COUNT)
    assert not list((tmp_path / "out" / "parts").glob(".*"))
