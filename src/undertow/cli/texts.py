"""`undertow explain --text`: texts in, their words shaded in the terminal, a folder for each out."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import debugging, error_line
from .printing import echo, print_json, print_line, print_shaded, print_table
from .report import write

if TYPE_CHECKING:
    from ..attribution.text import ExplainedText
    from ..text_model import TextModel

MAX_FILE = 8 << 20  # bytes of a file of texts
_TITLE = 60  # characters of a text above its table
_NAME = 40  # characters of a text in the name of its folder


def refuse_beside_text(given: Mapping[str, object]) -> None:
    """Refuse what is of photographs alone.

    Raises:
        click.UsageError: something is given.
    """
    if alone := ", ".join(name for name, value in given.items() if value):
        raise click.UsageError(f"{alone}: of photographs, not beside --text or --text-file; leave it out")


def all_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """Return the texts of the command and of a file, one a line; empty lines are left out.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    from ..errors import InputError, printable

    if file is None:
        return list(texts)
    try:
        content = sys.stdin.buffer.read(MAX_FILE + 1) if file == "-" else Path(file).read_bytes()[: MAX_FILE + 1]
        if len(content) > MAX_FILE:
            raise InputError(f"{printable(file)} has over {MAX_FILE:,} bytes; give fewer texts at once")
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(file)} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{printable(file)} cannot be read ({error.strerror}); check the name") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"{printable(file)} holds no text; write one a line")
    return [*texts, *found]


def load_text_model(reference: str, weights: Path | None, output: str | None) -> "TextModel":
    """Load a network that reads text.

    Raises:
        ModelError: it reads photographs.
    """
    from ..errors import ModelError, printable
    from ..models import load
    from ..text_model import TextModel

    model = load(reference, weights, None, output)
    if not isinstance(model, TextModel):
        raise ModelError(
            f"{printable(reference)} reads photographs, not text: name some, or another model, hf:NAME_OR_FOLDER"
        )
    return model


def explain_texts(
    model: "TextModel",
    texts: Sequence[str],
    options: dict[str, Any],
    device: str,
    out: Path,
    as_json: bool,
    page: Path | None,
) -> int:
    """Explain and write every text, and print each result; return the exit code, 2 if one failed.

    Args:
        options: of `undertow.explain_text`; "rules" in the place of one rule, and "target" in words.
        page: where to write one HTML page of all of them.
    """
    from ..attribution.text import write_texts
    from ..photographs import on_device

    on_device(model, device)
    words = list(options.pop("target"))
    options["target"] = words[0] if words and words[0].startswith("top:") else words or None
    rules = options.pop("rules") or (None,)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    folders: list[Path] = []
    for number, text in enumerate(texts, 1):
        try:
            explained = [_explained(model, text, rule, options) for rule in rules]
            folder = out / _folder_name(number, text)
            results.append({**write_texts(explained, model, folder), "folder": str(folder)})
        except Exception as error:
            if debugging():
                raise
            failed.append({"text": text, "error": error_line(error)})
            echo(f"error: {error_line(error)}", err=True)
            continue
        folders.append(folder)
        if not as_json:
            _print(explained, text, folder)
    if page and folders:
        write(folders, page, model.reference, as_json)
    if as_json:
        summary = {"results": results, "failed": failed, "seconds": round(time.perf_counter() - started, 3)}
        print_json(summary)
    elif failed:
        echo(f"{len(results)} of {len(texts)} texts explained, {len(failed)} not", err=True)
    return 2 if failed else 0


def _explained(model: "TextModel", text: str, rule: str | None, options: dict[str, Any]) -> "ExplainedText":
    """Explain a text; what is to be known of it stands in its notes, and is not warned of once more."""
    from ..attribution.photograph import collected
    from ..attribution.text import explain_text

    with collected():
        explained: ExplainedText = explain_text(model, text, rule=rule, **options)
    return explained


def _folder_name(number: int, text: str) -> str:
    from ..files import readable

    return f"text-{number}-{readable(text[:_NAME])}"


def _print(explained: Sequence["ExplainedText"], text: str, folder: Path) -> None:
    from rich.console import Console

    first, console = explained[0], Console()
    heading = "score" if first.predictions[0].probability is None else "probability"
    rows = [
        (p.class_id, repr(p.name), f"{p.score if p.probability is None else p.probability:.3f}")
        for p in first.predictions
    ]
    title = text if len(text) <= _TITLE else f"{text[: _TITLE - 3]}..."
    print_table(("class", "name", heading), rows, title=title, title_style="bold", right=("class", heading))
    for e in explained:
        for shaded in e.all_tokens():
            print_line(console, shaded.title)
            print_shaded(console, shaded.grounds())
            print_line(console, f"  strongest: {', '.join(f'{t!r} {value:+.3g}' for t, value in shaded.strongest())}")
    for line in _lines(explained, folder):
        print_line(console, line)


def _lines(explained: Sequence["ExplainedText"], folder: Path) -> Iterator[str]:
    for note in dict.fromkeys(note for e in explained for note in e.notes):
        yield f"  note: {note}"
    yield f"  -> {folder / 'tokens.html'}"
    yield ""
