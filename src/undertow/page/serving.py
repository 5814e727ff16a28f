"""The page of runs that are being written, served to this machine alone: new parts appear in it as they come."""

import hmac
import json
import secrets
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..errors import UndertowError
from ..runs import Run
from . import contents
from .packing import PackedArrays
from .writing import as_json, page

HOST = "127.0.0.1"


class LivePage:
    """What is served: the page, and what is new in it since a version.

    Args:
        what: as `report` takes it.
        title: of the page.
    """

    def __init__(self, what: Sequence[Any], title: str) -> None:
        self.what, self.title = what, title
        self._lock = threading.Lock()
        self._shown = ""
        self._data: dict[str, Any] = {}
        self.data()

    def data(self) -> dict[str, Any]:
        """Return what the page shows now, with its arrays and version; read anew only where a run has changed.

        Raises:
            InputError, RunError: something cannot be shown, such as a run that was damaged meanwhile.
        """
        with self._lock:
            version = self._seen()
            if version != self._shown:
                arrays = PackedArrays()
                self._data = {**contents(self.what, arrays, self.title), "live": "data", "version": version}
                self._data["arrays"], self._shown = arrays.texts, version
            return self._data

    def html(self) -> str:
        """Return the page."""
        data = self.data()
        return page(data | {"arrays": None}, data["arrays"], connect="'self'")

    def _seen(self) -> str:
        """Return a version of the runs on the disk: how many groups of batches each has, and its manifest's time."""
        seen = []
        for one in self.what:
            folder = one.folder if isinstance(one, Run) else Path(one)
            manifest = folder / "manifest.json"
            if manifest.is_file():
                seen.append([sum(1 for _ in (folder / "batches").glob("*")), manifest.stat().st_mtime_ns])
        return json.dumps(seen)


class PageServer(ThreadingHTTPServer):
    """Serves one live page under an address that nobody can guess, on this machine's own address alone."""

    daemon_threads = True

    def __init__(self, live: LivePage, port: int = 0) -> None:
        self.live = live
        self.token = secrets.token_urlsafe(16)
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page, or with what is new; without the token, or by another host's name, there is nothing."""
        asked = urlsplit(self.path)
        _, token, *rest = (*asked.path.split("/"), "")
        known = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if self.headers.get("Host") not in known or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._answer(HTTPStatus.NOT_FOUND, "not found")
            return
        try:
            if rest[0] == "":
                self._answer(HTTPStatus.OK, self.server.live.html(), "text/html")
            elif rest[0] == "data":
                data = self.server.live.data()
                new = parse_qs(asked.query).get("seen") != [data["version"]]
                self._answer(
                    HTTPStatus.OK if new else HTTPStatus.NO_CONTENT, as_json(data) if new else "", "application/json"
                )
            else:
                self._answer(HTTPStatus.NOT_FOUND, "not found")
        except UndertowError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                            ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing of each request."""
