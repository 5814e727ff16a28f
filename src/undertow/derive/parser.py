"""Text such as "C*X*B*X.T*A*X" into a matrix expression, by recursive descent over a closed set of words.

    sum      = product {("+" | "-") product}
    product  = sign {("*" | "@" | "·" | "/" | ".*" | "∘" | "./" | "⊘") sign}
    sign     = "-" sign | power
    power    = postfix [("**" | "^") ["-"] number]
    postfix  = atom {".T" | "ᵀ" | "⁻¹"}
    atom     = number | name | function "(" sum ")" | "Matrix" "(" rows ")" | "(" sum ")"

All products are of one rank and read from the left. Nothing that is typed is ever executed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import final

from ..errors import InputError, near
from . import matrices as m
from .differential import SLOPES
from .matrices import Shape, Term

DEEPEST = 60
HIGHEST = 20
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-zα-ω][A-Za-z0-9_α-ω]*)"
    r"|(?P<sign>\*\*|\.\*|\./|\.T\b|⁻¹|[-+*/@^()\[\],ᵀ∘⊘·−]))"
)
_SAME = {"@": "*", "·": "*", ".*": "∘", "./": "⊘", "^": "**", "−": "-", ".T": "ᵀ"}
_NUMBERS = ("number", "trace", "det", "norm", "entry")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Piece:
    """A term, and where in the text it stands."""

    term: Term
    start: int
    end: int


def parse(text: str, shapes: Mapping[str, Shape], vector: str = "") -> Term:
    """Read a matrix expression.

    Args:
        shapes: of every name.
        vector: a vector whose entries are named by its name and a number: x1, x2, ...

    Raises:
        InputError: with the column in the text: a word that is not known, shapes that do not fit, a sign out of place.

    >>> parse("X*a", {"X": ("d", "k"), "a": ("k", 1)}).shape
    ('d', 1)
    >>> parse("X*a", {"X": ("d", "k"), "a": ("d", 1)})
    Traceback (most recent call last):
    undertow.errors.InputError: column 3: 'a' is d×1 and cannot stand to the right of 'X', d×k (k ≠ d)
    """
    return _Reader(text, shapes, vector).read()


@final
class _Reader:
    def __init__(self, text: str, shapes: Mapping[str, Shape], vector: str) -> None:
        self._text = text
        self._shapes = shapes
        self._vector = vector
        self._tokens = _tokens(text)
        self._at = 0
        self._depth = 0

    def read(self) -> Term:
        piece = self._sum()
        if self._next.kind != "end":
            raise _wrong(self._next, "was not expected; is a * missing before it?")
        return piece.term

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _sees(self, *words: str) -> bool:
        return self._next.kind == "sign" and self._next.text in words

    def _take(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, word: str) -> _Token:
        if not self._sees(word):
            raise _wrong(self._next, f"was not expected; {word!r} was")
        return self._take()

    def _sum(self) -> _Piece:
        self._depth += 1
        if self._depth > DEEPEST:
            raise InputError(f"column {self._next.start + 1}: nested more than {DEEPEST} deep; write it flatter")
        pieces = [self._product()]
        while self._sees("+", "-"):
            is_minus = self._take().text == "-"
            right = self._product()
            self._same(right, pieces[0], "be added to")
            pieces.append(_Piece(m.negative(right.term), right.start, right.end) if is_minus else right)
        self._depth -= 1
        return _Piece(m.add(*(piece.term for piece in pieces)), pieces[0].start, pieces[-1].end)

    def _product(self) -> _Piece:
        left = self._sign()
        while self._sees("*", "/", "∘", "⊘"):
            sign = self._take()
            right = self._sign()
            left = _Piece(self._joined(sign.text, left, right), left.start, right.end)
        return left

    def _joined(self, sign: str, left: _Piece, right: _Piece) -> Term:
        if sign in "∘⊘":
            self._same(right, left, "be multiplied entry by entry with" if sign == "∘" else "divide")
            return (m.hadamard if sign == "∘" else m.over)(left.term, right.term)
        if sign == "/":
            if not right.term.is_scalar:
                raise self._misfit(right, "cannot divide; only a scalar can, or write ./ for entry by entry")
            if m.is_zero(right.term):
                raise InputError(f"column {right.start + 1}: division by zero")
            return m.over(left.term, right.term)
        a, b = left.term.shape, right.term.shape
        if m.SCALAR not in (a, b) and a[1] != b[0]:
            to = f"stand to the right of {self._words(left)}, {m.shown(a)} ({a[1]} ≠ {b[0]})"
            raise self._misfit(right, f"cannot {to}")
        return m.multiply(left.term, right.term)

    def _sign(self) -> _Piece:
        signs = []
        while self._sees("-"):
            signs.append(self._take())
        piece = self._power()
        if not signs:
            return piece
        return _Piece(m.times((-1) ** len(signs), piece.term), signs[0].start, piece.end)

    def _power(self) -> _Piece:
        base = self._postfix()
        if not self._sees("**"):
            return base
        self._take()
        bracketed = self._sees("(") and bool(self._take())
        is_negative = self._sees("-") and bool(self._take())
        token = self._take()
        if token.kind != "number":
            raise _wrong(token, "cannot be an exponent; only a number can")
        if bracketed:
            self._expect(")")
        exponent = -Fraction(token.text) if is_negative else Fraction(token.text)
        return _Piece(self._raised(base, exponent, token), base.start, token.end)

    def _raised(self, base: _Piece, exponent: Fraction, token: _Token) -> Term:
        if base.term.is_scalar:
            if m.is_zero(base.term) and exponent < 0:
                raise InputError(f"column {base.start + 1}: division by zero")
            return m.power(base.term, exponent)
        self._square(base, "a power")
        if exponent.denominator != 1 or not 1 <= abs(exponent) <= HIGHEST:
            raise _wrong(token, f"cannot be an exponent of a matrix; whole numbers to {HIGHEST} can, 0 cannot")
        term = base.term if exponent > 0 else m.inverse(base.term)
        return reduce(m.multiply, [term] * abs(int(exponent)))

    def _postfix(self) -> _Piece:
        piece = self._atom()
        while self._sees("ᵀ", "⁻¹"):
            token = self._take()
            if token.text == "⁻¹":
                self._square(piece, "an inverse")
            make = m.transpose if token.text == "ᵀ" else m.inverse
            piece = _Piece(make(piece.term), piece.start, token.end)
        return piece

    def _atom(self) -> _Piece:
        token = self._take()
        if token.kind == "number":
            return _Piece(m.number(Fraction(token.text)), token.start, token.end)
        if token.kind == "name":
            return self._call(token) if self._sees("(") else _Piece(self._named(token), token.start, token.end)
        if token.text == "(" and token.kind == "sign":
            piece = self._sum()
            return _Piece(piece.term, token.start, self._expect(")").end)
        raise _wrong(token, "was not expected; a name, a number or a bracket was")

    def _named(self, token: _Token) -> Term:
        name = token.text
        if name in self._shapes:
            return m.symbol(name, self._shapes[name])
        index = name.removeprefix(self._vector) if self._vector and name.startswith(self._vector) else ""
        if index.isdecimal():
            shape = self._shapes[self._vector]
            length = max((side for side in shape if isinstance(side, int)), default=0)
            if 1 in shape and all(isinstance(side, int) for side in shape) and 1 <= int(index) <= length:
                return m.entry(m.symbol(self._vector, shape), int(index))
            raise _wrong(token, f"is no entry of {self._vector}, {m.shown(shape)}")
        if name in _FUNCTIONS or name == "Matrix":
            raise _wrong(token, "is a function; brackets must follow it")
        hint = near(name, self._shapes) or f"; give it one, as in --shape {name}=d,d"
        raise _wrong(token, f"has no shape{hint}")

    def _call(self, name: _Token) -> _Piece:
        if name.text in self._shapes:
            raise _wrong(name, "is a matrix, not a function; write * before the bracket")
        if name.text == "Matrix":
            return self._matrix(name)
        if name.text not in _FUNCTIONS:
            known = near(name.text, _FUNCTIONS) or f" (known: {', '.join(_FUNCTIONS)}, Matrix)"
            raise _wrong(name, f"is no function here{known}")
        self._expect("(")
        piece = self._sum()
        end = self._expect(")").end
        return _Piece(_FUNCTIONS[name.text](self, name, piece), name.start, end)

    def _matrix(self, name: _Token) -> _Piece:
        self._expect("(")
        self._expect("[")
        rows = [self._row()]
        while self._sees(","):
            self._take()
            start = self._next
            rows.append(self._row())
            if len(rows[-1]) != len(rows[0]):
                raise _wrong(start, f"begins a row of {len(rows[-1])} where the first has {len(rows[0])}")
        self._expect("]")
        return _Piece(m.explicit(rows), name.start, self._expect(")").end)

    def _row(self) -> list[Term]:
        self._expect("[")
        cells = [self._cell()]
        while self._sees(","):
            self._take()
            cells.append(self._cell())
        self._expect("]")
        return cells

    def _cell(self) -> Term:
        piece = self._sum()
        if not piece.term.is_scalar:
            raise self._misfit(piece, "cannot be an entry of a matrix; only a scalar can")
        return piece.term

    def square(self, name: _Token, piece: _Piece) -> Term:
        """Return a term that has a trace, a determinant and an inverse."""
        self._square(piece, name.text)
        return piece.term

    def vector(self, name: _Token, piece: _Piece) -> Term:
        """Return a term that has a 2-norm here."""
        self._matrix_only(piece, name.text)
        if 1 not in piece.term.shape:
            raise self._misfit(piece, "no vector, which norm() needs; for the Frobenius norm write normF()")
        return piece.term

    def matrix(self, name: _Token, piece: _Piece) -> Term:
        """Return a term that is no plain number."""
        self._matrix_only(piece, name.text)
        return piece.term

    def _square(self, piece: _Piece, what: str) -> None:
        self._matrix_only(piece, what)
        if piece.term.shape[0] != piece.term.shape[1]:
            raise self._misfit(piece, f"not square, which {what} needs")

    def _matrix_only(self, piece: _Piece, what: str) -> None:
        if m.coefficient(piece.term)[1].kind in _NUMBERS:
            raise InputError(f"column {piece.start + 1}: {self._words(piece)} is a scalar; {what} needs a matrix")

    def _same(self, right: _Piece, left: _Piece, verb: str) -> None:
        if right.term.shape != left.term.shape:
            of = "a scalar" if left.term.is_scalar else m.shown(left.term.shape)
            raise self._misfit(right, f"cannot {verb} {self._words(left)}, {of}")

    def _misfit(self, piece: _Piece, why: str) -> InputError:
        what = "a scalar" if piece.term.is_scalar else m.shown(piece.term.shape)
        return InputError(f"column {piece.start + 1}: {self._words(piece)} is {what} and {why}")

    def _words(self, piece: _Piece) -> str:
        return repr(self._text[piece.start : piece.end])


def _elementwise(name: str) -> Callable[[_Reader, _Token, _Piece], Term]:
    return lambda reader, token, piece: m.apply(name, piece.term)


_FUNCTIONS: dict[str, Callable[[_Reader, _Token, _Piece], Term]] = {
    **{name: _elementwise(name) for name in SLOPES},
    "tr": lambda reader, token, piece: m.trace(reader.square(token, piece)),
    "det": lambda reader, token, piece: m.det(reader.square(token, piece)),
    "inv": lambda reader, token, piece: m.inverse(reader.square(token, piece)),
    "norm": lambda reader, token, piece: m.norm(reader.vector(token, piece), "2"),
    "normF": lambda reader, token, piece: m.norm(reader.matrix(token, piece), "F"),
}


def _tokens(text: str) -> list[_Token]:
    found = []
    at = 0
    stop = len(text.rstrip())
    while at < stop:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise InputError(f"column {at + 1}: {text[at]!r} is not understood in {text!r}")
        kind = str(match.lastgroup)
        word = match[kind]
        found.append(_Token(kind, _SAME.get(word, word), match.start(kind), match.end(kind)))
        at = match.end()
    return [*found, _Token("end", "the end", len(text), len(text))]


def _wrong(token: _Token, why: str) -> InputError:
    word = token.text if token.kind == "end" else repr(token.text)
    return InputError(f"column {token.start + 1}: {word} {why}")
