"""How the command words errors."""

import click

from ..errors import UndertowError


def error_line(error: BaseException) -> str:
    """Word an error as one line, with the notes that were added to it."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    kind = [] if isinstance(error, UndertowError) else [type(error).__name__]
    return ": ".join([*kind, " ".join([str(error), *notes]).replace("\n", " ")])


def debugging() -> bool:
    """Whether `--debug` was given, which `main` passes on as click's `obj`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().obj)
