"""One process, torchrun's processes and Ray's workers leave the same bytes; real ones, killed ones too."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import undertow as ut
from sweep.photographs import NETS, crops
from undertow.errors import InputError, RunError
from undertow.sweep.shards import Shards

COUNT = 40
SETTINGS = ("--rule", "guided", "--batch-size", "3", "--shard-size", "5")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("engines")
    names = crops(place / "in", COUNT)
    (place / "in" / names[17]).write_bytes(b"no photograph")
    (place / "nets.py").write_text(NETS)
    return place


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}


def command(place, out, *words, verb="explain", torchrun=0):
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun), "-m", "undertow"]
    words = [verb, "in", "--model", "nets.py:load", *words, "--out", out]
    return [sys.executable, *(starter if torchrun else ["-m", "undertow"]), *words]


def finished(place, out, *words, **options):
    done = subprocess.run(
        command(place, out, *words, **options), cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def local(place):
    code, _, err = finished(place, "local", *SETTINGS, "--engine", "local")
    assert code == 2
    assert "is not a photograph" in err
    return ut.Sweep(place / "local")


@pytest.mark.slow
def test_torchrun_leaves_the_same_bytes_also_when_its_group_was_killed(place, local):
    process = start(place, "group", *SETTINGS, "--engine", "torchrun", torchrun=2)
    try:
        wait_for_parts(process, place / "group", 2)
    finally:
        end(process)
    code, out, err = finished(place, "group", *SETTINGS, "--engine", "torchrun", torchrun=3)
    assert code == 0, err  # a failed image must not end the other processes
    assert out.count("40 images with nets.py:load") == 1
    sweep = ut.Sweep(place / "group")
    assert sweep.digest() == local.digest()
    assert [failure.index for failure in sweep.failed] == [17]


def test_torchrun_without_its_engine_is_told_so(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(InputError, match=r"torchrun has started several processes, .* add --engine torchrun"):
        ut.sweep.explain(place / "in", ut.load(f"{place / 'nets.py'}:load"), place / "wrong")


@pytest.mark.slow
def test_recordings_of_ray_have_the_same_rows(place):
    words = ("--sites", "conv", "--measure", "histogram", "--measure", "channel-norm", "--batch-size", "3")
    words += ("--shard-size", "5", "--engine")
    sweeps = []
    for engine, options in (("local", ()), ("ray", ("--processes", "2"))):
        code, out, err = finished(place, f"record-{engine}", *words, engine, *options, verb="record")
        assert code == 2, err
        assert "39 done, 1 failed, finished" in out
        sweeps.append(ut.Sweep(place / f"record-{engine}"))
        assert sweeps[-1].run().check().whole
    assert sweeps[0].digest() == sweeps[1].digest()
    assert sweeps[0].run().table("histogram").equals(sweeps[1].run().table("histogram"))


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(place):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        code, _, err = finished(place, "nowhere", "--engine", "ray", "--address", address)
    assert code == 2
    assert f"Ray cannot be reached at {address}: " in err


def start(place, out, *words, **options):
    """Start a sweep in a process group of its own."""
    return subprocess.Popen(
        command(place, out, *words, **options),
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_parts(process, folder, count):
    until = time.monotonic() + 200
    while len(list(folder.glob("parts/0*"))) < count and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)


def end(process):
    """Kill a process, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_moments_loses_doubles_and_changes_nothing(place, local):
    moments, out = random.Random(time.time_ns()), "killed"
    for kill in range(2):
        process = start(place, out, *SETTINGS, "--engine", "local")
        try:
            wait_for_parts(process, place / out, 1 + 3 * kill)
            time.sleep(moments.random() * 0.05)
        finally:
            end(process)
    before = {p: p.stat().st_mtime_ns for p in (place / out).glob("parts/0*/*")}
    finished(place, out, *SETTINGS, "--engine", "local")
    sweep = ut.Sweep(place / out)
    assert sweep.digest() == local.digest()
    assert sweep.check().whole
    assert {p: p.stat().st_mtime_ns for p in before} == before
    indices = [row["index"] for row in sweep.table().to_pylist()]
    assert indices == [i for i in range(COUNT) if i != 17]
    assert not list((place / out / "parts").glob(".*"))


@pytest.mark.slow
def test_ray_leaves_the_same_bytes_also_when_a_worker_was_killed(place, local):
    process = start(place, "worker", *SETTINGS, "--engine", "ray", "--processes", "2")
    try:
        wait_for_parts(process, place / "worker", 1)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        assert process.wait(timeout=200) == 2  # one image fails, as ever
    finally:
        end(process)
    assert ut.Sweep(place / "worker").digest() == local.digest()


def workers_of(group):
    """Return the processes of a session in which Ray runs a RayWorker."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                line = file.read()
        except OSError:
            continue
        if b"RayWorker" in line and os.getsid(int(name)) == group:
            found.append(int(name))
    return found


@pytest.mark.parametrize(
    ("count", "size", "world_size"), [(10, 4, 2), (1, 64, 3), (64, 64, 2), (65, 64, 2), (100, 1, 7)]
)
def test_every_item_is_in_one_shard_and_every_shard_has_one_process(count, size, world_size, monkeypatch):
    from undertow.sweep.engines import torchrun

    shards, all_items = Shards(count, size), []
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        all_items += [i for shard in torchrun.share(shards) for i in shards[shard]]
    assert sorted(all_items) == list(range(count))
    for shard in range(len(shards)):
        assert [i for batch in shards.batches(shard, 3) for i in batch] == list(shards[shard])
        assert {shards.of(i) for i in shards[shard]} == {shard}


def test_an_unfinished_sweep_has_no_digest(tmp_path):
    crops(tmp_path / "in", 3)
    (tmp_path / "nets.py").write_text(NETS)
    sweep = ut.sweep.explain(tmp_path / "in", ut.load(f"{tmp_path / 'nets.py'}:load"), tmp_path / "out", shard_size=2)
    for path in (tmp_path / "out" / "parts" / "000001").iterdir():
        path.unlink()
    (tmp_path / "out" / "parts" / "000001").rmdir()
    with pytest.raises(RunError, match=r"1 shards of .*out are missing; the same command goes on"):
        sweep.digest()
