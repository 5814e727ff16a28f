"""Recording side by side: undertow, a plain bincount, wandb.watch, Lightning's norms, TorchLens, nansense.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/record.py --markdown benchmarks/record.md --images 250

Training: each method has its own copy of the network and its own optimizer. All take turns of a few steps in one
process, in a new random order each round; a figure is the median over rounds of the ratio to the plain steps of the
same round. Recordings are opened once, outside the timing; a turn ends when all that it recorded lies on the disk.
Parameters: the same for what steps make of parameters.
Pairs: the plain step and undertow's alone, so that neither follows another tool's, on one network, one step each in
turn, until a whole group of batches lies on the disk: as many as undertow would publish together, which are those of
ten seconds. Each round makes the network anew: one copy is up to 2 % slower
than another, as its memory happens to lie, and stays so. A watched batch is one that `diagnose=` watches: every 32nd by
default, so a run pays one part in 32 of what it adds. Findings: `on_finding=`, watching and looking at every 4th batch,
is held in the same way to a recording without it; every 100th, as it is by default, costs a 25th of what that adds.
glibc is told to keep freed memory, for all methods alike: else a step of the six convolutions takes 1,000 to 18,000
page faults, as its memory happens to lie, which is up to a quarter of its time.
In place: the gradients at convolutions of a network with `ReLU(inplace=True)`, as each tool reports them, against
those of a copy without. Images: batches of 4 against what one writes by hand, in turns of 16 images.
"""

import argparse
import copy
import ctypes
import logging
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import undertow as ut
from undertow.frameworks.torch.record.probe import Probe
from undertow.frameworks.torch.zoo.importing import import_torchvision

GROUP = 256  # batches that undertow publishes together at most
EVERY = 4  # batches between looks for findings; at the 100 of the default nothing would be seen
PAUSE = 0.1  # seconds between turns, for what another process still has to write
STEPS = (16, 8)  # of a turn among the peers, for each network
TURN, BATCH = 16, 4  # images
SECTIONS = ("training", "parameters", "pairs", "findings", "inplace", "images", "memory")


# --- networks --------------------------------------------------------------------------------------------------------


def stack(widths: tuple[int | str, ...], channels: int, norm: bool, inplace: bool, head: int) -> nn.Sequential:
    """Build 3x3 convolutions with ReLUs and, where "M" stands, max-pooling by 2."""
    layers: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] * norm + [nn.ReLU(inplace=inplace)]
        channels = width
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(head, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias, std=0.1)
    return net


SIX = (16, 16, 16, "M", 32, 32, 32, "M")
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


@dataclass
class Task:
    """One training to watch: a network, its optimizer and a batch."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def twin(self) -> "Task":
        return Task(copy.deepcopy(self.model), self.x, self.y)


def six_convolutions(size: int = 128) -> Task:
    torch.manual_seed(0)
    net = stack(SIX, 1, norm=False, inplace=False, head=32 * 7 * 7)
    return Task(net, torch.randn(size, 1, 28, 28), torch.randint(10, (size,)))


def vgg11(size: int = 16, norm: bool = False, side: int = 64) -> Task:
    torch.manual_seed(0)
    net = stack(VGG11, 3, norm, inplace=True, head=512 * (side // 32) ** 2)
    return Task(net, torch.randn(size, 3, side, side), torch.randint(10, (size,)))


def vgg16(size: int = 4) -> Task:
    torch.manual_seed(0)
    net = import_torchvision().models.vgg16_bn(weights=None)
    return Task(net, torch.randn(size, 3, 224, 224), torch.randint(10, (size,)))


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


# --- training: a method yields its step, and what it leaves to be done at the end of a turn ---------------------------


@dataclass
class Method:
    """What is timed: a step, and publishing what several left, or waiting for what its threads do meanwhile.

    `before` and `after` a turn are not.
    """

    step: Callable[[], None]
    publish: Callable[[], None] | None = None
    settle: Callable[[], None] | None = None
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None


Start = Callable[[Task], AbstractContextManager[Method]]


@contextmanager
def plain(task: Task) -> Iterator[Method]:
    yield Method(task.step)


@contextmanager
def undertow(
    task: Task,
    measures: tuple[str, ...],
    diagnose: int = 0,
    group: int = GROUP,
    sites: str = "conv",
    telling: bool = False,
) -> Iterator[Method]:
    names = [f"{i:05d}.jpg" for i in range(len(task.x))]
    options: dict[str, object] = {"sites": sites, "measures": measures, "group": group, "diagnose": diagnose}
    if telling:
        options |= {"on_finding": lambda finding: None, "every": EVERY}
    options |= {"optimizer": task.optimizer} if sites == "params" else {}
    with folder() as place, ut.record(place, task.model, **options) as recording:

        def step() -> None:
            with recording.batch(samples=names):
                task.step()

        writer, given = recording._writer, []
        hand_over = writer._hand_over

        def handed(publish: bool) -> object:
            given.append(hand_over(publish))
            return given[-1]

        def settle() -> None:
            while given:
                given.pop().done.wait()

        writer._hand_over = handed
        yield Method(step, recording.flush, settle)


@contextmanager
def bincount(task: Task) -> Iterator[Method]:
    """The histogram that one writes at first: the same codes, counted whole in a hook."""
    totals = {name: torch.zeros(1 << 16, dtype=torch.int64) for name in convolutions(task.model)}

    def count(name: str, gradient: torch.Tensor) -> None:
        codes = (gradient.contiguous().view(torch.int32) >> 16) & 0xFFFF
        totals[name] += torch.bincount(codes.flatten(), minlength=1 << 16)

    def watch(name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(partial(count, name))

    for name, module in convolutions(task.model).items():
        module.register_forward_hook(partial(watch, name))
    yield Method(task.step)


@contextmanager
def wandb_watch(task: Task) -> Iterator[Method]:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    import wandb

    with folder() as place:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        run = wandb.init(project="benchmark", dir=place, mode="offline", settings=settings)
        run.watch(task.model, log="gradients", log_freq=1)

        def step() -> None:
            task.step()
            run.log({"step": 1})

        try:
            yield Method(step)
        finally:
            run.unwatch(task.model)
            run.finish()


@contextmanager
def norms_by_hand(task: Task) -> Iterator[Method]:
    """What one writes at first: a number for each parameter and step."""
    kept: list[dict[str, float]] = []

    def step() -> None:
        task.step()
        kept.append({name: p.grad.norm().item() for name, p in task.model.named_parameters()})

    yield Method(step)


@contextmanager
def lightning_norms(task: Task) -> Iterator[Method]:
    import_torchvision()  # which Lightning imports, and which needs two declarations with a CPU-only torch
    from lightning.pytorch.utilities import grad_norm

    kept: list[dict[str, float]] = []

    def before_step(*_: object) -> None:
        kept.append({name: float(value) for name, value in grad_norm(task.model, norm_type=2).items()})

    with_norms = task.optimizer.register_step_pre_hook(before_step)
    try:
        yield Method(task.step)
    finally:
        with_norms.remove()


@contextmanager
def torchlens_trace(task: Task) -> Iterator[Method]:
    def step() -> None:
        task.optimizer.zero_grad()
        traced_gradients(task)
        task.optimizer.step()

    yield Method(step, before=torchlens_on, after=torchlens_off)


@contextmanager
def torchlens_record(task: Task) -> Iterator[Method]:
    def step() -> None:
        task.optimizer.zero_grad()
        recorded_gradients(task)
        task.optimizer.step()

    yield Method(step, before=torchlens_on, after=torchlens_off)


@contextmanager
def nansense_session(task: Task) -> Iterator[Method]:
    """As its UI sets it for a view that follows each batch; the UI itself is not served."""
    with session(task.model, task.optimizer) as watching:

        def step() -> None:
            with watching.batch(phase="train", epoch=0):
                task.step()

        yield Method(step)


METHODS: dict[str, tuple[Start, str]] = {
    "plain step": (plain, "nothing"),
    "undertow, norms + zeros + moments": (
        partial(undertow, measures=("channel-norm", "zero-fraction", "moments")),
        "each sample's channel norms, zero counts, moments of the gradient at each convolution's output",
    ),
    "undertow, histogram": (
        partial(undertow, measures=("histogram",)),
        "the histogram of every value of that gradient, 65,536 cells",
    ),
    "torch.bincount in a hook": (bincount, "the same histogram, summed over all batches, in memory"),
    "wandb.watch, offline": (wandb_watch, "64-bin histograms of the weights' gradients"),
    "TorchLens trace": (torchlens_trace, "the tensors at the convolutions, of the last batch"),
    "TorchLens record": (torchlens_record, "the tensors at the convolutions, of the last batch"),
    "nansense": (nansense_session, "copies of all activations, gradients, weights, of the last batch"),
}
PARAMETERS: dict[str, tuple[Start, str]] = {
    "plain step": (plain, "nothing"),
    "undertow, norms": (
        partial(undertow, measures=("norm",), sites="params"),
        "the norm of each parameter's gradient before and after clipping, of the weight and of the update",
    ),
    "undertow, norms + moments + zeros": (
        partial(undertow, measures=("norm", "moments", "zero-fraction"), sites="params"),
        "the same with moments and zero counts",
    ),
    "undertow, histograms": (
        partial(undertow, measures=("histogram",), sites="params"),
        "histograms of all four, 65,536 cells",
    ),
    "norms by hand": (norms_by_hand, "the norm of each parameter's gradient, after the step has used it"),
    "Lightning's grad_norm": (lightning_norms, "the same, as `on_before_optimizer_step` logs it"),
    "wandb.watch, offline": (
        wandb_watch,
        "64-bin histograms of the parameters' gradients, as each backward pass leaves them",
    ),
}
TASKS = {"six convolutions, 28x28, b128": six_convolutions, "VGG11, 64x64, b16": vgg11}


# --- peers -----------------------------------------------------------------------------------------------------------


def torchlens_on() -> None:
    """TorchLens wraps every function of torch on its first use and leaves it so, which would slow the others."""
    from torchlens.backends.torch.wrappers import wrap_torch

    wrap_torch()


def torchlens_off() -> None:
    from torchlens.backends.torch.wrappers import unwrap_torch

    unwrap_torch()


def traced_gradients(task: Task) -> dict[str, torch.Tensor]:
    """Forward and backward as TorchLens documents them, saving what is needed: the scores and these gradients."""
    import torchlens as tl

    options = tl.options.CaptureOptions(save_grads=tl.func("conv2d"), backward_ready=True)
    log = tl.trace(task.model, task.x, save=tl.func("linear"), capture=options)
    log.log_backward(F.cross_entropy(log[log.output_layers[0]].out, task.y))
    return {name: log[name].grad for name in convolutions(task.model)}


def recorded_gradients(task: Task) -> dict[str, torch.Tensor]:
    """The same through its lighter `fastlog`."""
    import torchlens as tl
    from torchlens.fastlog import record

    only = {"save": tl.func("conv2d"), "default_op": False, "default_module": False}
    scores, log = record(task.model, task.x, backward_ready=True, return_output=True, **only)
    log.log_backward(F.cross_entropy(scores, task.y), save_grads=_is_conv)
    return {found.ctx.module_stack[-1].address: found.ram_payload for found in log.grad_records}


def _is_conv(context: object) -> bool:
    return "conv2d" in (getattr(context, "layer_label", None) or "")


@contextmanager
def session(model: nn.Module, optimizer: object = None) -> Iterator[object]:
    """A nansense session that publishes every batch and waits for nobody."""
    import nansense

    watching = nansense.start(model, epochs=1, optimizer=optimizer)
    watching.detach()
    watching.set_update_frequency(unit="batch", n=1)
    try:
        yield watching
    finally:
        watching.close()


@contextmanager
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="undertow-benchmark-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# --- training --------------------------------------------------------------------------------------------------------


def turn(method: Method, steps: int) -> tuple[float, float]:
    """Return the seconds of steps until all that they left is published: on the clock, and of all threads' work."""
    method.before()
    try:
        began = clocks()
        for _ in range(steps):
            method.step()
        if method.publish is not None:
            method.publish()
        wall, work = clocks() - began
    finally:
        method.after()
    time.sleep(PAUSE)
    return float(wall), float(work)


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def training(rounds: int, quick: bool, methods: dict[str, tuple[Start, str]] = METHODS) -> Iterator[str]:
    yield "| network | method | steps a turn | ms a step | x plain step | x its CPU time | what it keeps |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for (network, make), steps in zip(TASKS.items(), STEPS, strict=True):
        task = make(4) if quick else make()
        network += ", but b4" * quick
        failed: dict[str, str] = {}
        taken: dict[str, list[tuple[float, float]]] = {}
        with ExitStack() as opened:
            ready = {}
            for name, (start, _) in methods.items():
                try:
                    ready[name] = opened.enter_context(start(task.twin()))
                    turn(ready[name], 2)
                except Exception as error:
                    failed[name] = said(error)
                    ready.pop(name, None)
            taken = {name: [] for name in ready}
            for _ in range(rounds):
                for name in random.sample(list(ready), len(ready)):
                    taken[name].append(turn(ready[name], steps))
        for name, (_, keeps) in methods.items():
            if name in failed:
                yield f"| {network} | {name} | - | - | - | - | did not run: {failed[name]} |"
                continue
            turns, base = np.array(taken[name]), np.array(taken["plain step"])
            ms = 1e3 * np.median(turns[:, 0]) / steps
            wall, work = np.median(turns / base, axis=0)
            yield f"| {network} | {name} | {steps} | {ms:.1f} | {wall:.3f} | {work:.3f} | {keeps} |"


THREE = ("channel-norm", "zero-fraction", "moments")
GROUPS = dict(zip(TASKS, (128, 24), strict=True)) | {"VGG16-BN, 224x224, b4": 4}
"""For each network the steps of a round: as many as undertow would publish together."""


def pairs(rounds: int, quick: bool) -> Iterator[str]:
    yield (
        "| network | recorded | rounds of steps | plain step, ms | x plain step | 95 % interval | x its CPU time "
        "| in the hooks, ms a step | of a plain step |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    settings = {"norms + zeros + moments": (THREE, 0), "histogram": (("histogram",), 0)}
    settings |= {"norms + zeros + moments, watched": (THREE, 1)}
    for (network, steps), make in zip(GROUPS.items(), (*TASKS.values(), vgg16), strict=True):
        task = make(4) if quick else make()
        for name, (measures, diagnose) in settings.items():
            if make is vgg16 and diagnose:
                continue
            within: list[float] = []
            ours = partial(undertow, measures=measures, diagnose=diagnose, group=steps)
            ms, figures = held_to(plain, ours, task, rounds, steps, within)
            hooks = 1e3 * statistics.median(within)
            share = f"{hooks:.1f} | {100 * hooks / ms:.1f} %"
            yield f"| {network} | {name} | {rounds} of {steps} | {ms:.1f} | {figures} | {share} |"


def findings(rounds: int, quick: bool) -> Iterator[str]:
    yield "| network | looked | rounds of steps | step without, ms | x | 95 % interval | x CPU time | every 100th |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for network, make in TASKS.items():
        steps, task = GROUPS[network], make(4) if quick else make()
        without = partial(undertow, measures=THREE, group=steps)
        ms, figures = held_to(without, partial(without, telling=True), task, rounds, steps, [])
        added = (float(figures.rpartition("|")[2]) - 1) * EVERY
        yield f"| {network} | every {EVERY}th | {rounds} of {steps} | {ms:.1f} | {figures} | {added:+.2f} % |"


def held_to(base: Start, ours: Start, task: Task, rounds: int, steps: int, within: list[float]) -> tuple[float, str]:
    """Return the milliseconds of a step of `base`, and by what `ours` multiplies it: ratio, interval, of CPU time.

    Args:
        within: the seconds that a step of `ours` spends in hooks are added, for each round.
    """
    taken: dict[str, list[np.ndarray]] = {"base": [], "ours": []}
    for _ in range(rounds):
        twin = task.twin()
        with (
            mock.patch("undertow.recording.writer._GROUP_SECONDS", math.inf),  # the other's steps took half
            base(twin) as one,
            ours(twin) as other,
        ):
            turn(one, steps // 8 + 1), turn(other, steps // 8 + 1)
            for which, seconds in side_by_side({"base": one, "ours": other}, steps).items():
                taken[which].append(seconds)
            within.append(in_hooks(other, steps // 8 + 1))
    found, against = np.array(taken["ours"]), np.array(taken["base"])
    wall, work = np.median(found / against, axis=0)
    low, high = interval(found[:, 0] / against[:, 0])
    return 1e3 * float(np.median(against[:, 0])) / steps, f"{wall:.3f} | {low:.3f} to {high:.3f} | {work:.3f}"


def side_by_side(methods: dict[str, Method], steps: int) -> dict[str, np.ndarray]:
    """Return the seconds of steps that methods take in turn, one at a time, since this machine is slow for seconds.

    Each ends with nothing for its threads to do while another is timed, and the last with publishing.
    """
    spent = {name: np.zeros(2) for name in methods}
    for step in range(steps):
        for name in random.sample(list(methods), len(methods)):
            method, began = methods[name], clocks()
            method.step()
            end = method.publish if step + 1 == steps else method.settle
            if end is not None:
                end()
            spent[name] += clocks() - began
    return spent


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return between which of the values their median lies with a probability of 95 %, by the binomial distribution."""
    ordered = np.sort(values)
    below = np.cumsum([math.comb(len(ordered), k) for k in range(len(ordered))]) / 2 ** len(ordered)
    first = int(np.searchsorted(below, 0.025, side="right"))
    return float(ordered[max(first - 1, 0)]), float(ordered[-max(first, 1)])


def in_hooks(method: Method, steps: int = 8) -> float:
    """Return the median seconds that a step spends in the recorder's hooks, which no neighbour's load shifts much."""
    spent: list[float] = []

    def timed(hook: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            began = time.perf_counter()
            try:
                return hook(*args)
            finally:
                spent[-1] += time.perf_counter() - began

        return call

    with mock.patch.multiple(Probe, _called=timed(Probe._called), _arrived=timed(Probe._arrived)):
        for _ in range(steps):
            spent.append(0.0)
            method.step()
    return statistics.median(spent)


def said(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:90]}{'...' if len(text) > 90 else ''}"


# --- the in-place network --------------------------------------------------------------------------------------------

Gradients = dict[str, torch.Tensor]


def retained(task: Task, modules: dict[str, nn.Module]) -> Gradients:
    outputs: Gradients = {}

    def keep(name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    task.step()
    for handle in handles:
        handle.remove()
    return {name: output.grad for name, output in outputs.items()}


def truth(task: Task) -> tuple[Gradients, Gradients]:
    """Return the gradients of an out-of-place copy: at each convolution's output, and behind the ReLU after it."""
    task = task.twin()
    for module in task.model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    everything = retained(task, dict(task.model.named_modules()))
    convs = list(convolutions(task.model))
    relus = [name for name, module in task.model.named_modules() if isinstance(module, nn.ReLU)]
    return (
        {name: everything[name] for name in convs},
        {conv: everything[relu] for conv, relu in zip(convs, relus, strict=True)},
    )


def through_undertow(task: Task) -> Gradients:
    with folder() as place:
        with ut.record(place, task.model, sites="conv", measures="keep") as recording, recording.batch():
            task.step()
        return {row["site"]: torch.from_numpy(values) for row, values in ut.Run(place).tensors()}


def through_nansense(task: Task) -> Gradients:
    with session(task.model) as watching:
        with watching.batch(phase="train", epoch=0):
            task.step()
        found = watching.snapshot.activation_gradients
        return {name: found[name] for name in convolutions(task.model)}


def through_torchlens(task: Task, gradients: Callable[[Task], Gradients]) -> Gradients:
    torchlens_on()
    try:
        return gradients(task)
    finally:
        torchlens_off()


def through_retain_grad(task: Task) -> Gradients:
    return retained(task, convolutions(task.model))


def through_full_hooks(task: Task) -> Gradients:
    found: Gradients = {}
    for name, module in convolutions(task.model).items():
        module.register_full_backward_hook(lambda _, __, outer, name=name: found.update({name: outer[0].clone()}))
    task.step()
    return found


READERS: dict[str, Callable[[Task], Gradients]] = {
    "undertow": through_undertow,
    "Tensor.retain_grad": through_retain_grad,
    "register_full_backward_hook": through_full_hooks,
    "TorchLens trace": partial(through_torchlens, gradients=traced_gradients),
    "TorchLens record": partial(through_torchlens, gradients=recorded_gradients),
    "nansense": through_nansense,
}


def verdict(found: Gradients, wanted: Gradients, behind: Gradients) -> tuple[int, str]:
    """Return at how many sites the gradients are the true ones to the last bit, and what they are elsewhere."""
    missing = [name for name in wanted if name not in found]
    wrong = [name for name in wanted if name not in missing and not torch.equal(found[name], wanted[name])]
    exact = len(wanted) - len(missing) - len(wrong)
    if exact == len(wanted):
        return exact, "exact"
    parts = [f"nothing at {len(missing)}"] if missing else []
    if wrong:
        off = [100 * float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wrong]
        post = sum(torch.equal(found[name], behind[name]) for name in wrong)
        parts.append(f"post-ReLU values at {post}, " if post else "")
        parts[-1] += f"{min(off):.0f} to {max(off):.0f} % off at {len(wrong)}"
    return exact, "; ".join(parts)


def in_place() -> Iterator[str]:
    yield "| in-place network | tool | exact sites | gradients at the outputs of its convolutions |"
    yield "|---|---|---:|---|"
    for network, norm in (("VGG11", False), ("VGG11-BN", True)):
        task = vgg11(4, norm)
        wanted, behind = truth(task)
        for tool, read in READERS.items():
            try:
                exact, text = verdict(read(task.twin()), wanted, behind)
            except Exception as error:
                exact, text = 0, f"error: {said(error)}"
            yield f"| {network} | {tool} | {exact}/{len(wanted)} | {text} |"


# --- images ----------------------------------------------------------------------------------------------------------

Norms = dict[str, list[np.ndarray]]


@contextmanager
def by_hand(model: nn.Module, frozen: bool) -> Iterator[tuple[Callable[[torch.Tensor, int], None], Norms]]:
    """Image by image, as people write it; `frozen` is the same without the gradients of weights."""
    kept: Norms = {name: [] for name in list(convolutions(model))[:2]}

    def norms(name: str, gradient: torch.Tensor) -> None:
        kept[name].append(gradient[0].flatten(1).norm(dim=1).numpy())

    def watch(name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(partial(norms, name))

    for name in kept:
        model.get_submodule(name).register_forward_hook(partial(watch, name))
    model.requires_grad_(not frozen)

    def run(images: torch.Tensor, start: int) -> None:
        for image in images:
            model.zero_grad()
            scores = model(image[None].requires_grad_(frozen))
            scores[0, int(scores.argmax())].backward()

    yield run, kept


@contextmanager
def batched(model: nn.Module) -> Iterator[tuple[Callable[[torch.Tensor, int], None], Norms]]:
    """Batches of 4, the objective summed, as `undertow record FOLDER` does it."""
    kept: Norms = {}
    model.requires_grad_(False)
    with folder() as place:
        with ut.record(place, model, sites="conv[:2]", measures="channel-norm", loss_reduction="sum") as recording:

            def run(images: torch.Tensor, start: int) -> None:
                for place, some in enumerate(images.split(BATCH)):
                    names = [f"{start + place * BATCH + i:06d}.jpg" for i in range(len(some))]
                    with recording.batch(samples=names):
                        model(some.clone().requires_grad_()).amax(1).sum().backward()

            yield run, kept
        for row in ut.Run(place).table("channel_norm").to_pylist():
            kept.setdefault(row["site"], []).append(np.array(row["values"], np.float32))


HAND, FROZEN, BATCHED = "by hand, image by image", "the same, weights frozen", "undertow, batches of 4"


def images(count: int, quick: bool) -> Iterator[str]:
    yield f"| network, {count} images | method | images a second | x by hand | norms |"
    yield "|---|---|---:|---:|---|"
    side = 64 if quick else 224
    for network in ("vgg16", "vgg16_bn"):
        torch.manual_seed(0)
        model = import_torchvision().models.get_model(network, weights=None).eval()
        data = torch.randn(count, 3, side, side)
        ways = {HAND: partial(by_hand, frozen=False), FROZEN: partial(by_hand, frozen=True), BATCHED: batched}
        if count > 4 * TURN:
            del ways[FROZEN]  # it says what part of the gain is frozen weights; a few images say that as well
        taken: dict[str, list[float]] = {way: [] for way in ways}
        with ExitStack() as opened:
            ready = {way: opened.enter_context(start(copy.deepcopy(model))) for way, start in ways.items()}
            for run, kept in ready.values():  # once unseen
                run(data[:2], count)
                for found in kept.values():
                    found.clear()
            for start in range(0, count, TURN):
                for way in random.sample(list(ready), len(ready)):
                    started = time.perf_counter()
                    ready[way][0](data[start : start + TURN], start)
                    taken[way].append(time.perf_counter() - started)
        wanted = ready[HAND][1]
        ready[BATCHED][1].update({name: found[2:] for name, found in ready[BATCHED][1].items()})  # the unseen two
        for way, seconds in taken.items():
            ratio = statistics.median(b / t for t, b in zip(seconds, taken[HAND], strict=True))
            kept = ready[way][1]
            off = max(float(np.abs(np.stack(kept[n]) - w).max() / w.max()) for n, w in stacked(wanted).items())
            same = "-" if way == HAND else f"within {off:.0e} of the largest"
            yield f"| {network} | {way} | {count / sum(seconds):.2f} | {ratio:.2f} | {same} |"


def stacked(norms: Norms) -> dict[str, np.ndarray]:
    return {name: np.stack(found) for name, found in norms.items()}


# --- memory ----------------------------------------------------------------------------------------------------------


def resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def memory(batches: int) -> list[tuple[int, float]]:
    """Record many batches in this process and return its resident MiB on the way: run it in a new one."""
    torch.set_num_threads(1)  # two would wait for each other longer than they calculate
    torch.manual_seed(0)
    net = stack((4, "M", 4, "M"), 1, norm=False, inplace=True, head=16)
    task = Task(net, torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))
    names = [f"{i}.jpg" for i in range(8)]
    seen = []
    measures = ("channel-norm", "zero-fraction", "moments", "histogram")
    with folder() as place, ut.record(place, net, measures=measures) as recording:
        for number in range(1, batches + 1):
            with recording.batch(samples=names):
                task.step()
            if number in (batches // 10, batches // 2, batches):
                seen.append((number, resident()))
    return seen


def memory_apart(batches: int) -> Iterator[str]:
    yield "| batches recorded | resident MiB |"
    yield "|---:|---:|"
    command = [sys.executable, __file__, "--memory-of", str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        number, mib = line.split()
        yield f"| {int(number):,} | {float(mib):.1f} |"


def keep_memory() -> None:
    """Set glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; nothing where the C library is another."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of training steps for each method")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--images", type=int, default=32, help="images for each VGG16")
    parser.add_argument("--markdown", type=Path, help="write the tables here as well")
    parser.add_argument("--quick", action="store_true", help="small batches and 1,000 batches: does it run?")
    parser.add_argument("--threads", type=int, help="of torch; as it chooses if not given")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.memory_of:
        keep_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.memory_of:
        for number, mib in memory(given.memory_of):
            print(number, mib)
        return
    sections = {
        "training": lambda: training(given.rounds, given.quick),
        "parameters": lambda: training(given.rounds, given.quick, PARAMETERS),
        "pairs": lambda: pairs(given.rounds, given.quick),
        "findings": lambda: findings(given.rounds, given.quick),
        "inplace": in_place,
        "images": lambda: images(given.images, given.quick),
        "memory": lambda: memory_apart(1_000 if given.quick else 10_000),
    }
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    lines = [f"{machine}, {os.cpu_count()} cores; medians over turns in random order."]
    print(lines[0])
    for name in [given.only] if given.only else SECTIONS:
        lines.append("")
        print()
        for line in sections[name]():
            lines.append(line)
            print(line, flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
