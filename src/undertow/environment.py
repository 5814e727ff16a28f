"""What is installed here, what can be done with it, and what does not fit: the first lines of a bug report."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from .frameworks.base import capability
from .installing import install_command
from .photographs import versions

PURPOSES = {
    "torch": "models of PyTorch",
    "vision": "torchvision:NAME and timm:NAME",
    "demo": "undertow demo, and --model demo",
    "keras": "models of Keras and TensorFlow",
    "record": "record, quantiles, diagnose, sweeps",
    "plot": "--plot, and pictures of verdicts",
    "report": "report and view",
    "derive": "derive",
    "ray": "--engine ray",
    "jax": "networks in JAX, Flax and Equinox",
    "text": "networks that read text",
    "clip": "open_clip:NAME",
}
"""What each extra is for."""


@dataclass(frozen=True)
class Extra:
    """One extra of the package, and what is missing for it here.

    Attributes:
        name: as in `pip install "undertow[name]"`.
        purpose: what it is for.
        missing: requirements that are not met, such as "pyarrow>=17"; none: it is all there.
    """

    name: str
    purpose: str
    missing: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """What to type; empty where nothing is missing."""
        return install_command(self.name) if self.missing else ""


def extras() -> list[Extra]:
    """Return every extra that a user may want, in the order of `PURPOSES`."""
    return [Extra(name, purpose, tuple(_missing(name))) for name, purpose in PURPOSES.items()]


def _missing(extra: str) -> Iterator[str]:
    """Yield the requirements of an extra that are not met, those of extras within it too."""
    from packaging.requirements import Requirement

    for text in metadata.requires("undertow") or []:
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "undertow":
            for inner in sorted(requirement.extras):
                yield from _missing(inner)
        elif not _is_met(requirement.name, requirement.specifier):
            yield f"{requirement.name}{requirement.specifier}"


def _is_met(name: str, wanted: Any) -> bool:
    names = ("tensorflow", "tensorflow-cpu", "tf-nightly") if name.startswith("tensorflow") else (name,)
    for one in names:
        try:
            return bool(wanted.contains(metadata.version(one), prereleases=True))
        except metadata.PackageNotFoundError:
            continue
    return False


def environment() -> dict[str, Any]:
    """Return versions, the machine, what each extra lacks, the fastest device, and what does not fit, as plain data."""
    there = [name for name in ("torch", "jax") if find_spec(name)]
    return {
        "versions": versions(),
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "device": next((capability(name, "arrays").device("auto") for name in there), None),
        },
        "extras": [{**asdict(extra), "remedy": extra.remedy} for extra in extras()],
        "misfits": list(misfits()),
    }


def misfits() -> Iterator[str]:
    """Yield what is installed and will not work as it is, each with the remedy."""
    torch, keras, jax = (find_spec(name) for name in ("torch", "keras", "jax"))
    if not torch and not keras and not jax:
        yield f"neither PyTorch, Keras nor JAX is here, so no model can be read; run: {install_command('torch')}"
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    backends = {"tensorflow": ("TensorFlow", "keras"), "torch": ("PyTorch", "torch"), "jax": ("JAX", "jax")}
    title, extra = backends.get(backend, ("", ""))
    if keras and not title:
        yield f"Keras is to run on {backend}, where nothing is explained or recorded yet; set KERAS_BACKEND=tensorflow"
    elif keras and not find_spec(backend):
        yield f"Keras is here without {title}, which its models run on; run: {install_command(extra)}"
