"""Build the wheel and the source archive, check both, and install the wheel into clean environments.

    python .ci/release.py [--extras record,plot] [--pythons python3.12,python3.13]

`twine check --strict`, the whole source archive (`make test` needs tests, docs, studies and benchmarks), then for the
base and for each extra alone: a fresh environment, the wheel with that extra, `pip check`, and what the extra is for.
Without `--extras` all of them, which takes gigabytes; with an empty one the base alone.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRIED = ("3.11", "3.12", "3.13")
"""The Pythons with which this was run; the base, and the extras `record`, `plot`, `report` and `derive`."""
PROBES = {
    "": "import undertow as ut, sys; assert ut.load and ut.rules.RULES; assert 'torch' not in sys.modules",
    "torch": "import torch, undertow as ut; net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()); "
    "assert ut.explain(net, torch.ones(1, 2), target=0).rewired == 1",
    "record": "import undertow.runs.format as f; f.__name__; import pyarrow.parquet, filelock",
    "plot": "from undertow.show.plots import save; import matplotlib.figure",
    "report": "import jinja2, vl_convert",
    "derive": "import undertow as ut; assert 'HCX' in ut.derive.directional('X*C*X', wrt='X', shapes={'X': ('d', 'd'), "
    "'C': ('d', 'd')}).text",
    "ray": "import ray",
    "jax": "import jax",
    "text": "import transformers",
    "keras": "import keras",
    "vision": "import undertow as ut; ut.load('torchvision:squeezenet1_1@none'); ut.load('timm:resnet18@none')",
    "demo": "import undertow as ut; assert ut.load('demo').id('tiger cat') == 282",
}
"""What each extra alone must be able to do."""

WHOLE = ("README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "docs/design.md", "tests/conftest.py")
WHOLE += ("studies/trust.py", "benchmarks/explain.py", "src/undertow/py.typed")


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


def tried(wheel: Path, extra: str, python: str, folder: Path) -> None:
    """Install the wheel with one extra into an environment of its own, and use it there."""
    run(python, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[{extra}]" if extra else wheel)
    run(*pip, "check")
    run(folder / "bin" / "python", "-W", "error", "-c", PROBES[extra], cwd=folder)
    run(folder / "bin" / "undertow", "--version", cwd=folder)
    run(folder / "bin" / "undertow", "doctor", cwd=folder) if extra not in ("", *_WITHOUT_A_FRAMEWORK) else None


_WITHOUT_A_FRAMEWORK = ("record", "plot", "report", "derive", "ray", "jax")


def main() -> None:
    """Check what the arguments ask for."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    usual = [extra for extra in extras if extra not in ("dev", "bench")]
    parser = argparse.ArgumentParser(description="Check a release.")
    parser.add_argument("--extras", default=",".join(usual))
    parser.add_argument("--pythons", default=sys.executable)
    asked = parser.parse_args()
    unknown = set(usual) - set(PROBES)
    assert not unknown, f"extras that nothing tries: {unknown}"
    with tempfile.TemporaryDirectory() as scratch:
        wheel = built(Path(scratch) / "dist")
        for python in asked.pythons.split(","):
            for extra in ["", *filter(None, asked.extras.split(","))]:
                with tempfile.TemporaryDirectory() as folder:
                    tried(wheel, extra, python, Path(folder))
    print("ok")


if __name__ == "__main__":
    main()
