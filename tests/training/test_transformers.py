"""Recording in the Trainer of transformers: the rows of a loop by hand; and under Accelerate."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from training.loops import (
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
from undertow.transformers import GradientRecorder  # imports torchvision where transformers fails to

from accelerate import Accelerator  # isort: skip
from transformers import Trainer, TrainingArguments  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:accelerate", "ignore::UserWarning:transformers")


class WithLoss(nn.Module):
    """A network that returns its loss, as the Trainer wants it; the step `breaks_at` fails."""

    def __init__(self, net=None, scale=1.0, breaks_at=None):
        super().__init__()
        self.net, self.scale, self.breaks_at, self.calls = net or SmallNet(), scale, breaks_at, 0

    def forward(self, x, labels=None, name=None):
        self.calls += self.training
        if self.calls == self.breaks_at:
            raise ZeroDivisionError("as a training may")
        scores = self.net(x)
        return {"loss": self.scale * F.cross_entropy(scores, labels), "logits": scores}


class InOrder(Trainer):
    """Takes the samples in order, as the loop by hand does."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(tmp_path, recorder, model, x, y, resume=None, size=4, compiled=False, **options):
    data = [{"x": x[i], "labels": y[i], "name": i} for i in range(len(x))]
    usual = {"num_train_epochs": 1, "save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=size,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{**usual, **options},
    )
    trainer = InOrder(
        model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[recorder], optimizers=(sgd(model), None)
    )
    arguments.torch_compile = compiled  # given above it would also set variables of this process
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorder(folder, **options):
    def names(inputs):
        return [f"{i}.png" for i in inputs["name"].tolist()]

    return GradientRecorder(folder, **{"sites": SITES, "measures": MEASURES, "samples": names, **options})


def test_fashion_mnist_gives_the_rows_of_a_loop_by_hand(tmp_path):
    x, y = fashion_mnist(24 * 16)
    wanted, by_hand = plain_loop(tmp_path / "plain", x, y, size=16)
    model = WithLoss(SmallNet(28))
    train(tmp_path, recorder(tmp_path / "run"), model, x, y, size=16)
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert run.check().whole
    assert run.table("batches").num_rows == 24
    assert_same_rows(run, wanted, "net.")
    for ours, theirs in zip(model.net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_accumulation_clipping_evaluation_and_checkpointing(tmp_path):
    x, y = noise(24)
    wanted, _ = plain_loop(
        tmp_path / "plain", x, y, size=4, epochs=2, accumulate=2, clip=0.05, network=SmallNet(checkpointed=True)
    )
    model, own = WithLoss(SmallNet(checkpointed=True)), recorder(tmp_path / "run", diagnose=2)
    around = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "num_train_epochs": 2}
    train(tmp_path, own, model, x, y, eval_strategy="steps", eval_steps=1, **around)
    run = ut.Run(tmp_path / "run")
    assert_same_rows(run, wanted, "net.")
    norms = {(r["phase"], r["site"], r["batch"]): r["norm"] for r in run.table("norm").to_pylist() if r["epoch"] == 0}
    assert norms["gradient", "net.first.weight", 0] < norms["accumulated", "net.first.weight", 0]
    assert_nothing_stays(model)


def test_bfloat16(tmp_path):
    x, y = noise(8)
    wanted, _ = plain_loop(tmp_path / "plain", x, y, size=4)
    train(tmp_path, recorder(tmp_path / "run"), WithLoss(), x, y, bf16=True)
    run = ut.Run(tmp_path / "run")
    assert {r["dtype"] for r in run.table("norm").to_pylist() if r["site"] == "net.second"} == {"bfloat16"}
    assert_same_rows(run, wanted, "net.", rtol=0.3, atol=0.02)


def test_an_error_leaves_a_run_that_the_same_training_goes_on_with(tmp_path):
    x, y = noise(16)
    wanted, _ = plain_loop(tmp_path / "plain", x, y, size=4, epochs=3)
    broken, saving = WithLoss(breaks_at=7), {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    with pytest.raises(ZeroDivisionError), recorder(tmp_path / "run") as own:
        train(tmp_path, own, broken, x, y, **saving)
    assert_nothing_stays(broken)
    half = ut.Run(tmp_path / "run")
    assert not half.finished
    assert half.table("batches").num_rows == 6
    checkpoint = str(tmp_path / "out" / "checkpoint-5")  # in the midst of an epoch
    train(tmp_path, own, WithLoss(), x, y, resume=checkpoint, **saving)
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert_same_rows(run, wanted, "net.")
    with pytest.raises(ut.RunError, match="is a finished run; choose another folder"):
        train(tmp_path, own, WithLoss(), x, y)


def test_the_same_callback_closes_what_an_error_left_open(tmp_path):
    x, y = noise(16)
    broken, own = WithLoss(breaks_at=3), recorder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, own, broken, x, y)
    train(tmp_path, own, WithLoss(), x, y)
    assert_nothing_stays(broken)
    run = ut.Run(tmp_path / "run")
    assert run.finished
    assert run.table("batches")["batch"].to_pylist() == [0, 1, 2, 3]


DIES = """
import sys
from pathlib import Path
from training.test_transformers import *

x, y = noise(16)
own = recorder(Path(sys.argv[1]) / "run")
train(Path(sys.argv[1]), own, WithLoss(breaks_at=3), x, y)
"""


@pytest.mark.slow
def test_a_process_that_ends_by_an_error_publishes_what_it_recorded(tmp_path):
    paths = ":".join([*sys.path[:0], str(ut.__path__[0] + "/.."), str(__file__).rpartition("/training/")[0]])
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    done = subprocess.run(command, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert "ZeroDivisionError: as a training may" in done.stderr
    run = ut.Run(tmp_path / "run")
    assert not run.finished
    assert run.check().whole
    assert run.table("batches")["batch"].to_pylist() == [0, 1]


def test_findings_go_to_the_trainers_logger_and_history(tmp_path, caplog):
    x, y = noise(16)
    own = recorder(tmp_path / "run", sites="conv", measures="norm", samples=None)
    trainer = train(tmp_path, own, WithLoss(scale=0.0), x, y)
    assert [(row["undertow"], row["step"]) for row in trainer.state.log_history if "undertow" in row] == [
        ("no-gradient", 1)
    ]
    assert [r.message.partition(":")[0] for r in caplog.records if r.name == "undertow"] == ["no-gradient"]
    model = WithLoss(scale=0.0)
    with pytest.raises(ut.FindingError, match="no-gradient"):
        train(tmp_path, recorder(tmp_path / "raised", on_finding="raise"), model, x, y)
    raised = ut.Run(tmp_path / "raised")
    assert not raised.finished
    assert raised.table("batches")["batch"].to_pylist() == [0]  # published at once


def test_a_compiled_training_is_refused(tmp_path):
    x, y = noise(8)
    with pytest.raises(ut.InputError, match="torch_compile=True runs past the hooks"):
        train(tmp_path, recorder(tmp_path / "run"), WithLoss(), x, y, compiled=True)


def test_accelerate(tmp_path):
    """The loop of docs/training.md: a batch for each micro-batch, clipped where the gradients are synchronised."""
    x, y = noise(16)
    wanted, _ = plain_loop(tmp_path / "plain", x, y, size=4, accumulate=2, clip=0.05)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = SmallNet()
    data = torch.utils.data.DataLoader([(x[i], y[i], f"{i}.png") for i in range(len(x))], 4)
    model, optimizer, data = accelerator.prepare(model, sgd(model), data)
    inner = accelerator.unwrap_model(model)
    options = {"measures": MEASURES, "optimizer": optimizer, "scaler": accelerator.scaler}
    with ut.record(tmp_path / "run", inner, sites=SITES, **options) as recording:
        for images, labels, names in data:
            with recording.batch(samples=names), accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
    run = ut.Run(tmp_path / "run")
    rows = {(r["batch"], r["site"], r["phase"]): r["norm"] for r in run.table("norm").to_pylist()}
    for row in wanted.table("norm").to_pylist():
        micro = 2 * row["batch"] + (row["call"] if row["phase"] == "backward" else 1)
        assert rows.pop((micro, row["site"], row["phase"])) == pytest.approx(row["norm"], rel=1e-4, abs=1e-7)
    assert not rows
