"""The folder that a recording leaves: a manifest, tables in atomic parts, tensors. Reading it needs no framework.

    RUN/manifest.json              what was recorded, of which network, and how
    RUN/TABLE/part-RRR-NNNNNN.parquet
    RUN/tensors/*.safetensors      with the measure "keep"

Parts of one number belong together: those of the table `batches` are published last, and a part of any other table
counts only if `batches` has one of its name. So what a killed run leaves is whole batches, or nothing of them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import FrameworkError, InputError, RunError, near
from .files import published

if TYPE_CHECKING:
    from .analysis import SiteQuantiles

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
    "joins": "int32",
    "gain": "float64",
    "zeros": "int64",
    "expected_zeros": "int64",
    "closed": "int64",
    "slope": "float64",
    "absolute": "float64",
    "expected_absolute": "float64",
    "active": "list<int64>",
    "codes": "list<uint16>",
    "counts": "list<int64>",
    "sums": "list<float64>",
    "absolutes": "list<float64>",
}
"""The columns, behind KEYS, of the table `diagnosis`: a row for each site of a batch that was watched (step 0), and one
for each function that its output alone went through. `undertow.diagnosis` says what they mean."""


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


class Run:
    """What a recording left, finished or not.

    Attributes:
        folder: where it lies.
        manifest: what was recorded, of which network, and how; plain data.

    Raises:
        RunError: the folder is no run, or of a format that this version does not know.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)

    def __repr__(self) -> str:
        state = "finished" if self.finished else "unfinished"
        return f"Run({str(self.folder)!r}, {state}, sites={len(self.sites)}, tables={self.tables})"

    @property
    def finished(self) -> bool:
        """Whether the recording came to its end."""
        return bool(self.manifest["finished"])

    @property
    def sites(self) -> list[str]:
        """The names of the sites, in order of execution."""
        return list(self.manifest["sites"]["names"])

    @property
    def tables(self) -> list[str]:
        """The names of the tables that hold something."""
        return sorted({part.parent.name for part in self.folder.glob("*/part-*.parquet") if self._counts(part)})

    def table(self, name: str) -> Any:
        """Return a table as a `pyarrow.Table`; one that nothing was written to yet has no rows.

        Raises:
            InputError: the run records no such table.
            FrameworkError: pyarrow is missing.

        The columns of `channel_norm`, for one: epoch, batch, rank (of the process), sample (position in the batch),
        name (of the sample), site, call, output, phase, repeat, dtype, values: list<float32>.
        """
        known = {**TABLES, **self.manifest["tables"]}
        name = name.replace("-", "_")
        if name not in known:
            raise InputError(f"{self.folder} has no table {name!r}{near(name, known)} (it has {', '.join(known)})")
        pa = arrow()
        parts = [part for part in sorted((self.folder / name).glob("part-*.parquet")) if self._counts(part)]
        fields = schema(known[name])
        read = [pa.parquet.ParquetFile(part).read().cast(fields) for part in parts]
        return pa.concat_tables(read) if read else fields.empty_table()

    def parts(self, name: str) -> list[str]:
        """Return the files of a table that count, for engines that read Parquet themselves, such as DuckDB."""
        return [str(p) for p in sorted((self.folder / name).glob("part-*.parquet")) if self._counts(p)]

    def quantiles(
        self, q: Sequence[float], of: str = "magnitude", by: str | Sequence[str] = "site", per_sample: bool = False
    ) -> list["SiteQuantiles"]:
        """Return each site's quantiles; `undertow.analysis.quantiles` says how."""
        from .analysis import quantiles

        return quantiles(self, q, of=of, by=by, per_sample=per_sample)

    def tensors(self, **where: Any) -> Iterator[tuple[dict[str, Any], npt.NDArray[Any]]]:
        """Yield what was kept, with its row of the table `kept`; bfloat16 comes as float32.

        Args:
            where: values that columns must have, as in `site="features.0", epoch=3, name="a.jpg"`.

        Raises:
            InputError: nothing was kept, or there is no such column.
        """
        table = self.table("kept")
        if unknown := set(where) - set(table.column_names):
            raise InputError(f"there is no column {unknown.pop()!r} (there are {', '.join(table.column_names)})")
        for row in table.to_pylist():
            if all(row[key] == value for key, value in where.items()):
                yield row, read_tensor(self.folder / "tensors" / row["file"])

    def tensor(self, **where: Any) -> npt.NDArray[Any]:
        """Return the one kept tensor that `where` describes.

        Raises:
            InputError: none does, or several do.
        """
        found = [array for _, array in islice(self.tensors(**where), 2)]
        if len(found) != 1:
            said = ", ".join(f"{key}={value!r}" for key, value in where.items())
            raise InputError(f"{'no tensor is' if not found else 'several tensors are'} {said}; see run.table('kept')")
        return found[0]

    @cached_property
    def _committed(self) -> frozenset[str]:
        return frozenset(part.name for part in (self.folder / COMMITTED).glob("part-*.parquet"))

    def _counts(self, part: Path) -> bool:
        return part.name in self._committed


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


def settle(folder: Path) -> None:
    """See to it that the names in a folder outlast a power failure."""
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
    found = np.frombuffer(raw, layout, offset=start).reshape(spec["shape"])
    return (found.astype(np.uint32) << 16).view(np.float32) if spec["dtype"] == "BF16" else found.copy()
