"""The folder of a sweep may come from anybody: what is read of it is as it was written, or refused in one line."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import undertow as ut
from sweep.photographs import classifier, crops
from undertow.errors import RunError
from undertow.files import sha256_of
from undertow.sweep.folder import _sha256


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    crops(folder / "photographs", 6)
    ut.sweep.explain(folder / "photographs", classifier(), folder / "maps", shard_size=3)
    return folder / "maps"


@pytest.fixture
def maps(original, tmp_path):
    return shutil.copytree(original, tmp_path / "maps")


def everything(folder):
    sweep = ut.Sweep(folder)
    return sweep.names, sweep.table().to_pylist(), [values.tobytes() for _, values in sweep.maps()], sweep.digest()


def resigned(path, change):
    """Change a JSON file of a sweep, with the checksum that goes with it: no signature keeps anybody from that."""
    facts = json.loads(path.read_text())
    facts.pop("sha256")
    change(facts)
    path.write_text(json.dumps(facts | {"sha256": _sha256(facts)}))


def test_any_byte_that_is_changed_is_seen(original, maps):
    expected, files = everything(original), [p for p in sorted(original.rglob("*")) if p.is_file() and p.name[0] != "."]
    rng = np.random.default_rng(0)
    for path in files:
        raw, copy = path.read_bytes(), maps / path.relative_to(original)
        places = {0, 8, len(raw) // 2, len(raw) - 2, *rng.integers(0, len(raw), 12).tolist()}
        flipped = [raw[:at] + bytes([raw[at] ^ (1 << rng.integers(8))]) + raw[at + 1 :] for at in places]
        for changed in (*flipped, b"", raw[: len(raw) // 2], raw[:-2]):
            copy.write_bytes(changed)
            assert answer(maps) in (expected, "one line"), path
        copy.write_bytes(raw)
    assert everything(maps) == expected


def answer(folder):
    try:
        return everything(folder)
    except RunError as error:
        return "one line" if "\n" not in str(error) else str(error)


def test_what_is_missing_is_named(maps):
    (maps / "parts" / "000001" / "guided.safetensors").unlink()
    with pytest.raises(RunError, match=r"parts/000001/guided.safetensors is missing"):
        everything(maps)
    assert ut.Sweep(maps).check().faults.keys() == {1}


@pytest.mark.parametrize(
    "what", ["parts", "parts/000001", "parts/000001/guided.safetensors", "sweep.json", "names.parquet"]
)
def test_nothing_is_read_through_a_link(maps, tmp_path, what):
    moved = tmp_path / "moved"
    os.rename(maps / what, moved)
    (maps / what).symlink_to(moved)
    with pytest.raises(RunError, match=r"link"):
        everything(maps)


@pytest.mark.parametrize("name", ["../000000/guided.safetensors", "/etc/passwd", "run/../../x", "a\x1bb", "guided\\x"])
def test_no_file_outside_of_a_part_is_read(maps, name):
    resigned(maps / "parts/000001/part.json", lambda facts: facts["files"].update({name: "0" * 64}))
    with pytest.raises(RunError, match=r"names files that no part has"):
        everything(maps)


@pytest.mark.parametrize(
    ("column", "value"), [("offset", 99), ("offset", -1), ("file", "../../x"), ("file", "index.parquet")]
)
def test_an_index_that_names_another_place_is_refused(maps, column, value):
    part = maps / "parts" / "000001"
    table = pq.read_table(part / "index.parquet")
    values = [value] * table.num_rows
    changed = table.set_column(table.column_names.index(column), column, [values])
    pq.write_table(changed, part / "index.parquet")
    resigned(
        part / "part.json", lambda facts: facts["files"].update({"index.parquet": sha256_of(part / "index.parquet")})
    )
    with pytest.raises(RunError, match=r"names a row that its file has not|names a file that is not of its part"):
        everything(maps)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"task": "erase"},
        {"shard_size": 0},
        {"shard_size": True},
        {"source": {"count": "many"}},
        {"source": []},
        {"model": None},
        {"settings": 3},
    ],
)
def test_a_manifest_that_no_sweep_writes_is_refused(maps, change):
    resigned(maps / "sweep.json", lambda facts: facts.update(change))
    with pytest.raises(RunError, match=r"sweep.json"):
        ut.Sweep(maps)


def test_a_huge_count_takes_no_memory_and_no_time(maps):
    resigned(maps / "sweep.json", lambda facts: facts["source"].update(count=1 << 60))
    sweep = ut.Sweep(maps)
    for look in (sweep.check, lambda: sweep.map(0), lambda: sweep.missing, sweep.digest):
        with pytest.raises(RunError):
            look()
    assert sweep.status().done == 6


def test_what_is_not_of_the_sweep_is_named(maps):
    (maps / "parts" / "000001" / "virus.sh").write_text("")
    (maps / "parts" / "999999").mkdir()
    assert ut.Sweep(maps).check().strangers == ("parts/000001/virus.sh", "parts/999999")
