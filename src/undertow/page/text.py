"""Tokens with their attributions, as plain data for a page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.text import TEXT
from ..errors import InputError, one_line, printable
from ..files import read_bytes
from ..frameworks.base import as_numpy

MAX_JSON_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of one text, each with its attribution.

    Attributes:
        tokens: as they are read, in order; " the" with its space, if the tokenizer keeps it.
        values: a list, or an array of any framework: one number a token, `(T,)`, or a vector, `(T, features)`, which is
            summed.
        title: what they speak for, such as "positive, 0.98".

    Raises:
        InputError: there are not as many values as tokens, or one is NaN or infinite.

    >>> Text(["a", " cat"], [[0.5, 0.5], [1.0, -3.0]]).to_dict()
    {'title': '', 'tokens': ['a', ' cat'], 'values': [1.0, -2.0]}
    """

    tokens: Sequence[str]
    values: Any
    title: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        values = self.values if isinstance(self.values, list | tuple) else as_numpy(self.values)
        array = np.asarray(values, np.float64)
        if array.ndim not in (1, 2) or len(array) != len(self.tokens):
            raise InputError(f"values of shape {array.shape} are not one for each of {len(self.tokens)} tokens")
        if not np.isfinite(array).all():
            raise InputError("the tokens' values hold NaN or infinity, which no shade can show")
        sums = array if array.ndim == 1 else array.sum(1)
        return {"title": str(self.title), "tokens": [str(token) for token in self.tokens], "values": sums.tolist()}


def folders_of_texts(path: Path) -> list[Path]:
    """Return the folders of explained texts: the path itself, or those in it; none if it is neither."""
    if (path / TEXT).is_file():
        return [path]
    return sorted(folder for folder in path.iterdir() if (folder / TEXT).is_file()) if path.is_dir() else []


def texts_of_folder(folder: Path) -> Iterator[Text]:
    """Yield each map of an explained text.

    Raises:
        InputError: the file is not as `undertow explain` writes it.
    """
    path = folder / TEXT
    try:
        facts = json.loads(read_bytes(path, MAX_JSON_BYTES))
        tokens = [str(token) for token in facts["tokens"]]
        for rule in facts["rules"].values():
            for title, values in zip(rule["titles"], rule["values"], strict=True):
                yield Text(tokens, [float(value) for value in values], str(title))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{printable(path)} is not as undertow writes it ({type(error).__name__}: {one_line(error)[:120]}); "
            "explain the text again"
        ) from error
