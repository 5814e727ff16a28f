"""Sweeps at their size: the same bytes from every engine, 50 kills, peak memory, and speed beside a bare loop.

    python benchmarks/sweep.py --markdown benchmarks/sweep.md           all of it
    python benchmarks/sweep.py engines memory --images 2000             some of it, smaller

20,000 images of Fashion-MNIST as PNG files and a small convolutional network, and crops of the packaged photographs
and the packaged EfficientNet-Lite0 at 64 x 64. All commands run with one thread a process, as torchrun has it.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import undertow as ut

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
NETS = """
import torch

def load():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(32 * 7 * 7, 10))
    return {"module": net, "preprocessing": {"resize": 28, "crop": 28, "mean": (0.5,) * 3, "std": (0.25,) * 3}}
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FASHION_NET = ("--model", "nets.py:load", "--batch-size", "32")
CROPS_NET = ("--model", "demo", "--preprocess", "imagenet@64")
EXPLAIN = ("--rule", "guided", "--fast", "off")


def make_fashion(folder: Path, count: int) -> None:
    """Write images of Fashion-MNIST as PNG files."""
    with gzip.open(FASHION) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    for n in range(count):
        path = folder / f"{n // 1000:02d}" / f"{n:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[n]).save(path)


def make_crops(folder: Path, count: int) -> None:
    """Write squares of the packaged photographs as JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(path).convert("RGB") for path in ut.images.demo_photographs().values()]
    generator = np.random.default_rng(0)
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        side = int(generator.integers(128, 300))
        x, y = (int(generator.integers(0, length - side)) for length in photograph.size)
        photograph.crop((x, y, x + side, y + side)).save(folder / f"{n:05d}.jpg", quality=92)


def command(verb: str, source: str, out: str, *words: str, engine: str = "local", processes: int = 2) -> list[str]:
    starter = [sys.executable, "-m"]
    if engine == "torchrun":
        starter += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    extra = ["--processes", str(processes)] if engine == "ray" else []
    return [*starter, "undertow", verb, source, "--out", out, *words, "--engine", engine, *extra]


def timed(place: Path, *words: str, **options: object) -> tuple[float, float]:
    """Run a command; return its seconds, and its peak memory in MB (of the largest of its processes)."""
    started = time.monotonic()
    process = subprocess.Popen(command(*words, **options), cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def engines(place: Path, images: int, crops: int) -> list[str]:
    """Do the same on every engine, and compare the digests."""
    lines = ["| | local | torchrun, 2 | Ray, 2 | digests |", "|---|---|---|---|---|"]
    rows = (
        (f"guided maps of {images:,} of Fashion-MNIST", "explain", "fashion", (*FASHION_NET, *EXPLAIN)),
        (
            f"histograms of {images:,} of Fashion-MNIST",
            "record",
            "fashion",
            (*FASHION_NET, "--sites", "conv", "--measure", "histogram", "--measure", "channel-norm"),
        ),
        (f"guided maps of {crops:,} crops", "explain", "crops", (*CROPS_NET, *EXPLAIN)),
    )
    for title, verb, source, words in rows:
        cells, digests = [], set()
        for engine in ("local", "torchrun", "ray"):
            out = f"{verb}-{source}-{engine}"
            seconds, _ = timed(place, verb, source, out, *words, engine=engine)
            digests.add(ut.Sweep(place / out).digest())
            cells.append(f"{seconds:.0f} s")
        same = "equal" if len(digests) == 1 else "DIFFERENT"
        lines.append(f"| {title} | {' | '.join(cells)} | {same} |")
        print(lines[-1], flush=True)
    return lines


def kills(place: Path, count: int, images: int) -> list[str]:
    """Kill a worker, the driver or the whole group at random moments, and go on, until it has been killed so often."""
    chance = random.Random(0)
    words = (*FASHION_NET, *EXPLAIN, "--limit", str(images))
    timed(place, "explain", "fashion", "kills-whole", *words)
    expected = ut.Sweep(place / "kills-whole")
    landed, tally, out, rounds = 0, {}, "", 0
    while landed < count:
        if not out:
            rounds += 1
            out = f"kills-{rounds}"
        engine = chance.choice(("local", "torchrun", "torchrun", "ray"))
        process = subprocess.Popen(
            command("explain", "fashion", out, *words, engine=engine),
            cwd=place,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        before = _parts(place / out)
        until = time.monotonic() + 120
        while _parts(place / out) == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.3)
        victim = (
            chance.choice(("worker", "driver", "group")) if engine != "local" else chance.choice(("driver", "group"))
        )
        if process.poll() is None:
            _kill(process, victim)
            landed += 1
            tally[f"{engine} {victim}"] = tally.get(f"{engine} {victim}", 0) + 1
        if victim == "worker":
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if ut.Sweep(place / out).status().finished or landed >= count:
            timed(place, "explain", "fashion", out, *words)
            sweep = ut.Sweep(place / out)
            assert sweep.digest() == expected.digest(), out
            assert sweep.check().whole
            print(f"{out}: {landed} kills so far, digest equal", flush=True)
            shutil.rmtree(place / out)
            out = ""
    told = ", ".join(f"{n} {what}" for what, n in sorted(tally.items()))
    return [f"{landed} kills in {rounds} sweeps of {images:,} images ({told}): all digests equal."]


def _parts(folder: Path) -> int:
    return len(list(folder.glob("parts/0*")))


def _kill(process: "subprocess.Popen[bytes]", victim: str) -> None:
    if victim == "worker":
        for pid in _workers(process.pid)[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif victim == "driver":
        process.kill()
    else:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _workers(group: int) -> list[int]:
    """Return the processes of a session that compute: Ray's workers, or those that torchrun started."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            line = Path("/proc", name, "cmdline").read_bytes()
            is_worker = b"RayWorker" in line or (b"undertow" in line and b"torch.distributed" not in line)
            if is_worker and os.getsid(int(name)) == group and int(name) != group:
                found.append(int(name))
    return found


def memory(place: Path, images: int) -> list[str]:
    """Peak memory of small and large sweeps."""
    peaks = {}
    for n in (min(1000, images // 2), images):
        _, peaks[n] = timed(place, "explain", "fashion", f"memory-{n}", *FASHION_NET, *EXPLAIN, "--limit", str(n))
        print(f"{n:,} images: {peaks[n]:.0f} MB", flush=True)
    (few, a), (many, b) = peaks.items()
    return [f"Peak memory: {a:.0f} MB with {few:,} images, {b:.0f} MB with {many:,}: {b / a - 1:+.1%}."]


def faults(place: Path, images: int) -> list[str]:
    """1 % of the images damaged and one gone, two sweeps into one folder, a folder that is read-only, a full disk."""
    source = place / "faulty"
    make_fashion(source, images)
    paths = sorted(source.glob("*/*.png"))
    damaged = random.Random(0).sample(paths, images // 100)
    for n, path in enumerate(damaged):
        content = path.read_bytes()
        path.write_bytes((b"", content[:40], b"no photograph", content[:100] + bytes(100))[n % 4])
    (source / "list.txt").write_text("\n".join(str(path.relative_to(source)) for path in paths))
    gone = next(path for path in reversed(paths) if path not in damaged)
    gone.unlink()
    lines = []

    def said(what: str, out: str, **how: object) -> None:
        words = command("explain", "faulty/list.txt", out, *FASHION_NET, *EXPLAIN)
        done = subprocess.run(words, cwd=place, env=ENVIRONMENT, text=True, capture_output=True, **how)
        line = next((line for line in reversed(done.stderr.splitlines()) if "error: " in line), "")
        sweep = ut.Sweep(place / out)
        is_whole = "all parts whole" if sweep.check().whole else "DAMAGED"
        lines.append(f"- {what}: exit code {done.returncode}, `{line[:160]}`; {is_whole}")
        print(lines[-1], flush=True)

    first = subprocess.Popen(
        command("explain", "faulty/list.txt", "faults", *FASHION_NET, *EXPLAIN),
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not _parts(place / "faults"):
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    said("a second sweep into a folder that is written", "faults")
    first.send_signal(signal.SIGCONT)
    first.wait()
    sweep = ut.Sweep(place / "faults")
    named = {failure.name for failure in sweep.failed}
    assert {str(path.relative_to(source)) for path in (*damaged, gone)} == named
    assert sweep.status().done == images - len(damaged) - 1
    lines.append(
        f"- {len(damaged)} of {images:,} images damaged and one gone: these failed, with names and reasons, no other"
    )
    said("the same again", "faults")
    for part in list((place / "faults" / "parts").iterdir())[:3]:
        shutil.rmtree(part)
    said("a disk that takes no file of over 100 kB", "faults", preexec_fn=lambda: _limited(100_000))
    if os.getuid():  # root may write anywhere
        (place / "faults" / "parts").chmod(0o500)
        said("a folder that is read-only", "faults")
        (place / "faults" / "parts").chmod(0o700)
    said("and gone on with", "faults")
    assert ut.Sweep(place / "faults").status().finished
    return lines


def _limited(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


BARE = """
import sys, time, torch, undertow as ut
reference, preprocess, source, count, batch = sys.argv[1:]
classifier = ut.load(reference, preprocess=None if preprocess == "-" else preprocess)
data = ut.images.Folder(source, classifier)
size = int(batch)
batches = [torch.stack([torch.from_numpy(data[i][0]) for i in range(n, n + size)]) for n in range(0, 64, size)]
started = time.monotonic()
for n in range(0, int(count), size):
    ut.explain(classifier.module, batches[n // size % len(batches)], rule="guided")
print(int(count) / (time.monotonic() - started))
"""


def speed(place: Path, images: int, crops: int) -> list[str]:
    """Images a second of sweeps, beside a bare loop over batches in memory that does the arithmetic alone."""
    lines = ["| | bare loop | local | of it | torchrun, 2 |", "|---|---|---|---|---|"]
    for source, words, (reference, preprocess, batch), count in (
        ("fashion", FASHION_NET, ("nets.py:load", "-", "32"), images),
        ("crops", CROPS_NET, ("demo", "imagenet@64", "8"), crops),
    ):
        bare, local, two = [], [], []
        for round_ in range(3):
            arguments = [reference, preprocess, source, str(count), batch]
            done = subprocess.run([sys.executable, "-c", BARE, *arguments], cwd=place, env=ENVIRONMENT, text=True,
                                  capture_output=True, check=True)  # fmt: skip
            bare.append(float(done.stdout))
            for engine, speeds in (("local", local), ("torchrun", two)):
                out = f"speed-{source}-{engine}-{round_}"
                timed(place, "explain", source, out, *words, *EXPLAIN, "--limit", str(count), engine=engine)
                speeds.append(ut.Sweep(place / out).status().speed or 0.0)
                shutil.rmtree(place / out)
        ratio = statistics.median(b / a for a, b in zip(bare, local, strict=True))
        ratios = statistics.median(b / a for a, b in zip(local, two, strict=True))
        figures = [f"{statistics.median(values):.0f}" for values in (bare, local, two)]
        lines.append(
            f"| {source}, images/s | {figures[0]} | {figures[1]} | {ratio:.2f} | {figures[2]} ({ratios:.2f} x) |"
        )
        print(lines[-1], flush=True)
    return lines


PROCESSOR = """
import sys, tempfile, time, torch, undertow as ut
classifier, count = ut.load("nets.py:load"), int(sys.argv[1])
data = ut.images.Folder("fashion", classifier)
batches = [torch.stack([torch.from_numpy(data[i][0]) for i in range(n, n + 32)]) for n in (0, 32)]
def bare():
    for n in range(count // 32):
        ut.explain(classifier.module, batches[n % 2], rule="guided")
def sweep():
    how = {"rule": "guided", "fast": "off", "batch_size": 32, "device": "cpu", "limit": count}
    ut.sweep.explain("fashion", classifier, tempfile.mkdtemp(dir="."), **how)
sweep()
for _ in range(4):
    for call in (bare, sweep):
        thread, process = time.thread_time(), time.process_time()
        call()
        print(time.thread_time() - thread, time.process_time() - process)
"""


def processor(place: Path, images: int) -> list[str]:
    """Processor time of the computing thread, of a bare loop and of a sweep, which a busy machine disturbs less."""
    done = subprocess.run([sys.executable, "-c", PROCESSOR, str(images)], cwd=place, env=ENVIRONMENT, text=True,
                          capture_output=True, check=True)  # fmt: skip
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    bare, sweep = rows[::2], rows[1::2]
    ratio = statistics.median(b[0] / s[0] for b, s in zip(bare, sweep, strict=True))
    thread, whole = (statistics.median(values) for values in zip(*sweep, strict=True))
    line = f"{images:,}: {thread:.2f} s of the computing thread, a bare loop {ratio:.2f} of it; of all {whole:.2f} s"
    print(line, flush=True)
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["engines", "kills", "memory", "faults", "processor", "speed"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--crops", type=int, default=2_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--place", type=Path, help="of the images and sweeps; kept where it is given")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    place = arguments.place or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    (place / "nets.py").write_text(NETS)
    for name, make, count in (("fashion", make_fashion, arguments.images), ("crops", make_crops, arguments.crops)):
        if not (place / name).exists():
            make(place / name, count)
    jobs = {
        "engines": lambda: engines(place, arguments.images, arguments.crops),
        "kills": lambda: kills(place, arguments.kills, min(3000, arguments.images)),
        "memory": lambda: memory(place, arguments.images),
        "processor": lambda: processor(place, min(3200, arguments.images)),
        "faults": lambda: faults(place, min(2000, arguments.images)),
        "speed": lambda: speed(place, min(6000, arguments.images), min(400, arguments.crops)),
    }
    machine = f"torch {torch.__version__}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} beforehand"
    lines = [f"# Sweeps\n\n{machine}.\n"]
    for what in arguments.what:
        lines += [f"## {what}\n", *jobs[what](), ""]
    print(json.dumps({"place": str(place)}))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines))
    if arguments.place is None:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
