"""Import of torchvision and timm, also beside a CPU-only torch; what does not fit is said in one line."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ....errors import FrameworkError, one_line
from ....installing import install_command

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # torch forgets a declaration when its object dies
_importing = threading.Lock()


def import_torchvision() -> Any:
    """Import torchvision, also beside a CPU-only torch, where the wheel's CUDA operators cannot load.

    `import torchvision` then fails with "operator torchvision::nms does not exist". Declaring the schemas of the two
    operators that it registers kernels for is enough: no classifier and no transform calls them.

    Raises:
        FrameworkError: torchvision is missing, or does not fit the installed torch.
    """
    with _importing:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise FrameworkError(f"torchvision is missing; run: {install_command('vision')}")
        if "torchvision" not in sys.modules:
            declare_operators(Path(spec.origin).parent)
        try:
            with warnings.catch_warnings(action="ignore"):
                return importlib.import_module("torchvision")
        except Exception as error:
            raise FrameworkError(_misfit(error)) from error


def declare_operators(package: Path) -> None:
    """Let torchvision, whose folder is given, be imported beside a CPU-only torch, by whatever imports it."""
    for library in sorted(package.glob("_C*")):  # torchvision's own name for its compiled operators
        with suppress(OSError, RuntimeError):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call, unused-ignore]
    missing = [schema for schema in _OPERATORS if not hasattr(torch.ops.torchvision, schema.partition("(")[0])]
    if missing:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call, unused-ignore]
        for schema in missing:
            _declared[-1].define(schema)


def _misfit(error: Exception) -> str:
    """Say why torchvision does not import, and which would: torchvision 0.(N+15) is built for torch 2.N."""
    installed, version = torch.__version__.partition("+")[0], "of unknown version"
    needs = installed
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("torchvision")
        lines = importlib.metadata.requires("torchvision") or ()
        pins = (re.match(r"torch\s*\(?==\s*([\d.]+)", line) for line in lines)
        needs = next((pin[1] for pin in pins if pin), installed)
    minor = re.match(r"2\.(\d+)", installed)
    remedy = f'pip install "torchvision==0.{int(minor[1]) + 15}.*"' if minor else f"pip install torch=={needs}"
    if needs != installed:
        return f"torchvision {version} is built for torch {needs}, but torch {installed} is installed; run: {remedy}"
    return f"torchvision {version} cannot be imported ({one_line(error)}); run: {remedy} --force-reinstall"


def import_timm() -> Any:
    """Import timm, after torchvision, which it needs.

    Raises:
        FrameworkError: as `import_torchvision` says.
    """
    import_torchvision()
    return import_package("timm", "vision")


def import_package(name: str, extra: str) -> Any:
    """Import a package of one of undertow's extras.

    Raises:
        FrameworkError: it is missing or broken; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = "is missing" if getattr(error, "name", None) == name else f"cannot be imported ({one_line(error)})"
        raise FrameworkError(f"{name} {reason}; run: {install_command(extra)}") from error
