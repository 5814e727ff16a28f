"""Build the wheel and the source archive, check both, and use the wheel in clean environments.

    python .ci/release.py [--extras record,plot] [--pythons python3.12,python3.13] [--without torch]

`twine check --strict`, the whole source archive (`make test` needs tests, docs, studies and benchmarks), then for the
base and for each extra alone: a fresh environment, the wheel with that extra, `pip check`, and what the extra is for
(tries.py). Without `--extras` all of them, which takes gigabytes; with an empty one the base alone. `--without torch`:
a line that asks for that extra has answered, and is not run with it; for Pythons that have PyTorch for CUDA only.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

from tries import NEEDED, TRIES, furnish

ROOT = Path(__file__).parent.parent
TRIED = ("3.11", "3.12", "3.13", "3.14")
"""The Pythons with which this was run: all extras on 3.11, on the others those without PyTorch and TensorFlow."""
WHOLE = ("README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "docs/design.md", "tests/conftest.py")
WHOLE += ("studies/trust.py", "benchmarks/explain.py", "src/undertow/py.typed")
REMEDY = re.compile(r'run: (pip install "undertow\[(\w+)\]")')


def run(*words: object, cwd: Path | None = None) -> None:
    """Run a command; stop where it fails."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, cwd=cwd)


def built(folder: Path) -> Path:
    """Build both archives, check them, and return the wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir())
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in WHOLE if name not in names]
    assert not missing, f"the source archive lacks {missing}"
    with zipfile.ZipFile(wheel) as packed:
        files = packed.namelist()
    assert "undertow/py.typed" in files
    assert all(name.startswith(("undertow/", "undertow-")) for name in files)
    return wheel


def tried(wheel: Path, extra: str, python: str, without: set[str], furnished: Path, folder: Path) -> str:
    """Install the wheel with one extra into an environment of its own, use it there, and return a line of figures."""
    run("cp", "-r", furnished, folder / "here")
    run(python, "-m", "venv", folder / "venv")
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    begun = time.perf_counter()
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[{extra}]" if extra else wheel)
    installed = time.perf_counter()
    run(*pip, "check")
    size = sum(path.stat().st_size for path in (folder / "venv").rglob("*") if path.is_file() and not path.is_symlink())
    needed = {name for line in TRIES[extra] for name in typed(line, without, folder)}
    assert without or needed == NEEDED.get(extra, set()), f"{extra or 'the base'} asked for {needed}"
    took = installed - begun, time.perf_counter() - installed
    name = f"{Path(python).name:10} {extra or 'base':8}"
    return f"{name} {took[0]:5.0f} s installing, {size / 1e6:6.0f} MB; {took[1]:4.0f} s of use"


def typed(line: str, without: set[str], folder: Path) -> list[str]:
    """Run a line as a user types it, with the remedies that it names; return the extras that these brought."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}"
    environment = kept | {"PATH": path, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    brought: list[str] = []
    while True:
        print("$", line, flush=True)
        done = subprocess.run(line, shell=True, cwd=folder / "here", env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return brought
        remedy = REMEDY.search(done.stderr)
        assert remedy is not None, done.stdout + done.stderr
        assert remedy[2] not in brought, f"{remedy[1]} did not help: {done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 2, done.returncode
        if remedy[2] in without:
            return brought
        brought.append(remedy[2])
        print("$", remedy[1], flush=True)
        subprocess.run(f"{remedy[1]} --quiet", shell=True, cwd=folder, env=environment, check=True)


def main() -> None:
    """Check what the arguments ask for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    usual = [extra for extra in extras if extra not in ("dev", "bench")]
    parser = argparse.ArgumentParser(description="Check a release.")
    parser.add_argument("--extras", default=",".join(usual))
    parser.add_argument("--pythons", default=sys.executable)
    parser.add_argument("--without", default="")
    asked = parser.parse_args()
    without = set(filter(None, asked.without.split(",")))
    with tempfile.TemporaryDirectory() as scratch:
        wheel, furnished = built(Path(scratch) / "dist"), Path(scratch) / "furnished"
        furnished.mkdir()
        furnish(furnished)
        figures = []
        for python in asked.pythons.split(","):
            for extra in ["", *filter(None, asked.extras.split(","))]:
                with tempfile.TemporaryDirectory() as folder:
                    figures.append(tried(wheel, extra, python, without, furnished, Path(folder)))
                    print(figures[-1], flush=True)
    print("\n".join(figures))


if __name__ == "__main__":
    main()
