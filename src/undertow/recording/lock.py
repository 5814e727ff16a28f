"""A run's folder belongs to one recording at a time, and holds nothing that leads out of it."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FrameworkError, RunError, one_line, printable
from ..installing import install_command


def _filelock() -> Any:
    try:
        import filelock
    except ImportError as error:
        raise FrameworkError(f"filelock, which guards runs, is missing; run: {install_command('record')}") from error
    return filelock


@contextmanager
def locked(folder: Path, rank: int, what: str = "recording") -> Iterator[None]:
    """Keep another process from recording into the same folder under the same rank; ends with the process.

    Where it is refused inside, no lock's file is left that was not there before.

    Args:
        what: writes there, in messages.

    Raises:
        RunError: one does, or there can be no lock.
    """
    filelock, path = _filelock(), folder / f".lock-{rank:03d}"
    if path.is_symlink():
        raise RunError(f"{printable(path)} is a link, which no {what} makes; remove it, or choose another folder")
    was_there = path.exists()
    lock = filelock.FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        name = printable(folder)
        raise RunError(f"another {what} writes into {name} at this moment; choose another folder") from error
    except OSError as error:
        raise RunError(f"{printable(folder)} cannot be locked ({one_line(error)}); choose another folder") from error
    try:
        yield
    except Exception:
        if not was_there:
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                path.unlink()
        raise
    finally:
        lock.release()


def refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds something and is no run.

    Raises:
        RunError: it does.
    """
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if files and "manifest.json" not in files:
        raise RunError(f"{printable(folder)} holds {printable(files[0])} and is no run; choose another folder")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse a run in which a folder that will be written to is a link: nothing outside a run is written or cleared.

    Raises:
        RunError: one is, or is no folder.
    """
    for path in (folder / name for name in names):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RunError(f"{printable(path)} is no folder, or a link to one; choose another folder for the run")
