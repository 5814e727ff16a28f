"""Tokens shaded by what they speak for, in a notebook and in a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..display import Part, Shown, ShownTable, escaped, number
from ..errors import InputError, printable

# Okabe and Ito's palette: distinguishable with any colour vision. Source: jfly.uni-koeln.de/color
FOR, AGAINST = (213, 94, 0), (0, 114, 178)
_SPACES = ("Ġ", "▁")  # what byte-level BPE and SentencePiece write for a space before a word


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Shown):
    """The tokens of one text, each with its attribution; `ut.Text(t.tokens, t.values, t.title)` puts them on a page.

    Attributes:
        tokens: as they are read, in order, " the" with its space.
        values: float64, `(T,)`, summed over each embedding's features. Unit: as the map's.
        title: what they speak for.

    >>> shaded = Tokens([" not", " bad"], np.array([-0.5, 1.0]), "positive")
    >>> shaded._repr_html_().count("background")
    2
    """

    tokens: Sequence[str]
    values: npt.NDArray[np.float64]
    title: str = ""

    def _shown(self) -> Iterator[Part]:
        yield f"Tokens{f', {self.title}' if self.title else ''}"
        order = np.argsort(-np.abs(self.values), kind="stable")
        rows = ((str(i), printable(self.tokens[i]), number(float(self.values[i]))) for i in order)
        yield ShownTable(("position", "token", "value"), rows, len(self.tokens))

    def _repr_html_(self) -> str:
        spans = (
            f'<span style="background:rgba({",".join(map(str, colour))},{strength:.2f})" title="{number(value)}">'
            f"{escaped(token)}</span>"
            for token, value, colour, strength in self._shaded()
        )
        return f'<div>{escaped(self.title)}<p style="white-space:pre-wrap">{"".join(spans)}</p></div>'

    def terminal(self) -> str:
        """Return the text for a terminal of 24-bit colour: orange speaks for the score, blue against it.

        >>> print(Tokens([" a"], np.array([0.0])).terminal().replace(chr(27), "ESC"))
        ESC[48;2;255;255;255mESC[38;2;0;0;0m aESC[0m
        """
        return "".join(
            f"\x1b[48;2;{';'.join(map(str, ground))}m\x1b[38;2;0;0;0m{printable(token)}\x1b[0m"
            for token, ground in self.grounds()
        )

    def grounds(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Yield each token with the colour of its ground, red, green and blue to 255."""
        for token, _, colour, strength in self._shaded():
            red, green, blue = (round(255 + (c - 255) * strength) for c in colour)
            yield token, (red, green, blue)

    def strongest(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the tokens of the largest |values|, the largest first.

        >>> Tokens([" not", " bad"], np.array([-0.5, 1.0])).strongest(1)
        [(' bad', 1.0)]
        """
        order = np.argsort(-np.abs(self.values), kind="stable")[:count]
        return [(self.tokens[i], float(self.values[i])) for i in order]

    def _shaded(self) -> Iterator[tuple[str, float, tuple[int, int, int], float]]:
        """Yield each token with its value, its colour and that colour's strength, in [0, 0.85]."""
        largest = float(np.abs(self.values).max(initial=0)) or 1.0
        for token, value in zip(self.tokens, self.values.tolist(), strict=True):
            yield token, value, FOR if value > 0 else AGAINST, 0.85 * abs(value) / largest


def tokens_of(values: npt.NDArray[Any], ids: npt.NDArray[Any], tokenizer: Any, title: str) -> Tokens:
    """Return the tokens of one text.

    Args:
        values: `(T,)`, or `(T, features)`, which are summed.
        ids: `(T,)` whole numbers.
        tokenizer: one of transformers, or anything with `decode`, from a list of ids to text.

    Raises:
        InputError: there are not as many values as ids, or the tokenizer cannot decode.
    """
    if values.ndim not in (1, 2) or ids.ndim != 1 or len(values) != len(ids):
        raise InputError(f"values of shape {values.shape} are not one for each of the tokens {ids.shape}")
    if not hasattr(tokenizer, "decode"):
        raise InputError(f"a {type(tokenizer).__name__} is no tokenizer: it has no decode(ids)")
    sums = values.astype(np.float64) if values.ndim == 1 else values.astype(np.float64).sum(1)
    return Tokens([_word(tokenizer, int(i)) for i in ids], sums, title)


def _word(tokenizer: Any, token_id: int) -> str:
    """Return a token as it is read; a tokenizer of transformers strips the space when it decodes one alone."""
    text = str(tokenizer.decode([token_id]))
    piece = tokenizer.convert_ids_to_tokens(token_id) if hasattr(tokenizer, "convert_ids_to_tokens") else ""
    return f" {text.lstrip()}" if str(piece).startswith(_SPACES) else text
