"""Run folders: whole batches or nothing of them, whatever happens; resuming; names; reading without a framework."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import duckdb
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from undertow.errors import InputError, RunError, UndertowError
from undertow.recording import Schedule, record
from undertow.runs import Run
from undertow.runs.format import appearing, read_tensor, write_tensor

MEASURES = ["channel-norm", "zero-fraction", "moments", "histogram"]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)
        return nn.Sequential(*layers).eval()


def batch_of(number):
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(number))


def work(folder, batches=range(4), model=None, pause=0.0, **more):
    """Record some batches, each the same whenever it comes."""
    model = model or network()
    with record(folder, model, **{"measures": MEASURES, "loss_reduction": "sum", "group": 2, **more}) as recording:
        for number in batches:
            with recording.batch(samples=[f"{number}/x.jpg", f"{number}/y.jpg"], batch=number):
                model(batch_of(number)).square().sum().backward()
            time.sleep(pause)
    return recording


def interrupted(folder, batches=range(4), **more):
    """Record as `work` does, and leave the loop by an exception after the last batch."""

    def going():
        yield from batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(folder, going(), **more)


def rows(folder):
    """All rows of all tables, but for the tensors' file names."""
    run = Run(folder)
    return {name: sorted(map(str, run.table(name).to_pylist())) for name in run.tables}


def test_what_a_run_holds(tmp_path):
    work(
        tmp_path, measures=[*MEASURES, "keep"], schedule=Schedule(first=3), objective="sum of squares", reference="mine"
    )
    run = Run(tmp_path)
    assert run.finished
    assert run.sites == ["0", "2"]
    assert run.tables == ["batches", "channel_norm", "histogram", "kept", "moments", "samples", "zero_fraction"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == run.manifest
    assert manifest["format"] == 2
    assert manifest["model"]["reference"] == "mine"
    assert manifest["model"]["precision"] == "float32"
    assert len(manifest["model"]["weights_sha256"]) == 64
    assert manifest["objective"] == "sum of squares"
    assert manifest["schedule"] == {"epoch": None, "epochs": None, "every": 1, "first": 3}
    assert run.table("channel_norm").num_rows == 3 * 2 * 2
    assert run.table("channel-norm").column_names[:6] == ["epoch", "batch", "rank", "sample", "name", "site"]
    assert str(run.table("channel_norm").schema.field("values").type) == "list<element: float>"
    assert str(run.table("histogram").schema.field("codes").type) == "list<element: uint16>"
    assert run.table("samples")["name"].to_pylist()[:2] == ["0/x.jpg", "0/y.jpg"]
    assert run.table("batches")["size"].to_pylist() == [2, 2, 2]
    assert "finished, sites=2" in repr(run)


def test_values_are_those_of_autograd(tmp_path):
    work(tmp_path, measures=[*MEASURES, "keep"])
    run, model = Run(tmp_path), network()
    y = model[0](batch_of(3))
    gradient = torch.autograd.grad(model[1:](y.clone()).square().sum(), y)[0].numpy()
    here = {"site": "0", "batch": 3}
    np.testing.assert_array_equal(run.tensor(**here), gradient)

    def row(table):
        return [r for r in run.table(table).to_pylist() if r["site"] == "0" and r["batch"] == 3]

    for sample, found in enumerate(row("channel_norm")):
        np.testing.assert_allclose(found["values"], np.sqrt((gradient[sample] ** 2).sum((1, 2))), rtol=1e-6)
    assert row("zero_fraction")[0]["zeros"] == (gradient == 0).sum()
    assert row("moments")[0]["mean"] == pytest.approx(gradient.astype(float).mean(), rel=1e-5)
    assert sum(row("histogram")[0]["counts"]) == gradient.size


def test_duckdb_opens_the_parquet(tmp_path):
    work(tmp_path)
    found = duckdb.sql(f"select site, count(*), sum(len(values)) from '{tmp_path}/channel_norm/*.parquet' group by 1")
    assert sorted(found.fetchall()) == [("0", 8, 24), ("2", 8, 16)]
    assert duckdb.sql(f"select count(*) from read_parquet({Run(tmp_path).parts('histogram')})").fetchall() == [(8,)]


def test_an_unfinished_run_goes_on_where_it_stopped(tmp_path):
    work(tmp_path / "whole")
    interrupted(tmp_path / "parts", range(3))
    assert not Run(tmp_path / "parts").finished
    assert Run(tmp_path / "parts").table("batches").num_rows == 3
    recording = work(tmp_path / "parts")
    assert (recording.batches, recording.skipped) == (1, 3)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert Run(tmp_path / "parts").finished


@pytest.mark.parametrize("lost", ["channel_norm", "histogram", "batches"])
def test_parts_of_a_group_that_was_not_published_do_not_count(tmp_path, lost):
    """A process killed between two parts leaves some of them; the table `batches` comes last."""
    work(tmp_path / "whole")
    interrupted(tmp_path / "run")
    order = ["channel_norm", "histogram", "moments", "samples", "zero_fraction", "batches"]
    for table in order[order.index(lost) :]:
        (tmp_path / "run" / table / "part-000-000001.parquet").unlink()
    (tmp_path / "run" / "moments" / ".part-000-000001.parquet.17").write_bytes(b"half")
    assert Run(tmp_path / "run").table("moments").num_rows == 4
    work(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob(".part*"))


@pytest.fixture
def one_thread():
    """As the processes of a `ForkServer` have it: with more threads, kernels may add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments_and_resumed(tmp_path):
    """Twenty SIGKILLs; after the last, the rows are those of an undisturbed run, none lost and none twice."""
    measures = [*MEASURES, "keep:sample"]
    work(tmp_path / "whole", range(40), measures=measures)
    folder, draw, kills, gone_on = tmp_path / "run", random.Random(0), 0, 0
    call = f"test_reader.work({str(folder)!r}, range(40), pause=0.004, measures={measures!r})"
    with ForkServer(call) as server:
        while kills < 20:
            if (folder / "manifest.json").exists() and Run(folder).finished:
                assert rows(folder) == rows(tmp_path / "whole")
                shutil.rmtree(folder)
            before = published(folder)
            child = server.start()
            deadline = time.monotonic() + 20
            while kills % 2 and published(folder) == before and time.monotonic() < deadline:
                time.sleep(0.01)  # every other one has published something, however slow the processor
            time.sleep(draw.uniform(0.02, 0.1))
            kills += server.kill(child)
            gone_on += published(folder) > before > 0
            if (folder / "manifest.json").exists():
                run = Run(folder)
                batches = run.table("batches").num_rows
                assert run.table("channel_norm").num_rows == sum(1 for _ in run.tensors()) == 4 * batches
    assert gone_on
    if not Run(folder).finished:
        work(folder, range(40), measures=measures)
    assert rows(folder) == rows(tmp_path / "whole")
    for row, values in Run(folder).tensors():
        np.testing.assert_array_equal(values, read_tensor(tmp_path / "whole" / "tensors" / row["file"]))


def published(folder):
    """How many batches are on the disk."""
    return Run(folder).table("batches").num_rows if (folder / "manifest.json").exists() else 0


class ForkServer:
    """Processes that start quickly: one imports torch, and forks for each run."""

    def __init__(self, call):
        code = SERVER.format(call=call, tests=os.path.dirname(__file__))
        pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def start(self):
        self.process.stdin.write("start\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self, child):
        """Kill it; return whether it was still at work."""
        os.kill(child, signal.SIGKILL)
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()) == signal.SIGKILL

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


SERVER = """
import os, sys
sys.path.insert(0, {tests!r})
import test_reader, torch
torch.set_num_threads(1)
for line in sys.stdin:
    if line == "start\\n":
        child = os.fork()
        if child == 0:
            {call}
            os._exit(0)
        print(child, flush=True)
    else:
        print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_whole_batches(tmp_path, monkeypatch):
    real, calls = pyarrow.parquet.write_table, []

    def full(*args, **more):
        calls.append(args)
        if len(calls) > 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **more)

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(RunError, match=r"No space left on device; the 4 batches .* goes on from them"):
        work(tmp_path / "run", range(1000))
    monkeypatch.undo()
    run = Run(tmp_path / "run")
    assert not run.finished
    assert run.table("batches").num_rows == 4
    assert run.table("channel_norm").num_rows == 16
    assert not list((tmp_path / "run").rglob(".part*"))
    work(tmp_path / "run", range(8))
    work(tmp_path / "whole", range(8))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_full_disk_at_the_end_does_not_hide_an_error_of_the_loop(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(KeyboardInterrupt) as caught:
        work(tmp_path, iter([0, Raised()]))
    assert "No space left on device" in caught.value.__notes__[0]


class Raised:
    def __format__(self, spec):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"measures": ["moments"]}, "measures"),
        ({"sites": "conv[0]"}, "sites"),
        ({"phase": "both"}, "phase"),
        ({"schedule": Schedule(first=9)}, "schedule"),
        ({"loss_reduction": "mean"}, "loss_reduction"),
        ({"objective": "other"}, "objective"),
        ({"model": nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()).eval()}, "structure"),
    ],
    ids=str,
)
def test_other_settings_or_another_network_are_refused(tmp_path, more, said):
    interrupted(tmp_path)
    before = rows(tmp_path)
    with pytest.raises(RunError, match=said):
        work(tmp_path, **more)
    assert rows(tmp_path) == before


def test_other_weights_are_refused_in_evaluation_and_expected_in_training(tmp_path):
    for mode in (False, True):
        folder, model = tmp_path / str(mode), network().train(mode)
        interrupted(folder, range(2), model=model)
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        if mode:
            work(folder, model=model)
            assert Run(folder).table("batches").num_rows == 4
        else:
            with pytest.raises(RunError, match="weights_sha256"):
                work(folder, model=model)


def test_a_finished_run_and_what_is_no_run_are_refused(tmp_path):
    work(tmp_path / "run")
    with pytest.raises(RunError, match="finished run"):
        work(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds thesis.tex and is no run"):
        work(tmp_path / "other")
    with pytest.raises(RunError, match=r"no manifest.json"):
        Run(tmp_path / "other")


def test_two_recordings_into_one_folder_are_refused(tmp_path):
    model = network()
    with record(tmp_path, model) as recording:
        with pytest.raises(RunError, match="at this moment"):
            work(tmp_path)
        with recording.batch():
            model(batch_of(0)).sum().backward()


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ('{"format": 99}', "format 99"), ("[]", "cannot be read")]
)
def test_a_manifest_that_cannot_be_read(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=said):
        Run(tmp_path)


def test_a_run_is_readable_while_it_is_written(tmp_path):
    model = network()
    with record(tmp_path, model, measures=MEASURES, group=1000) as recording:
        with recording.batch():
            model(batch_of(0)).sum().backward()
        recording.flush()
        assert Run(tmp_path).table("moments").num_rows == 2
        with recording.batch():
            model(batch_of(1)).sum().backward()
    assert Run(tmp_path).table("moments").num_rows == 4


def test_parts_are_never_overwritten(tmp_path):
    with appearing(tmp_path / "a") as aside:
        aside.write_text("first")
    with pytest.raises(FileExistsError), appearing(tmp_path / "a") as aside:
        aside.write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "first"


AWKWARD = [
    *("a/x.jpg", "b/x.jpg", "../../x", "x" * 300, "猫" * 90, "猫.jpg", "X.jpg", "x.jpg", "a\nb.jpg", "a b.jpg"),
    *("/etc/passwd", "..", ".", "", "-rf", "con", "a\0b", "a_b.jpg", "\udcff.jpg", "🙂", 'quo"te', "x.safetensors"),
]


def test_awkward_names_neither_collide_nor_leave_the_folder(tmp_path):
    folder, model = tmp_path / "run", network()
    x = torch.randn(len(AWKWARD), 1, 6, 6)
    with record(folder, model, sites="conv[0]", measures="keep:sample", phase="forward") as recording:
        for _ in range(2):
            with recording.batch(samples=AWKWARD):
                model(x)
    run = Run(folder)
    files = list((folder / "tensors").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert len({path.name.casefold() for path in files}) == len(files) == 2 * len(AWKWARD)
    assert all(len(path.name.encode()) < 256 and path.name.isprintable() for path in files)
    wanted = model[0](x)
    for row, values in run.tensors(batch=1):
        np.testing.assert_array_equal(values, wanted[row["sample"]].detach().numpy())
    assert [row["name"] for row, _ in run.tensors(batch=0)][:5] == AWKWARD[:5]
    assert run.tensor(batch=0, name="a\nb.jpg").shape == (3, 4, 4)
    with pytest.raises(InputError, match="several tensors"):
        run.tensor(name="a\nb.jpg")
    with pytest.raises(InputError, match="no tensor is"):
        run.tensor(name="c.jpg")
    with pytest.raises(InputError, match="no column"):
        run.tensor(colour="red")


def test_the_same_name_twice_in_a_batch(tmp_path):
    model = network()
    asked = {"sites": "conv[0]", "measures": "keep:sample"}
    with record(tmp_path, model, **asked) as recording, recording.batch(samples=["same", "same"]):
        model(batch_of(0)).sum().backward()
    assert len({row["file"] for row, _ in Run(tmp_path).tensors()}) == 2


@given(st.sampled_from(["float64", "float32", "float16", "bfloat16"]), st.lists(st.integers(0, 4), max_size=4))
@settings(max_examples=40, deadline=None)
def test_tensors_are_safetensors(tmp_path_factory, dtype, shape):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    values = torch.randn(shape).to(getattr(torch, dtype))
    host = values.view(torch.uint16) if dtype == "bfloat16" else values
    write_tensor(path, host.numpy(), dtype, {"site": "猫"})
    assert torch.equal(safetensors.torch.load_file(path)["values"], values)
    np.testing.assert_array_equal(read_tensor(path), values.float().numpy() if dtype == "bfloat16" else values.numpy())


def test_a_table_that_is_not_there(tmp_path):
    work(tmp_path)
    with pytest.raises(InputError, match="did you mean moments"):
        Run(tmp_path).table("moment")


def test_reads_without_a_framework(tmp_path):
    work(tmp_path, measures=[*MEASURES, "keep"])
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from undertow.runs import Run; from undertow.runs import compare\n"
        f"run = Run({str(tmp_path)!r})\n"
        "assert run.quantiles([.5]) and run.table('moments').num_rows and next(run.tensors()) and compare([run, run])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_are_of_the_one_tree():
    assert issubclass(RunError, UndertowError)
