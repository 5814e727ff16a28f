"""What a run says of itself: `manifest.json`, written whole, with a checksum of its own, and checked when read."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RunError, one_line, printable
from ..files import published, read_bytes, readable
from .format import CLASSES, COMMITTED, FORMAT, LATER, TABLES, TYPES, known_columns

NAME = "manifest.json"
_MAX_BYTES = 64 << 20
_RESERVED = frozenset((COMMITTED, "tensors", "checksums"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a run says of itself, and trust none of it before it is checked.

    Raises:
        RunError: there is none, one that cannot be read or has been changed, or one of another format.
    """
    path = folder / NAME
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(path, _MAX_BYTES).decode())
        version = manifest["format"]
    except FileNotFoundError as error:
        raise RunError(f"{printable(folder)} is no run: it holds no {NAME}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {one_line(error)[:160]}"
        raise RunError(f"{printable(path)} cannot be read ({reason}); restore it from a copy") from error
    if version != FORMAT:
        version = printable(version)[:20]
        raise RunError(
            f"{printable(folder)} has format {version}; this undertow reads {FORMAT}: install the one that wrote it"
        )
    if manifest.keys() & {"sha256", "checksums"} and manifest.get("sha256") != _sha256(manifest):
        raise RunError(
            f"{printable(path)} has changed since it was written: its checksum differs; restore it from a copy, or "
            'take out its "sha256" and "checksums" if you changed it on purpose'
        )
    if fault := next(_faults(manifest), None):
        raise RunError(f"{printable(path)} is not as a recording writes it: {printable(fault)}; restore it from a copy")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any], new: bool = False) -> None:
    """Write the manifest, whole or not at all: in the place of any there is, or as a `new` one.

    Raises:
        FileExistsError: it is to be new, and there is one.
        RunError: it could not be read again: a measure's table or columns are named as they must not be.
    """
    facts = json.loads(json.dumps(manifest, default=str))
    if fault := next(_faults(facts), None):
        raise RunError(f"{printable(folder)} cannot hold such a run: {printable(fault)}")
    facts["sha256"] = _sha256(facts)
    with published(folder / NAME, new) as aside:
        aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _sha256(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that the manifest says, but for this."""
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps a manifest from being read; keys that are not known are left alone."""
    for key, (is_right, meaning) in _MEANING.items():
        if key not in manifest or not is_right(manifest[key]):
            yield f"{key!r} is not {meaning}" if key in manifest else f"it has no {key!r}"
            return
    for key in ("parameters", "unreached"):
        if not isinstance(manifest.get(key, {}), dict):
            yield f"{key!r} is not an object"
    known = known_columns()
    for table, columns in manifest["tables"].items():
        if table in _RESERVED or readable(table) != table:
            yield f"{table!r} cannot be the name of a table"
        if not isinstance(columns, dict):
            yield f"the table {table!r} has no columns"
            return
        for column, kind in columns.items():
            if not isinstance(kind, str) or kind not in TYPES:
                yield f"the column {column!r} of {table!r} has the type {kind!r}, which there is not"
        if table in TABLES and "site" in columns:
            yield f"{table!r} cannot be the name of a measure's table"
        later = LATER.get(table, frozenset())
        missing = later if later.isdisjoint(columns) else frozenset()
        for column, kind in known.get(table, {}).items():
            if column not in missing and columns.get(column) != kind:
                yield f"the table {table!r} has no column {column!r} of type {kind!r}"
        for column, kind in CLASSES.items() if table == "samples" else ():
            if columns.get(column, kind) != kind:
                yield f"the column {column!r} of {table!r} has the type {columns[column]!r}, not {kind!r}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_MEANING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    "model": (lambda value: isinstance(value, dict), "an object"),
    "sites": (lambda value: isinstance(value, dict) and _is_texts(value.get("names")), "an object with names"),
    "tables": (lambda value: isinstance(value, dict), "an object"),
    "phase": (lambda value: value in ("backward", "forward", "both"), "backward, forward or both"),
    "loss_reduction": (lambda value: value in ("mean", "sum"), "mean or sum"),
    "world_size": (_is_count, "a number of processes"),
}
"""What the library reads of a manifest without asking again."""
