"""Recording in Lightning's Trainer: the rows of a loop by hand, whatever the Trainer does around the steps."""

import csv
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision

import_torchvision()  # which Lightning imports in a way that fails beside a CPU-only torch

import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from training.loops import (  # noqa: E402
    MEASURES,
    SITES,
    SmallNet,
    assert_nothing_stays,
    assert_same_rows,
    fashion_mnist,
    noise,
    plain_loop,
    sgd,
)
from undertow.lightning import GradientRecorder  # noqa: E402
from undertow.recording.training import RecordOptions  # noqa: E402


class Named(Dataset):
    """Images, labels and names."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i], "name": f"{i}.png"}


class Lit(lightning.LightningModule):
    """A network as Lightning has it; the loss is multiplied by `scale`, and the step `breaks_at` fails."""

    def __init__(self, net=None, scale=1.0, breaks_at=None):
        super().__init__()
        self.net, self.scale, self.breaks_at = net or SmallNet(), scale, breaks_at

    def training_step(self, batch, batch_idx):
        if self.breaks_at == (self.current_epoch, batch_idx):
            raise ZeroDivisionError("as a training may")
        return self.scale * F.cross_entropy(self.net(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.net(batch["x"])

    def configure_optimizers(self):
        return sgd(self)


def trainer(folder, recorder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[recorder],
        default_root_dir=folder,
        **{**quiet, "max_epochs": 1, "enable_checkpointing": False, **options},
    )


def recorder(folder, **options):
    return GradientRecorder(folder, **{"sites": SITES, "measures": MEASURES, "samples": "name", **options})


def loader(x, y, size=4):
    return DataLoader(Named(x, y), size)


def test_fashion_mnist_gives_the_rows_of_a_loop_by_hand(tmp_path):
    x, y = fashion_mnist(24 * 16)
    wanted, by_hand = plain_loop(tmp_path / "plain", x, y, size=16)
    module = Lit(SmallNet(28))
    trainer(tmp_path, recorder(tmp_path / "run")).fit(module, loader(x, y, 16))
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert run.check().whole
    assert run.table("batches").num_rows == 24
    assert_same_rows(run, wanted, "net.")
    for ours, theirs in zip(module.net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_accumulation_clipping_validation_between_micro_batches_and_checkpointing(tmp_path):
    x, y = noise(26)
    wanted, _ = plain_loop(
        tmp_path / "plain", x, y, size=4, epochs=2, accumulate=2, clip=0.05, network=SmallNet(checkpointed=True)
    )
    around = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "val_check_interval": 1, "max_epochs": 2}
    module, data = Lit(SmallNet(checkpointed=True)), loader(x, y)
    own = recorder(tmp_path / "run", diagnose=2)
    trainer(tmp_path, own, **around).fit(module, data, data)
    run = ut.Run(tmp_path / "run")
    assert_same_rows(run, wanted, "net.")
    norms = {(r["phase"], r["site"], r["batch"]): r["norm"] for r in run.table("norm").to_pylist() if r["epoch"] == 0}
    assert norms["gradient", "net.first.weight", 0] < norms["accumulated", "net.first.weight", 0]
    assert_nothing_stays(module)


def test_validation_and_the_sanity_check_are_not_recorded(tmp_path):
    x, y = noise(8)
    own = recorder(tmp_path / "run", sites="conv", measures="norm", phase="forward", on_finding=None)
    trainer(tmp_path, own, num_sanity_val_steps=2).fit(Lit(), loader(x, y), loader(x, y, 2))
    rows = ut.Run(tmp_path / "run").table("norm").to_pylist()
    assert sorted((row["batch"], row["site"], row["call"]) for row in rows) == [
        (batch, site, 0) for batch in range(2) for site in ("net.first", "net.second")
    ]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(tmp_path, precision):
    x, y = noise(8)
    wanted, _ = plain_loop(tmp_path / "plain", x, y, size=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if precision == "16-mixed" else None
    own = recorder(tmp_path / "run")
    trainer(tmp_path, own, plugins=[MixedPrecision(precision, "cpu", scaler)]).fit(Lit(), loader(x, y))
    run = ut.Run(tmp_path / "run")
    assert run.table("batches")["scale"].to_pylist() == [None if scaler is None else 2.0**12] * 2
    dtypes = {row["dtype"] for row in run.table("norm").to_pylist() if row["site"] == "net.second"}
    assert dtypes == {"bfloat16"} if scaler is None else {"float32"}  # divided by the scale in float32
    assert_same_rows(run, wanted, "net.", rtol=0.3, atol=0.02)  # half precision, by and large: no factor of a scale


def test_an_error_leaves_a_run_that_the_same_training_goes_on_with(tmp_path):
    x, y = noise(16)
    wanted, _ = plain_loop(tmp_path / "plain", x, y, size=4, epochs=3)

    broken = Lit(breaks_at=(1, 2))
    own = recorder(tmp_path / "run")
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    first = trainer(tmp_path, own, max_epochs=3, enable_checkpointing=True)
    first.callbacks.append(save)
    with pytest.raises(ZeroDivisionError):
        first.fit(broken, loader(x, y))
    assert_nothing_stays(broken)
    half = ut.Run(tmp_path / "run")
    assert not half.finished
    assert half.table("batches").num_rows == 6
    trainer(tmp_path, own, max_epochs=3).fit(Lit(), loader(x, y), ckpt_path=save.best_model_path)
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert_same_rows(run, wanted, "net.")
    with pytest.raises(ut.RunError, match="is a finished run; choose another folder"):
        trainer(tmp_path, own).fit(Lit(), loader(x, y))


def test_findings_go_to_the_trainers_logger_as_they_arise(tmp_path, caplog):
    x, y = noise(16)
    own = recorder(tmp_path / "run", sites="conv", measures="norm")
    logger = CSVLogger(tmp_path, "log", version=0)
    trainer(tmp_path, own, logger=logger, log_every_n_steps=1).fit(Lit(scale=0.0), loader(x, y))
    with open(tmp_path / "log" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["undertow/no-gradient"] for row in rows] == ["1.0"]
    assert [record.message.partition(":")[0] for record in caplog.records if record.name == "undertow"] == [
        "no-gradient"
    ]


def test_raise_ends_the_training_and_leaves_the_run(tmp_path):
    x, y = noise(16)
    module, own = Lit(scale=0.0), recorder(tmp_path / "run", on_finding="raise")
    with pytest.raises(ut.FindingError, match="no-gradient"):
        trainer(tmp_path, own).fit(module, loader(x, y))
    assert not ut.Run(tmp_path / "run").finished
    assert_nothing_stays(module)


class Two(Lit):
    """Manual optimization with two optimizers, as adversarial networks have it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch["x"]), batch["y"]))
            optimizer.step()

    def configure_optimizers(self):
        halves = (self.net.first, self.net.second), (self.net.head,)
        return [torch.optim.SGD([p for m in half for p in m.parameters()], 0.1) for half in halves]


def test_manual_optimization(tmp_path):
    x, y = noise(8)
    trainer(tmp_path, recorder(tmp_path / "run", samples=None)).fit(Two(), loader(x, y))
    run = ut.Run(tmp_path / "run")
    assert [(r["batch"], r["optimizer"]) for r in run.table("steps").to_pylist()] == [
        (b, o) for b in (0, 1) for o in (0, 1)
    ]
    updates = {row["site"] for row in run.table("norm").to_pylist() if row["phase"] == "update"}
    assert updates == {name for name, _ in Two().named_parameters()}


def test_what_cannot_be_recorded_is_said_before_the_first_step(tmp_path):
    x, y = noise(8)
    with pytest.raises(ut.InputError, match=r"optimiser= is no option.*\(there are sites, measures"):
        GradientRecorder(tmp_path, optimiser=None)
    with pytest.raises(ut.InputError, match="select nothing"):
        trainer(tmp_path, recorder(tmp_path / "run", sites="convolution")).fit(Lit(), loader(x, y))
    with pytest.raises(ut.InputError, match="samples='path' is not in the batch, one with x, y, name"):
        trainer(tmp_path, recorder(tmp_path / "named", samples="path")).fit(Lit(), loader(x, y))


def test_options_are_those_of_record_and_a_tracker_may_be_one(tmp_path):
    assert set(RecordOptions.__annotations__) < set(inspect.signature(ut.record).parameters)
    x, y = noise(8)
    trainer(tmp_path, recorder(tmp_path / "run", to=f"tensorboard:{tmp_path / 'tb'}")).fit(Lit(), loader(x, y))
    assert ut.export(tmp_path / "run", "tensorboard", tmp_path / "tb").portions == 0
    assert list((tmp_path / "tb").glob("*tfevents*"))


def test_a_schedule_that_wants_nothing_is_a_warning_at_the_end(tmp_path):
    x, y = noise(8)
    own = recorder(tmp_path / "run", schedule=ut.Schedule(epoch=7))
    with warnings.catch_warnings(record=True) as caught:  # pytest.warns would tell those of Lightning anew
        warnings.simplefilter("always")
        trainer(tmp_path, own).fit(Lit(), loader(x, y))
    [message] = [str(one.message) for one in caught if one.category is ut.UndertowWarning]
    assert "did not end as it should" in message
    assert "the schedule wanted none of 2 batches" in message


def test_a_compiled_module_is_not_recorded_in_silence(tmp_path):
    x, y = noise(8)
    module = Lit()
    module.net = torch.compile(module.net, backend="eager")
    with pytest.raises(ut.ModelError, match="compiled"):
        trainer(tmp_path, recorder(tmp_path / "run")).fit(module, loader(x, y))


DDP = """
import sys
import warnings
from pathlib import Path
from training.test_lightning import *
from lightning.pytorch.strategies import DDPStrategy

x, y = noise(24)
own = recorder(Path(sys.argv[1]), sites="conv", measures=["channel-norm"], on_finding=None)
strategy = DDPStrategy(process_group_backend="gloo")
lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=[own], max_epochs=1, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                  default_root_dir=sys.argv[1] + "-root").fit(Lit(), loader(x, y, 4))
"""


@pytest.mark.slow
def test_two_processes_of_ddp_leave_one_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP)
    here = [str(Path(__file__).parents[1]), str(Path(ut.__file__).parents[1])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(here),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert run.manifest["world_size"] == 2
    assert run.check().whole
    rows = run.table("channel_norm").to_pylist()
    assert {row["rank"] for row in rows} == {0, 1}
    x, y = noise(24)
    first = [row for row in rows if row["batch"] == 0]
    net = SmallNet()
    with ut.record(tmp_path / "alone", net, sites="conv", measures="channel-norm") as recording:
        for rank in (0, 1):  # each process's own mean; the weights are the first ones
            names = list(dict.fromkeys(row["name"] for row in first if row["rank"] == rank))
            chosen = torch.tensor([int(name.removesuffix(".png")) for name in names])
            assert len(chosen) == 4
            with recording.batch(samples=names):
                F.cross_entropy(net(x[chosen]), y[chosen]).backward()
    wanted = ut.Run(tmp_path / "alone").table("channel_norm").to_pylist()
    twins = {(row["name"], row["site"]): row["values"] for row in wanted}
    assert len(first) == len(twins) == 2 * 8
    for row in first:
        twin = twins[row["name"], row["site"].removeprefix("net.")]
        np.testing.assert_allclose(row["values"], twin, rtol=1e-4, atol=1e-7)
