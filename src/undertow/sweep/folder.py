"""The folder that a sweep leaves: what is to be done, and a part for each shard that is done. Needs no framework.

    DIR/sweep.json          what is done to what, with which network
    DIR/names.parquet       the name of each item, in order
    DIR/parts/000012/       shard 12, which appears whole by one rename

The folder may come from elsewhere: nothing is read through a link, by a path that it names, or without bound.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError, one_line, printable
from ..files import published, published_folder, read_bytes, sha256_of, to_json
from ..runs.format import arrow, damage_named, schema
from ..runs.parts import read_part

NAME = "sweep.json"
PARTS = "parts"
NAMES = "names.parquet"
INDEX = "index.parquet"
FACTS = "part.json"
FORMAT = 1
NAMES_COLUMNS = {"index": "int64", "name": "string"}
_MAX_BYTES = 256 << 20
_PART = re.compile(r"\d{6,12}")
_FILE = re.compile(r"(?:run/(?:[\w-]+/)?)?[\w. -]+")
SAME = ("task", "settings", "source", "shard_size", "model")
"""What must be the same to go on with a sweep."""


@dataclass(frozen=True)
class Failure:
    """An item that could not be done, and why."""

    index: int
    name: str
    error: str


@dataclass(frozen=True)
class Part:
    """What a part says of itself.

    Attributes:
        shard: its number.
        items: how many were done.
        failed: those that could not be done.
        files: the SHA-256 of each of its files.
        seconds: how long it took.
        ended: when, in seconds since 1970.
    """

    shard: int
    items: int
    failed: tuple[Failure, ...]
    files: Mapping[str, str]
    seconds: float
    ended: float


def part_folder(folder: Path, shard: int) -> Path:
    """Return where a shard's part lies."""
    return folder / PARTS / f"{shard:06d}"


def done_shards(folder: Path) -> list[int]:
    """Return the shards whose part is there, in order.

    Raises:
        RunError: the folder of parts is a link.
    """
    parts = folder / PARTS
    with damage_named(parts):
        if parts.is_symlink():
            raise ValueError("is a link")
        return (
            sorted(int(path.name) for path in parts.iterdir() if _PART.fullmatch(path.name)) if parts.is_dir() else []
        )


@contextmanager
def new_part(folder: Path, shard: int) -> Iterator[Path]:
    """Give a folder to fill with a shard's files and, last, `write_facts`; then it appears, unless it is there already.

    That another process did the same shard is no error: what it did is the same.
    """
    try:
        with published_folder(part_folder(folder, shard)) as aside:
            yield aside
    except FileExistsError:
        if not part_folder(folder, shard).is_dir():
            raise


def write_facts(aside: Path, shard: int, items: int, failed: Sequence[Failure], seconds: float, ended: float) -> None:
    """Write what a part says of itself, with the checksums of the files that are in it."""
    files = {p.relative_to(aside).as_posix(): sha256_of(p) for p in sorted(aside.rglob("*")) if _is_ours(p)}
    facts = {
        "shard": shard,
        "items": items,
        "failed": [vars(failure) for failure in failed],
        "files": files,
        "seconds": round(seconds, 3),
        "ended": round(ended, 3),
    }
    write_json(aside / FACTS, facts, new=True)


def _is_ours(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def read_facts(folder: Path, shard: int) -> Part:
    """Read what a part says of itself.

    Raises:
        RunError: it is missing or damaged.
    """
    part = part_folder(folder, shard)
    path = part / FACTS
    with damage_named(path):
        if part.is_symlink():
            raise ValueError("lies behind a link")
        facts = read_json(path)
        failed = tuple(Failure(int(f["index"]), str(f["name"]), str(f["error"])) for f in facts["failed"])
        files = {str(name): str(digest) for name, digest in facts["files"].items()}
        if facts["shard"] != shard or not all(map(_FILE.fullmatch, files)) or any(".." in name for name in files):
            raise ValueError("is of another shard, or names files that no part has")
        return Part(shard, int(facts["items"]), failed, files, float(facts["seconds"]), float(facts["ended"]))


def write_table(path: Path, rows: Mapping[str, Sequence[Any]], columns: Mapping[str, str]) -> None:
    """Write a table, the same bytes for the same rows."""
    pa = arrow()
    types = schema(columns)
    table = pa.table({name: pa.array(rows[name], types.field(name).type) for name in columns})
    pa.parquet.write_table(table, path, compression="lz4", write_statistics=True)


def read_index(folder: Path, part: Part, columns: Mapping[str, str]) -> Any:
    """Read the table of a part. Raises RunError: it is missing or damaged."""
    return read_part(part_folder(folder, part.shard) / INDEX, "index", columns, part.files.get(INDEX))


def write_manifest(
    folder: Path, manifest: Mapping[str, Any], names: Sequence[str], chosen: Collection[str] = ()
) -> dict[str, Any]:
    """Begin a sweep, or go on with the one that is there; returns its manifest.

    Several processes may do so at once: the first one counts.

    Args:
        chosen: the settings that whoever begins the sweep chooses for all.

    Raises:
        RunError: another sweep is there.
    """
    if not (folder / NAME).exists():
        with published(folder / NAMES) as aside:
            texts = [storable(name) for name in names]
            write_table(aside, {"index": range(len(texts)), "name": texts}, NAMES_COLUMNS)
    facts = {"format": FORMAT, **json.loads(json.dumps(manifest, default=str))}
    try:
        write_json(folder / NAME, facts, new=True)
    except FileExistsError:
        before = read_manifest(folder)
        facts["settings"] |= {name: before["settings"].get(name) for name in chosen}
        _refuse_other(folder, before, facts)
        return before
    return facts


def storable(name: str) -> str:
    """Return a name as Parquet can hold it: bytes of a file name that are no text become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def names_digest(names: Sequence[str]) -> str:
    """Return the SHA-256 of names, which tells a source from others.

    >>> names_digest(["a.jpg"]) == names_digest(["b.jpg"])
    False
    """
    digest = hashlib.sha256()
    for name in names:
        digest.update(storable(name).encode() + b"\0")
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a sweep says of itself.

    Raises:
        RunError: there is none, or it is damaged or of another format.
    """
    path = folder / NAME
    if not path.exists() and not path.is_symlink():
        raise RunError(f"{printable(folder)} is no sweep: it holds no {NAME}")
    with damage_named(path):
        facts = read_json(path)
        if facts.get("format") != FORMAT:
            raise ValueError(f"has format {printable(facts.get('format'))[:20]}, and this undertow reads {FORMAT}")
        if fault := next((text for key, (is_right, text) in _MEANING.items() if not is_right(facts.get(key))), None):
            raise ValueError(f"is not as a sweep writes it: {fault}")
    return facts


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_MEANING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (lambda value: value in ("explain", "record", "trust"), "there is no such task"),
    "settings": (lambda value: isinstance(value, dict), "settings are no object"),
    "shard_size": (_is_count, "the size of a shard is no number"),
    "model": (lambda value: isinstance(value, dict), "the model is no object"),
    "source": (lambda value: isinstance(value, dict) and _is_count(value.get("count")), "the source has no count"),
}


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a sweep of something else.

    Raises:
        RunError: with the first difference.
    """
    for key in SAME:
        old, new = before[key], now[key]
        if old == new:
            continue
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)] if isinstance(old, dict) else [""]
        pairs = [(f"{key} {k}".strip(), old.get(k) if k else old, new.get(k) if k else new) for k in changed]
        difference = printable("; ".join(f"{name} {a!r}, not {b!r}" for name, a, b in pairs[:2]))
        raise RunError(f"{printable(folder)} is a sweep with {difference}; choose another --out, or the same again")


def write_json(path: Path, facts: Mapping[str, Any], new: bool) -> None:
    """Write plain data as JSON, with a checksum of its own. Raises FileExistsError: it is to be new, and is there."""
    with published(path, new) as aside:
        aside.write_text(to_json({**facts, "sha256": _sha256(facts)}) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises ValueError: it has changed since."""
    facts = json.loads(read_bytes(path, _MAX_BYTES).decode())
    if not isinstance(facts, dict) or facts.pop("sha256", None) != _sha256(facts):
        raise ValueError("has changed since it was written: its checksum differs")
    return facts


def _sha256(facts: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(to_json(facts)), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def disk_named(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line that names the folder, and says what remains.

    Raises:
        RunError: it refused something.
    """
    try:
        yield
    except OSError as error:
        what = one_line(error)
        raise RunError(
            f"cannot write into {printable(folder)}: {what}; the parts that are there are whole, "
            "and the same command goes on from them"
        ) from error
