"""From plain data to one HTML file that asks for nothing: styles, scripts, charts and data are all in it."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import FrameworkError
from ..files import published
from ..installing import install_command

SCRIPTS = ("common.js", "explanations.js", "gradients.js", "flow.js", "text.js", "start.js")


def write_page(path: Path, data: Mapping[str, Any], arrays: Sequence[str]) -> Path:
    """Write a page, whole or not at all."""
    text = page(data, arrays)
    with published(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def page(data: Mapping[str, Any], arrays: Sequence[str], connect: str = "'none'") -> str:
    """Return a page as HTML.

    Args:
        data: what the scripts draw; every text in it may be hostile.
        arrays: packed, by number.
        connect: what the page may ask, as a content security policy says it; nothing, but where it is served.

    Raises:
        FrameworkError: a package is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise _missing() from error
    charts = charts_script() if data["gradients"]["runs"] else ""
    script = "\n".join(_asset(name) for name in SCRIPTS)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=data["title"],
        style=_asset("page.css"),
        charts=charts,
        licence=_asset("vega-licence.txt") if charts else "",
        script=script,
        data=as_json(data),
        arrays=arrays,
        policy=_policy([charts, script] if charts else [script], connect),
    )


def _missing() -> FrameworkError:
    return FrameworkError(f"a page needs jinja2 and vl-convert-python; run: {install_command('report')}")


def as_json(data: Any) -> str:
    """Return JSON that may stand in a script element: `<` is written as an escape; NaN and infinity become null.

    >>> as_json({"name": "</script>"})
    '{"name": "\\\\u003c/script>"}'
    """
    from ..files import to_json

    return to_json(data, indent=None).replace("<", "\\u003c")


def _policy(scripts: Sequence[str], connect: str) -> str:
    """Return a content security policy under which these scripts run and no others, and nothing is asked for.

    Vega makes functions of its own charts' expressions, hence 'unsafe-eval'; no text of others becomes an expression.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    allowed = {"default-src": "'none'", "script-src": f"{hashes} 'unsafe-eval'", "style-src": "'unsafe-inline'",
               "img-src": "data: blob:", "connect-src": connect,
               "base-uri": "'none'", "form-action": "'none'"}  # fmt: skip
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


@cache
def charts_script() -> str:
    """Return Vega and Vega-Lite, from the package that carries them.

    Raises:
        FrameworkError: it is missing.
    """
    try:
        from vl_convert import javascript_bundle
    except ImportError as error:
        raise _missing() from error
    return str(javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
