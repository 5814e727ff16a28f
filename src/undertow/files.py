"""Files that appear whole or not at all, are read only where they are what they seem, and have safe names."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_ASIDE = ".undertow-"
_WITHOUT_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def published(path: Path, new: bool = False) -> Iterator[Path]:
    """Give a path to write aside; on success it becomes `path` atomically, on an exception it is gone.

    Args:
        new: nothing may be there yet; otherwise a file of that name is replaced.

    Raises:
        FileExistsError: it is to be new, and something of that name is there; that is left as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with published(Path(folder, "a.txt")) as aside:
    ...         _ = aside.write_text("all of it")
    ...     Path(folder, "a.txt").read_text()
    'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _aside(path) as aside:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        if not new:
            aside.replace(path)
            return
        try:
            os.link(aside, path)
        except (PermissionError, NotImplementedError):  # a file system without links
            with path.open("xb"):
                aside.replace(path)


@contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill aside; on success it becomes `path` by one rename, on an exception it is gone.

    Raises:
        FileExistsError: something of that name is there; that is left as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with published_folder(Path(folder, "part")) as aside:
    ...         _ = Path(aside, "a.txt").write_text("all of it")
    ...     Path(folder, "part", "a.txt").read_text()
    'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, handle = _aside_folder(path)
    try:
        yield aside
        for entry in sorted(aside.rglob("*"), reverse=True):  # what is in a folder before the folder
            if entry.is_dir():
                sync_folder(entry)
            else:
                with entry.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(aside)
        try:
            aside.rename(path)
        except OSError as error:
            if os.path.lexists(path):  # its name differs between systems
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            raise
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _aside_folder(path: Path) -> tuple[Path, int | None]:
    """Make a folder beside `path`; with the handle that claims it, where this system has such."""
    for attempt in range(3):
        aside = path.with_name(f"{_ASIDE}{secrets.token_hex(6)}-{path.name}")
        try:
            aside.mkdir()
        except OSError as error:
            error.filename = str(path)  # the name that somebody knows
            raise
        try:
            handle = os.open(aside, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            return aside, None
        # else a process that clears the folder was quicker, or this file system knows no locks
        if (_claim(handle) and aside.exists()) or attempt == 2:
            break
        os.close(handle)
    return aside, handle


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Make a file beside `path`, with the rights that the umask leaves; it is claimed while it is in use."""
    stem, suffix = path.stem.encode(errors="ignore")[:40].decode(errors="ignore"), path.suffix
    aside = path.with_name(f"{_ASIDE}{secrets.token_hex(6)}-{stem}{suffix}")
    try:
        handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | _WITHOUT_LINKS, 0o666)
    except OSError as error:
        error.filename = str(path)  # the name that somebody knows
        raise
    claimed = _claim(handle)
    if not claimed:  # Windows, which locks otherwise, replaces no file that is open
        os.close(handle)
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)
        if claimed:
            os.close(handle)


def _claim(handle: int) -> bool:
    """Lock an open file until it is closed; False where another process has it, or files cannot be locked."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def clear_asides(folder: Path) -> None:
    """Remove what killed processes left half written in a folder; what a living one writes is left to it."""
    for aside in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError):  # gone, or no file
            handle = os.open(aside, os.O_RDONLY | _WITHOUT_LINKS)
            try:
                if _claim(handle):
                    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder through to the disk, so that they outlast a power failure."""
    with suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file that somebody else may have put there: never through a link, from a device, or without bound.

    Raises:
        ValueError: it is a link or no regular file, or too large; says so in a few words.
        OSError: it is missing, or cannot be read.
    """
    if path.is_symlink():
        raise ValueError("is a link")
    handle = os.open(path, os.O_RDONLY | _WITHOUT_LINKS)
    with open(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("is no file")
        if facts.st_size > max_bytes:
            raise ValueError(f"has {facts.st_size:,} bytes, over {max_bytes:,}")
        return file.read(facts.st_size)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, indent: int | None = 1) -> str:
    r"""Write plain data as JSON: letters of every script as they are, all that a terminal might obey as escapes.

    Infinity and NaN, which JSON lacks, become null.

    Bytes of a file name that are no text (surrogates, as Python has them) are escapes too, and come back from
    `json.loads` as they were.

    >>> print(to_json(["猫\x9b1m", "\udcff.jpg"], indent=None))
    ["猫\u009b1m", "\udcff.jpg"]
    """
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[^\x20-\x7e\n]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable(name: str, max_bytes: int = 80) -> str:
    """Reduce any name to one that is safe as part of a file name: letters, digits, `.`, `_`, `-`, in any script.

    Not unique: several names may give one. `max_bytes` bounds its bytes in UTF-8.

    >>> readable("../a b/猫.jpg")
    'a_b_猫.jpg'
    """
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip("._- ")
    return safe.encode()[:max_bytes].decode(errors="ignore") or "unnamed"


def distinct(names: Sequence[str]) -> list[str]:
    """Give each name a file name of its own: the readable part, with a digest where that alone would collide.

    Names that differ in case only count as colliding.

    >>> distinct(["a/x.jpg", "A/x.jpg", "y.jpg"])
    ['a_x.jpg-7ec9164c', 'A_x.jpg-0ec0354d', 'y.jpg']
    """
    short = [readable(name) for name in names]
    counts = Counter(name.casefold() for name in short)
    digests = (hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8] for name in names)
    return [s if counts[s.casefold()] == 1 else f"{s}-{d}" for s, d in zip(short, digests, strict=True)]
