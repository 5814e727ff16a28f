"""Recursive-descent parser of matrix expressions such as "C*X*B*X.T*A*X", over a fixed set of functions.

    sum      = product {("+" | "-") product}
    product  = unary {("*" | "@" | "·" | "/" | ".*" | "∘" | "./" | "⊘") unary}
    unary    = "-" unary | power
    power    = postfix [("**" | "^") ["-"] number]
    postfix  = atom {".T" | "ᵀ" | "⁻¹"}
    atom     = number | name | function "(" sum ")" | "Matrix" "(" rows ")" | "(" sum ")"

All products have the same precedence and associate to the left. The text is never executed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import final

from ..errors import InputError, did_you_mean
from . import matrices as m
from .differential import DIFFERENTIALS
from .matrices import MatrixExpr, Shape

MAX_DEPTH = 60
MAX_EXPONENT = 20
MAX_TOKENS = 100_000
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[A-Za-zα-ω][A-Za-z0-9_α-ω]*)"
    r"|(?P<operator>\*\*|\.\*|\./|\.T\b|⁻¹|[-+*/@^()\[\],ᵀ∘⊘·−]))"
)
_CANONICAL = {"@": "*", "·": "*", ".*": "∘", "./": "⊘", "^": "**", "−": "-", ".T": "ᵀ"}
_SCALAR_KINDS = ("number", "trace", "det", "norm", "entry")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Piece:
    """An expression and its position in the text."""

    expr: MatrixExpr
    start: int
    end: int


def parse(text: str, shapes: Mapping[str, Shape], vector: str = "") -> MatrixExpr:
    """Parse a matrix expression.

    Args:
        shapes: rows and columns of every name.
        vector: the name of a vector whose entries may occur as its name and a number: x1, x2, ...

    Raises:
        InputError: an unknown word, shapes that do not fit, numbers that are too long or a syntax error, with the
            column in the text.

    >>> parse("X*a", {"X": ("d", "k"), "a": ("k", 1)}).shape
    ('d', 1)
    >>> parse("X*a", {"X": ("d", "k"), "a": ("d", 1)})
    Traceback (most recent call last):
    undertow.errors.InputError: column 3: 'a' is d×1 and cannot stand to the right of 'X', d×k (k ≠ d)
    """
    return _Parser(text, shapes, vector).parse()


@final
class _Parser:
    def __init__(self, text: str, shapes: Mapping[str, Shape], vector: str) -> None:
        self._text = text
        self._shapes = shapes
        self._vector = vector
        self._tokens = _tokens(text)
        self._position = 0
        self._depth = 0

    def parse(self) -> MatrixExpr:
        """Return the expression of the whole text, or raise InputError."""
        try:
            piece = self._sum()
        except InputError as error:
            if str(error).startswith("column"):
                raise
            raise InputError(f"{_cut(repr(self._text), 60)} cannot be worked out: {error}") from error
        if self._next.kind != "end":
            raise _token_error(self._next, "is unexpected; is a * missing before it?")
        return piece.expr

    @property
    def _next(self) -> _Token:
        return self._tokens[self._position]

    def _next_is(self, *words: str) -> bool:
        return self._next.kind == "operator" and self._next.text in words

    def _advance(self) -> _Token:
        self._position += 1
        return self._tokens[self._position - 1]

    def _expect(self, word: str) -> _Token:
        if not self._next_is(word):
            raise _token_error(self._next, f"is unexpected; expected {word!r}")
        return self._advance()

    def _sum(self) -> _Piece:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"column {self._next.start + 1}: nested more than {MAX_DEPTH} levels deep")
        pieces = [self._product()]
        while self._next_is("+", "-"):
            is_minus = self._advance().text == "-"
            right = self._product()
            self._require_same_shape(right, pieces[0], "be added to")
            pieces.append(_Piece(m.negative(right.expr), right.start, right.end) if is_minus else right)
        self._depth -= 1
        return _Piece(m.add(*(piece.expr for piece in pieces)), pieces[0].start, pieces[-1].end)

    def _product(self) -> _Piece:
        left = self._unary()
        while self._next_is("*", "/", "∘", "⊘"):
            operator = self._advance()
            right = self._unary()
            left = _Piece(self._binary(operator.text, left, right), left.start, right.end)
        return left

    def _binary(self, operator: str, left: _Piece, right: _Piece) -> MatrixExpr:
        if operator in "∘⊘":
            self._require_same_shape(right, left, "be multiplied entry by entry with" if operator == "∘" else "divide")
            return (m.hadamard if operator == "∘" else m.divide)(left.expr, right.expr)
        if operator == "/":
            if not right.expr.is_scalar:
                raise self._shape_error(right, "cannot be a divisor; a scalar can, or divide entry by entry with ./")
            if m.is_zero(right.expr):
                raise InputError(f"column {right.start + 1}: division by zero")
            return m.divide(left.expr, right.expr)
        a, b = left.expr.shape, right.expr.shape
        if m.SCALAR not in (a, b) and a[1] != b[0]:
            to = f"stand to the right of {self._source(left)}, {m.format_shape(a)} ({a[1]} ≠ {b[0]})"
            raise self._shape_error(right, f"cannot {to}")
        return m.multiply(left.expr, right.expr)

    def _unary(self) -> _Piece:
        minuses = []
        while self._next_is("-"):
            minuses.append(self._advance())
        piece = self._power()
        if not minuses:
            return piece
        return _Piece(m.times((-1) ** len(minuses), piece.expr), minuses[0].start, piece.end)

    def _power(self) -> _Piece:
        base = self._postfix()
        if not self._next_is("**"):
            return base
        self._advance()
        bracketed = self._next_is("(") and bool(self._advance())
        is_negative = self._next_is("-") and bool(self._advance())
        token = self._advance()
        if token.kind != "number":
            raise _token_error(token, "cannot be an exponent; only a number can")
        if bracketed:
            self._expect(")")
        exponent = -_fraction(token) if is_negative else _fraction(token)
        return _Piece(self._raise_to(base, exponent, token), base.start, token.end)

    def _raise_to(self, base: _Piece, exponent: Fraction, token: _Token) -> MatrixExpr:
        if base.expr.is_scalar:
            if m.is_zero(base.expr) and exponent < 0:
                raise InputError(f"column {base.start + 1}: division by zero")
            try:
                return m.power(base.expr, exponent)
            except InputError as error:
                raise _token_error(token, f"is too large an exponent of {_cut(self._source(base))}: {error}") from error
        self.square(base, "a power")
        if exponent.denominator != 1 or not 1 <= abs(exponent) <= MAX_EXPONENT:
            raise _token_error(
                token,
                f"cannot be an exponent of a matrix; use a nonzero integer up to ±{MAX_EXPONENT}",
            )
        expr = base.expr if exponent > 0 else m.inverse(base.expr)
        return reduce(m.multiply, [expr] * abs(int(exponent)))

    def _postfix(self) -> _Piece:
        piece = self._atom()
        while self._next_is("ᵀ", "⁻¹"):
            token = self._advance()
            if token.text == "⁻¹":
                self.square(piece, "an inverse")
            operation = m.transpose if token.text == "ᵀ" else m.inverse
            piece = _Piece(operation(piece.expr), piece.start, token.end)
        return piece

    def _atom(self) -> _Piece:
        token = self._advance()
        if token.kind == "number":
            return _Piece(m.number(_fraction(token)), token.start, token.end)
        if token.kind == "name":
            return self._call(token) if self._next_is("(") else _Piece(self._named(token), token.start, token.end)
        if token.text == "(" and token.kind == "operator":
            piece = self._sum()
            return _Piece(piece.expr, token.start, self._expect(")").end)
        raise _token_error(token, "is unexpected; expected a name, a number or a bracket")

    def _named(self, token: _Token) -> MatrixExpr:
        name = token.text
        if name in self._shapes:
            return m.symbol(name, self._shapes[name])
        index = name.removeprefix(self._vector) if self._vector and name.startswith(self._vector) else ""
        if index.isdecimal() and len(index) < 10:
            shape = self._shapes[self._vector]
            length = max((dimension for dimension in shape if isinstance(dimension, int)), default=0)
            if 1 in shape and all(isinstance(dimension, int) for dimension in shape) and 1 <= int(index) <= length:
                return m.entry(m.symbol(self._vector, shape), int(index))
            raise _token_error(token, f"is not an entry of {self._vector}, {m.format_shape(shape)}")
        if name in _FUNCTIONS or name == "Matrix":
            raise _token_error(token, "is a function; write brackets after it")
        hint = did_you_mean(name, self._shapes) or f"; give it one, as in --shape {name}=d,d"
        raise _token_error(token, f"has no shape{hint}")

    def _call(self, name: _Token) -> _Piece:
        if name.text in self._shapes:
            raise _token_error(name, "is a matrix, not a function; write * before the bracket")
        if name.text == "Matrix":
            return self._matrix(name)
        if name.text not in _FUNCTIONS:
            hint = did_you_mean(name.text, _FUNCTIONS) or f" (known: {', '.join(_FUNCTIONS)}, Matrix)"
            raise _token_error(name, f"is not a function{hint}")
        self._expect("(")
        piece = self._sum()
        end = self._expect(")").end
        return _Piece(_FUNCTIONS[name.text](self, name, piece), name.start, end)

    def _matrix(self, name: _Token) -> _Piece:
        self._expect("(")
        self._expect("[")
        rows = [self._row()]
        while self._next_is(","):
            self._advance()
            start = self._next
            rows.append(self._row())
            if len(rows[-1]) != len(rows[0]):
                raise _token_error(start, f"begins a row of {len(rows[-1])}, but the first row has {len(rows[0])}")
        self._expect("]")
        return _Piece(m.explicit(rows), name.start, self._expect(")").end)

    def _row(self) -> list[MatrixExpr]:
        self._expect("[")
        cells = [self._cell()]
        while self._next_is(","):
            self._advance()
            cells.append(self._cell())
        self._expect("]")
        return cells

    def _cell(self) -> MatrixExpr:
        piece = self._sum()
        if not piece.expr.is_scalar:
            raise self._shape_error(piece, "cannot be an entry of a matrix; only a scalar can")
        return piece.expr

    def matrix(self, piece: _Piece, operation: str) -> MatrixExpr:
        """Return an expression that is not a plain number, or raise InputError."""
        if m.coefficient(piece.expr)[1].kind in _SCALAR_KINDS:
            raise InputError(f"column {piece.start + 1}: {self._source(piece)} is a scalar; {operation} needs a matrix")
        return piece.expr

    def square(self, piece: _Piece, operation: str) -> MatrixExpr:
        """Return a square matrix, which has a trace, a determinant and an inverse, or raise InputError."""
        if self.matrix(piece, operation).shape[0] != piece.expr.shape[1]:
            raise self._shape_error(piece, f"not square, which {operation} needs")
        return piece.expr

    def vector(self, piece: _Piece, operation: str) -> MatrixExpr:
        """Return a row or a column, or raise InputError."""
        if 1 not in self.matrix(piece, operation).shape:
            raise self._shape_error(piece, "not a vector, which norm() needs; for the Frobenius norm write normF()")
        return piece.expr

    def _require_same_shape(self, right: _Piece, left: _Piece, verb: str) -> None:
        if right.expr.shape != left.expr.shape:
            of = "a scalar" if left.expr.is_scalar else m.format_shape(left.expr.shape)
            raise self._shape_error(right, f"cannot {verb} {self._source(left)}, {of}")

    def _shape_error(self, piece: _Piece, why: str) -> InputError:
        shape = "a scalar" if piece.expr.is_scalar else m.format_shape(piece.expr.shape)
        return InputError(f"column {piece.start + 1}: {self._source(piece)} is {shape} and {why}")

    def _source(self, piece: _Piece) -> str:
        return _cut(repr(self._text[piece.start : piece.end]), 200)


def _elementwise(name: str) -> Callable[[_Parser, _Token, _Piece], MatrixExpr]:
    return lambda parser, token, piece: m.apply(name, piece.expr)


_FUNCTIONS: dict[str, Callable[[_Parser, _Token, _Piece], MatrixExpr]] = {
    **{name: _elementwise(name) for name in DIFFERENTIALS},
    "tr": lambda parser, token, piece: m.trace(parser.square(piece, token.text)),
    "det": lambda parser, token, piece: m.det(parser.square(piece, token.text)),
    "inv": lambda parser, token, piece: m.inverse(parser.square(piece, token.text)),
    "norm": lambda parser, token, piece: m.norm(parser.vector(piece, token.text), "2"),
    "normF": lambda parser, token, piece: m.norm(parser.matrix(piece, token.text), "F"),
}


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    stop = len(text.rstrip())
    while position < stop:
        match = _TOKEN.match(text, position)
        if match is None:
            position += len(text[position:]) - len(text[position:].lstrip())
            raise InputError(f"column {position + 1}: {text[position]!r} is not understood in {_cut(repr(text), 200)}")
        kind = str(match.lastgroup)
        word = match[kind]
        tokens.append(_Token(kind, _CANONICAL.get(word, word), match.start(kind), match.end(kind)))
        if len(tokens) > MAX_TOKENS:
            raise InputError(f"column {position + 1}: more than {MAX_TOKENS:,} words and signs; write a shorter one")
        position = match.end()
    return [*tokens, _Token("end", "the end", len(text), len(text))]


def _fraction(token: _Token) -> Fraction:
    """Return the value of a number, or raise InputError for one of too many digits."""
    if len(token.text) > m.MAX_DIGITS:
        raise _token_error(token, f"has {len(token.text):,} digits; {m.MAX_DIGITS} are the most")
    return Fraction(token.text)


def _cut(text: str, length: int = 30) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _token_error(token: _Token, why: str) -> InputError:
    word = token.text if token.kind == "end" else repr(_cut(token.text))
    return InputError(f"column {token.start + 1}: {word} {why}")
