"""Is a run whole: every file against its checksum, its table and the counts of its batches."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..display import BAD, FrozenRows, Mark, Part, Shown, ShownTable, brief, counted
from ..errors import RunError, printable
from .checksums import FOLDER, lost_commits, read_checksums
from .format import COMMITTED, TABLES, damage_named, read_tensor, tensor_path
from .parts import batch_counts, batches_of, part_name, parts_of, read_part

_AGAIN = "recording again with the same settings does these batches"
Key = tuple[int, int]


@dataclass(frozen=True)
class Fault:
    """One file that is not as it was written.

    Attributes:
        file: its name within the run.
        reason: what is wrong, in one line.
        batches: how many batches have lost rows by it; -1 where that cannot be told.
        remedy: what can be done.
    """

    file: str
    reason: str
    batches: int
    remedy: str


@dataclass(frozen=True, repr=False)
class Check(Shown):
    """What `Run.check` says of a run.

    Attributes:
        run: its folder.
        finished: whether the recording came to its end.
        groups: how many groups of batches count.
        batches: how many batches they hold, as far as they can be read.
        files: how many files were read and are as they were written.
        unverified: how many of these were written before there were checksums, and only could be read.
        faults: the files that are not, or are missing.
        orphans: files of groups that do not count, as a killed process leaves them; recording again clears them.
        strangers: files that no recording writes; nothing reads them.
    """

    run: str
    finished: bool
    groups: int
    batches: int
    files: int
    unverified: int
    faults: tuple[Fault, ...]
    orphans: tuple[str, ...]
    strangers: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("faults", "orphans", "strangers"):
            object.__setattr__(self, name, FrozenRows(getattr(self, name)))  # tuples that show themselves, however long

    @property
    def whole(self) -> bool:
        """Whether nothing that was recorded is lost or changed."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "whole": self.whole}

    def _shown(self) -> Iterator[Part]:
        kind = "whole" if self.whole else f"{counted(len(self.faults), 'file')} damaged or missing"
        state = "finished" if self.finished else "not finished"
        yield f"Check of {self.run}: {kind}"
        yield f"{counted(self.files, 'file')} with {self.batches:,} batches read; {state}"
        for names, what in ((self.orphans, "of groups that do not count"), (self.strangers, "not of this run")):
            if names:
                yield f"{what}: {brief(names)}"
        faults = ((Mark(f.file, BAD), f.reason, str(f.batches), f.remedy) for f in self.faults)
        yield ShownTable(("file", "reason", "batches lost", "remedy"), faults, len(self.faults))


def check(folder: Path, manifest: Mapping[str, Any]) -> Check:
    """Read every file of a run whose manifest is known to be whole.

    Raises:
        FrameworkError: pyarrow is missing.
    """
    checker = _Checker(folder, manifest)
    checker.run()
    orphans = tuple(checker.orphans())
    return Check(
        run=str(folder),
        finished=manifest["finished"],
        groups=len(checker.committed),
        batches=checker.batches,
        files=checker.files,
        unverified=checker.unverified,
        faults=tuple(checker.faults),
        orphans=orphans,
        strangers=tuple(checker.strangers()),
    )


class _Checker:
    """Goes through a run group by group, and gathers what is wrong."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.columns = {**TABLES, **manifest["tables"]}
        self.faults: list[Fault] = []
        self.batches = self.files = self.unverified = 0
        self.committed: dict[Key, Path] = {}
        self.known: set[str] = {"manifest.json"}
        self.batch_keys: Counter[tuple[int, int, int]] = Counter()

    def run(self) -> None:
        """Check every group that counts."""
        try:
            self.committed = parts_of(self.folder, COMMITTED)
        except RunError as error:
            self._fault(self.folder / COMMITTED, error, -1)
            return
        for lost in lost_commits(self.folder, self.committed, self.manifest["finished"]):
            self._fault(lost, "is missing", -1, "its group's other parts do not count without it")
        for key, path in self.committed.items():
            self._group(key, path)
        for (rank, epoch, batch), count in self.batch_keys.items():
            if count > 1:
                reason = f"batch {batch} of epoch {epoch} of process {rank} is there {count} times"
                self._fault(self.folder / COMMITTED, reason, 1, "restore the folder from a copy")

    def _group(self, key: Key, path: Path) -> None:
        """Check the parts of one group, and the tensors that they name."""
        name = part_name(*key)
        digests = self._digests(name)
        rows = self._read(path, lambda digest: batches_of(path, digest), digests, -1)
        batches = {} if rows is None else batch_counts(rows)
        self.batches += 0 if rows is None else rows.num_rows
        self.batch_keys.update({(key[0], *batch): count for batch, count in batches.items()})
        lost = -1 if rows is None else rows.num_rows
        for table in sorted(set(self.columns) - {COMMITTED}):
            part = self.folder / table / f"{name}.parquet"
            if part.exists() or f"{table}/{name}.parquet" in (digests or ()):
                self._part(part, table, key, digests, rows, lost)

    def _part(
        self, part: Path, table: str, key: Key, digests: Mapping[str, str] | None, batches: Any, lost: int
    ) -> None:
        read = self._read(part, lambda digest: read_part(part, table, self.columns[table], digest), digests, lost)
        if read is None or batches is None:
            return
        try:
            with damage_named(part):
                _refuse_other_rows(read, table, key[0], batches)
        except RunError as error:
            self.files -= 1
            self._fault(part, error, lost)
        for file in read["file"].to_pylist() if table == "kept" else ():
            self._tensor(file, digests)

    def _tensor(self, file: str, digests: Mapping[str, str] | None) -> None:
        try:
            path = tensor_path(self.folder, file)
        except RunError as error:
            self._fault(self.folder / "kept", error, 1)
        else:
            self._read(path, lambda digest: read_tensor(path, digest), digests, 1)

    def _read(self, path: Path, read: Any, digests: Mapping[str, str] | None, lost: int) -> Any:
        """Read one file, and count it as whole or note its fault."""
        name = self._known(path)
        digest = None if digests is None else digests.get(name)
        if digests is not None and digest is None:
            self._fault(path, f"is not among the checksums of {FOLDER}/", lost)
            return None
        try:
            content = read(digest)
        except RunError as error:
            self._fault(path, error, lost)
            return None
        self.files += 1
        self.unverified += digest is None
        return content

    def _digests(self, name: str) -> dict[str, str] | None:
        """Return the checksums of a group; None for one written before there were any, or if they are lost."""
        path = self.folder / FOLDER / f"{name}.sha256"
        self.known.add(f"{FOLDER}/{path.name}")
        if "checksums" not in self.manifest and not path.exists():
            return None
        try:
            return read_checksums(path)
        except RunError as error:
            self._fault(path, error, 0, "restore it from a copy; DuckDB and the like read the rows without it")
            return None

    def _fault(self, path: Path, reason: RunError | str, batches: int, remedy: str = "") -> None:
        """Note what is wrong with a file; an error names the file itself, and is cut to what it says of it."""
        text = str(reason).removeprefix(printable(path)).partition("; restore it")[0].strip()
        name = path.relative_to(self.folder).as_posix()
        if not remedy and self.manifest["finished"]:
            remedy = "restore it from a copy; the run is finished, so record into a new folder to have it again"
        elif not remedy:
            stem = path.stem if path.parent.name in self.columns else "part-..."
            remedy = f"restore it from a copy, or delete {COMMITTED}/{stem}.parquet: {_AGAIN}"
        self.faults.append(Fault(name, text, batches, remedy))

    def orphans(self) -> Iterator[str]:
        """Yield the files of groups that do not count."""
        for table, suffix in (*((table, ".parquet") for table in sorted(self.columns)), (FOLDER, ".sha256")):
            try:
                parts = parts_of(self.folder, table, suffix)
            except RunError as error:
                self._fault(self.folder / table, error, -1)
                continue
            for key, path in parts.items():
                if key not in self.committed:
                    yield self._known(path)
        for path in sorted((self.folder / "tensors").glob("*.safetensors")):
            if f"tensors/{path.name}" not in self.known and not path.name.startswith("."):
                yield self._known(path)

    def _known(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        self.known.add(name)
        return name

    def strangers(self) -> Iterator[str]:
        """Yield files that no recording writes; hidden ones, which locks and half-written files are, are left out."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            is_folder = path.is_dir() and not path.is_symlink()
            if not is_folder and name not in self.known and not path.name.startswith("."):
                yield name


def _refuse_other_rows(rows: Any, table: str, rank: int, batches: Any) -> None:
    """Raise ValueError where a part has rows of batches that are not its group's, or too few or many of its samples."""
    sizes = dict(zip(batch_counts(batches), batches["size"].to_pylist(), strict=True))
    counts = batch_counts(rows)
    if set(rows["rank"].unique().to_pylist()) - {rank} or not counts.keys() <= sizes.keys():
        raise ValueError("has rows of batches that are not in its group")
    if table == "samples" and (wrong := next((key for key in sizes if counts.get(key, 0) != sizes[key]), None)):
        raise ValueError(f"has {counts.get(wrong, 0)} samples of a batch of {sizes[wrong]}")
