"""Reads what a recording left. Needs no framework."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import InputError, did_you_mean
from .format import COMMITTED, TABLES, arrow, read_manifest, read_tensor, schema
from .quantiles import SiteQuantiles, quantiles


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

    @classmethod
    def of(cls, run: Any) -> "Run":
        """Return a run from itself, from its folder's path, or from a recording.

        Raises:
            InputError: it is none of these.
            RunError: the folder is no run.
        """
        if isinstance(run, cls):
            return run
        folder = getattr(run, "folder", run)
        if not isinstance(folder, str | os.PathLike):
            raise InputError(f"run is a {type(run).__name__}; pass a Run, the path of its folder, or a recording")
        return cls(folder)

    def __repr__(self) -> str:
        state = "finished" if self.finished else "unfinished"
        return f"Run({str(self.folder)!r}, {state}, sites={len(self.sites)}, tables={self.tables})"

    @property
    def finished(self) -> bool:
        """Whether the recording came to its end."""
        return bool(self.manifest["finished"])

    @property
    def sites(self) -> list[str]:
        """The names of the modules among the sites, in order of execution."""
        return list(self.manifest["sites"]["names"])

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters among the sites, in the order in which the network defines them."""
        return list(self.manifest.get("parameters", {}))

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
            raise InputError(
                f"{self.folder} has no table {name!r}{did_you_mean(name, known)} (it has {', '.join(known)})"
            )
        pa = arrow()
        fields = schema(known[name])
        tables = [pa.parquet.ParquetFile(part).read().cast(fields) for part in self.parts(name)]
        return pa.concat_tables(tables) if tables else fields.empty_table()

    def parts(self, name: str) -> list[str]:
        """Return the files of a table that count, for engines that read Parquet themselves, such as DuckDB."""
        return [str(p) for p in sorted((self.folder / name).glob("part-*.parquet")) if self._counts(p)]

    def quantiles(
        self, q: Sequence[float], of: str = "magnitude", by: str | Sequence[str] = "site", per_sample: bool = False
    ) -> list[SiteQuantiles]:
        """Return each site's quantiles; `undertow.runs.quantiles` says how."""
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
        arrays = [array for _, array in islice(self.tensors(**where), 2)]
        if len(arrays) != 1:
            wanted = ", ".join(f"{key}={value!r}" for key, value in where.items())
            raise InputError(
                f"{'no tensor is' if not arrays else 'several tensors are'} {wanted}; see run.table('kept')"
            )
        return arrays[0]

    @cached_property
    def _committed(self) -> frozenset[str]:
        return frozenset(part.name for part in (self.folder / COMMITTED).glob("part-*.parquet"))

    def _counts(self, part: Path) -> bool:
        return part.name in self._committed
