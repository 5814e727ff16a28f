"""What is swept: a sequence of named items, each a photograph or the array that a network takes.

photographs/                    a folder, recursively; names are relative to it
list.txt                        a path in each line, relative to the file
data.parquet:image              a column of paths, of encoded images, or of Hugging Face's {bytes, path}
shards/train-*.tar              tar files in the manner of WebDataset; {0000..0099} counts
a torch Dataset, in Python      anything with a length and items: an image, an array, or a tuple that begins with one
"""

import glob
import io
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from .. import images
from ..errors import InputError, PhotographError, one_line, printable
from ..files import read_bytes
from ..frameworks.base import as_numpy
from ..runs.format import arrow
from ..structures import is_tensor

Draft = Callable[[int, int], tuple[int, int]] | None
_MAX_LIST_BYTES = 1 << 30


class Source(Protocol):
    """A sequence of named items that can be read in any order, by several threads."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    @property
    def where(self) -> str:
        """Where it is, for people."""

    @property
    def names(self) -> Sequence[str]:
        """The items' names, in order."""

    @property
    def folder(self) -> Path:
        """What the names are relative to; empty where they are no paths."""

    def read(self, index: int, draft: Draft = None) -> Image.Image | npt.NDArray[Any]:
        """Return an item: an upright RGB image, or an array as the network takes it.

        Raises:
            PhotographError: it cannot be read.
        """


@dataclass(frozen=True)
class PhotographFiles:
    """Photographs in files, by names relative to a folder.

    >>> folder = images.demo_photographs()["chelsea"].parent
    >>> PhotographFiles("folder", str(folder), ["chelsea.png"], folder).read(0).size
    (451, 300)
    """

    kind: str
    where: str
    names: Sequence[str]
    folder: Path = Path()

    def read(self, index: int, draft: Draft = None) -> Image.Image:
        """Read a photograph. Raises PhotographError: it cannot be read."""
        return images.read(os.path.join(self.folder, self.names[index]), draft)


@dataclass(frozen=True)
class TarShards:
    """The photographs in tar files: read where they lie, without unpacking."""

    where: str
    files: Sequence[str]
    names: Sequence[str]
    places: Sequence[tuple[int, int, int]]
    """Of each photograph: its file, its first byte there, and its bytes."""
    kind: str = "tar"
    folder: Path = Path()

    def read(self, index: int, draft: Draft = None) -> Image.Image:
        """Read a photograph. Raises PhotographError: it cannot be read."""
        number, start, size = self.places[index]
        path, name = self.files[number], self.names[index]
        try:
            with open(path, "rb") as file:
                file.seek(start)
                raw = file.read(size)
        except OSError as error:
            raise PhotographError(
                f"{printable(name)} in {printable(path)} cannot be read: {one_line(error)}"
            ) from error
        return images.read(_named(raw, f"{name} in {path}"), draft)


@dataclass(frozen=True)
class ParquetColumn:
    """A column of a Parquet file: paths relative to the file, or encoded images."""

    where: str
    path: Path
    column: str
    names: Sequence[str]
    is_path: bool
    starts: Sequence[int]
    """The first row of each row group, and the number of rows."""
    kind: str = "parquet"
    folder: Path = Path()
    _cache: dict[int, Any] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, index: int, draft: Draft = None) -> Image.Image:
        """Read a photograph. Raises PhotographError: it cannot be read."""
        name = self.names[index]
        if self.is_path:
            return images.read(os.path.join(self.path.parent, name), draft)
        group = int(np.searchsorted(self.starts, index, "right")) - 1
        value = self._group(group)[index - self.starts[group]].as_py()
        raw = value.get("bytes") if isinstance(value, dict) else value
        if raw is None:
            raise PhotographError(f"row {index} of {printable(self.where)} has no image")
        return images.read(_named(raw, f"row {index} of {self.where}"), draft)

    def _group(self, number: int) -> Any:
        """Return the column of a row group; the two read last are kept."""
        with self._lock:
            if number not in self._cache:
                with arrow().parquet.ParquetFile(self.path) as file:
                    self._cache[number] = file.read_row_group(number, columns=[self.column])[self.column]
                if len(self._cache) > 2:
                    del self._cache[next(iter(self._cache))]
            return self._cache[number]


@dataclass(frozen=True)
class DatasetItems:
    """The items of a torch `Dataset`, or of anything with a length and `[i]`.

    >>> DatasetItems([(np.zeros((3, 2, 2), np.float32), 7)]).read(0).shape
    (3, 2, 2)
    """

    dataset: Any
    kind: str = "dataset"
    folder: Path = Path()

    @property
    def where(self) -> str:
        """The class of the data set."""
        return type(self.dataset).__name__

    @property
    def names(self) -> Sequence[str]:
        """The data set's own `names`, or the items' numbers."""
        names = getattr(self.dataset, "names", None)
        fits = isinstance(names, Sequence) and len(names) == len(self.dataset)
        return [str(name) for name in names] if fits and names is not None else _Numbers(len(self.dataset))

    def read(self, index: int, draft: Draft = None) -> Image.Image | npt.NDArray[Any]:
        """Return an item's image or array. Raises PhotographError: the data set failed, or gives something else."""
        try:
            item = self.dataset[index]
            item = item[0] if isinstance(item, tuple | list) else item
            if isinstance(item, Image.Image):
                return images.read(item)
            if is_tensor(item):
                return as_numpy(item)
        except PhotographError:
            raise
        except Exception as error:  # the data set is somebody else's code
            raise PhotographError(f"item {index} of {self.where}: {type(error).__name__}: {one_line(error)}") from error
        raise PhotographError(f"item {index} of {self.where} is a {type(item).__name__}, no image and no array")


class _Numbers(Sequence[str]):
    """The numbers from 0 on, as texts, without keeping them."""

    def __init__(self, length: int) -> None:
        self.numbers = range(length)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return [str(n) for n in self.numbers[index]] if isinstance(index, slice) else str(self.numbers[index])


def source_of(source: Any) -> Source:
    """Return the source that a path, several paths, or a data set means.

    Raises:
        InputError: it is none.
        PhotographError: there is nothing in it, or it cannot be listed.

    >>> source_of(images.demo_photographs().values()).names[0].endswith("chelsea.png")
    True
    """
    if isinstance(source, str | os.PathLike):
        return _at([os.fspath(source)])
    if hasattr(source, "read") and hasattr(source, "names") and hasattr(source, "where"):
        found: Source = source
        return found
    if isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        source = list(source)
    if isinstance(source, list | tuple) and source and all(isinstance(item, str | os.PathLike) for item in source):
        return _at([os.fspath(item) for item in source])
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__") or not len(source):
        raise InputError(f"a sweep goes over a folder, files or a data set with items, not a {type(source).__name__}")
    return DatasetItems(source)


def _at(paths: list[str]) -> Source:
    """Return the source that the words of a command mean."""
    if len(paths) == 1:
        path = paths[0]
        if (match := re.fullmatch(r"(.+\.parquet):([^/\\:]+)", path)) is not None:
            return _parquet(Path(match[1]), match[2])
        if path.lower().endswith(".txt"):
            return _file_list(Path(path))
        if Path(path).is_dir():
            within = 0 if Path(path) == Path() else len(os.path.join(Path(path), ""))
            names = [os.fspath(photograph)[within:] for photograph in images.find([path])]
            return PhotographFiles("folder", path, names, Path(path))
    if all(path.lower().endswith((".tar", ".tar.gz", ".tgz")) for path in paths):
        return _tar(paths)
    return PhotographFiles("files", " ".join(paths), list(map(str, images.find(paths))))


def _file_list(path: Path) -> PhotographFiles:
    try:
        text = read_bytes(path, _MAX_LIST_BYTES).decode(errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise PhotographError(f"the list {printable(path)} cannot be read: {one_line(error)}") from error
    names = list(dict.fromkeys(line for line in text.split("\n") if line.strip()))
    names = [name.removesuffix("\r") for name in names]
    if not names:
        raise PhotographError(f"the list {printable(path)} is empty; put a path in each line")
    return PhotographFiles("list", str(path), names, path.parent)


def _parquet(path: Path, column: str) -> ParquetColumn:
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise InputError(f"{printable(path)} has no column {column!r} (it has {', '.join(schema.names)})")
            kind, metadata = schema.field(column).type, file.metadata
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            names = _parquet_names(pa, file, column, kind)
    except (OSError, pa.ArrowException) as error:
        raise PhotographError(f"{printable(path)} cannot be read: {one_line(error)}") from error
    if not names:
        raise PhotographError(f"{printable(path)} has no rows")
    starts = [0, *np.cumsum(rows).tolist()]
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return ParquetColumn(f"{path}:{column}", path, column, names, is_path, starts)


def _parquet_names(pa: Any, file: Any, column: str, kind: Any) -> Sequence[str]:
    """Return a name for each row: the path where there is one, else the row's number."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [name or "" for name in file.read(columns=[column])[column].to_pylist()]
    fields = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in fields):
        raise InputError(f"the column {column!r} is of {kind}; it must hold paths, encoded images, or {{bytes, path}}")
    count = file.metadata.num_rows
    if "path" not in fields:
        return _Numbers(count)
    paths = file.read(columns=[f"{column}.path"])[column].combine_chunks().field("path").to_pylist()
    return _distinct([path or str(row) for row, path in enumerate(paths)])


def _distinct(names: list[str]) -> list[str]:
    """Put a number before names that occur more than once."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{n}/{name}" for n, name in enumerate(names)]


def _tar(patterns: Sequence[str]) -> TarShards:
    files = list(dict.fromkeys(path for pattern in patterns for path in _expanded(pattern)))
    names, places = [], []
    for number, path in enumerate(files):
        for name, start, size in _members(path):
            names.append(name if len(files) == 1 else f"{Path(path).name}/{name}")
            places.append((number, start, size))
    if not names:
        raise PhotographError(
            f"no photograph in {printable(' '.join(patterns))}; a tar file must hold .jpg, .png or the like"
        )
    return TarShards(" ".join(patterns), files, _distinct(names), places)


def _expanded(pattern: str) -> list[str]:
    """Return the files that a pattern means, sorted; `{0000..0009}` counts, `*` is as in a shell.

    >>> _expanded("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        for low, high in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    texts = ["".join(x + y for x, y in zip(pieces[::3], (*c, ""), strict=True)) for c in product(*ranges)]
    return [path for text in texts for path in (sorted(glob.glob(text)) or [text])]


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and size of each photograph in a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name
                hidden = Path(name).name.startswith(".")
                if (
                    member.isreg()
                    and not member.issparse()
                    and not hidden
                    and Path(name).suffix.lower() in images.SUFFIXES
                ):
                    yield name, member.offset_data, member.size
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
    except FileNotFoundError as error:
        raise PhotographError(f"{printable(path)} does not exist; check the name") from error
    except (OSError, tarfile.TarError) as error:
        remedy = (
            "unpack .gz first, for items are read where they lie" if path.lower().endswith("gz") else "copy it again"
        )
        raise PhotographError(
            f"{printable(path)} is no tar file that can be read ({one_line(error)}); {remedy}"
        ) from error


def _named(raw: bytes, name: str) -> IO[bytes]:
    """Return bytes as a file with a name, which messages tell."""
    file = io.BytesIO(raw)
    file.name = name
    return file
