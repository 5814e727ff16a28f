"""The runs of all parts as one run, by links: nothing is copied or read but lists of checksums."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import published
from ..runs.checksums import FOLDER as CHECKSUMS
from ..runs.checksums import read_checksums, write_checksums
from ..runs.manifest import read_manifest, write_manifest
from ..runs.parts import part_name, parts_of
from .folder import PARTS, part_folder
from .shards import Shards


def merge_runs(folder: Path, shards: Shards) -> None:
    """Make a sweep's folder the run of all of its parts, which are all there. Several processes may do so at once.

    Raises:
        RunError: a part is damaged.
    """
    number, manifest = 0, dict[str, Any]()
    for run in (part_folder(folder, shard) / "run" for shard in range(len(shards))):
        if not run.exists():  # none of its items could be read
            continue
        of_part = read_manifest(run)
        unreached = of_part.get("unreached", {})
        manifest = manifest or {**of_part, "unreached": unreached}
        manifest["unreached"] = {site: why for site, why in manifest["unreached"].items() if site in unreached}
        for key, path in parts_of(run, CHECKSUMS, ".sha256").items():
            _link_group(run, folder, read_checksums(path), part_name(*key), number)
            number += 1
    if manifest:
        with suppress(FileExistsError):
            write_manifest(folder, manifest, new=True)


def unmerge(folder: Path) -> None:
    """Take the merged run away, whose files the parts still have; the next merge makes it anew."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name not in (PARTS, "pictures"):
            shutil.rmtree(path)


def _link_group(run: Path, folder: Path, digests: dict[str, str], name: str, number: int) -> None:
    """Link the files of a group of a part's run, under a number of the whole run."""
    renamed = {file: file.replace(f"/{name}.", f"/{part_name(0, number)}.") for file in digests}
    for file, new in renamed.items():
        _link(run / file, folder / new)
    write_checksums(folder, 0, number, {renamed[file]: digest for file, digest in digests.items()})


def _link(file: Path, to: Path) -> None:
    """Let a file have a second name; a copy where the file system has no links."""
    to.parent.mkdir(exist_ok=True)
    try:
        os.link(file, to)
    except FileExistsError:
        return
    except OSError:
        with suppress(FileExistsError), published(to, new=True) as aside:
            shutil.copyfile(file, aside)
