"""A matrix expression as plain text or LaTeX."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from .matrices import Term, coefficient, power, symbols, times

SUM, PRODUCT, ATOM = range(3)
_RAISED = str.maketrans("0123456789-/.", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᐟ·")


@dataclass(frozen=True)
class _Written:
    words: str
    rank: int

    def inside(self, least: int, latex: bool = False) -> str:
        """Return the words, in brackets where they bind less than needed."""
        if self.rank >= least:
            return self.words
        return rf"\left({self.words}\right)" if latex else f"({self.words})"


def text(term: Term) -> str:
    """Write a term as plain text.

    >>> from .parser import parse
    >>> text(parse("X*X.T - 2*inv(X)", {"X": ("d", "d")}))
    'XXᵀ − 2X⁻¹'
    """
    return _Writer(all(len(name.rstrip("0123456789'")) == 1 for name in symbols(term)), False).write(term).words


def latex(term: Term) -> str:
    r"""Write a term in LaTeX.

    >>> from .parser import parse
    >>> latex(parse("X*X.T", {"X": ("d", "d")}))
    'X X^{\\top}'
    """
    return _Writer(True, True).write(term).words


@dataclass(frozen=True)
class _Writer:
    juxtaposes: bool
    latex: bool

    def write(self, term: Term) -> _Written:
        """Write a term of any kind."""
        return _KINDS[term.kind](self, term)

    def _pick(self, plain: str, tex: str) -> str:
        return tex if self.latex else plain

    def number(self, term: Term) -> _Written:
        value: Fraction = term.datum
        if value < 0:
            return _Written(self._pick(f"−{-value}", str(value)), SUM)
        return _Written(str(value), ATOM if value.denominator == 1 else PRODUCT)

    def named(self, term: Term) -> _Written:
        return _Written(self._pick(term.datum, _latex_name(term.datum)), ATOM)

    def entry(self, term: Term) -> _Written:
        name = f"{term.parts[0].datum}{term.datum}"
        return _Written(self._pick(name, _latex_name(name)), ATOM)

    def constant(self, term: Term) -> _Written:
        return _Written("0" if term.kind == "zero" else self._pick("𝟏", r"\mathbf{1}"), ATOM)

    def explicit(self, term: Term) -> _Written:
        columns = int(term.shape[1])
        cells = [self.write(part).words for part in term.parts]
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        if self.latex:
            body = r" \\ ".join(" & ".join(row) for row in rows)
            return _Written(rf"\begin{{pmatrix}} {body} \end{{pmatrix}}", ATOM)
        return _Written("Matrix([" + ", ".join(f"[{', '.join(row)}]" for row in rows) + "])", ATOM)

    def sum(self, term: Term) -> _Written:
        words = self.write(term.parts[0]).words
        for part in term.parts[1:]:
            value, core = coefficient(part)
            if value < 0:
                words += f" {self._pick('−', '-')} {self.write(times(-value, core)).words}"
            else:
                words += f" + {self.write(part).words}"
        return _Written(words, SUM)

    def product(self, term: Term) -> _Written:
        runs = [(factor, len(list(same))) for factor, same in groupby(term.parts)]
        words = [self._repeated(factor, count) for factor, count in runs]
        plain = self.juxtaposes and not any(factor.kind in ("apply", "explicit") for factor in term.parts)
        return _Written((" " if self.latex else "" if plain else " · ").join(words), PRODUCT)

    def _repeated(self, factor: Term, count: int) -> str:
        inner = self.write(factor).inside(ATOM, self.latex)
        if count == 1:
            return inner
        if factor.kind not in ("symbol", "sum"):
            return (" " if self.latex else "").join([inner] * count)
        return self._pick(f"{inner}{str(count).translate(_RAISED)}", f"{inner}^{{{count}}}")

    def scaled(self, term: Term) -> _Written:
        scalar, body = term.parts
        words = self.write(body).inside(PRODUCT, self.latex)
        if scalar.kind == "number":
            return self._numbered(scalar.datum, words)
        if scalar.kind == "power" and scalar.datum < 0:
            below = self.write(power(scalar.parts[0], -scalar.datum))
            if self.latex:
                return _Written(rf"\frac{{{self.write(body).words}}}{{{below.words}}}", PRODUCT)
            return _Written(f"{words}/{below.inside(ATOM)}", PRODUCT)
        front = self.write(scalar).inside(ATOM, self.latex)
        return _Written(f"{front}{self._pick(' · ', ' ')}{words}", PRODUCT)

    def _numbered(self, value: Fraction, words: str) -> _Written:
        minus = self._pick("−", "-") if value < 0 else ""
        size = abs(value)
        if size == 1:
            front = ""
        elif size.denominator == 1:
            front = str(size) + (" · " if words[0].isdigit() and not self.latex else "")
        else:
            front = self._pick(f"({size})", rf"\frac{{{size.numerator}}}{{{size.denominator}}} ")
        return _Written(f"{minus}{front}{words}", SUM if minus else PRODUCT)

    def entrywise(self, term: Term) -> _Written:
        signs = {"hadamard": ("∘", r"\circ"), "over": ("⊘", r"\oslash")}
        sign = self._pick(*signs[term.kind])
        return _Written(f" {sign} ".join(self.write(p).inside(ATOM, self.latex) for p in term.parts), PRODUCT)

    def postfix(self, term: Term) -> _Written:
        marks = {"transpose": ("ᵀ", r"\top"), "inverse": ("⁻¹", "-1")}
        plain, tex = marks[term.kind]
        written = self.write(term.parts[0])
        if term.parts[0].kind in marks:
            written = _Written(written.words, PRODUCT)
        inner = written.inside(ATOM, self.latex)
        return _Written(self._pick(f"{inner}{plain}", f"{inner}^{{{tex}}}"), ATOM)

    def power(self, term: Term) -> _Written:
        inner = self.write(term.parts[0]).inside(ATOM, self.latex)
        if term.datum == -1 and not self.latex:
            return _Written(f"1/{inner}", PRODUCT)
        raised = str(term.datum).translate(_RAISED) if term.datum.denominator == 1 else f"^({term.datum})"
        return _Written(self._pick(f"{inner}{raised}", f"{{{inner}}}^{{{term.datum}}}"), ATOM)

    def function(self, term: Term) -> _Written:
        name = term.datum if term.kind == "apply" else {"trace": "tr", "det": "det"}[term.kind]
        inner = self.write(term.parts[0]).words
        return _Written(self._pick(f"{name}({inner})", rf"\operatorname{{{name}}}\left({inner}\right)"), ATOM)

    def norm(self, term: Term) -> _Written:
        inner = self.write(term.parts[0]).words
        plain = f"‖{inner}‖{'₂' if term.datum == '2' else '_F'}"
        return _Written(self._pick(plain, rf"\left\Vert {inner} \right\Vert_{{{term.datum}}}"), ATOM)


def _latex_name(name: str) -> str:
    stem = name.rstrip("0123456789")
    index = name[len(stem) :]
    if len(stem) == 1 and not stem.isascii():
        stem = "\\" + unicodedata.name(stem).rpartition(" ")[2].lower()  # α is GREEK SMALL LETTER ALPHA
    stem = stem if len(stem) == 1 or stem[0] == "\\" else rf"\mathrm{{{stem}}}".replace("_", r"\_")
    return f"{stem}_{{{index}}}" if index else stem


_KINDS: dict[str, Callable[[_Writer, Term], _Written]] = {
    "number": _Writer.number,
    "symbol": _Writer.named,
    "entry": _Writer.entry,
    "zero": _Writer.constant,
    "ones": _Writer.constant,
    "explicit": _Writer.explicit,
    "sum": _Writer.sum,
    "product": _Writer.product,
    "scaled": _Writer.scaled,
    "hadamard": _Writer.entrywise,
    "over": _Writer.entrywise,
    "transpose": _Writer.postfix,
    "inverse": _Writer.postfix,
    "power": _Writer.power,
    "apply": _Writer.function,
    "trace": _Writer.function,
    "det": _Writer.function,
    "norm": _Writer.norm,
}
