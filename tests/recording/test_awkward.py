"""Networks that can be read in part or not at all: right, or one true line at the first batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import undertow as ut
from undertow.errors import InputError, ModelError


def recorded(folder, model, **more):
    return ut.record(folder, model, **{"sites": "linear", "measures": "norm", **more})


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        return (x * self.phase).abs()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.LazyLinear(3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()),
        lambda: nn.Linear(3, 3, device="meta"),
    ],
)
def test_weights_without_values_are_refused(make, tmp_path):
    with pytest.raises(ModelError, match="values yet; run the model once"):
        recorded(tmp_path / "run", make())
    assert not (tmp_path / "run").exists()


def test_a_lazy_module_that_has_run_is_recorded(tmp_path):
    model = nn.Sequential(nn.LazyLinear(3))
    assert [site.shape for site in ut.select(model, "linear", example=torch.ones(2, 4))] == [(2, 3)]
    with recorded(tmp_path, model, sites="linear, params") as recording, recording.batch():
        model(torch.ones(2, 4)).sum().backward()
    rows = ut.Run(tmp_path).table("norm").to_pylist()
    assert {row["site"]: row["norm"] for row in rows} == pytest.approx(
        {"0": 6**0.5, "0.weight": 48**0.5, "0.bias": 12**0.5}
    )


def test_complex_outputs_are_said_at_the_first_batch(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Spectrum())

    def loop(recording):
        with pytest.warns(UserWarning, match="1: its output is complex64, which no measure reads"), recording.batch():
            model(torch.randn(2, 4)).abs().sum().backward()
        with recording.batch():  # once is enough
            model(torch.randn(2, 4)).abs().sum().backward()

    with pytest.warns(UserWarning, match="1 of 2 sites"), recorded(tmp_path, model, sites="**") as recording:
        loop(recording)
    assert ut.Run(tmp_path).manifest["unreached"] == {
        "1": "its output is complex64, which no measure reads; take the module behind it"
    }


def test_complex_parameters_are_left_out(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Turned())
    with (
        pytest.warns(UserWarning, match="1 of 3 sites were not recorded: 1.phase: it is complex64"),
        recorded(tmp_path, model, sites="params", measures=["norm", "moments", "histogram"]) as recording,
        recording.batch(),
    ):
        model(torch.randn(2, 4)).sum().backward()
    assert set(ut.Run(tmp_path).table("norm")["site"].to_pylist()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("each", [True, False])
def test_vmapped_gradients_are_refused_at_the_first_batch(each, tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    parameters, x = dict(model.named_parameters()), torch.randn(5, 3)

    def loss(given, one):
        return functional_call(model, given, (one,)).square().sum()

    def forget():
        with recorded(tmp_path, model) as recording, recording.batch():
            vmap(grad(loss), in_dims=(None, 0))(parameters, x) if each else grad(loss)(parameters, x)

    with pytest.raises(ModelError, match=r"0 was called inside torch\.func\.vmap or grad"):
        forget()
    assert not any(module._forward_hooks for module in model.modules())


def test_what_was_compiled_beforehand_is_said_at_the_first_batch(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    fast = torch.compile(model, backend="eager")
    fast(torch.randn(2, 3)).sum().backward()

    def loop():
        said = pytest.warns(UserWarning, match=r"never called; .* what torch\.compile made beforehand")
        with recorded(tmp_path, model) as recording, said, recording.batch():
            fast(torch.randn(2, 3)).sum().backward()

    with pytest.raises(InputError, match=r"what torch\.compile made beforehand"):
        loop()


def test_parameters_of_a_network_compiled_beforehand(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    fast, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(model.parameters(), 0.1)
    fast(torch.randn(2, 3)).sum().backward()
    optimizer.zero_grad()
    with recorded(tmp_path, model, sites="params", measures="keep", optimizer=optimizer) as recording:
        with recording.batch():
            fast(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    kept = ut.Run(tmp_path).tensor(site="0.weight", phase="gradient")
    np.testing.assert_array_equal(kept, model[0].weight.grad.numpy())


SHARDED = """
import sys, torch, undertow as ut
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=world)
torch.manual_seed(0)
net, plain = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2))
plain.load_state_dict(net.state_dict())
x = torch.randn(world, 3, 4)
mesh = init_device_mesh("cpu", (world,))
for part in (net[0], net[2], net):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
with ut.record(folder, net, sites="linear, params", measures=["norm", "keep"], optimizer=optimizer) as recording:
    with recording.batch(samples=[f"{rank}{i}.jpg" for i in range(3)]):
        net(x[rank]).square().mean().backward()
    optimizer.step()
outputs = []
plain[2].register_forward_hook(lambda _, inputs, output: (output.retain_grad(), outputs.append(output))[0])
plain(x.flatten(0, 1)).square().mean().backward()
dist.barrier()
run = ut.Run(folder)
for name, p in plain.named_parameters():
    part = p.grad.chunk(world)[rank]
    kept = torch.from_numpy(run.tensor(site=name, phase="gradient", rank=rank))
    torch.testing.assert_close(kept, part, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.from_numpy(run.tensor(site=name, phase="update", rank=rank)), -0.1 * part)
assert run.manifest["model"]["weights_sha256"] is None
own = outputs[0].grad.view(world, 3, 2)[rank] * world  # a mean over fewer samples, as `per_sample` knows
torch.testing.assert_close(torch.from_numpy(run.tensor(site="2", rank=rank)), own)
assert run.finished and run.manifest["world_size"] == world
assert sorted((r["rank"], r["name"]) for r in run.table("samples").to_pylist()) == [
    (r, f"{r}{i}.jpg") for r in range(world) for i in range(3)]
assert {(r["rank"], r["size"]) for r in run.table("batches").to_pylist()} == {(r, 3) for r in range(world)}
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_each_process_records_its_part_of_sharded_parameters(world, tmp_path):
    words = [sys.executable, "-W", "error::UserWarning:undertow", "-c", SHARDED]
    processes = [
        subprocess.Popen([*words, str(rank), str(world), str(tmp_path / "run")], stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
