"""Runs the blocks of a lesson of the course, and puts below each what it prints and shows."""

import ast
import contextlib
import io
import os
import re
import warnings
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: two threads wait for each other more than they compute

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def with_outputs(lesson: str, name: str) -> str:
    r"""Return a lesson with an output below each block that has one; the blocks share their names.

    >>> print(with_outputs("```python\nx = 2\nprint(x)\nx + 1\n```", "sum").replace("```", "~~~"))
    ~~~python
    x = 2
    print(x)
    x + 1
    ~~~
    <BLANKLINE>
    ~~~{ .text .output }
    2
    ~~~
    <BLANKLINE>
    ~~~{ .text .output }
    3
    ~~~
    """
    names: dict[str, Any] = {"__name__": name}
    return BLOCK.sub(lambda block: "\n\n".join([block[0], *_outputs(block[1], name, names)]), lesson)


def shown(data: Mapping[str, str]) -> str:
    """Return one output, given in each of its kinds, as Markdown."""
    if "text/html" in data:
        return f'<div class="output">{re.sub(chr(10) + "+", chr(10), data["text/html"])}</div>'
    if "image/png" in data:
        return f'<div class="output"><img alt="" src="data:image/png;base64,{data["image/png"].strip()}"></div>'
    return f"```{{ .text .output }}\n{data['text/plain'].rstrip()}\n```"


def _outputs(block: str, name: str, names: dict[str, Any]) -> list[str]:
    """Run a block as a notebook runs a cell: what it prints, and the value of its last line."""
    tree = ast.parse(block)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        exec(compile(tree, name, "exec"), names)
        value = eval(compile(ast.Expression(last.value), name, "eval"), names) if last is not None else None
    outputs = [{"text/plain": printed.getvalue()}] if printed.getvalue() else []
    return [shown(output) for output in (*outputs, *([_kinds(value)] if value is not None else []))]


def _kinds(value: Any) -> dict[str, str]:
    """Return what a notebook would be given of a value."""
    kinds = {"text/plain": repr(value)}
    if hasattr(value, "_repr_html_"):
        kinds["text/html"] = value._repr_html_()
    elif hasattr(value, "_repr_png_"):
        kinds["image/png"] = b64encode(value._repr_png_()).decode()
    return kinds
