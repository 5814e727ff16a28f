"""The memory of this machine and process, as far as the system tells: Linux does."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self")


def free() -> int | None:
    """Return how many bytes this process may still take: of the machine, of its control groups, of its own limit.

    None where the system does not tell.
    """
    try:
        limits = [_table(Path("/proc/meminfo"))["MemAvailable"]]
        status = _table(_OWN / "status")
    except (OSError, KeyError, ValueError):
        return None
    with suppress(OSError, ValueError):
        limits += _of_groups((_OWN / "cgroup").read_text(), _GROUPS)
    return max(0, min([*limits, *_of_process(status)]))


def peak() -> Callable[[], int] | None:
    """Begin to measure; what is returned tells by how many bytes this process has grown since, at its largest.

    None where the system does not tell.

    >>> grown = peak()
    >>> grown is None or grown() >= 0
    True
    """
    with suppress(OSError):  # where it may not be reset, the peak before counts too: more than it takes, never less
        (_OWN / "clear_refs").write_text("5")
    try:
        before = _table(_OWN / "status")["VmRSS"]
        return lambda: max(0, _table(_OWN / "status")["VmHWM"] - before)
    except (OSError, KeyError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Read lines such as `VmRSS:  1024 kB`, in bytes."""
    words = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in words if len(row) == 3 and row[2] == "kB"}


def _of_process(status: dict[str, int]) -> Iterator[int]:
    """Yield what the limit of this process's address space leaves."""
    with suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit - status["VmSize"]


def _of_groups(text: str, root: Path) -> Iterator[int]:
    """Yield what each control group that this process is in leaves, of version 1 and 2.

    Args:
        text: of `/proc/self/cgroup`, lines of number, controllers and path.
        root: where the groups are mounted. In a container a path may be the host's, of which only an end is there.
    """
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        size, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        inactive = "total_inactive_file" if controllers else "inactive_file"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            group = top.joinpath(*parts[:count])
            with suppress(OSError, ValueError):  # "max" is no number: no limit
                limit = int((group / size).read_text())
                rows = (row.split() for row in (group / "memory.stat").read_text().splitlines())
                cached = next((int(value) for name, value in rows if name == inactive), 0)
                yield limit - int((group / used).read_text()) + cached
