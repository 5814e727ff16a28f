"""The checksums of a run's files: a list for each group of parts, in the form that `sha256sum -c` reads.

cd RUN && sha256sum -c checksums/*.sha256
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from ..files import published, read_bytes
from .format import COMMITTED, damage_named, damaged
from .parts import part_name, parts_of

FOLDER = "checksums"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+/[^/\n]+)")
_MAX_BYTES = 1 << 30
_MAX_LOST = 1000  # of a process, that are named: a stray file may have any number


def write_checksums(folder: Path, rank: int, number: int, digests: Mapping[str, str]) -> None:
    """Write the SHA-256 of each file of a group, before the part appears that makes it count."""
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    with published(folder / FOLDER / f"{part_name(rank, number)}.sha256") as aside:
        aside.write_text(text, encoding="utf-8")


def read_checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a group by its name within the run, such as "samples/part-000-000000.parquet".

    Raises:
        RunError: the list is missing or damaged.
    """
    with damage_named(path):
        lines = read_bytes(path, _MAX_BYTES).decode().removesuffix("\n").split("\n")
        matches = [_LINE.fullmatch(line) for line in lines]
        if None in matches:
            raise ValueError("is no list of checksums")
    digests = {match[2]: match[1] for match in matches if match}
    if f"{COMMITTED}/{path.stem}.parquet" not in digests:
        raise damaged(path, f"does not name {COMMITTED}/{path.stem}.parquet")
    return digests


def missing(folder: Path, rank: int, numbers: Iterable[int], listed: bool) -> Path | None:
    """Return a file of these groups of a process that is not there; None where all are.

    Args:
        listed: whether each group must have its checksums; a run written before there were any has none.

    Raises:
        RunError: a list of checksums is damaged.
    """
    for name in (part_name(rank, number) for number in sorted(numbers)):
        digests = folder / FOLDER / f"{name}.sha256"
        needed = [folder / COMMITTED / f"{name}.parquet", *([digests] if listed else [])]
        if lost := next((path for path in needed if not path.is_file()), None):
            return lost
        files = (folder / file for file in (read_checksums(digests) if digests.exists() else ()))
        if lost := next((path for path in files if not path.is_file()), None):
            return lost
    return None


def lost_commits(folder: Path, committed: Container[tuple[int, int]], finished: bool) -> Iterator[Path]:
    """Yield the parts of `batches` that must have been there: processes number their groups without gaps, and one that
    is at its end has published all that it has checksums of.
    """
    lists = parts_of(folder, FOLDER, ".sha256") if finished else {}
    numbered = (*parts_of(folder, COMMITTED), *lists)
    for rank in sorted({rank for rank, _ in numbered}):
        numbers = {number for of, number in numbered if of == rank}
        for number in range(min(max(numbers), len(numbers) + _MAX_LOST) + 1):
            if (rank, number) not in committed:
                yield folder / COMMITTED / f"{part_name(rank, number)}.parquet"
