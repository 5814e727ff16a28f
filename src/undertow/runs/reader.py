"""Reads what a recording left. Needs no framework."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from ..display import Part, Rows, ShownItem, ShownTable, brief, counted
from ..errors import InputError, did_you_mean, printable
from .check import Check, check
from .checksums import FOLDER, lost_commits, read_checksums
from .format import COMMITTED, TABLES, arrow, damaged, read_tensor, schema, tensor_path
from .manifest import read_manifest
from .parts import part_name, parts_of, read_part
from .quantiles import Quantiles, quantiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run(ShownItem):
    """What a recording left, finished or not. Nothing in the folder is trusted: what is read is checked.

    Attributes:
        folder: where it lies.
        manifest: what was recorded, of which network, and how; plain data.

    Raises:
        RunError: the folder is no run, or of a format that this version does not know. So does every method that
            reads a file which is missing or damaged.
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

    def _shown(self) -> Iterator[Part]:
        state = "finished" if self.finished else "unfinished"
        tables = self.tables
        yield f"Run({str(self.folder)!r}, {state}, sites={len(self.sites)}, tables={tables})"
        model = self.manifest["model"]
        facts = {
            "model": ", ".join(f"{key} {brief(model[key])}" for key in ("reference", "class") if model.get(key)),
            "sites": brief(self.sites),
            "parameters": brief(self.parameters),
            "tables": ", ".join(f"{name} ({counted(len(self.parts(name)), 'file')})" for name in tables[:12]),
            "phase": self.manifest["phase"],
            "loss": self.manifest["loss_reduction"],
            "processes": str(self.manifest["world_size"]),
            "not reached": brief(self.manifest.get("unreached", {})),
        }
        rows = [(name, text) for name, text in facts.items() if text]
        yield ShownTable(("", ""), rows, len(rows))

    @property
    def finished(self) -> bool:
        """Whether the recording came to its end."""
        return bool(self.manifest["finished"])

    @property
    def sites(self) -> Rows[str]:
        """The names of the modules among the sites, in order of execution."""
        return Rows(self.manifest["sites"]["names"])

    @property
    def parameters(self) -> Rows[str]:
        """The names of the parameters among the sites, in the order in which the network defines them."""
        return Rows(self.manifest.get("parameters", {}))

    @property
    def tables(self) -> list[str]:
        """The names of the tables that hold something."""
        return sorted(name for name in self._columns if self.parts(name))

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The groups of batches that were published together: the process's rank, and a number, in that order."""
        return list(self._committed)

    def table(self, name: str, groups: Sequence[tuple[int, int]] | None = None) -> Any:
        """Return a table as a `pyarrow.Table`; one that nothing was written to yet has no rows.

        Args:
            name: of the table.
            groups: those of `groups` to read; None reads all.

        Raises:
            InputError: the run records no such table.
            FrameworkError: pyarrow is missing.

        The columns of `channel_norm`, for one: epoch, batch, rank (of the process), sample (position in the batch),
        name (of the sample), site, call, output, phase, repeat, dtype, values: list<float32>.
        """
        name = self._known(name)
        pa = arrow()
        columns = self._columns[name]
        tables = [
            read_part(self.folder / name / f"{part_name(*key)}.parquet", name, columns, self._sha256(key, name))
            for key in (self._committed if groups is None else groups)
            if self._holds(key, name)
        ]
        return pa.concat_tables(tables) if tables else schema(columns).empty_table()

    def parts(self, name: str) -> list[str]:
        """Return the files of a table that count, for engines that read Parquet themselves, such as DuckDB.

        Raises:
            InputError: the run records no such table.
        """
        name = self._known(name)
        return [str(path) for key, path in parts_of(self.folder, name).items() if key in self._committed]

    def check(self) -> Check:
        """Read every file of the run against its checksum, table and counts; says what is whole and what is lost.

        >>> import tempfile, torch, undertow as ut
        >>> net, folder = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), tempfile.mkdtemp()
        >>> with ut.record(folder, net, group=1) as recording, recording.batch():
        ...     net(torch.ones(2, 1, 5, 5)).sum().backward()
        >>> Run(folder).check().whole
        True
        """
        return check(self.folder, self.manifest)

    def quantiles(
        self, q: Sequence[float], of: str = "magnitude", by: str | Sequence[str] = "site", per_sample: bool = False
    ) -> Quantiles:
        """Return each site's quantiles; `undertow.runs.quantiles` says how."""
        return quantiles(self, q, of=of, by=by, per_sample=per_sample)

    def plot(
        self,
        path: str | Path | None = None,
        q: Sequence[float] = (0.5, 0.7, 0.9),
        *,
        of: str | None = None,
        panels: str | None = None,
        ground: str = "white",
    ) -> "Figure":
        """Draw quantiles of each site, as `undertow quantiles --plot` does; `Quantiles.plot` says how.

        Args:
            path: also write it there, as PNG, SVG or PDF; replaced atomically.
            q, of: as `undertow.runs.quantiles` has them.
            panels, ground: as `Quantiles.plot` has them.

        Raises:
            InputError, FrameworkError: as `quantiles` and `Quantiles.plot`.
        """
        return quantiles(self, q, of=of).plot(path, self.folder.name, panels=panels, ground=ground)

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
                yield row, self._tensor(row["file"])

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

    @property
    def _columns(self) -> dict[str, dict[str, str]]:
        """The columns of every table that the run may hold."""
        return {**TABLES, **self.manifest["tables"]}

    def _known(self, name: str) -> str:
        """Return the name of a table of this run, as it is on the disk."""
        name = name.replace("-", "_")
        if name not in self._columns:
            hint = f"{did_you_mean(name, self._columns)} (it has {', '.join(self._columns)})"
            raise InputError(f"{printable(self.folder)} has no table {name!r}{hint}")
        return name

    @cached_property
    def _committed(self) -> dict[tuple[int, int], Path]:
        """The groups that count, by rank and number, each with its part of the table `batches`."""
        committed = parts_of(self.folder, COMMITTED)
        for lost in lost_commits(self.folder, committed, self.finished):
            if not lost.exists():  # else a process that records has published it since
                raise damaged(lost, "is missing")
        return committed

    @cached_property
    def _checksums(self) -> dict[tuple[int, int], dict[str, str]]:
        """The SHA-256 of the files of each group that counts; a run written before there were any has none."""
        lists = parts_of(self.folder, FOLDER, ".sha256")
        if "checksums" in self.manifest and (
            without := next((key for key in self._committed if key not in lists), None)
        ):
            raise damaged(self.folder / FOLDER / f"{part_name(*without)}.sha256", "is missing")
        return {key: read_checksums(path) for key, path in lists.items() if key in self._committed}

    def _holds(self, key: tuple[int, int], table: str) -> bool:
        """Whether a group has a part of a table: its checksums name it, or, where it has none, it is there."""
        digests, path = self._checksums.get(key), self.folder / table / f"{part_name(*key)}.parquet"
        there = os.path.lexists(path)
        if digests is None:
            return there
        named = f"{table}/{path.name}" in digests
        if there and not named:
            raise damaged(path, f"is not among the checksums of {FOLDER}/{path.stem}.sha256")
        return named

    def _sha256(self, key: tuple[int, int], table: str) -> str | None:
        digests = self._checksums.get(key)
        return None if digests is None else digests[f"{table}/{part_name(*key)}.parquet"]

    @cached_property
    def _tensors(self) -> dict[str, str]:
        """The SHA-256 of each kept tensor that has one, by the name of its file."""
        return {name: digest for digests in self._checksums.values() for name, digest in digests.items()}

    def _tensor(self, file: str) -> npt.NDArray[Any]:
        """Read a kept tensor by the name of its file, which must be a name in its folder and no path."""
        path, digest = tensor_path(self.folder, file), self._tensors.get(f"tensors/{file}")
        if digest is None and "checksums" in self.manifest:
            raise damaged(path, f"is not among the checksums of {FOLDER}/")
        return read_tensor(path, digest)
