"""The folder in which the documentation's blocks run, and how they run there: in this process, one after the other.

A network whose weights a page would download, or that takes long, has a small one in its place (`STAND_INS`). What is
not run at all stands in `NOT_RUN`, with who runs it instead.
"""

import re
import shlex
import tarfile
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import undertow as ut
from undertow.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = {
    "make ": "CI's own",
    "pip install": "CI's own",
    "python studies/": "tests/studies",
    "torchrun ": "tests/sweep/test_engines.py",
    "undertow view": "tests/page/test_serving.py: it serves until Ctrl-C",
    "undertow export runs/a --to wandb": "tests/trackers/test_export.py: it needs an account, or WANDB_MODE=offline",
    "undertow models": "tests/cli/test_commands.py: it imports every framework",
    "undertow demo": "tests/cli/test_commands.py",
    "undertow derive model --model torchvision": "tests/derive/test_cli.py",
}
"""Beginnings of shell lines, and where they are run instead."""

NOT_RUN_WITH = {
    "--engine ray": "tests/sweep/test_engines.py: it needs a cluster",
    "--model open_clip:": "tests/test_zero_shot.py: it needs weights",
    "--decoder-text": "tests/attribution/test_text_decoders.py: it needs weights",
}
"""Parts of shell lines, likewise."""

STAND_INS = {
    "torchvision:": "small.py:load",
    "timm:": "small.py:load",
    "demo": "small.py:load",
    "keras:": "small.keras",
    "hf:gpt2": "hf:writer",
    "saved/net.keras": "small.keras",
}
"""The beginning of a reference to a network, and the file that stands for it."""

SMALL = """
import torch


def load():
    features = [torch.nn.Conv2d(3, 8, 5, stride=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3)]
    head = [torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(), torch.nn.Linear(72, 300)]
    names = [f"class {i}" for i in range(300)]
    names[282] = "tiger cat"
    size = {"resize": 64, "crop": 64}
    return {"module": torch.nn.Sequential(*features, *head), "preprocessing": size, "classes": names}
"""


def blocks_of(page: Path, kinds: str = "python|sh") -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each block of a page, in order."""
    yield from re.findall(rf"^```({kinds})\n(.*?)^```", page.read_text(), re.S | re.M)


def lines_of(block: str) -> list[str]:
    """Return the commands of a block of shell."""
    return [line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]


def is_run(line: str) -> bool:
    """Whether a line is run here."""
    return not line.startswith(tuple(NOT_RUN)) and not any(part in line for part in NOT_RUN_WITH)


def run_line(line: str, stand_ins: bool = True) -> None:
    """Run one command line of undertow; a finding that `--fail-on` stops at is as good an end as any."""
    words = shlex.split(line, comments=True)
    assert words[0] == "undertow", f"nothing runs {line!r}: run it here, or say in NOT_RUN who does"
    if stand_ins and words[1] != "derive":
        for i, word in enumerate(words[:-1]):
            if word == "--model":
                small = [name for start, name in STAND_INS.items() if words[i + 1].startswith(start)]
                words[i + 1] = small[0] if small else words[i + 1]
    with pytest.raises(SystemExit) as left:
        main(words[1:])
    assert left.value.code in ((0, 1) if "--fail-on" in words else (0,)), line


def run_page(page: Path) -> dict[str, object]:
    """Run all blocks of a page in the current folder, and return the names that its Python has left."""
    names: dict[str, object] = {"__name__": page.stem}
    for kind, block in blocks_of(page):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
        elif "studies" not in page.parts:
            for line in filter(is_run, lines_of(block)):
                run_line(line)
    return names


def furnish(folder: Path) -> None:
    """Fill a folder with the files that the pages speak of."""
    (folder / "nets.py").write_text(_block_behind("here `nets.py`"))
    (folder / "small.py").write_text(SMALL)
    names: dict[str, object] = {}
    exec((folder / "nets.py").read_text(), names)
    save_file(names["load"]().state_dict(), folder / "mine.safetensors")  # type: ignore[operator]
    photographs = _photographs(folder)
    _packed(folder, photographs)
    _runs(folder)


def furnish_keras(folder: Path) -> None:
    """Add a saved model of Keras, whose import takes seconds."""
    import keras

    layers = [keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Keras's own, of NumPy
        keras.Sequential([*layers, keras.layers.Dense(300)]).save(folder / "small.keras")


def _block_behind(words: str) -> str:
    """Return the block of Python that follows some words of the tour."""
    (block,) = re.findall(rf"{re.escape(words)}.*?```python\n(.*?)```", (ROOT / "docs" / "tour.md").read_text(), re.S)
    return block


def _photographs(folder: Path) -> list[Path]:
    """Write cat.jpg, scan.png, 14 small photographs and a list of them."""
    (folder / "photographs").mkdir()
    cat = Image.open(ut.images.demo_photographs()["chelsea"]).convert("RGB")
    cat.resize((150, 100)).save(folder / "cat.jpg")
    cat.convert("L").resize((96, 96)).save(folder / "scan.png")
    paths = [folder / "photographs" / f"{i:02}.jpg" for i in range(14)]
    for i, path in enumerate(paths):
        cat.crop((10 * i, 0, 10 * i + 200, 200)).resize((64, 64)).save(path)
    (folder / "list.txt").write_text("".join(f"photographs/{path.name}\n" for path in paths))
    return paths


def _packed(folder: Path, photographs: list[Path]) -> None:
    """Write the photographs as a column of Parquet, and as four tar files."""
    data = [path.read_bytes() for path in photographs]
    pa.parquet.write_table(pa.table({"image": data}), folder / "data.parquet")
    for number in range(4):
        with tarfile.open(folder / f"train-{number:03}.tar", "w") as tar:
            for path in photographs[number::4]:
                info = tarfile.TarInfo(f"{number}/{path.name}")
                info.size = path.stat().st_size
                tar.addfile(info, BytesIO(path.read_bytes()))


def _runs(folder: Path) -> None:
    """Record a step of two networks that differ in their pooling."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 8, 8))).float()
    for name, pool in (("max", torch.nn.MaxPool2d(2)), ("average", torch.nn.AvgPool2d(2))):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), pool, torch.nn.Flatten(), torch.nn.Linear(36, 5)
        network = torch.nn.Sequential(*layers)
        with ut.record(folder / "runs" / name, network, sites="conv", diagnose=1) as recording, recording.batch():
            torch.nn.functional.cross_entropy(network(x), torch.arange(4)).backward()
