"""What can go wrong, as one tree. Every message is one line that names what failed and says what to do.

Names of files, classes and modules come from elsewhere: `printable` shows them, so that none is obeyed by a terminal.

UndertowError
├── InputError (also ValueError)      an argument that cannot be used
│   ├── PhotographError               a file that is not a readable photograph
│   ├── ModelError                    a model reference, its weights or its output
│   └── TargetError                   a class that is not there
├── RuleError                         the rule cannot be applied to this network: nothing to rewire,
│                                     or a node of the graph that hides a computation
├── RunError                          a run folder that cannot be read, written or resumed
├── FindingError                      something is wrong in a training, and it was to stop for that
└── FrameworkError (also ImportError) a package that is missing or does not fit another

UndertowWarning (a UserWarning)       a result that is right and easily misread
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class UndertowError(Exception):
    r"""The root: `except UndertowError` catches every error that this library raises on purpose.

    >>> print(UndertowError("no layer \x1b[31m"))
    no layer \x1b[31m
    """

    def __init__(self, *arguments: object) -> None:
        """Keep the message to one line, whatever names stand in it."""
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in arguments))


class InputError(UndertowError, ValueError):
    """An argument that cannot be used as it is."""


class PhotographError(InputError):
    """A file that is missing, empty, broken, too large or no photograph at all."""


class ModelError(InputError):
    """A model that cannot be named, loaded, or run as a classifier."""


class TargetError(InputError):
    """A class, or a number of classes, that the model does not have."""


class RuleError(UndertowError):
    """A rule that cannot be applied to this network, with the reason and the remedy."""


class RunError(UndertowError):
    """A run folder that cannot be read, written or resumed."""


class FindingError(UndertowError):
    """Findings in a run, where `on_finding="raise"` asks to stop for them.

    Attributes:
        findings: the new warnings and errors, the most severe first.
    """

    def __init__(self, message: str, findings: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)


class FrameworkError(UndertowError, ImportError):
    """A framework or package that is missing or does not fit another one."""


class UndertowWarning(UserWarning):
    """Said of a result that is right and easily misread: a map that vanishes, activations that a rule left alone."""


def did_you_mean(word: str, known: Iterable[str], max_names: int = 3) -> str:
    """Say which known names are close to a word, as the end of an error line; empty where none is.

    >>> did_you_mean("vgg61", ["vgg16", "resnet50"])
    '; did you mean vgg16?'
    >>> did_you_mean("zebra", ["vgg16"])
    ''
    """
    lowered = {name.lower(): name for name in known if name != word}
    close = difflib.get_close_matches(word.lower(), lowered, n=max_names, cutoff=0.6)
    return f"; did you mean {', '.join(lowered[name] for name in close)}?" if close else ""


def printable(text: object) -> str:
    """Escape a path or any text, so that it stays one line and can be printed, whatever its bytes.

    >>> printable("two\\nlines.png")
    'two\\\\nlines.png'
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's text, or else its kind, on one line; an error whose own text fails has none.

    >>> one_line(ValueError("first,\\n  then"))
    'first, then'
    """
    return text_of(error) or printable(type(error).__name__)


def text_of(value: object) -> str:
    """Return the text of an error or a note on one line; empty where there is none, or asking for it fails."""
    try:
        return printable(" ".join(str(value).split()))
    except BaseException:  # a stranger's __str__ may raise anything
        return ""
