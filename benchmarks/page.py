"""What a page costs: seconds to write it, its size, and what Chromium takes to open, draw and scroll it.

    python benchmarks/page.py [--keep FOLDER] [--photographs 50] [--layers 100] [--batches 1000]

Prints two rows of `benchmarks/page.md`: photographs under three rules at 224 x 224, by the packaged classifier's
architecture; and a run of many layers and batches. Photographs and run are made first, which is not timed.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

import undertow as ut
from undertow.cli.explain import explain_all
from undertow.cli.photographs import RULES

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# Milliseconds since navigation began: when the page's script has put everything there, and when all in sight is drawn.
READY = """() => {
  const { ready, drawn } = document.documentElement.dataset;
  return drawn ? [Number(ready), Number(drawn)] : null;
}"""
SCROLL = """() => new Promise((done) => {
  const frames = []; let last = performance.now();
  const step = (now) => {
    frames.push(now - last); last = now; scrollBy(0, 60);
    const more = scrollY + innerHeight < document.documentElement.scrollHeight - 1;
    if (frames.length < 240 && more) requestAnimationFrame(step);
    else done(frames.slice(1));
  };
  requestAnimationFrame(step);
})"""


def photographs(folder: Path, count: int) -> list[Path]:
    """Cut a number of different squares out of the packaged photographs, and explain them."""
    sources = [Image.open(path).convert("RGB") for path in ut.images.demo_photographs().values()]
    random = np.random.default_rng(0)
    pieces = folder / "photographs"
    pieces.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        source = sources[number % len(sources)]
        x, y = (int(random.integers(0, side - 256)) for side in source.size)
        paths.append(pieces / f"{number:03}.png")
        source.crop((x, y, x + 256, y + 256)).save(paths[-1])
    options = {"rules": RULES, "target": "top:1"}
    explain_all(ut.load("demo"), paths, options, "cpu", folder / "maps")
    return [folder / "maps"]


def run(folder: Path, layers: int, batches: int) -> list[Path]:
    """Record a deep narrow network: histogram and channel norms of each of its linear layers."""
    torch.manual_seed(0)
    net = nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())])
    for part in net:
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    with ut.record(
        folder / "run", net, sites="linear", measures=["histogram", "channel-norm"], diagnose=True
    ) as recording:
        for _ in range(batches):
            with recording.batch():
                net(torch.randn(8, 16)).square().sum().backward()
    return [folder / "run"]


def opened(path: Path, rounds: int = 5) -> dict[str, str]:
    """Open a page several times; medians."""
    ready, drawn, frames = [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.resolve().as_uri())
            first, last = page.wait_for_function(READY).json_value()
            ready.append(first)
            drawn.append(last)
            frames += page.evaluate(SCROLL)
            page.close()
        browser.close()
    late = sum(frame > 34 for frame in frames) / len(frames)
    return {
        "ready": f"{statistics.median(ready) / 1000:.2f} s",
        "drawn": f"{statistics.median(drawn) / 1000:.2f} s",
        "frame, median": f"{statistics.median(frames):.0f} ms",
        "frame, 95 %": f"{np.percentile(frames, 95):.0f} ms",
        "frames over 34 ms": f"{100 * late:.0f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="where photographs, run and pages are kept, and found again")
    parser.add_argument("--photographs", type=int, default=50)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--batches", type=int, default=1000)
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        f"{asked.photographs} photographs x 3 rules": (folder / "maps", lambda: photographs(folder, asked.photographs)),
        f"{asked.layers} layers x {asked.batches} batches": (
            folder / "run",
            lambda: run(folder, asked.layers, asked.batches),
        ),
    }
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for name, (made, make) in found.items():
        what = [made] if made.exists() else make()
        start, cpu = time.perf_counter(), time.process_time()
        page = ut.report(*what, path=folder / f"{what[0].name}.html")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        row = {
            "written in": f"{seconds:.1f} s",
            "of a processor": f"{cpu:.1f} s",
            "size": f"{page.stat().st_size / 1e6:.1f} MB",
            **opened(page),
        }
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
