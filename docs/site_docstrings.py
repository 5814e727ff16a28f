"""Examples in docstrings as blocks of code, wherever a `>>>` begins one.

mkdocstrings looks for them in a section of that name alone.
"""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*\n*)+", re.M)
"""Blocks of a session, up to the blank line behind their output, and those that follow directly."""


class Doctests(Extension):
    """Fences the examples of each docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n\n", obj.docstring.value
            )
