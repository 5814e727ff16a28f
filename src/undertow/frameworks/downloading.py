"""Downloads of weights: whether a hub answers is checked first, since its own retries take a minute."""

import http.client
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from ..errors import ModelError, one_line


def downloaded(reference: str, url: str | None, build: Callable[[], Any]) -> Any:
    """Build a network whose weights may be downloaded.

    Args:
        reference: of the model, for the message.
        url: of the hub that the weights come from; None where they are on disk.
        build: returns the network.

    Raises:
        ModelError: the hub does not answer within 10 seconds, or `build` fails.
    """
    remedy = f"give --weights FILE or use {reference.partition('@')[0].partition('.')[0]}@none"
    if url and (reason := unreachable(url)):
        raise ModelError(f"could not download the weights of {reference} ({reason}); {remedy}")
    try:
        return build()
    except Exception as error:
        raise ModelError(f"could not get the weights of {reference} ({one_line(error)}); {remedy}") from error


def unreachable(url: str, seconds: float = 10) -> str:
    """Return why an address does not answer, or "". An answer that refuses is left to the hub's own code."""
    outcome = [f"no answer from {urllib.parse.urlsplit(url).hostname} in {seconds:g} seconds"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            outcome[0] = ""
        except (urllib.error.HTTPError, http.client.HTTPException, ssl.SSLError):
            outcome[0] = ""
        except OSError as error:
            reason = getattr(error, "reason", error)
            outcome[0] = "" if isinstance(reason, ssl.SSLError) else one_line(reason)

    thread = threading.Thread(target=ask, daemon=True)  # name resolution obeys no timeout, and each address has its own
    thread.start()
    thread.join(seconds)
    return outcome[0]
