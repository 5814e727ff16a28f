"""Photographs for a classifier: as batches on a device, and the folder that holds the results of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from . import images
from .classifier import Classifier
from .files import clear_asides, published, sync_folder, to_json
from .frameworks.base import capability, framework_of_model


def on_device(classifier: Classifier, name: str) -> str:
    """Move a classifier's network to a device, and return the device's full name; "auto" is the fastest one there is.

    Raises:
        InputError: there is no such device here.
    """
    arrays = capability(framework_of_model(classifier.module), "arrays")
    device = arrays.device(name)
    arrays.move(classifier.module, device)
    return device


def batch_of(classifier: Classifier, photograph: Image.Image, device: str = "cpu") -> Any:
    """Return a photograph as a batch of one on a device, as the network takes it.

    Raises:
        PhotographError: it is too elongated.
    """
    arrays = capability(framework_of_model(classifier.module), "arrays")
    return arrays.batch([classifier.preprocessing.array(photograph)], device)


def batch_of_file(classifier: Classifier, path: Path, device: str = "cpu") -> Any:
    """Read a photograph as a batch of one on a device.

    Raises:
        PhotographError: it cannot be read.
    """
    return batch_of(classifier, images.read(path), device)


def provenance(path: Path, classifier: Classifier) -> dict[str, Any]:
    """Return which photograph and which network a result is of, ready for JSON."""
    return {
        "photograph": str(path),
        "model": classifier.reference,
        "weights": classifier.weights,
        "weights_sha256": classifier.weights_sha256,
    }


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
