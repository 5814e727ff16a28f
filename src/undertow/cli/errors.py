"""How the command words errors."""

import click

from ..errors import UndertowError, printable, text_of


def error_line(error: BaseException) -> str:
    """Word an error as one line, with the notes that were added to it; one whose text fails is named by its kind."""
    texts = [text_of(part) for part in (error, *(getattr(error, "__notes__", None) or ()))]
    said = " ".join(text for text in texts if text)
    if isinstance(error, UndertowError) and said:
        return said
    return ": ".join(part for part in (printable(type(error).__name__), said) if part)


def debugging() -> bool:
    """Whether `--debug` was given, which `main` passes on as click's `obj`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().obj)
