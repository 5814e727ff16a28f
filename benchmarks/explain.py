"""Guided backpropagation side by side: undertow, the plain input gradient, Captum, zennit, pytorch-grad-cam.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/explain.py --markdown benchmarks/explain.md

All methods explain the same class of the same batch of the same network in one process, in a new random order each
round; a figure is the median over rounds of the ratio to the plain gradient of the same round. Peak memory is that of
one call in a process of its own, above what the loaded network takes. A method is marked where its map differs from
the guided map that `tests/references.py` gives.

"of the limit" is the time that the arithmetic would take, forward and backward to the input, at the rate of a large
matrix product on this machine in the same round, as a part of the time that was taken.
"""

import argparse
import copy
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import undertow as ut
from undertow.frameworks.torch.zoo.importing import import_torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from frameworks.torch.references import reference

TARGET = 3


def mlp() -> nn.Module:
    """A hundred ReLUs and hardly any arithmetic: the method alone. Its input has 4 axes because a peer insists."""
    layers = [layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


NETWORKS = {
    "resnet50 b8": ("resnet50", (8, 3, 224, 224)),
    "vgg16 b1": ("vgg16", (1, 3, 224, 224)),
    "vgg16 b4": ("vgg16", (4, 3, 224, 224)),
    "densenet201 b2": ("densenet201", (2, 3, 224, 224)),
    "mobilenet_v2 b8": ("mobilenet_v2", (8, 3, 224, 224)),
    "EfficientNet-Lite0 b8": ("demo", (8, 3, 224, 224)),
    "100-ReLU MLP": ("mlp", (1, 64, 1, 1)),
}


def load(name: str) -> tuple[nn.Module, torch.Tensor]:
    network, shape = NETWORKS[name]
    torch.manual_seed(0)
    torchvision = import_torchvision()  # the peers import it too, and it has to fit the installed torch by then
    if network == "demo":
        model = ut.load("demo").module
    else:
        model = mlp() if network == "mlp" else torchvision.models.get_model(network, weights=None)
    return model.eval(), torch.randn(shape)


def flops(call: Callable[[], object]) -> int:
    """Return how many floating-point operations the convolutions and matrix products of a call take."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def gemm_rate(size: int = 1536) -> float:
    """Return the floating-point operations a second of a large matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    started = time.perf_counter()
    a @ b
    return float(2 * size**3 / (time.perf_counter() - started))


def plain(model: nn.Module, x: torch.Tensor):
    def call() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)[0]

    return call


def undertow(model: nn.Module, x: torch.Tensor):
    return lambda: ut.explain(model, x, rule="guided", target=TARGET).values


def prepared(model: nn.Module, x: torch.Tensor):
    fast = ut.prepare(model, x)
    print(f"  prepared: {fast}".replace("\n", "\n    "), file=sys.stderr)
    return lambda: ut.explain(fast.model, x, rule="guided", target=TARGET).values


def captum(model: nn.Module, x: torch.Tensor):
    from captum.attr import GuidedBackprop

    method = GuidedBackprop(model)
    return lambda: method.attribute(x, target=TARGET).detach()


def zennit(model: nn.Module, x: torch.Tensor):
    from zennit.attribution import Gradient
    from zennit.composites import GuidedBackprop

    def call() -> torch.Tensor:
        with Gradient(model=model, composite=GuidedBackprop()) as attributor:
            return attributor(x.clone().requires_grad_(), lambda out: torch.eye(out.shape[1])[[TARGET] * len(out)])[1]

    return call


def grad_cam(model: nn.Module, x: torch.Tensor):
    from pytorch_grad_cam import GuidedBackpropReLUModel

    method = GuidedBackpropReLUModel(model, torch.device("cpu"))
    return lambda: torch.from_numpy(method(x.clone().requires_grad_(), target_category=TARGET))


METHODS = {
    "plain gradient": plain,
    "undertow": undertow,
    "prepared": prepared,
    "Captum": captum,
    "zennit": zennit,
    "pytorch-grad-cam": grad_cam,
}


def right(method: str, values: torch.Tensor, wanted: torch.Tensor) -> str:
    """Say whether a map is the guided one; the plain gradient is not meant to be."""
    if method == "plain gradient":
        return "-"
    if values.shape != wanted.shape and values.ndim == 3:
        if len(wanted) > 1:
            return "one map for the batch"
        values = values.permute(2, 0, 1)[None]
    if torch.equal(values, wanted):
        return "exact"
    off = float((values - wanted).norm() / wanted.norm())
    return f"{100 * off:.2g} % off"


def times(name: str, rounds: int) -> dict[str, tuple[float, float, float, str]]:
    """Return, for each method, median milliseconds, median ratios to the plain gradient and of the limit, and whether
    it was right.
    """
    model, x = load(name)
    wanted, calls = reference(model, x, TARGET, "guided")
    ready = {}
    verdicts = {}
    for method, make in METHODS.items():
        ready[method] = make(copy.deepcopy(model) if method in ("Captum", "pytorch-grad-cam") else model, x)
        values = ready[method]()
        verdicts[method] = right(method, values, wanted)
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    needed, limits = flops(ready["plain gradient"]), []
    for _ in range(rounds):
        limits.append(needed / gemm_rate())
        for method in random.sample(list(METHODS), len(METHODS)):
            started = time.perf_counter()
            ready[method]()
            taken[method].append(time.perf_counter() - started)
    base = taken["plain gradient"]
    rows = {
        method: (
            1e3 * statistics.median(seconds),
            statistics.median(t / b for t, b in zip(seconds, base, strict=True)),
            statistics.median(limit / t for t, limit in zip(seconds, limits, strict=True)),
            verdicts[method],
        )
        for method, seconds in taken.items()
    }
    if name.endswith("MLP"):
        for method, seconds in taken.items():
            extra = statistics.median(t - b for t, b in zip(seconds, base, strict=True))
            print(f"  {method}: {1e6 * extra / calls:.1f} us an activation above the plain gradient", file=sys.stderr)
            rows[method] = (*rows[method][:3], f"{rows[method][3]}, +{1e6 * extra / calls:.1f} us an activation")
    return rows


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory(name: str, method: str) -> float:
    """Return the peak MiB of one call above the loaded network, measured in this process: run it in a new one."""
    model, x = load(name)
    call = METHODS[method](model, x)
    call()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return status("VmHWM") - before


def memory_apart(name: str, method: str) -> float:
    command = [sys.executable, __file__, "--memory-of", name, method]
    quick_to_return = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env={**os.environ, **quick_to_return}, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds for each network; the MLP gets 30 times as many")
    parser.add_argument("--only", choices=NETWORKS, help="one network")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.memory_of:
        print(memory(*given.memory_of))
        return
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    lines = [f"{machine}, {os.cpu_count()} cores; medians over rounds in random order.", ""]
    headings = ("network", "method", "ms", "x plain gradient", "of the limit", "peak MiB", "guided map")
    lines += [f"| {' | '.join(headings)} |", "|---|---|---:|---:|---:|---:|---|"]
    for name in [given.only] if given.only else NETWORKS:
        rounds = given.rounds * (30 if name.endswith("MLP") else 1)
        for method, (ms, ratio, of_limit, verdict) in times(name, rounds).items():
            peak = memory_apart(name, method)
            lines.append(f"| {name} | {method} | {ms:.1f} | {ratio:.3f} | {of_limit:.0%} | {peak:.0f} | {verdict} |")
            print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
