"""A run's folder comes from anywhere: what is read is right or one error, and nothing outside the folder is touched."""

import json
import os
import shutil
import subprocess
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runs.damaging import answers, change_manifest, network, seal, small_run, without_checksums
from undertow.diagnosis import diagnose
from undertow.errors import InputError, RunError, UndertowError
from undertow.measures import MEASURES
from undertow.recording import record
from undertow.runs import Run, check, compare, parts
from undertow.runs.checksums import read_checksums
from undertow.runs.format import CLASSES, LATER, TYPES, known_columns, schema


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def part(run, table="histogram", number=0):
    return run / table / f"part-000-{number:06d}.parquet"


def everything(run):
    """Ask for all that can be asked, and return the error."""
    with pytest.raises((RunError, InputError)) as caught:
        answers(run)
    assert str(caught.value).isprintable(), "an error is one line"
    return str(caught.value)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_byte_changed_anywhere_gives_the_right_answer_or_an_error(whole, tmp_path_factory, data):
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from([file for file in files if not file.name.startswith(".")]))
    right = bytearray((whole / name).read_bytes())
    place, flip = data.draw(st.integers(0, len(right) - 1)), data.draw(st.integers(1, 255))
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("copy") / "run")
    right[place] ^= flip
    (copy / name).write_bytes(right)
    with suppress(UndertowError):
        assert answers(copy) == answers(whole)
    shutil.rmtree(copy)


def test_every_byte_of_the_manifest_and_of_a_part_matters_or_changes_nothing(whole, tmp_path):
    """What a random draw may miss: each byte of the files by which all others are held to account."""
    right, copy = answers(whole), shutil.copytree(whole, tmp_path / "run")
    for name in ("manifest.json", "checksums/part-000-000001.sha256", "batches/part-000-000001.parquet"):
        content, refused = (copy / name).read_bytes(), 0
        for place in range(0, len(content), 11):
            (copy / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                assert answers(copy) == right, (name, place)
            except UndertowError:
                refused += 1
        assert refused > len(content) // 11 * 0.8, name
        (copy / name).write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def of_another_table(path):
    shutil.copyfile(path.parents[1] / "channel_norm" / path.name, path)


def a_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


def huge(path):
    with path.open("r+b") as file:
        file.truncate(1 << 40)


DAMAGES = [empty, cut, of_another_table, a_link, a_pipe, a_folder, huge, os.unlink]


@pytest.mark.parametrize("aged", [False, True], ids=["with checksums", "without"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_part_is_named(run, damage, aged):
    if aged:
        without_checksums(run)
    damage(part(run))
    if aged and damage is os.unlink:
        assert Run(run).table("histogram").num_rows < Run(run).table("moments").num_rows  # nothing tells
    else:
        assert "histogram/part-000-000000.parquet" in everything(run)


@pytest.mark.parametrize("damage", [empty, cut, a_link, a_pipe, a_folder, huge, os.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "name", ["manifest.json", "checksums/part-000-000001.sha256", "batches/part-000-000000.parquet"]
)
def test_what_holds_a_run_together_is_named_too(run, name, damage):
    damage(run / name)
    assert name in everything(run) or "is no run" in everything(run)


@pytest.mark.parametrize("damage", [empty, cut, a_link, a_pipe, huge, os.unlink], ids=lambda d: d.__name__)
def test_a_damaged_tensor_is_named(run, damage):
    file = next((run / "tensors").iterdir())
    damage(file)
    assert file.name in everything(run)


def set_column(run, table, column, values):
    """Replace a column of the first part, and the checksums with it."""
    path = part(run, table)
    rows = pq.read_table(path)
    values = pa.array(values(rows[column].to_pylist()), rows.schema.field(column).type)
    pq.write_table(rows.set_column(rows.column_names.index(column), column, values), path)
    seal(run)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "a\0b"])
def test_a_kept_tensors_name_is_no_path(run, tmp_path, name):
    shutil.copyfile(next((run / "tensors").iterdir()), tmp_path / "other.safetensors")
    set_column(run, "kept", "file", lambda files: [name] * len(files))
    said = everything(run)
    assert "no name within the run" in said or "cannot be read" in said


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("histogram", "phase", lambda rows: ["sideways"] * len(rows)),
        ("histogram", "codes", lambda rows: [row[:-1] for row in rows]),
        ("histogram", "counts", lambda rows: [None, *rows[1:]]),
        ("histogram", "counts", lambda rows: [[None] * len(row) for row in rows]),
        ("moments", "site", lambda rows: [None, *rows[1:]]),
        ("batches", "rank", lambda rows: [7] * len(rows)),
    ],
)
def test_rows_that_no_recording_writes(run, table, column, values):
    set_column(run, table, column, values)
    if (table, column) == ("batches", "rank"):
        assert not Run(run).check().whole
    else:
        assert f"{table}/part-000-000000.parquet" in everything(run)


def test_text_that_is_none(run):
    rows = pq.read_table(part(run, "samples"))
    names = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    names = pa.concat_arrays([names] * (len(rows) // 2))
    pq.write_table(rows.set_column(rows.column_names.index("name"), "name", names), part(run, "samples"))
    seal(run)
    assert "samples/part-000-000000.parquet" in everything(run)


def bomb(run, rows, text="x"):
    """Write a part of a few kilobytes that unpacks to very much more."""
    kinds = known_columns()["batches"]
    columns = {}
    for name, kind in kinds.items():
        one = pa.array([text if kind == "string" else 0], schema({name: kind}).field(0).type)
        columns[name] = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), one)
    pq.write_table(pa.table(columns), part(run, "batches", 0), compression="zstd", row_group_size=rows)
    seal(run)
    assert part(run, "batches", 0).stat().st_size < 100_000


@pytest.mark.parametrize(("rows", "text"), [(60_000, "x"), (400, "x" * 60_000)])
def test_what_a_part_unpacks_to_is_bounded(run, rows, text, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1 << 20)
    bomb(run, rows, text)
    assert "over 1,048,576" in everything(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["tables"]["histogram"].update(codes="create_library_symlinks"), "the type"),
        (lambda m: m["tables"]["histogram"].update(codes="list<list<int8>>"), "the type"),
        (lambda m: m["tables"]["histogram"].update(codes=["int8"]), "the type"),
        (lambda m: m["tables"]["histogram"].update(codes="int64"), "no column 'codes'"),
        (lambda m: m["tables"]["histogram"].pop("counts"), "no column 'counts'"),
        (lambda m: m["tables"].update({"../other/moments": m["tables"]["moments"]}), "name of a table"),
        (lambda m: m["tables"].update({"/tmp/moments": m["tables"]["moments"]}), "name of a table"),
        (lambda m: m["tables"].update({"tensors": m["tables"]["moments"]}), "name of a table"),
        (lambda m: m["tables"].update({"batches": {}}), "name of a table"),
        (lambda m: m["tables"].update(moments=None), "no columns"),
        (lambda m: m.update(tables=[]), "'tables' is not"),
        (lambda m: m.update(finished="yes"), "'finished' is not"),
        (lambda m: m.update(sites={"names": "all"}), "'sites' is not"),
        (lambda m: m.update(sites={"names": [1]}), "'sites' is not"),
        (lambda m: m.pop("sites"), "no 'sites'"),
        (lambda m: m.update(loss_reduction="least"), "'loss_reduction' is not"),
        (lambda m: m.update(phase=["backward"]), "'phase' is not"),
        (lambda m: m.update(world_size=0), "'world_size' is not"),
        (lambda m: m.update(model=None), "'model' is not"),
    ],
)
def test_a_manifest_that_asks_for_more_is_refused(run, change, said):
    change_manifest(run, change)
    assert said in everything(run)


def test_a_manifest_of_deep_brackets(run):
    (run / "manifest.json").write_text("[" * 100_000)
    assert "cannot be read" in everything(run)


def test_a_change_on_purpose_is_told_how(run):
    change_manifest(run, lambda manifest: manifest.update(objective="mine"), sealed=False)
    assert 'take out its "sha256" and "checksums" if' in everything(run)
    change_manifest(run, lambda manifest: [manifest.pop(key) for key in ("sha256", "checksums")])
    assert Run(run).manifest["objective"] == "mine"


def test_a_tables_folder_that_is_a_link(run, tmp_path):
    (run / "moments").rename(tmp_path / "moments")
    (run / "moments").symlink_to(tmp_path / "moments")
    assert "moments" in everything(run)


def learning_run(folder):
    """Record modules, parameters and a diagnosis, with further columns of the samples."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recording = record(folder, model, sites="**, params", measures="norm", optimizer=optimizer, diagnose=1, group=2)
    recording.sample_columns = dict(CLASSES)
    with recording:
        for number in range(3):
            with recording.batch(batch=number):
                model(torch.ones(2, 1, 4, 4)).square().sum().backward()
                recording.describe({"class": [0, 1], "class_name": ["cat", "\udce9"], "score": [0.5, float("nan")]})
            optimizer.step()
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return learning_run(tmp_path_factory.mktemp("learnt") / "run")


@pytest.fixture
def learning(learnt, tmp_path):
    return shutil.copytree(learnt, tmp_path / "run")


def test_what_an_optimizer_and_a_diagnosis_leave_has_checksums(learnt):
    run = Run(learnt)
    assert run.tables == ["batches", "diagnosis", "norm", "samples", "steps"]
    assert set(run.table("norm")["phase"].to_pylist()) == {"backward", "accumulated", "gradient", "weight", "update"}
    assert run.table("samples")["class_name"].to_pylist() == ["cat", "\\udce9"] * 3
    found = run.check()
    assert (found.whole, found.files, found.unverified, found.orphans, found.strangers) == (True, 2 * 5, 0, (), ())


@pytest.mark.parametrize("damage", [empty, cut, a_link, os.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("table", ["diagnosis", "norm", "samples", "steps"])
def test_their_damage_is_named(learning, table, damage):
    damage(part(learning, table))
    with pytest.raises(RunError, match=f"{table}/part-000-000000.parquet"):
        Run(learning).table(table)
    assert [fault.file for fault in Run(learning).check().faults] == [f"{table}/part-000-000000.parquet"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["tables"]["steps"].pop("lr"), "no column 'lr'"),
        (lambda m: m["tables"]["norm"].update(norm="string"), "no column 'norm'"),
        (lambda m: m["tables"]["samples"].pop("name"), "no column 'name'"),
        (lambda m: m["tables"]["samples"].update(class_name="list<int8>"), "not 'string'"),
        (lambda m: m["tables"]["samples"].update(loss="object"), "the type"),
        (lambda m: m["tables"]["samples"].update(site="string"), "name of a measure's table"),
        (lambda m: m["tables"]["diagnosis"].pop("read_by"), "no column 'read_by'"),
        (lambda m: m["tables"]["diagnosis"].pop("gain"), "no column 'gain'"),
        (lambda m: m.update(parameters=["0.weight"]), "'parameters' is not"),
        (lambda m: m.update(unreached="all"), "'unreached' is not"),
    ],
)
def test_their_columns_are_those_that_are_known(learning, change, said):
    change_manifest(learning, change)
    with pytest.raises(RunError, match=said):
        Run(learning)


def test_a_diagnosis_of_an_earlier_version_is_read(learning):
    change_manifest(learning, lambda m: [m["tables"]["diagnosis"].pop(name) for name in LATER["diagnosis"]])
    for path in (learning / "diagnosis").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(list(LATER["diagnosis"])), path)
    seal(learning)
    assert Run(learning).check().whole
    diagnose(Run(learning))


def test_a_measure_takes_no_name_of_another_table(tmp_path):
    for table in ("samples", "batches", "steps", "diagnosis", "checksums"):
        mine = type("Mine", (MEASURES["channel-norm"],), {"name": table})
        with pytest.raises(RunError, match=f"'{table}'"):
            record(tmp_path / table, network(), measures=mine()).__enter__()


def test_the_types_are_those_that_measures_write():
    for columns in known_columns().values():
        assert set(columns.values()) <= TYPES
        assert len(schema(columns)) == len(columns)
    assert len(schema({kind: kind for kind in TYPES})) == len(TYPES)


def test_a_run_without_checksums_is_read_and_gone_on_with(tmp_path, whole):
    old = without_checksums(small_run(tmp_path / "old", batches=2, end=False))
    assert Run(old).table("moments").num_rows == 2 * 3
    small_run(old)
    assert answers(old) == answers(without_checksums(shutil.copytree(whole, tmp_path / "run")))


def test_checksums_are_those_of_coreutils(whole):
    done = subprocess.run(["sha256sum", "-c", "--quiet", *(whole / "checksums").iterdir()], cwd=whole, check=False)
    assert done.returncode == 0
    named = set().union(*map(read_checksums, (whole / "checksums").iterdir()))
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert named == {f for f in files if not f.startswith((".lock", "manifest", "checksums"))}


def test_a_whole_run_is_said_to_be(whole):
    found = Run(whole).check()
    assert (found.whole, found.finished, found.groups, found.batches, found.unverified) == (True, True, 2, 3, 0)
    assert found.files == 2 * 6 + 3 * 3
    assert (found.faults, found.orphans, found.strangers) == ((), (), ())
    assert json.loads(json.dumps(found.to_dict()))["whole"] is True


def test_what_is_lost_is_named_with_what_can_be_done(run):
    part(run, "moments", 1).unlink()
    cut(part(run, "histogram", 0))
    next((run / "tensors").glob("*batch0-0-*")).unlink()
    part(run, "samples", 0).with_name("part-000-000009.parquet").write_bytes(b"half")
    (run / "notes.txt").write_text("mine")
    found = Run(run).check()
    faults = {fault.file.partition("/")[0]: fault for fault in found.faults}
    assert set(faults) == {"moments", "histogram", "tensors"}
    assert (faults["moments"].reason, faults["moments"].batches) == ("is missing", 1)
    assert (faults["histogram"].reason[:11], faults["histogram"].batches) == ("has changed", 2)
    assert "new folder" in faults["moments"].remedy
    assert found.orphans == ("samples/part-000-000009.parquet",)
    assert found.strangers == ("notes.txt",)


def test_rows_that_do_not_fit_their_group(run):
    set_column(run, "samples", "batch", lambda rows: [0] * len(rows))
    set_column(run, "moments", "batch", lambda rows: [9] * len(rows))
    assert {fault.file: fault.reason for fault in Run(run).check().faults} == {
        "samples/part-000-000000.parquet": "has 4 samples of a batch of 2",
        "moments/part-000-000000.parquet": "has rows of batches that are not in its group",
    }


def test_a_group_that_was_copied_is_there_twice(run):
    for table in (*Run(run).manifest["tables"], "samples", "batches"):
        shutil.copyfile(part(run, table, 0), part(run, table, 2))
    lines = (run / "checksums" / "part-000-000000.sha256").read_text()
    (run / "checksums" / "part-000-000002.sha256").write_text(lines.replace("part-000-000000", "part-000-000002"))
    assert "is there 2 times" in Run(run).check().faults[0].reason


def test_a_lost_group_is_seen_in_reading(run):
    for table in (*Run(run).manifest["tables"], "samples", "batches"):
        part(run, table, 1).unlink()
    assert "batches/part-000-000001.parquet is missing" in everything(run)
    assert [fault.file for fault in Run(run).check().faults] == ["batches/part-000-000001.parquet"]


def test_lost_batches_of_an_unfinished_run_are_recorded_again(tmp_path, whole):
    run = small_run(tmp_path / "run", batches=4, end=False)
    part(run, "moments", 0).unlink()
    with pytest.raises(
        RunError, match=r"moments/part-000-000000.parquet is missing; .*delete .*batches/part-000-000000"
    ):
        small_run(run, batches=4)
    [fault] = Run(run).check().faults
    assert "delete batches/part-000-000000.parquet" in fault.remedy
    part(run, "batches", 0).unlink()
    small_run(run, batches=4)
    assert Run(run).check().whole
    assert answers(run).count("0a.png") == answers(small_run(tmp_path / "b", batches=4)).count("0a.png") > 0


def test_diagnose_and_compare_of_a_damaged_run(run, whole):
    cut(part(run))
    for ask in (lambda: diagnose(Run(run)), lambda: compare([whole, run])):
        with pytest.raises(RunError, match="histogram"):
            ask()


def test_check_of_a_folder_of_strangers(run):
    (run / "batches" / "part-000-999999999999.parquet").write_bytes(b"")
    (run / "batches" / "part-x.parquet").write_bytes(b"")
    found = check.check(run, Run(run).manifest)
    assert not found.whole
    assert "batches/part-x.parquet" in found.strangers
