"""The folder that a recording leaves: a manifest, tables in atomic parts, tensors. Needs no framework.

    RUN/manifest.json              what was recorded, of which network, and how
    RUN/TABLE/part-RRR-NNNNNN.parquet
    RUN/tensors/*.safetensors      with the measure "keep"

Parts of one number belong together: those of the table `batches` are published last, and a part of any other table
counts only if `batches` has one of its name. So what a killed run leaves is whole batches, or nothing of them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FrameworkError, RunError
from ..files import published

FORMAT = 2
COMMITTED = "batches"
KEYS = {"epoch": "int32", "batch": "int64", "rank": "int32"}
SAMPLE_KEYS = {"sample": "int32", "name": "string"}
SITE_KEYS = {"site": "string", "call": "int32", "output": "string", "phase": "string", "repeat": "int16"}
TABLES: dict[str, dict[str, str]] = {
    "batches": KEYS | {"size": "int32", "world_size": "int32", "loss_reduction": "string", "scale": "float64"},
    "samples": KEYS | SAMPLE_KEYS,
}
"""The columns of the tables that every run has; a measure's own follow KEYS, SITE_KEYS and `dtype`."""

DIAGNOSIS = SITE_KEYS | {
    "step": "int16",
    "op": "string",
    "module": "string",
    "settings": "string",
    "readers": "string",
    "shape": "list<int64>",
    "dtype": "string",
    "arrival": "string",
    "flat": "string",
    "number": "int32",
    "read_by": "list<int32>",
    "trainable": "int8",
    "joins": "int32",
    "gain": "float64",
    "weight_std": "float64",
    "broken_data": "int64",
    "broken_input": "int64",
    "broken_weights": "int64",
    "broken_output": "int64",
    "ignored_labels": "float64",
    "operand": "float64",
    "zeros": "int64",
    "expected_zeros": "int64",
    "closed": "int64",
    "saturated": "int64",
    "slope": "float64",
    "rms_slope": "float64",
    "absolute": "float64",
    "norm": "float64",
    "expected_absolute": "float64",
    "active": "list<int64>",
    "codes": "list<uint16>",
    "counts": "list<int64>",
    "sums": "list<float64>",
    "absolutes": "list<float64>",
}
"""The columns, behind KEYS, of the table `diagnosis`: a row for each site of a batch that was watched (step 0), and one
for each function that its output alone went through. `undertow.diagnosis` says what they mean."""


STEPS = {"optimizer": "int32", "class": "string", "step": "int32", "group": "int32"} | dict.fromkeys(
    ("lr", "weight_decay"), "float64"
)
"""The columns, behind KEYS, of the table `steps`: a row for each group of parameters in each step of an optimizer."""


def arrow() -> Any:
    """Import pyarrow.

    Raises:
        FrameworkError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FrameworkError(
            'pyarrow, which reads and writes runs, is missing; run: pip install "undertow[record]"'
        ) from error
    return pyarrow


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a run says of itself.

    Raises:
        RunError: there is none, or one that cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError as error:
        raise RunError(f"{folder} is no run: it holds no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}/manifest.json cannot be read ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise RunError(f"{folder} has format {version}; this undertow reads {FORMAT}: install the one that wrote it")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any], new: bool = False) -> None:
    """Write the manifest, whole or not at all: in the place of any there is, or as a `new` one.

    Raises:
        FileExistsError: it is to be new, and there is one.
    """
    path = folder / "manifest.json"
    with appearing(path) if new else published(path) as aside:
        aside.write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")


def schema(columns: Mapping[str, str]) -> Any:
    """Return the Arrow schema of columns whose types are written as text, such as "list<float32>"."""
    pa = arrow()
    return pa.schema([(name, _arrow_type(pa, text)) for name, text in columns.items()])


def _arrow_type(pa: Any, text: str) -> Any:
    if text.startswith("list<"):
        return pa.list_(pa.field("element", _arrow_type(pa, text[5:-1])))  # as Parquet calls it
    return pa.string() if text == "tensor" else getattr(pa, text)()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a path to write aside; on success it appears as `path`, which must not exist, on an exception it is gone.

    Raises:
        FileExistsError: something of that name is there; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except (PermissionError, NotImplementedError):  # a file system without links
            with path.open("xb"):
                aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder through to the disk, so that they outlast a power failure."""
    with suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_DTYPES = {"float64": ("F64", "<f8"), "float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}


def write_tensor(path: Path, values: npt.NDArray[Any], dtype: str, facts: Mapping[str, str]) -> None:
    """Write one tensor as safetensors under the name "values", with facts about it; whole or not at all.

    NumPy has no bfloat16: it is given as its bits, uint16.
    """
    word, layout = _DTYPES[dtype]
    data = np.ascontiguousarray(values, layout)
    spec = {"dtype": word, "shape": list(values.shape), "data_offsets": [0, data.nbytes]}
    header = json.dumps({"__metadata__": dict(facts), "values": spec}).encode()
    header += b" " * (-len(header) % 8)
    with published(path) as aside, aside.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(data.tobytes())


def read_tensor(path: Path) -> npt.NDArray[Any]:
    """Read one kept tensor; bfloat16 becomes float32, which holds every value of it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    spec = json.loads(raw[8:start])["values"]
    layout = dict(_DTYPES.values())[spec["dtype"]]
    values = np.frombuffer(raw, layout, offset=start).reshape(spec["shape"])
    return (values.astype(np.uint32) << 16).view(np.float32) if spec["dtype"] == "BF16" else values.copy()
