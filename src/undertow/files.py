"""Files that appear whole or not at all, and safe file names."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it replaces `path` atomically, on an exception it is deleted.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with published(Path(folder, "a.txt")) as aside:
    ...         _ = aside.write_text("all of it")
    ...     Path(folder, "a.txt").read_text()
    'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
