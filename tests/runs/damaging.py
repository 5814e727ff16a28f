"""A small run, and what may be done to one by somebody who knows the format."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from undertow.recording import record
from undertow.runs import Run

MEASURES = ["channel-norm", "histogram", "moments", "keep"]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()


def small_run(folder, batches=3, measures=MEASURES, end=True, **more):
    """Record two samples a batch into groups of two; `end=False` leaves the run unfinished."""
    model = network()
    recording = record(folder, model, sites="**", measures=measures, group=2, **more)
    try:
        with recording:
            for number in range(batches):
                x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(number))
                with recording.batch(samples=[f"{number}a.png", f"{number}b.png"], batch=number):
                    model(x).square().sum().backward()
            if not end:
                raise InterruptedError
    except InterruptedError:
        pass
    return Path(folder)


def without_checksums(folder):
    """Make of a run what was written before there were checksums."""
    shutil.rmtree(folder / "checksums")
    change_manifest(folder, lambda manifest: [manifest.pop(key) for key in ("checksums", "sha256")])
    return folder


def change_manifest(folder, change, sealed=True):
    """Change what a run says of itself, with a checksum that fits, as an attacker can give it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sealed and manifest.pop("sha256", None):
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def seal(folder):
    """Write all checksums anew, as an attacker can."""
    for path in (folder / "checksums").iterdir():
        lines = [line.split("  ") for line in path.read_text().splitlines()]
        files = [name for _, name in lines if (folder / name).is_file()]
        text = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
        path.write_text(text)


def answers(folder):
    """All that the reader says of a run, as plain data."""
    run = Run(folder)
    manifest = {key: value for key, value in run.manifest.items() if key not in ("sha256", "created")}
    tables = {name: run.table(name).to_pydict() for name in run.tables}
    tensors = [(row["file"], values.tobytes()) for row, values in run.tensors()]
    return repr(
        (manifest, tables, tensors, [q.to_dict() for q in run.quantiles([0.1, 0.5, 0.9])], run.sites, run.finished)
    )
