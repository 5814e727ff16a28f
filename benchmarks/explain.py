"""Maps side by side: undertow, plain and prepared, the input gradient by hand, Captum, zennit, pytorch-grad-cam.

    pip install -c constraints.txt -e '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/explain.py --rounds 3 --markdown benchmarks/explain.md
    python benchmarks/explain.py --figure benchmarks/explain.svg       draws the table that is there

All methods explain the same class of the same batch of the same network in one process, in a new random order each
round; a figure is the median over rounds of the ratio to the plain gradient of the same round. With one thread the
clock is the processor time of this process, which other work on the machine disturbs less than the wall's. Peak memory
is that of one call in a process of its own, above what the loaded network takes. A method is marked where its map
differs from the one that `tests/frameworks/torch/references.py` gives.

"of the limit" is the time that the arithmetic would take, forward and backward to the input, at the rate of a large
matrix product on this machine in the same round, as a part of the time that was taken. Where a prepared network stays
under three quarters of it, a profile says where the rest goes.
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import undertow as ut
from undertow.frameworks.torch.prepare import prepared as prepared_copy
from undertow.frameworks.torch.zoo.importing import import_torchvision

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from frameworks.torch.references import reference

TARGET = 3
Call = Callable[[], torch.Tensor]


def mlp() -> nn.Module:
    """A hundred ReLUs and hardly any arithmetic: the method alone. Its input has 4 axes because a peer insists."""
    layers = [layer for _ in range(100) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


NETWORKS = {
    "vgg16 b4": ("vgg16", (4, 3, 224, 224)),
    "resnet50 b8": ("resnet50", (8, 3, 224, 224)),
    "densenet201 b4": ("densenet201", (4, 3, 224, 224)),
    "mobilenet_v2 b8": ("mobilenet_v2", (8, 3, 224, 224)),
    "EfficientNet-Lite0 b8": ("demo", (8, 3, 224, 224)),
    "vit_small b4": ("vit", (4, 3, 224, 224)),
    "100-ReLU MLP": ("mlp", (1, 64, 1, 1)),
}


@dataclass(frozen=True)
class Case:
    """A network and a rule. GELU follows a rule only where that is asked for, so of the transformer it is."""

    network: str
    rule: str

    @property
    def activations(self) -> str:
        return "all" if self.network.startswith("vit") else "relu-like"

    def load(self) -> tuple[nn.Module, torch.Tensor]:
        kind, shape = NETWORKS[self.network]
        torch.manual_seed(0)
        torchvision = import_torchvision()  # the peers import it too, and it has to fit the installed torch by then
        if kind == "demo":
            model = ut.load("demo").module
        elif kind == "vit":
            import timm

            model = timm.create_model("vit_small_patch16_224", pretrained=False)
        else:
            model = mlp() if kind == "mlp" else torchvision.models.get_model(kind, weights=None)
        return model.eval(), torch.randn(shape)


def flops(model: nn.Module, x: torch.Tensor) -> int:
    """Return how many floating-point operations the convolutions and matrix products take, there and back to `x`."""
    leaf = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).requires_grad_(False)(leaf)[:, TARGET].sum().backward()
    return int(counter.get_total_flops())


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    started = clock()
    call()
    return clock() - started


def gemm_rate(size: int = 1536) -> float:
    """Return the floating-point operations a second of a large matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / seconds(lambda: a @ b)


def plain(case: Case, model: nn.Module, x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)[0]

    return call


def undertow(case: Case, model: nn.Module, x: torch.Tensor) -> Call:
    how = {"rule": case.rule, "target": TARGET, "activations": case.activations}
    return lambda: ut.explain(model, x, **how).values


def captum(case: Case, model: nn.Module, x: torch.Tensor) -> Call:
    from captum.attr import GuidedBackprop, Saliency

    if case.rule == "gradient":
        return lambda: Saliency(model).attribute(x.requires_grad_(), target=TARGET, abs=False).detach()
    method = GuidedBackprop(model)
    return lambda: method.attribute(x, target=TARGET).detach()


def zennit(case: Case, model: nn.Module, x: torch.Tensor) -> Call:
    from zennit.attribution import Gradient
    from zennit.composites import GuidedBackprop

    def call() -> torch.Tensor:
        with Gradient(model=model, composite=GuidedBackprop() if case.rule == "guided" else None) as attributor:
            return attributor(x.clone().requires_grad_(), lambda out: torch.eye(out.shape[1])[[TARGET] * len(out)])[1]

    return call


def grad_cam(case: Case, model: nn.Module, x: torch.Tensor) -> Call | None:
    from pytorch_grad_cam import GuidedBackpropReLUModel

    if case.rule == "gradient":  # which it has none of
        return None
    method = GuidedBackpropReLUModel(model, torch.device("cpu"))
    return lambda: torch.from_numpy(method(x.clone().requires_grad_(), target_category=TARGET))


PREPARED = "undertow, prepared"
METHODS = {
    "plain gradient": plain,
    "undertow": undertow,
    PREPARED: undertow,
    "Captum": captum,
    "zennit": zennit,
    "pytorch-grad-cam": grad_cam,
}


def made(case: Case, method: str, model: nn.Module, x: torch.Tensor, steps: tuple[str, ...]) -> Call | None:
    """Return what computes a map by a method; None where it has none. Peers that change the model have a copy."""
    if method == PREPARED:
        model = prepared_copy(model, steps, x)
    elif method in ("Captum", "pytorch-grad-cam"):
        model = copy.deepcopy(model)
    return METHODS[method](case, model, x.clone())


def right(method: str, values: torch.Tensor, wanted: torch.Tensor, vanilla: torch.Tensor) -> str:
    """Say whether a map is the one that the rule means."""
    if values.shape != wanted.shape and values.ndim == 3:
        if len(wanted) > 1:
            return "one map for the batch"
        values = values.permute(2, 0, 1)[None]
    if torch.equal(values, wanted):
        return "exact"
    off = float((values - wanted).norm() / wanted.norm())
    if off > 0.01 and float((values - vanilla).norm()) <= 1e-5 * float(vanilla.norm()):
        return "the plain gradient"
    return f"{100 * off:.2g} % off"


@dataclass(frozen=True)
class Row:
    """What was measured of a method: milliseconds, ratios to the plain gradient and of the limit, and what it gave."""

    ms: float
    ratio: float
    of_limit: float
    verdict: str


def measured(case: Case, rounds: int) -> tuple[dict[str, Row], tuple[str, ...], list[str]]:
    """Return a row for each method, the steps of the prepared copy, and a profile of it where it is far from the limit.

    The reference is that of the map's rule, by the tests' own twin.
    """
    model, x = case.load()
    wanted, calls = reference(model, x, TARGET, case.rule, case.activations)
    fast = ut.prepare(model, x, rule=case.rule if case.activations == "relu-like" else "gradient")
    print(f"  prepared: {fast}".replace("\n", "\n    "), file=sys.stderr)
    ready = {method: made(case, method, model, x, fast.steps) for method in METHODS}
    ready = {method: call for method, call in ready.items() if call is not None}
    vanilla = ready["plain gradient"]()
    verdicts = {method: right(method, call(), wanted, vanilla) for method, call in ready.items()}
    verdicts["plain gradient"] = verdicts["plain gradient"] if case.rule == "gradient" else "-"
    taken: dict[str, list[float]] = {method: [] for method in ready}
    needed, limits = flops(model, x), []
    for _ in range(rounds):
        limits.append(needed / gemm_rate())
        for method in random.sample(list(ready), len(ready)):
            taken[method].append(seconds(ready[method]))
    base = taken["plain gradient"]
    rows = {
        method: Row(
            1e3 * statistics.median(times),
            statistics.median(t / b for t, b in zip(times, base, strict=True)),
            statistics.median(limit / t for t, limit in zip(times, limits, strict=True)),
            verdicts[method] + (_extra(times, base, calls) if case.network.endswith("MLP") else ""),
        )
        for method, times in taken.items()
    }
    far = rows[PREPARED].of_limit < 0.75 and not case.network.endswith("MLP")
    return rows, fast.steps, list(profiled(ready[PREPARED])) if far else []


def _extra(times: list[float], base: list[float], calls: int) -> str:
    extra = statistics.median(t - b for t, b in zip(times, base, strict=True))
    return f", {1e6 * extra / max(1, calls):+.1f} us an activation"


KINDS = {
    "convolutions and matrix products": ("conv", "mm", "linear", "mkldnn", "addmm", "bmm", "attention"),
    "batch norm": ("batch_norm",),
    "pooling": ("pool",),
    "activations": ("relu", "hardtanh", "threshold", "gelu"),
    "layer norm": ("layer_norm",),
    "copies and joins": ("copy_", "clone", "cat", "contiguous", "reorder"),
}


def profiled(call: Callable[[], object]) -> Iterator[str]:
    """Yield the shares of the kinds of operators in a call's processor time, largest first."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        call()
    shares = Counter[str]()
    for event in prof.key_averages(group_by_input_shape=True):
        name = event.key.rpartition("::")[2].lower() if event.key.startswith("aten::") else "-"
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "all else")
        if "conv" in name and any(len(shape) == 4 and shape[1] == 1 for shape in event.input_shapes):
            kind = "depthwise convolutions"
        shares[kind] += event.self_cpu_time_total
    whole = sum(shares.values())
    yield from (f"{kind} {share / whole:.0%}" for kind, share in shares.most_common() if share > 0.005 * whole)


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory(case: Case, method: str, steps: tuple[str, ...]) -> float:
    """Return the peak MiB of one call above the loaded network, measured in this process: run it in a new one."""
    model, x = case.load()
    call = made(case, method, model, x, steps)
    assert call is not None
    call()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return status("VmHWM") - before


def memory_apart(case: Case, method: str, steps: tuple[str, ...]) -> float:
    command = [sys.executable, __file__, "--memory-of", case.network, case.rule, method, ",".join(steps)]
    quick_to_return = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env={**os.environ, **quick_to_return}, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def table(cases: list[Case], rounds: int) -> Iterator[str]:
    """Yield the lines of a table of all cases, and what is to be said of each below it."""
    headings = ("network", "rule", "method", "ms", "x plain gradient", "of the limit", "peak MiB", "map")
    yield f"| {' | '.join(headings)} |\n|---|---|---|---:|---:|---:|---:|---|"
    below = []
    for case in cases:
        rows, steps, shares = measured(case, rounds * (30 if case.network.endswith("MLP") else 1))
        for method, row in rows.items():
            peak = memory_apart(case, method, steps)
            yield (
                f"| {case.network} | {case.rule} | {method} | {row.ms:.1f} | {row.ratio:.3f} | {row.of_limit:.0%} "
                f"| {peak:.0f} | {row.verdict} |"
            )
        below.append(f"- {case.network}, {case.rule}: {', '.join(steps) or 'frozen alone'}")
        if shares:
            below[-1] += f"; {rows[PREPARED].of_limit:.0%} of the limit, its time: {', '.join(shares)}"
    yield "\nWhat was prepared, and where its time goes where that is under 75 % of the limit:\n"
    yield from below


def draw(markdown: Path, figure: Path) -> None:
    """Draw the table of a Markdown file: each method's time of a guided map beside the plain gradient's."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "undertow"
    from matplotlib import pyplot

    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.read_text().splitlines()]
    rows = [row for row in cells if len(row) == 8 and row[1] == "guided" and not row[0].endswith("MLP")]
    networks = list(dict.fromkeys(row[0] for row in rows))
    methods = [method for method in METHODS if method != "plain gradient"]
    colours = ("#1f4e79", "#2e9e6b", "#c0504d", "#e0a030", "#8c8c8c")
    plot, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    for n, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        values = {row[0]: (float(row[4]), row[7]) for row in rows if row[2] == method}
        for place, network in enumerate(networks):
            if network not in values:
                continue
            ratio, verdict = values[network]
            is_right = verdict == "exact" or (verdict.endswith("% off") and float(verdict.split()[0]) < 1)
            at = place + (n - 2) * 0.16
            axes.bar(at, ratio, 0.15, color=colour, alpha=1 if is_right else 0.35, hatch="" if is_right else "///")
            axes.text(at, ratio, f"{ratio:.2f}", ha="center", va="bottom", fontsize=6)
        axes.bar(0, 0, color=colour, label=method)
    axes.bar(0, 0, color="white", edgecolor="grey", hatch="///", label="not the guided map")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks, fontsize=8)
    axes.set_ylabel("time / plain gradient", fontsize=8)
    axes.set_title("A guided map: time beside that of the input gradient by hand (lower is better)", fontsize=9)
    axes.legend(fontsize=7, ncols=3, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    plot.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds for each network; the MLP gets 30 times as many")
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="some networks")
    parser.add_argument("--rule", choices=("guided", "gradient"), nargs="+", default=["guided", "gradient"])
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--figure", type=Path, help="measure nothing: draw benchmarks/explain.md here")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.memory_of:
        network, rule, method, steps = given.memory_of
        print(memory(Case(network, rule), method, tuple(filter(None, steps.split(",")))))
        return
    if given.figure:
        draw(Path(__file__).with_suffix(".md"), given.figure)
        return
    threads = torch.get_num_threads()
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {threads} of {os.cpu_count()} cores"
    lines = [f"{machine}; medians of {given.rounds} rounds in random order."]
    lines += ["Milliseconds of processor time." if threads == 1 else "Milliseconds of wall time.", ""]
    for line in table([Case(network, rule) for network in given.only for rule in given.rule], given.rounds):
        lines.append(line)
        print(line, flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
