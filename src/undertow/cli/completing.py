"""Completion of `--model` in bash, zsh and fish: nothing is imported for it, so that a TAB takes a moment.

Names are read off the source of the installed packages, where each model is registered; those of the hub off its cache.
"""

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, shell_complete, split_arg_string

from ..references import SOURCES

VARIABLE = "_UNDERTOW_COMPLETE"
"""In the environment of a command that is asked for completions, or for the script that asks."""

_REGISTERED = {
    "torchvision": (
        "torchvision",
        "models",
        b"@register_model(",
        rb"(?:name=\"(\w+)\")?[^\n]*\n(?:[@ )][^\n]*\n)*def (\w+)",
    ),
    "timm": ("timm", "models", b"@register_model\n", rb"(?:@[^\n]*\n)*def (\w+)"),
    "keras": ("keras", "src/applications", b'"keras.applications.', rb"([A-Z]\w+)\""),
}
"""Of each source its package, the folder in it, what stands where a model is registered, and what follows it there."""


def complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the references that begin with what was typed: of one source, else the sources; else files."""
    values = list(references(incomplete))
    return [CompletionItem(value) for value in values] or [CompletionItem(incomplete, type="file")]


def references(start: str) -> Iterator[str]:
    """Yield the references that begin with `start`, sorted.

    >>> list(references("de")), list(references(""))[:3]
    (['demo'], ['demo', 'torchvision:', 'timm:'])
    """
    sources = [name if name == "demo" else f"{name}:" for name in (*SOURCES, "jax")]
    begun = [prefix for prefix in sources if prefix.startswith(start) or start.startswith(prefix)]
    if len(begun) > 1 or begun == ["demo"]:
        yield from begun
        return
    if ".py:" in start:
        path, _, function = start.rpartition(":")
        yield from (
            f"{path}:{name}" for name in _functions(Path(path.removeprefix("jax:"))) if name.startswith(function)
        )
    elif begun == ["hf:"]:
        yield from (name for name in [*_cached(), *_paths("hf:", start, "")] if name.startswith(start))
    elif begun == ["jax:"]:
        yield from (name for name in _paths("jax:", start, ".py") if name.startswith(start))
    elif begun:
        base, at, _ = start.partition("@")
        names = sorted({f"{begun[0]}{name}" for name in registered(begun[0][:-1])})
        names = [f"{name}@none" for name in names if name == base] if at else names
        yield from (name for name in names if name.startswith(start))


def registered(source: str) -> Iterator[str]:
    """Yield the names of the models of a source, as the files of its package register them."""
    package, folder, mark, following = _REGISTERED.get(source, (source, "", b"", b""))
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    if source == "open_clip":  # a file of each
        yield from (path.stem for path in Path(spec.origin).parent.glob("model_configs/*.json"))
        return
    pattern = re.compile(following)
    for path in sorted(Path(spec.origin).parent.joinpath(folder).glob("*.py")):
        for part in path.read_bytes().split(mark)[1:]:
            if found := pattern.match(part):
                yield next(name for name in found.groups() if name).decode()


def _cached() -> Iterator[str]:
    """Yield what is in the hub's cache."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    for path in sorted(cache.glob("models--*")):
        yield "hf:" + path.name.removeprefix("models--").replace("--", "/")


def _paths(source: str, start: str, ending: str) -> Iterator[str]:
    """Yield the folders, or also the files of an ending, that the path behind a source begins."""
    typed = start.removeprefix(source)
    parent, _, _ = typed.rpartition("/")
    folder = Path(parent or ("/" if typed.startswith("/") else ".")).expanduser()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(".") and (path.is_dir() or (ending and path.suffix == ending)):
            begun = f"{parent}/" if "/" in typed else ""
            yield f"{source}{begun}{path.name}{'/' if ending and path.is_dir() else ''}"


def _functions(path: Path) -> list[str]:
    """Return the names of a file's own functions, without running it."""
    try:
        tree = ast.parse(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


class ColonBash(BashComplete):
    """Bash, which takes a colon for the end of a word unless it is told otherwise: so the whole line is asked about."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value
    COMPREPLY=()
    for line in $(env COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
                  %(complete_var)s=bash_complete $1); do
        IFS=',' read -r type value <<< "$line"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value"); [[ $value == *: ]] && compopt -o nospace ;;
        esac
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is typed, and that one."""
        line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
        words = split_arg_string(line)[1:]
        return (words, "") if not words or line[-1].isspace() else (words[:-1], words[-1])

    def format_completion(self, item: CompletionItem) -> str:
        """Return a value as bash puts it in the place of what it takes for the word."""
        value: Any = item.value
        if ":" in os.environ.get("COMP_WORDBREAKS", ":") and item.type == "plain":
            typed = self.get_completion_args()[1]
            value = value[len(typed.partition("=")[2] or typed) - len(re.split(r"[:=]", typed)[-1]) :]
        return f"{item.type},{value}"


add_completion_class(ColonBash)


def answer(app: click.Command) -> int:
    """Print what the environment asks for: completions of a line, or the script that asks for them."""
    return shell_complete(app, {}, "undertow", VARIABLE, os.environ[VARIABLE])
