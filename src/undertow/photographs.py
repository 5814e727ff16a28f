"""Photographs for a classifier: the device that they go to, and the folder that holds the results of one."""

import base64
import io
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .classifier import Classifier
from .files import clear_asides, published, sync_folder, to_json
from .frameworks.base import capability, framework_of_model

PHOTOGRAPH = "photograph.png"
"""In the folder of a result: the photograph as the network's input shows it."""
_MODULES = {"pillow": "PIL"}
_DISTRIBUTIONS = {
    name: (name,) for name in ("undertow", "torch", "torchvision", "timm", "keras", "numpy", "pillow")
} | {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-macos", "tf-nightly")}


def on_device(classifier: Classifier, name: str) -> str:
    """Move a classifier's network to a device, and return the device's full name; "auto" is the fastest one there is.

    Raises:
        InputError: there is no such device here.
    """
    arrays = capability(framework_of_model(classifier.module), "arrays")
    device = arrays.device(name)
    arrays.move(classifier.module, device)
    return device


def provenance(path: Path, classifier: Classifier) -> dict[str, Any]:
    """Return which photograph and which network a result is of, ready for JSON."""
    return {
        "photograph": str(path),
        "model": classifier.reference,
        "weights": classifier.weights,
        "weights_sha256": classifier.weights_sha256,
        "preprocessing": classifier.preprocessing.to_dict(),
        "preprocessing_from": classifier.preprocessing_from,
    }


def write_image(image: Any, path: Path) -> Path:
    """Write a Pillow image, or `(H, W, 3)` uint8, as PNG, PDF or SVG by the path's ending; whole or not at all.

    A PDF, and an SVG, holds the picture's pixels; a PDF has white below what is transparent.
    """
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with published(path) as aside:
        if path.suffix == ".svg":
            aside.write_text(_as_svg(picture), encoding="utf-8")
        elif path.suffix == ".pdf":
            over = picture.convert("RGBA")
            Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB").save(aside, "PDF")
        else:
            picture.save(aside, format="PNG", compress_level=3)  # two thirds of the time of 6, and 1 % larger
    return path


def _as_svg(picture: Any) -> str:
    """Return a picture's pixels as SVG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = picture.size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/></svg>\n'
    )


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a result may depend on; None for one that is missing.

    What is imported says its own, "2.13.0+cpu"; TensorFlow is installed under several names.
    """
    return {"python": platform.python_version(), **{package: _version(package) for package in _DISTRIBUTIONS}}


def _version(package: str) -> str | None:
    module = sys.modules.get(_MODULES.get(package, package))
    if module is not None:
        return str(module.__version__)
    for name in _DISTRIBUTIONS[package]:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


@contextmanager
def result_folder(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Give a dict to fill while files are written into a folder; it is written last, as the JSON file `name`.

    Files of the same names are replaced, and what a killed process left half written is cleared. A folder that has the
    JSON file is complete, also after a power failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    clear_asides(folder)
    result: dict[str, Any] = {}
    yield result
    sync_folder(folder.parent)
    sync_folder(folder)
    with published(folder / name) as aside:
        aside.write_text(to_json(result) + "\n", encoding="utf-8")
    sync_folder(folder)
