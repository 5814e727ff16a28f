"""What to type so that an extra is there, for the way in which this package was installed."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """Return the command that installs an extra, from where this package came: an index, a checkout or an archive.

    >>> install_command("record").endswith('[record]"')
    True
    """
    try:
        origin = json.loads(metadata.distribution("undertow").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    return command_for(extra, origin, Path.cwd())


def command_for(extra: str, origin: object, here: Path) -> str:
    """Return the command for what `direct_url.json` says of an installation; nothing stands there for an index.

    >>> command_for("plot", {}, Path("/"))
    'pip install "undertow[plot]"'
    >>> command_for("plot", {"url": "file:///src/undertow", "dir_info": {"editable": True}}, Path("/src/undertow"))
    'pip install -e ".[plot]"'
    >>> command_for("plot", {"url": "https://example.org/undertow.whl", "archive_info": {}}, Path("/"))
    'pip install "undertow[plot] @ https://example.org/undertow.whl"'

    Source: the specification "Recording the Direct URL Origin of installed distributions", packaging.python.org.
    """
    if not isinstance(origin, dict) or not isinstance(url := origin.get("url"), str):
        return f'pip install "undertow[{extra}]"'
    if not isinstance(folder := origin.get("dir_info"), dict):
        return f'pip install "undertow[{extra}] @ {url}"'
    path = Path(url2pathname(urlsplit(url).path))
    editable = "-e " if folder.get("editable") else ""
    return f'pip install {editable}"{"." if path == here else path}[{extra}]"'
