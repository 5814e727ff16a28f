"""`--batch-size auto`: as many images at once as memory holds, the same result, written down; and memory as it is."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import undertow as ut
from sweep.photographs import network
from undertow import memory
from undertow.errors import RunError
from undertow.frameworks.torch import memory as torch_memory
from undertow.sweep import fitting
from undertow.sweep.folder import read_manifest, write_manifest

ITEMS = [np.full((3, 20, 20), 0.1 * n, np.float32) for n in range(20)]


class Holds(torch.nn.Module):
    """A network that so many images at once fit into; it counts the images of each call."""

    def __init__(self, most):
        super().__init__()
        self.inner, self.most, self.calls = network(), most, []

    def forward(self, x):
        self.calls.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def swept(out, model, verb=ut.sweep.explain, **options):
    return verb(ITEMS, model.eval(), out, **{"device": "cpu", "batch_size": "auto", "fast": "off"} | options)


def batch_size(sweep):
    return read_manifest(sweep.folder)["settings"]["batch_size"]


def test_batches_grow_until_memory_lacks_and_the_maps_are_the_same(tmp_path):
    sweep = swept(tmp_path / "auto", Holds(5))
    assert batch_size(sweep) == 4
    plain = swept(tmp_path / "one", Holds(5), batch_size=1)
    for n in range(len(ITEMS)):
        np.testing.assert_allclose(sweep.map(n), plain.map(n), rtol=1e-4, atol=1e-6)
    assert sweep.check().whole


@pytest.mark.parametrize(("free", "expected"), [(100, 1), (1000, 8), (1 << 40, 16)])
def test_no_batch_takes_more_than_half_of_the_free_memory(tmp_path, monkeypatch, free, expected):
    model = Holds(99)
    monkeypatch.setattr(torch_memory, "free", lambda device: free)
    monkeypatch.setattr(torch_memory, "peak", lambda device: lambda: 50 * max(model.calls))
    monkeypatch.setattr(fitting, "GAIN", 1e9)  # that nothing is gained by it stops no batch
    assert batch_size(swept(tmp_path, model)) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(lambda n: 1.0, 8), (lambda n: 1 / n, 16)])
def test_beyond_the_default_images_must_come_sooner(tmp_path, monkeypatch, seconds, expected):
    monkeypatch.setattr(fitting, "_seconds_for_each", lambda job, items: seconds(len(items)))
    assert batch_size(swept(tmp_path, network())) == expected


def test_a_batch_is_no_larger_than_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "GAIN", 1e9)
    assert batch_size(swept(tmp_path, network(), shard_size=6)) == 4


def test_where_memory_is_not_known_the_default_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_memory, "free", lambda device: None)
    assert batch_size(swept(tmp_path, network())) == 8


def test_what_was_chosen_is_kept_and_another_number_refused(tmp_path, monkeypatch):
    first = swept(tmp_path, Holds(2), limit=len(ITEMS))
    monkeypatch.setattr(fitting, "fitting_batch_size", None)  # it is not asked for again
    assert batch_size(swept(tmp_path, Holds(2))) == batch_size(first) == 2
    with pytest.raises(RunError, match=r"batch_size 2, not 3"):
        swept(tmp_path, Holds(2), batch_size=3)


def test_the_first_of_several_processes_chooses_for_all(tmp_path):
    facts = {"task": "explain", "settings": {"batch_size": 4}, "source": {"count": 1}, "shard_size": 64, "model": {}}
    write_manifest(tmp_path, facts, ["0"], ["batch_size"])
    later = {**facts, "settings": {"batch_size": 16}}
    assert write_manifest(tmp_path, later, ["0"], ["batch_size"])["settings"] == {"batch_size": 4}
    with pytest.raises(RunError, match=r"batch_size 4, not 16"):
        write_manifest(tmp_path, later, ["0"])


def test_a_recording_is_halved_where_memory_lacks_and_nothing_is_lost_or_doubled(tmp_path):
    how = {"verb": ut.sweep.record, "options": {"sites": "conv", "measures": ["channel-norm"]}, "shard_size": 7}
    with pytest.warns(ut.UndertowWarning, match=r"memory did not suffice for 6 images at once; 1 were taken"):
        sweep = swept(tmp_path / "halved", Holds(2), **how, batch_size=6)
    plain = swept(tmp_path / "plain", Holds(6), **how, batch_size=6)
    rows, wanted = ({(r["name"], r["site"]): r["values"] for r in ut.Run(s.folder).table("channel_norm").to_pylist()}
                    for s in (sweep, plain))  # fmt: skip
    assert rows.keys() == wanted.keys()
    assert len(rows) == 2 * len(ITEMS) == ut.Run(sweep.folder).table("channel_norm").num_rows
    for key, values in rows.items():
        np.testing.assert_allclose(values, wanted[key], rtol=1e-4, atol=1e-6)
    batches = ut.Run(sweep.folder).table("batches").to_pylist()
    assert len({row["batch"] for row in batches}) == len(batches)


GROUPS = {
    "version 1": ("9:cpu:/x\n4:memory:/a/b\n0::/\n", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "version 2": ("0::/a/b\n", "a/b", "memory.max", "memory.current"),
    "of a host, seen from within": ("0::/host/only\n", ".", "memory.max", "memory.current"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_control_group_leaves_its_limit_without_what_is_used_but_for_cached_files(tmp_path, kind):
    text, place, limit, used = GROUPS[kind]
    group = tmp_path / place
    group.mkdir(parents=True, exist_ok=True)
    inactive = "total_inactive_file" if "version 1" in kind else "inactive_file"
    for name, value in ((limit, "1000"), (used, "700"), ("memory.stat", f"anon 5\n{inactive} 50\n")):
        (group / name).write_text(f"{value}\n")
    assert list(memory._of_groups(text, tmp_path)) == [350]
    (group / limit).write_text("max\n")
    assert list(memory._of_groups(text, tmp_path)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_memory_of_this_process():
    code = """
import resource
from undertow import memory
plenty, grown = memory.free(), memory.peak()
block = bytearray(b"x") * (64 << 20)
del block
assert 60 << 20 < grown() < 80 << 20, grown()
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), -1))
assert memory.free() <= 100 << 20 < plenty, memory.free()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
