"""Recording: what is read at each site of awkward networks, against twins that are out of place and hook-free."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import undertow as ut
from undertow.errors import InputError, ModelError, RunError
from undertow.frameworks.torch.record.axes import Layouts, arranged
from undertow.frameworks.torch.record.probe import Probe
from undertow.frameworks.torch.zoo.importing import import_torchvision
from undertow.measures import ChannelNorm, Histogram, Keep, Measure, ZeroFraction
from undertow.recording import Schedule, record, writer
from undertow.runs import Run


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """No test leaves a thread of ours, nor changes the random state for the next."""
    before = set(threading.enumerate())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("undertow")]


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


STATISTICS = (ChannelNorm(), ZeroFraction(), Histogram())


def probed(model, run, sites=None, phases=("backward", "forward"), scaler=None):
    """Run once under a probe of the modules named, or of all; return tensors by (site, call, output, phase, repeat).

    A second probe, whose measures take statistics, must see the same tensors.
    """
    modules = {name: module for name, module in model.named_modules() if name and (sites is None or name in sites)}
    with (
        Probe(modules, (Keep(),), frozenset(phases), scaler) as probe,
        Probe(modules, STATISTICS, frozenset(phases), scaler) as beside,
    ):
        run()
    assert not hooks_on(model)
    kept, measured = ({(*astuple(o.key), o.repeat): o for o in p.transfer(()).wait()} for p in (probe, beside))
    assert list(kept) == list(measured)
    tensors, layouts = {}, Layouts(modules, {})
    for key, observation in kept.items():
        assert (observation.dtype, observation.size) == (measured[key].dtype, measured[key].size)
        [values] = Keep().finish(observation.states[0])["file"]
        tensors[key] = torch.from_numpy(values)
        if observation.dtype != "bfloat16":  # whose bits were kept
            site, _, output, *_ = key
            x = arranged(modules[site], tensors[key], layouts.of(site, output, tensors[key].shape)).numpy()
            for measure, state in zip(STATISTICS, measured[key].states, strict=True):
                columns, wanted = measure.finish(state), measure.finish(measure.reduce(x))
                assert list(columns) == list(wanted)
                for column in wanted:
                    np.testing.assert_allclose(
                        np.asarray(columns[column]), np.asarray(wanted[column]), rtol=1e-4, equal_nan=True
                    )
    return tensors


def out_of_place(model):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def by_retain_grad(model, run, kind=nn.Conv2d):
    """The independent twin: outputs kept, their gradients retained, of a network that works out of place."""
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, kind)]
    run()
    for handle in handles:
        handle.remove()
    return {name: (output.grad, output.detach()) for name, output in outputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "resnet50"])
def test_in_place_networks_equal_an_out_of_place_copy_to_the_last_bit(name):
    model = getattr(import_torchvision().models, name)(num_classes=5).eval()
    twin, x = out_of_place(model), torch.randn(2, 3, 40, 36)
    assert any(getattr(module, "inplace", False) for module in model.modules())
    wanted = by_retain_grad(twin, lambda: twin(x).square().sum().backward())
    found = probed(model, lambda: model(x).square().sum().backward(), sites=wanted)
    assert len(wanted) == {"vgg16": 13, "vgg16_bn": 13, "resnet50": 53}[name]
    assert len(found) == 2 * len(wanted)
    for site, (gradient, output) in wanted.items():
        assert torch.equal(found[site, 0, "", "backward", 0], gradient), site
        assert torch.equal(found[site, 0, "", "forward", 0], output), site
        assert gradient.abs().sum() > 0


class Segments(nn.Module):
    """Two modules, each used several times, in segments that may be checkpointed, and checkpointed within."""

    def __init__(self, mode=None, nested=False):
        super().__init__()
        self.a, self.b, self.mode, self.nested = nn.Linear(4, 4), nn.Linear(4, 4), mode, nested

    def maybe(self, segment, x):
        return segment(x) if self.mode is None else checkpoint(segment, x, use_reentrant=self.mode)

    def inner(self, x):
        return self.b(torch.tanh(self.a(x)))

    def segment(self, x):
        y = self.maybe(self.inner, x) if self.nested else self.b(torch.relu_(self.a(x)))
        return self.a(y) + self.b(y * 2)

    def forward(self, x):
        with torch.no_grad():
            self.a(x)  # a call without a graph, before and after
        for _ in range(2):
            x = self.maybe(self.segment, x)
        with torch.no_grad():
            self.b(x)
        return self.a(x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_are_recorded_once_each_under_its_own_number(reentrant, nested):
    plain, x = Segments(nested=nested), torch.randn(3, 4, requires_grad=True)
    model = Segments(reentrant, nested)
    model.load_state_dict(plain.state_dict())
    wanted = probed(plain, lambda: plain(x).square().sum().backward())
    found = probed(model, lambda: model(x).square().sum().backward())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert {key[1] for key in wanted if key[0] == "a" and key[3] == "backward"} == {1, 2, 3, 4, 5}


class Several(nn.Module):
    """Gives a dictionary with a tuple, whole numbers and text in it."""

    def forward(self, x):
        return {"logits": x * 2, "hidden": (x * 3, [x.exp()]), "ids": torch.arange(3), "text": "no tensor"}


def test_several_outputs_each_have_their_place():
    model = nn.Sequential(nn.Linear(3, 3), Several())
    x = torch.randn(2, 3)

    def run():
        out = model(x)
        (out["logits"].sum() + 5 * out["hidden"][1][0].sum()).backward()

    found = probed(model, run, sites=["1"])
    assert {key[2] for key in found if key[3] == "forward"} == {"logits", "hidden.0", "hidden.1.0"}
    assert {key[2]: float(value[0, 0]) for key, value in found.items() if key[3] == "backward"} == {
        "logits": 1.0,
        "hidden.1.0": 5.0,
    }


def test_each_output_of_a_recurrent_layer_is_kept_as_it_is():
    model = nn.Sequential(nn.LSTM(3, 5, batch_first=True))
    found = probed(model, lambda: model(torch.randn(2, 7, 3))[0].square().sum().backward())
    assert found["0", 0, "0", "backward", 0].shape == (2, 7, 5)
    assert {key[2] for key in found if key[3] == "forward"} == {"0", "1.0", "1.1"}


class InPlaceLater(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(4, 6), change

    def forward(self, x):
        return self.change(self.layer(x))


def on_a_part(y):
    y[..., :2].mul_(3.0)
    return y


CHANGES = {
    "relu_": (F.relu_, F.relu),
    "mul_": (lambda y: y.mul_(2.0), lambda y: y * 2.0),
    "+=": (lambda y: y.__iadd__(y.detach() * 2 + 1), lambda y: y + (y.detach() * 2 + 1)),
    "sigmoid_": (lambda y: y.sigmoid_(), lambda y: y.sigmoid()),
    "part": (on_a_part, lambda y: torch.cat([y[..., :2] * 3.0, y[..., 2:]], -1)),
    "index": (lambda y: y.index_fill_(-1, torch.tensor([1]), 0.0), lambda y: y * torch.tensor([1.0, 0, 1, 1, 1, 1])),
}


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_values_are_those_before_an_in_place_successor(change, axes):
    inside, outside = (InPlaceLater(one) for one in CHANGES[change])
    outside.load_state_dict(inside.state_dict())
    x = torch.randn((3, 4) if axes == 2 else (3, 4, 4))
    (wanted,) = by_retain_grad(outside, lambda: outside(x).square().sum().backward(), nn.Linear).values()
    found = probed(inside, lambda: inside(x).square().sum().backward())
    for phase, value in zip(("backward", "forward"), wanted, strict=True):
        assert torch.equal(found["layer", 0, "", phase, 0], value), phase


def test_an_in_place_module_is_read_after_its_own_work():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    found = probed(model, lambda: (3 * model(torch.randn(2, 3))).sum().backward())
    assert torch.equal(found["1", 0, "", "backward", 0], torch.full((2, 4), 3.0))
    assert (found["1", 0, "", "forward", 0] >= 0).all()
    assert (found["0", 0, "", "forward", 0] < 0).any()


def test_a_module_that_hands_on_its_input_has_the_same_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Dropout(0.0))
    found = probed(model, lambda: (2 * model(torch.randn(2, 3))).sum().backward())
    assert len({tuple(v.flatten().tolist()) for key, v in found.items() if key[3] == "backward"}) == 1


def test_backward_twice_is_recorded_twice_and_a_penalty_too():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3, requires_grad=True)

    def run():
        y = model(x)
        y.sum().backward(retain_graph=True)
        (7 * y).sum().backward()

    found = probed(model, run, phases=["backward"])
    assert {key[4]: float(value[0, 0]) for key, value in found.items()} == {0: 1.0, 1: 7.0}

    def penalty():
        (slope,) = torch.autograd.grad(model(x).exp().sum(), x, create_graph=True)
        slope.square().sum().backward()

    found = probed(model, penalty, phases=["backward"])
    assert not any(value.requires_grad for value in found.values())


def test_evaluation_passes_record_nothing_in_backward_phase():
    model = nn.Sequential(nn.Linear(3, 2))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not probed(model, lambda: model(torch.randn(2, 3)), phases=["backward"])
            assert len(probed(model, lambda: model(torch.randn(2, 3)), phases=["forward"])) == 1


def test_a_pass_of_another_thread_is_not_recorded():
    model = nn.Sequential(nn.Linear(3, 2))

    def run():
        other = threading.Thread(target=lambda: model(torch.randn(9, 3)).sum().backward())
        other.start()
        other.join()
        model(torch.randn(2, 3)).sum().backward()

    assert {tuple(value.shape) for value in probed(model, run).values()} == {(2, 2)}


def test_two_threads_record_one_model_into_two_runs(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)).eval()

    def work(name, size):
        with record(tmp_path / name, model, measures="channel-norm", loss_reduction="sum") as recording:
            for number in range(20):
                with recording.batch(samples=range(size)):
                    model(torch.full((size, 1, 5, 5), number + 1.0)).sum().backward()

    threads = [threading.Thread(target=work, args=pair) for pair in (("a", 2), ("b", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [Run(tmp_path / name).table("channel_norm").num_rows for name in "ab"] == [40, 60]


def test_a_single_sample_without_a_batch_axis():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    found = probed(model, lambda: model(torch.randn(1, 5, 5)).sum().backward())
    assert found["0", 0, "", "backward", 0].shape == (2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept_as_they_are(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4)).to(dtype).eval()
    x = torch.randn(2, 3).to(dtype)
    with record(tmp_path, model, sites="linear", measures=["keep", "histogram"]) as recording, recording.batch():
        model(x).square().sum().backward()
    y = model(x)
    wanted = torch.autograd.grad(y.square().sum(), y)[0]
    run = Run(tmp_path)
    assert torch.equal(torch.from_numpy(run.tensor()).to(dtype), wanted)
    assert run.table("kept")["dtype"].to_pylist() == [str(dtype).removeprefix("torch.")]


class Scaler:
    """Stands in for `torch.amp.GradScaler`, whose own class is tried beside it, with a scale that changes."""

    def __init__(self, scale):
        self._scale = torch.tensor(scale)

    def is_enabled(self):
        return True

    def _get_scale_async(self):
        return self._scale


def test_the_scale_of_amp_is_divided_out(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4)).eval()
    x = torch.randn(2, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with record(tmp_path, model, sites="linear", measures=["keep", "moments"], scaler=scaler) as recording:
        for _ in range(2):
            with recording.batch(), torch.autocast("cpu", torch.bfloat16):
                scaler.scale(model(x).float().square().sum()).backward()
    run = Run(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        wanted = torch.autograd.grad(y.float().square().sum(), y)[0].float()
    for row, found in run.tensors():
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=2e-2, atol=1e-3)
        assert row["dtype"] == "float32"
    assert run.table("batches")["scale"].to_pylist() == [1024.0, 1024.0]


@pytest.mark.parametrize("given", [False, True])
def test_a_scaler_that_was_forgotten_is_asked_for(tmp_path, given):
    model, scaler = nn.Sequential(nn.Linear(3, 4)), torch.amp.GradScaler("cpu", init_scale=4.0)
    with (
        warnings.catch_warnings(record=True) as caught,
        recorded(tmp_path, model, scaler=scaler if given else None) as r,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            with r.batch(), torch.autocast("cpu", torch.float16):
                scaler.scale(model(torch.randn(2, 3)).float().sum()).backward()
    assert ["pass record(..., scaler=scaler)" in str(one.message) for one in caught] == ([] if given else [True])


def test_the_scale_is_that_of_the_moment():
    model, scaler, x = nn.Sequential(nn.Linear(3, 4)), Scaler(8.0), torch.randn(2, 3)

    def run():
        (8 * model(x).square().sum()).backward()
        scaler._scale.fill_(2.0)  # as an update does, in place

    torch.testing.assert_close(probed(model, run, scaler=scaler)["0", 0, "", "backward", 0], 2 * model(x).detach())


@contextmanager
def recorded(folder, model, **more):
    with record(folder, model, **{"sites": "linear", "measures": "zero-fraction", **more}) as recording:
        yield recording


def tiny():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def backward(model, size=2):
    model(torch.randn(size, 3)).sum().backward()


def test_slices_follow_the_execution_of_the_first_batch(tmp_path):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x))

    model = Turned()
    with recorded(tmp_path, model, sites="linear[:1]") as recording:
        for _ in range(2):
            with recording.batch():
                backward(model)
    assert Run(tmp_path).sites == ["first"]
    assert set(Run(tmp_path).table("zero_fraction")["site"].to_pylist()) == {"first"}


def test_hooks_are_there_for_scheduled_batches_alone(tmp_path):
    model, seen = tiny(), []
    with recorded(tmp_path, model, schedule=Schedule(epoch=-1, first=2, epochs=2)) as recording:
        assert not hooks_on(model)
        for epoch in range(2):
            for _ in range(3):
                with recording.batch(epoch=epoch) as live:
                    seen.append((live, hooks_on(model) > 0))
                    backward(model)
                assert not hooks_on(model)
    assert seen == [(False, False)] * 3 + [(True, True)] * 2 + [(False, False)]
    assert Run(tmp_path).table("batches").select(["epoch", "batch"]).to_pylist() == [
        {"epoch": 1, "batch": 0},
        {"epoch": 1, "batch": 1},
    ]


def test_an_exception_in_the_loop_leaves_a_clean_model_and_a_readable_run(tmp_path):
    model = tiny()

    def loop():
        with recorded(tmp_path, model) as recording:
            for number in range(3):
                with recording.batch():
                    backward(model)
                    if number == 2:
                        raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert not hooks_on(model)
    run = Run(tmp_path)
    assert not run.finished
    assert run.table("zero_fraction").num_rows == 4


def test_a_hook_that_cannot_be_set_leaves_none():
    model = tiny()

    class Odd:
        def register_forward_hook(self, hook):
            raise RuntimeError("not me")

    with (
        pytest.raises(RuntimeError, match="not me"),
        Probe({"0": model[0], "x": Odd()}, (Keep(),), frozenset(["forward"])),
    ):
        pass
    assert not hooks_on(model)


def test_a_measure_that_fails_is_heard_of(tmp_path):
    class Failing(Measure):
        name, columns = "failing", {"value": "float64"}

        def init(self):
            return {}

        def reduce(self, x, start=0):
            return {"value": x.sum()}

        def merge(self, a, b):
            return a

        def finish(self, state):
            raise ZeroDivisionError("in finish")

    model = tiny()
    with (
        pytest.raises(RunError, match="in finish"),
        recorded(tmp_path, model, measures=Failing()) as recording,
        recording.batch(),
    ):
        backward(model)


def test_a_measure_of_ones_own_is_one_class(tmp_path):
    class Largest(Measure):
        name, columns = "largest", {"value": "float64"}

        def init(self):
            return {"value": torch.tensor(0.0).numpy()}

        def reduce(self, x, start=0):
            return {"value": abs(x).max()}

        def merge(self, a, b):
            return {"value": max(a["value"], b["value"])}

        def finish(self, state):
            return {"value": [float(state["value"])]}

    model = tiny()
    with recorded(tmp_path, model, measures=Largest()) as recording, recording.batch():
        (3 * model(torch.randn(2, 3))).sum().backward()
    assert Run(tmp_path).table("largest")["value"].to_pylist()[1] == 3.0


def test_modules_never_reached_are_said(tmp_path):
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "cut": nn.Linear(3, 2)})

    def loop():
        with recorded(tmp_path, model) as recording:
            assert recording.unreached == {}
            with recording.batch():
                (model["used"](torch.randn(2, 3)) + model["cut"](torch.randn(2, 3)).detach()).sum().backward()
            return recording.unreached

    with pytest.warns(UserWarning, match="2 of 3 sites were not recorded"):
        assert loop() == {
            "idle": "its module was never called",
            "cut": "no gradient reached its output inside a batch",
        }
    assert set(Run(tmp_path).manifest["unreached"]) == {"idle", "cut"}


def test_a_view_changed_in_place_is_said(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU(inplace=True))
    with (
        pytest.warns(UserWarning, match="take the module before it"),
        record(tmp_path, model, sites="conv, Flatten", measures="moments") as recording,
        recording.batch(),
    ):
        model(torch.randn(2, 1, 4, 4)).sum().backward()


def test_recording_nothing_is_an_error(tmp_path):
    model = tiny()
    never = Schedule(epoch=5)
    with (
        pytest.raises(InputError, match="schedule wanted none"),
        recorded(tmp_path / "a", model, schedule=never) as recording,
        recording.batch(),
    ):
        backward(model)
    with pytest.raises(InputError, match=r"put `with recording.batch"), recorded(tmp_path / "b", model):
        pass

    def forgets_the_backward_pass():
        with recorded(tmp_path / "c", model) as recording:
            for said in (pytest.warns(UserWarning, match="nothing was recorded of batch 0"), nullcontext()):
                with said, recording.batch():  # at once, and no second time
                    model(torch.randn(2, 3))

    with pytest.raises(InputError, match=r"call .backward\(\)"):
        forgets_the_backward_pass()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"phase": "sideways"}, "phase 'sideways'"),
        ({"loss_reduction": "none"}, "loss_reduction"),
        ({"sites": "conv"}, "select nothing"),
        ({"measures": "norms"}, "unknown measure"),
        ({"group": 0}, "group=0"),
    ],
)
def test_arguments_are_checked_before_anything_is_made(tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        record(tmp_path / "run", tiny(), **{"sites": "linear", **more})
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be(tmp_path):
    model = tiny()
    with recorded(tmp_path, model) as recording:
        with pytest.raises(InputError, match="one text"), recording.batch(samples="abc"):
            pass
        with recording.batch(epoch=1, batch=7):
            backward(model)
            with pytest.raises(InputError, match="leave it"), recording.batch():
                pass
        with pytest.raises(InputError, match="recorded already"), recording.batch(epoch=1, batch=7):
            pass
        with recording.batch(epoch=1):
            backward(model)
    assert Run(tmp_path).table("batches")["batch"].to_pylist() == [7, 8]
    with pytest.raises(InputError, match="not open"), recording.batch():
        pass


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": -1}, "say how many"),
        ({"epoch": 3, "epochs": 3}, "beyond"),
        ({"first": 0}, "first=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"epoch": "last"}, "whole number"),
    ],
)
def test_schedules_that_cannot_be(values, said):
    with pytest.raises(InputError, match=said):
        Schedule(**values)


def test_schedules():
    every = Schedule(every=3, first=2)
    assert [n for n in range(20) if every.wants(0, n)] == [0, 3]
    several = Schedule(epoch=[0, -1], epochs=4)
    assert [n for n in range(4) if several.wants(n, 0)] == [0, 3]


def test_names_of_samples_and_gradient_accumulation(tmp_path):
    model = tiny()
    with recorded(tmp_path, model, measures="channel-norm") as recording:
        for part in torch.tensor([[3, 1], [4, 1]]):
            with recording.batch(samples=part):
                (model(torch.randn(2, 3)).mean() / 2).backward()
    table = Run(tmp_path).table("channel_norm")
    assert table["name"].to_pylist() == ["3", "1"] * 2 + ["4", "1"] * 2
    assert table["batch"].to_pylist() == [0] * 4 + [1] * 4


def test_a_first_axis_that_is_not_the_samples_has_no_names(tmp_path):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x.flatten(0, 1))

    model = Folded()
    with (
        pytest.warns(UserWarning, match="no names at layer: its first axis is 10 long, and there are 2 names"),
        recorded(tmp_path, model, measures="channel-norm") as recording,
        recording.batch(samples=["a", "b"]),
    ):
        model(torch.randn(2, 5, 3)).sum().backward()
    assert Run(tmp_path).table("channel_norm")["name"].to_pylist() == [None] * 10


def test_a_wrapper_does_not_change_names(tmp_path):
    model = nn.DataParallel(tiny())
    with recorded(tmp_path, model) as recording, recording.batch():
        backward(model.module)
    assert Run(tmp_path).sites == ["0", "2"]


def test_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="never fire"):
        recorded(tmp_path, torch.compile(tiny(), backend="eager")).__enter__()


@pytest.mark.slow
def test_histograms_of_real_gradients(tmp_path):
    """Exact quantiles of the kept tensors against those of the histograms."""
    features = import_torchvision().models.vgg16(num_classes=5).features[:17]
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(256 * 16, 5)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        model, folder = model.to(dtype), tmp_path / str(dtype)
        with record(folder, model, measures=["keep", "histogram"], loss_reduction="sum") as recording:
            for seed in range(2):
                x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
                with recording.batch():
                    model(x).float().logsumexp(1).sum().backward()
        run, q = Run(folder), [0.0, 0.05, 0.5, 0.7, 0.9, 0.999, 1.0]
        for of in ("magnitude", "value"):
            for found in run.quantiles(q, of=of):
                kept = torch.cat([torch.from_numpy(a).flatten() for _, a in run.tensors(site=found.site)]).double()
                kept = (kept.abs() if of == "magnitude" else kept).sort().values
                places = [max(0, -int(-fraction * len(kept) // 1) - 1) for fraction in q]
                wanted = kept[places].tolist()
                tolerance = 0 if dtype == torch.bfloat16 else 2.0**-8
                assert found.count == len(kept)
                assert found.zeros == int((kept == 0).sum())
                for one, other in zip(found.values, wanted, strict=True):
                    assert abs(one - other) <= tolerance * abs(other)


@pytest.mark.slow
def test_memory_is_flat_over_many_batches(tmp_path):
    model = tiny()
    refs, held = [], []
    with recorded(tmp_path, model, measures=["channel-norm", "histogram"], group=8) as recording:
        for number in range(60):
            with recording.batch(samples=["a", "b"]):
                y = model(torch.randn(2, 3))
                refs.append(weakref.ref(y))
                y.sum().backward()
                del y
            if number in (20, 59):
                recording.flush()
                gc.collect()
                held.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert not any(ref() for ref in refs[:-1])
    assert held[1] <= held[0]


def soon(true):
    """Wait until the thread that writes has come so far."""
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_what_is_kept_does_not_wait_in_memory_for_its_group(tmp_path, monkeypatch):
    model = tiny()
    monkeypatch.setattr(writer, "_HANDOVER_BYTES", 3 * ((16 + 2 * 4 * 4) + (16 + 2 * 2 * 4)))  # of three batches
    with recorded(tmp_path, model, measures="keep", group=1000) as recording:
        for number in range(5):
            with recording.batch():
                backward(model)
            if number in (1, 4):
                time.sleep(0.2)
                assert soon(lambda here=2 * 3 * (number > 1): len(list(tmp_path.glob("tensors/*"))) == here)
        assert Run(tmp_path).tables == []
    assert Run(tmp_path).table("batches").num_rows == 5


@pytest.mark.parametrize(("measure", "least"), [("channel-norm", 4 * 2 * (4 + 2)), ("histogram", 10)])
def test_a_group_is_published_where_it_grows_large(tmp_path, monkeypatch, measure, least):
    monkeypatch.setattr(writer, "_GROUP_BYTES", 3 * least)
    with recorded(tmp_path, tiny(), measures=measure, group=1000) as recording:
        for _ in range(6):
            with recording.batch():
                backward(recording.model)
    parts = len(list(tmp_path.glob("batches/part-*")))
    assert parts == 2 if measure == "channel-norm" else parts > 2


def test_the_thread_that_writes_has_the_ordinary_priority(tmp_path):
    """With a lower one, the training waits for it wherever the processors are busy."""
    with recorded(tmp_path, tiny()) as recording, recording.batch():
        backward(recording.model)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "undertow-writer"]
        priorities = [os.getpriority(os.PRIO_PROCESS, t.native_id) for t in (thread, threading.main_thread())]
        assert priorities[0] == priorities[1]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("diagnose", [False, 1])
@pytest.mark.parametrize("way", COPIES)
def test_a_model_can_be_copied_inside_a_batch_and_the_copy_is_not_recorded(way, diagnose, tmp_path):
    model, x = tiny(), torch.randn(2, 3)
    with recorded(tmp_path, model, measures="keep", diagnose=diagnose) as recording, recording.batch():
        before = COPIES[way](model)
        y = model(x)
        between = COPIES[way](model)
        y.sum().backward()
        for twin in (before, between, COPIES[way](model)):
            assert torch.equal(twin(x), y)
            twin(x).sum().backward()
    run = Run(tmp_path)
    assert run.table("kept").num_rows == 2
    assert torch.equal(torch.from_numpy(run.tensor(site="2")), torch.ones(2, 2))


@pytest.mark.slow
def test_a_copy_made_inside_a_batch_loads_without_undertow(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    with recorded(tmp_path / "run", model) as recording, recording.batch():
        torch.save(model, tmp_path / "model.pt")
        backward(model)
    code = (
        "import sys, torch; sys.modules['undertow'] = None\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(tuple(model(torch.ones(1, 3)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(1, 2)\n", done.stderr


@pytest.mark.parametrize("through", ["swap", "hook"])
def test_explain_works_on_copies_inside_a_batch(through, tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3)
    wanted = ut.explain(model, x, through=through, target=0).values
    with recorded(tmp_path, model) as recording, recording.batch():
        backward(model)
        assert torch.equal(ut.explain(model, x, through=through, target=0).values, wanted)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("measure", [Keep(), ChannelNorm()], ids=["kept", "measured"])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_hooks_of_others_on_the_same_tensor_stay_and_ours_go(first, measure, inplace):
    conv, seen = nn.Conv2d(1, 2, 3), []

    def theirs(module, args, output):
        output.register_hook(lambda gradient: seen.append("theirs"))

    if first == "theirs":
        conv.register_forward_hook(theirs)
    with Probe({"0": conv}, (measure,), frozenset({"backward"})) as probe:
        if first == "ours":
            conv.register_forward_hook(theirs)
        loss = nn.ReLU(inplace)(conv(torch.ones(1, 1, 4, 4))).square().sum()
        loss.backward(retain_graph=True)
        assert (len(seen), len(probe.observations)) == (1, 1)
    loss.backward()
    assert (len(seen), len(probe.observations)) == (2, 1)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "measured"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_gradient_that_is_negative_only_by_name(kept, samples):
    """The gradient of a conjugate's imaginary part: its memory holds the opposite of what it says."""
    conv = nn.Conv2d(1, 1, 3)
    with Probe({"0": conv}, (Keep() if kept else ChannelNorm(),), frozenset({"backward"})) as probe:
        seen, output = [], conv(torch.ones(samples, 1, 3, 3))
        output.register_hook(lambda gradient: seen.append((gradient.is_neg(), gradient.clone())))
        torch.complex(torch.ones_like(output), output).conj().abs().sum().backward()
    [(negative, wanted)] = seen
    assert negative
    [observation] = probe.transfer(()).wait()
    [found] = probe.measures[0].finish(observation.states[0]).values()
    np.testing.assert_allclose(found[0] if kept else found, wanted if kept else wanted.abs()[..., 0, 0])


def test_what_is_recorded_slowly_is_published_in_time(tmp_path, monkeypatch):
    """Ten seconds after the first batch that waits, however long there was none before it."""
    model, now = tiny(), [1000.0]
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with recorded(tmp_path, model, group=1000) as recording:
        for seconds, published in ((0, 0), (6, 0), (5, 3), (100, 3), (9, 3), (2, 6)):
            now[0] += seconds
            with recording.batch():
                backward(model)
            recording._writer._hand_over(False).done.wait()
            assert Run(tmp_path).table("batches").num_rows == published


def test_warnings_of_torch_are_not_ours(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny()
        with recorded(tmp_path, model, measures=["keep:sample"]) as recording, recording.batch(samples=["a", "b"]):
            backward(model)
    assert len(list(Path(tmp_path, "tensors").iterdir())) == 4
