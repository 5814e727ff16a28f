"""A network trained by two processes under torchrun: one run, each sample with its own gradient."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import undertow as ut

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

BATCHES, SIZES = 3, (3, 5)  # of the two processes
TRAINING = """
import os
import sys
import torch
from torch import distributed, nn
from test_processes import BATCHES, SIZES, data, network, objective
import undertow as ut

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = nn.parallel.DistributedDataParallel(network())
start = sum(SIZES[:rank])
measures = ["channel-norm", "histogram", "keep"]
with ut.record(sys.argv[1], model, sites="conv[:1]", measures=measures, group=2) as recording:
    for batch in range(BATCHES):
        names, x, y = data(batch, start, start + SIZES[rank])
        if batch == BATCHES - 1:
            recording.flush()
        with recording.batch(samples=names):
            objective(model(x), y).backward()
    if rank == 1 and "dies" in sys.argv:
        os._exit(3)  # the third batch is not published; the other process comes to its end
distributed.barrier()
distributed.destroy_process_group()
"""


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 3 * 3, 3))


def data(batch, start, end):
    draw = torch.Generator().manual_seed(batch)
    x, y = torch.randn(sum(SIZES), 1, 12, 12, generator=draw), torch.randint(3, (sum(SIZES),), generator=draw)
    return [f"{batch}-{i}.jpg" for i in range(start, end)], x[start:end], y[start:end]


def objective(scores, y):
    return nn.functional.cross_entropy(scores, y)


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = folder.with_suffix(".py")
    script.write_text(TRAINING)
    here = [str(Path(__file__).parent), str(Path(ut.__file__).parents[1])]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return subprocess.run(
        [sys.executable, *launch, "--local-addr=127.0.0.1", str(script), str(folder), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same batches in one process."""
    folder, model = tmp_path_factory.mktemp("alone"), network()
    with ut.record(folder, model, sites="conv[:1]", measures=["channel-norm", "histogram", "keep"]) as recording:
        for batch in range(BATCHES):
            names, x, y = data(batch, 0, sum(SIZES))
            with recording.batch(samples=names):
                objective(model(x), y).backward()
    return ut.Run(folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "run"
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    return ut.Run(folder)


def norms(run):
    """Each sample's channel norms, as of the gradient of its own loss."""
    sizes = {(row["batch"], row["rank"]): row["size"] for row in run.table("batches").to_pylist()}
    rows = run.table("channel_norm").to_pylist()
    return {row["name"]: np.multiply(row["values"], sizes[row["batch"], row["rank"]]) for row in rows}


def test_two_processes_leave_one_run_with_each_samples_own_gradient(alone, together):
    assert together.finished
    assert together.manifest["world_size"] == 2
    assert together.sites == alone.sites == ["0"]
    assert sorted((row["batch"], row["rank"], row["size"]) for row in together.table("batches").to_pylist()) == [
        (batch, rank, size) for batch in range(BATCHES) for rank, size in enumerate(SIZES)
    ]
    ours, theirs = norms(together), norms(alone)
    assert ours.keys() == theirs.keys() == {f"{b}-{i}.jpg" for b in range(BATCHES) for i in range(sum(SIZES))}
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-4)


@pytest.mark.parametrize("of", ["magnitude", "channel-norm"])
def test_quantiles_of_two_processes_are_those_of_one_per_sample(alone, together, of):
    wanted = alone.quantiles([0.1, 0.5, 0.9, 1.0], of=of, per_sample=True)[0]
    found = together.quantiles([0.1, 0.5, 0.9, 1.0], of=of, per_sample=True)[0]
    assert found.count == wanted.count
    np.testing.assert_allclose(found.values, wanted.values, rtol=2.0**-7)


def test_tensors_of_two_processes_lie_side_by_side(alone, together):
    for batch in range(BATCHES):
        whole = alone.tensor(batch=batch) * sum(SIZES)
        parts = [together.tensor(batch=batch, rank=rank) * size for rank, size in enumerate(SIZES)]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-7)


def test_a_run_of_which_one_process_died_is_unfinished_and_goes_on(tmp_path, together):
    folder = tmp_path / "run"
    assert torchrun(folder, "dies").returncode != 0
    half = ut.Run(folder)
    assert not half.finished
    assert [row["batch"] for row in half.table("batches").to_pylist() if row["rank"] == 1] == [0, 1]
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    whole = ut.Run(folder)
    assert whole.finished
    for table in ("channel_norm", "histogram"):
        by = [("batch", "ascending"), ("rank", "ascending")]
        assert whole.table(table).sort_by(by).equals(together.table(table).sort_by(by))
