"""The folder that a recording leaves: a manifest, tables in atomic parts, tensors. Needs no framework.

    RUN/manifest.json              what was recorded, of which network, and how
    RUN/TABLE/part-RRR-NNNNNN.parquet
    RUN/tensors/*.safetensors      with the measure "keep"
    RUN/checksums/part-RRR-NNNNNN.sha256   of the files of one number, as `sha256sum -c` reads them

Parts of one number belong together: those of the table `batches` are published last, and a part of any other table
counts only if `batches` has one of its name. So what a killed run leaves is whole batches, or nothing of them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FrameworkError, RunError, UndertowError, one_line, printable
from ..files import published, read_bytes
from ..installing import install_command
from ..measures import MEASURES, Measure

FORMAT = 2
MAX_PART_BYTES = 2 << 30
"""Of a part on the disk, and of its rows in memory; a group is published at 64 MiB."""
MAX_TENSOR_BYTES = 64 << 30
COMMITTED = "batches"
KEYS = {"epoch": "int32", "batch": "int64", "rank": "int32"}
SAMPLE_KEYS = {"sample": "int32", "name": "string"}
SITE_KEYS = {"site": "string", "call": "int32", "output": "string", "phase": "string", "repeat": "int16"}
TABLES: dict[str, dict[str, str]] = {
    "batches": KEYS | {"size": "int32", "world_size": "int32", "loss_reduction": "string", "scale": "float64"},
    "samples": KEYS | SAMPLE_KEYS,
}
"""The columns of the tables that every run has; a measure's own follow KEYS, SITE_KEYS and `dtype`."""

SITE = KEYS | SITE_KEYS | {"dtype": "string"}
"""The columns of an observation that are the same for all of its samples, in order."""

_NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64")
TYPES = frozenset((*_NUMBERS, "string", "tensor", *(f"list<{kind}>" for kind in (*_NUMBERS, "string"))))
"""The types that a column may have; "tensor" is the name of a file."""

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

_LATER = (
    *("flat", "number", "read_by", "trainable", "weight_std", "broken_data", "broken_input", "broken_weights"),
    *("broken_output", "ignored_labels", "operand", "saturated", "rms_slope", "norm"),
)
LATER = {"diagnosis": frozenset(_LATER)}
"""Columns of tables that earlier versions wrote without them: a table has all of them, or none."""

CLASSES = {"class": "int32", "class_name": "string", "score": "float64"}
"""Further columns of `samples` where photographs were recorded: what each was asked about, and its score."""


def columns_of(measure: Measure) -> dict[str, str]:
    """Return the columns of a measure's table, with their types."""
    return {**KEYS, **(SAMPLE_KEYS if measure.per_sample else {}), **SITE, **measure.columns}


@cache
def known_columns() -> dict[str, dict[str, str]]:
    """Return the tables that this library reads itself, each with the columns that it cannot do without."""
    measured = {measure().table: {**SITE, **measure.columns} for measure in MEASURES.values()}
    return {**TABLES, **measured, "diagnosis": KEYS | DIAGNOSIS, "steps": KEYS | STEPS}


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
            f"pyarrow, which reads and writes runs, is missing; run: {install_command('record')}"
        ) from error
    return pyarrow


def schema(columns: Mapping[str, str]) -> Any:
    """Return the Arrow schema of columns whose types are written as text, such as "list<float32>"."""
    pa = arrow()
    return pa.schema([(name, _arrow_type(pa, text)) for name, text in columns.items()])


def _arrow_type(pa: Any, text: str) -> Any:
    if text.startswith("list<"):
        return pa.list_(pa.field("element", _arrow_type(pa, text[5:-1])))  # as Parquet calls it
    return pa.string() if text in ("string", "tensor") else pa.type_for_alias(text)


def appearing(path: Path) -> AbstractContextManager[Path]:
    """Give a path to write aside; on success it appears as `path`, which must not exist, on an exception it is gone.

    Raises:
        FileExistsError: something of that name is there; it is left as it is.
    """
    return published(path, new=True)


_DTYPES = {"float64": ("F64", "<f8"), "float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}


def write_tensor(path: Path, values: npt.NDArray[Any], dtype: str, facts: Mapping[str, str]) -> str:
    """Write one tensor as safetensors under the name "values", with facts about it; whole or not at all.

    NumPy has no bfloat16: it is given as its bits, uint16.

    Returns:
        The SHA-256 of the file.
    """
    word, layout = _DTYPES[dtype]
    data = np.ascontiguousarray(values, layout)
    spec = {"dtype": word, "shape": list(values.shape), "data_offsets": [0, data.nbytes]}
    header = json.dumps({"__metadata__": dict(facts), "values": spec}).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    content = header + data.tobytes()
    with published(path) as aside:
        aside.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_tensor(path: Path, sha256: str | None = None) -> npt.NDArray[Any]:
    """Read one kept tensor; bfloat16 becomes float32, which holds every value of it.

    Raises:
        RunError: the file is missing, damaged, or not the one with this SHA-256.
    """
    with damage_named(path):
        raw = read_bytes(path, MAX_TENSOR_BYTES)
        refuse_changed(raw, sha256)
        start = 8 + int.from_bytes(raw[:8], "little")
        spec = json.loads(raw[8:start])["values"]
        layout = np.dtype(dict(_DTYPES.values())[spec["dtype"]])
        shape = [int(side) for side in spec["shape"]]
        if min(shape, default=0) < 0 or math.prod(shape) * layout.itemsize != len(raw) - start:
            raise ValueError(f"its shape {spec['shape']} does not fit its {len(raw) - start:,} bytes")
        values = np.frombuffer(raw, layout, offset=start).reshape(shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if spec["dtype"] == "BF16" else values.copy()


def tensor_path(folder: Path, file: str) -> Path:
    """Return where a kept tensor lies, which is in the run's folder `tensors` whatever its name.

    Raises:
        RunError: the name is a path, or that folder is a link.
    """
    tensors = folder / "tensors"
    if Path(file).name != file or "\\" in file or "\0" in file or file in ("", ".", ".."):
        raise damaged(folder / "kept", f"names a file {printable(file)!r}, which is no name within the run")
    if tensors.is_symlink():
        raise damaged(tensors, "is a link")
    return tensors / file


def refuse_changed(raw: bytes, sha256: str | None) -> None:
    """Raise ValueError where bytes have another SHA-256 than they were written with; None is not known."""
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError("has changed since it was written: its checksum differs")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file of a run into one line that names it and the remedy.

    Raises:
        RunError: something went wrong.
    """
    try:
        yield
    except (UndertowError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except Exception as error:  # a damaged file can raise nearly anything in some decoder
        plain = isinstance(error, ValueError) and type(error) is ValueError
        reason = one_line(error) if plain else f"cannot be read ({type(error).__name__}: {one_line(error)[:160]})"
        raise damaged(path, reason) from error


def damaged(path: Path, reason: str) -> RunError:
    """Return the error of a file of a run: which, what is wrong with it, and the remedy."""
    return RunError(f"{printable(path)} {reason}; restore it from a copy, or see what is whole: undertow check RUN")
