"""Reads what a sweep left: how far it is, the maps by name, all rows. Needs no framework."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..display import BAD, Mark, Rows, Shown, ShownItem, ShownTable, brief, counted
from ..display import Part as Shows
from ..errors import InputError, RunError, did_you_mean, printable
from ..files import read_bytes
from ..runs import Run
from ..runs.format import MAX_TENSOR_BYTES, arrow, damage_named, damaged, read_tensor, refuse_changed, schema
from ..runs.parts import read_part
from .columns import COLUMNS
from .folder import (
    FACTS,
    INDEX,
    NAMES,
    NAMES_COLUMNS,
    PARTS,
    Failure,
    Part,
    done_shards,
    names_digest,
    part_folder,
    read_facts,
    read_index,
    read_json,
    read_manifest,
    storable,
)
from .merge import unmerge
from .shards import Shards

_RECENT = 32  # parts that the speed is taken of


@dataclass(frozen=True, repr=False)
class SweepStatus(Shown):
    """How far a sweep is.

    Attributes:
        sweep: its folder.
        task: what is done.
        model: the network's reference.
        count: how many items there are.
        done: how many were done; those that failed are not among them.
        failed: how many could not be done.
        missing: how many are to come.
        shards, shards_done: how many shards there are, and are done.
        speed: items a second, lately, by all processes; None where nothing can be told yet.
        seconds_left: None where it is not known; 0 when nothing is missing.
        failures: each item that failed, with the reason.
    """

    sweep: str
    task: str
    model: str
    count: int
    done: int
    failed: int
    missing: int
    shards: int
    shards_done: int
    speed: float | None
    seconds_left: float | None
    failures: tuple[Failure, ...]

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return self.missing == 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "finished": self.finished}

    def _shown(self) -> Iterator[Shows]:
        state = "finished" if self.finished else f"{self.missing:,} missing"
        yield f"SweepStatus of {self.sweep}: {self.done:,} of {self.count:,} done, {self.failed:,} failed, {state}"
        speed = f", {self.speed:.3g} items a second" if self.speed else ""
        left = f", about {self.seconds_left:.0f} s left" if self.seconds_left else ""
        yield f"{self.task} with {self.model}; {self.shards_done:,} of {self.shards:,} shards{speed}{left}"
        rows = ((Mark(failure.name, BAD), failure.error) for failure in self.failures)
        yield ShownTable(("failed", "reason"), rows, len(self.failures))


@dataclass(frozen=True, repr=False)
class SweepCheck(Shown):
    """Whether each part is as it was written.

    Attributes:
        sweep: the folder.
        files: how many files were read and are as they were written.
        missing: how many items are to come.
        faults: the damaged parts, by shard, with what is wrong with each.
        strangers: files that no sweep writes.
    """

    sweep: str
    files: int
    missing: int
    faults: dict[int, str]
    strangers: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing that was done is lost or changed."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "whole": self.whole}

    def _shown(self) -> Iterator[Shows]:
        kind = "whole" if self.whole else f"{counted(len(self.faults), 'part')} damaged or missing"
        yield f"SweepCheck of {self.sweep}: {kind}"
        yield f"{counted(self.files, 'file')} read; {counted(self.missing, 'item')} to come"
        if self.strangers:
            yield f"not of this sweep: {brief(self.strangers)}"
        rows = ((Mark(str(shard), BAD), fault) for shard, fault in self.faults.items())
        yield ShownTable(("shard", "what is wrong"), rows, len(self.faults))


class Sweep(ShownItem):
    """What a sweep left, finished or not. Nothing in the folder is trusted: what is read is checked.

    Attributes:
        folder: where it lies.
        manifest: what is done to what, with which network; plain data.

    Raises:
        RunError: the folder is no sweep. So does every method that reads a file which is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shards = Shards(self.manifest["source"]["count"], self.manifest["shard_size"])
        self._maps_in = lru_cache(maxsize=2)(self._read_maps)

    def _shown(self) -> Iterator[Shows]:
        yield f"Sweep({str(self.folder)!r}, {self.task}, {len(self.done)} of {len(self.shards)} shards)"
        rows = [("items", f"{len(self):,}"), ("model", brief(self.manifest["model"].get("reference")))]
        yield ShownTable(("", ""), rows, len(rows))

    def __len__(self) -> int:
        """Return how many items there are."""
        return self.shards.count

    @property
    def task(self) -> str:
        """What is done: "explain", "record" or "trust"."""
        return str(self.manifest["task"])

    @cached_property
    def names(self) -> Rows[str]:
        """The items' names, in order."""
        path = self.folder / NAMES
        names: list[str] = read_part(path, "names", NAMES_COLUMNS)["name"].to_pylist()
        if names_digest(names) != self.manifest["source"].get("names_sha256") or len(names) != len(self):
            raise damaged(path, "has changed since it was written: its checksum differs")
        return Rows(names)

    @property
    def done(self) -> list[int]:
        """The shards that are done."""
        return [shard for shard in done_shards(self.folder) if shard < len(self.shards)]

    @property
    def missing(self) -> Rows[str]:
        """The names of the items that are still to be done."""
        names = self.names  # which also tells whether there are as many as the manifest says
        return Rows(names[i] for shard in self.shards.missing(set(self.done)) for i in self.shards[shard])

    @property
    def failed(self) -> Rows[Failure]:
        """The items that could not be done, each with its reason."""
        return Rows(failure for part in self._parts() for failure in part.failed)

    def _parts(self) -> Iterator[Part]:
        for shard in self.done:
            yield read_facts(self.folder, shard)

    @property
    def prepared(self) -> list[str]:
        """What was measured of each step of preparing the network, and whether it was taken; empty where none was."""
        path = self.folder / "prepared.json"
        if not path.exists() and not path.is_symlink():
            return []
        with damage_named(path):
            return [str(line) for line in read_json(path)["trials"]]

    def table(self) -> Any:
        """Return the rows of all parts as a `pyarrow.Table`: of explain, a row for each map; of trust, for each answer.

        Raises:
            InputError: the task is record; `run()` has its tables.
        """
        columns = COLUMNS[self.task]
        if not columns:
            raise InputError("what was recorded is a run: use .run().table(...)")
        tables = [read_index(self.folder, part, columns) for part in self._parts()]
        return arrow().concat_tables(tables) if tables else schema(columns).empty_table()

    def run(self) -> Run:
        """Return what the task `record` recorded.

        Raises:
            RunError: it is another task, or something is missing yet.
        """
        if self.task != "record" or len(self.done) < len(self.shards):
            what = "is not finished" if self.task == "record" else f"is of the task {self.task}, which records no run"
            raise RunError(f"the sweep {printable(self.folder)} {what}; see: undertow status {printable(self.folder)}")
        return Run(self.folder)

    def map(self, name: str | int, rule: str | None = None, target: int | None = None) -> npt.NDArray[Any]:
        """Return the map of one image, `(C, H, W)` as the network has its channels.

        Args:
            name: of the image, or its position.
            rule: may be left out where there is one.
            target: a class id; may be left out where one was explained.

        Raises:
            InputError: there is no such map, or several; it says which there are.
            RunError: it is not done yet, failed, or its file is damaged.
        """
        index = self._index_of(name)
        part, rows = self._part_of(index)
        chosen = [r for r in rows if rule in (None, r["rule"]) and target in (None, r["target"])]
        if len(chosen) != 1:
            there = ", ".join(f"rule={r['rule']!r} target={r['target']}" for r in rows[:6])
            shown = printable(self.names[index])
            raise InputError(f"{'several maps' if chosen else 'no map'} of {shown}; choose one of: {there}")
        return self._map(part, chosen[0])

    def maps_of(self, name: str | int) -> list[tuple[dict[str, Any], npt.NDArray[Any]]]:
        """Return all maps of one image, each with its row of the table.

        Raises:
            InputError: there is no such image.
            RunError: it is not done yet, failed, or its file is damaged.
        """
        part, rows = self._part_of(self._index_of(name))
        return [(row, self._map(part, row)) for row in rows]

    def _part_of(self, index: int) -> tuple[Part, list[dict[str, Any]]]:
        """Return the part of an image, and its rows there."""
        shard = self.shards.of(index)
        shown = printable(self.names[index])
        if not part_folder(self.folder, shard).exists():
            raise RunError(f"{shown} is not done yet; the same command goes on")
        part = read_facts(self.folder, shard)
        if failure := next((failure for failure in part.failed if failure.index == index), None):
            raise RunError(f"{shown} could not be done: {failure.error}")
        return part, [row for row in self._rows(part) if row["index"] == index]

    def maps(self, rule: str | None = None) -> Iterator[tuple[dict[str, Any], npt.NDArray[Any]]]:
        """Yield each map with its row of the table, shard by shard; of one rule, or of all."""
        for part in self._parts():
            rows = [row for row in self._rows(part) if rule in (None, row["rule"])]
            for row in sorted(rows, key=lambda row: row["file"]):
                yield row, self._map(part, row)

    def _rows(self, part: Part) -> list[dict[str, Any]]:
        if self.task != "explain":
            raise InputError(f"a sweep of the task {self.task} holds no maps")
        rows: list[dict[str, Any]] = read_index(self.folder, part, COLUMNS["explain"]).to_pylist()
        return rows

    def _map(self, part: Part, row: dict[str, Any]) -> npt.NDArray[Any]:
        """Return a map by its row, whose file must be one of the part's own."""
        maps = self._maps_in(part.shard, row["file"])
        if not 0 <= row["offset"] < len(maps):
            raise damaged(part_folder(self.folder, part.shard) / INDEX, "names a row that its file has not")
        values: npt.NDArray[Any] = maps[row["offset"]].copy()
        return values

    def _read_maps(self, shard: int, file: str) -> npt.NDArray[Any]:
        digest = read_facts(self.folder, shard).files.get(file)
        if digest is None or not file.endswith(".safetensors"):
            raise damaged(part_folder(self.folder, shard) / INDEX, "names a file that is not of its part")
        return read_tensor(part_folder(self.folder, shard) / file, digest)

    def _index_of(self, name: str | int) -> int:
        if isinstance(name, int):
            if not 0 <= name < len(self):
                raise InputError(f"there is no image {name} among {len(self)}")
            return name
        positions = self._positions.get(storable(name), [])
        if len(positions) != 1:
            hint = f"is there {len(positions)} times; give its position, one of {positions[:4]}"
            close = did_you_mean(name, self.names) if len(self) < 10_000 else ""
            raise InputError(
                f"{printable(name)} {hint if positions else f'is not among the {len(self)} images{close}'}"
            )
        return positions[0]

    @cached_property
    def _positions(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            positions.setdefault(name, []).append(index)
        return positions

    def digest(self) -> str:
        """Return a SHA-256 of all rows, maps and failures: the same for every engine and every interruption.

        Raises:
            RunError: something is missing yet.
        """
        if missing := len(self.shards) - len(self.done):
            raise RunError(f"{missing} shards of {printable(self.folder)} are missing; the same command goes on")
        digest = hashlib.sha256()
        for part in self._parts():
            files = {} if self.task == "record" else part.files
            digest.update(repr((part.shard, part.failed, sorted(files.items()))).encode())
        if self.task == "record" and (self.folder / "manifest.json").exists():
            _digest_tables(self.run(), digest)
        return digest.hexdigest()

    def status(self) -> SweepStatus:
        """Return how far it is."""
        parts = list(self._parts())
        failures = tuple(failure for part in parts for failure in part.failed)
        done = sum(len(self.shards[part.shard]) for part in parts)
        speed = _speed(parts, self.shards)
        missing = len(self) - done
        return SweepStatus(
            sweep=str(self.folder),
            task=self.task,
            model=str(self.manifest["model"].get("reference")),
            count=len(self),
            done=done - len(failures),
            failed=len(failures),
            missing=missing,
            shards=len(self.shards),
            shards_done=len(parts),
            speed=speed,
            seconds_left=0.0 if not missing else missing / speed if speed else None,
            failures=failures,
        )

    def check(self, repair: bool = False) -> SweepCheck:
        """Read every file against its checksum.

        Args:
            repair: remove damaged parts, so that the same command does them again.

        Raises:
            RunError: to be repaired while a sweep writes into the folder.
        """
        files, faults = 0, dict[int, str]()
        for shard in self.done:
            try:
                files += self._check_part(shard)
            except RunError as error:
                faults[shard] = str(error).partition("; restore it")[0]
        _ = self.names
        if faults and repair:
            self._take_out(list(faults))
        missing = len(self) - self.shards.items(self.done)
        return SweepCheck(str(self.folder), files, missing, faults, tuple(self._strangers()))

    def _take_out(self, shards: list[int]) -> None:
        """Remove some parts, and the run that was merged of all of them."""
        from ..recording.lock import locked, refuse_links

        with locked(self.folder, 0, "sweep"):
            refuse_links(self.folder, [PARTS])
            for shard in shards:
                _remove(part_folder(self.folder, shard))
            if self.task == "record":
                unmerge(self.folder)

    def _check_part(self, shard: int) -> int:
        """Return how many files a part has, all of them whole. Raises RunError: one is not."""
        part, folder = read_facts(self.folder, shard), part_folder(self.folder, shard)
        for name, digest in part.files.items():
            with damage_named(folder / name):
                if (folder / name).parent.is_symlink():
                    raise ValueError("lies behind a link")
                refuse_changed(read_bytes(folder / name, MAX_TENSOR_BYTES), digest)
        if COLUMNS[self.task]:
            read_index(self.folder, part, COLUMNS[self.task])
        if part.items + len(part.failed) != len(self.shards[shard]):
            raise damaged(folder / FACTS, "has another number of items than its shard")
        return len(part.files)

    def _strangers(self) -> Iterator[str]:
        for path in sorted((self.folder / "parts").iterdir()) if (self.folder / "parts").is_dir() else ():
            shard = int(path.name) if path.name.isdecimal() else -1
            if path.name.startswith("."):
                continue
            if not 0 <= shard < len(self.shards):
                yield f"parts/{path.name}"
                continue
            try:
                known = {*read_facts(self.folder, shard).files, FACTS}
            except RunError:
                continue
            names = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir() and p.name[0] != "."}
            yield from (f"parts/{path.name}/{name}" for name in sorted(names - known))


def _remove(part: Path) -> None:
    """Take a part away; a link alone, not what it leads to."""
    if part.is_symlink():
        part.unlink()
    else:
        shutil.rmtree(part)


def _speed(parts: list[Part], shards: Shards) -> float | None:
    """Return items a second of the parts that ended last, by however many processes; None where there are none.

    Pauses between processes that were killed and started again do not count.
    """
    recent = sorted(parts, key=lambda part: part.ended)[-_RECENT:]
    spans = sorted((part.ended - part.seconds, part.ended) for part in recent)
    covered, until = 0.0, float("-inf")
    for begin, end in spans:
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return shards.items([part.shard for part in recent]) / covered if covered > 0 else None


def _digest_tables(run: Run, digest: Any) -> None:
    """Add every row of a run's tables, whatever parts they lie in."""
    pa = arrow()
    for name in run.tables:
        table = run.table(name).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(name.encode() + sink.getvalue())
