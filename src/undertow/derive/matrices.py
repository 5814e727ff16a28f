"""Matrix expressions as trees, put together by functions that keep them simple.

Every function below takes and returns terms, and checks no shapes: the parser does, where it can point at the text. A
scalar is a term of shape (1, 1). Numbers stand outermost, scalars before matrices, transposes on symbols alone.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Dimension = str | int
Shape = tuple[Dimension, Dimension]
SCALAR: Shape = (1, 1)


@dataclass(frozen=True)
class Term:
    """A node of the tree.

    Attributes:
        kind: number, zero, ones, symbol, entry, explicit, sum, product, scaled, hadamard, over, transpose, inverse,
            power, apply, trace, det or norm.
        shape: rows and columns, numbers or names.
        parts: what it is made of.
        datum: a number's value, a symbol's name, an entry's index, a function's name, an exponent, the kind of norm.
    """

    kind: str
    shape: Shape
    parts: tuple["Term", ...] = ()
    datum: Any = None

    @property
    def is_scalar(self) -> bool:
        return self.shape == SCALAR


def number(value: Fraction | int) -> Term:
    return Term("number", SCALAR, (), Fraction(value))


def zero(shape: Shape) -> Term:
    return number(0) if shape == SCALAR else Term("zero", shape)


def ones(shape: Shape) -> Term:
    """Return a matrix whose entries are all 1, or the number."""
    return number(1) if shape == SCALAR else Term("ones", shape)


def symbol(name: str, shape: Shape) -> Term:
    return Term("symbol", shape, (), name)


def entry(vector: Term, index: int) -> Term:
    """Return a component of a vector, counted from 1."""
    return Term("entry", SCALAR, (vector,), index)


def explicit(rows: list[list[Term]]) -> Term:
    """Return a matrix of scalar terms."""
    return Term("explicit", (len(rows), len(rows[0])), tuple(cell for row in rows for cell in row))


def is_zero(term: Term) -> bool:
    return term.kind == "zero" or (term.kind == "number" and term.datum == 0)


def coefficient(term: Term) -> tuple[Fraction, Term]:
    """Take the number off a term.

    >>> coefficient(scaled(number(3), symbol("X", ("d", "d"))))[0]
    Fraction(3, 1)
    """
    if term.kind == "number":
        return term.datum, number(1)
    if term.kind == "scaled" and term.parts[0].kind == "number":
        return term.parts[0].datum, term.parts[1]
    return Fraction(1), term


def add(*terms: Term) -> Term:
    """Add; equal terms become one."""
    counts: dict[Term, Fraction] = {}
    for term in terms:
        for part in term.parts if term.kind == "sum" else (term,):
            value, core = coefficient(part)
            counts[core] = counts.get(core, Fraction(0)) + value
    kept = [times(value, core) for core, value in counts.items() if value and not is_zero(core)]
    if not kept:
        return zero(terms[0].shape)
    return kept[0] if len(kept) == 1 else Term("sum", kept[0].shape, tuple(kept))


def times(value: Fraction | int, term: Term) -> Term:
    """Multiply by a number."""
    own, core = coefficient(term)
    value = own * value
    if value == 0:
        return zero(term.shape)
    if core.kind == "number":
        return number(value)
    if core.kind == "sum":
        return core if value == 1 else add(*(times(value, part) for part in core.parts))
    return core if value == 1 else Term("scaled", core.shape, (number(value), core))


def negative(term: Term) -> Term:
    return times(-1, term)


def scaled(scalar: Term, body: Term) -> Term:
    """Multiply by a scalar."""
    if is_zero(scalar) or is_zero(body):
        return zero(body.shape)
    one, scalar = coefficient(scalar)
    two, body = coefficient(body)
    if scalar.kind == "number":
        return times(one * two, body)
    if body.kind == "number":
        return times(one * two, scalar)
    if body.kind == "power" and body.datum < 0 and scalar.kind != "power":  # a divisor stands before what it divides
        scalar, body = body, scalar
    if scalar.kind == "scaled":
        return times(one * two, scaled(scalar.parts[0], scaled(scalar.parts[1], body)))
    if body.kind == "scaled" and _base(scalar)[0] == _base(body.parts[0])[0]:
        (base, first), (_, second) = _base(scalar), _base(body.parts[0])
        return times(one * two, scaled(power(base, first + second), body.parts[1]))
    return times(one * two, Term("scaled", body.shape, (scalar, body)))


def _base(scalar: Term) -> tuple[Term, Fraction]:
    return (scalar.parts[0], scalar.datum) if scalar.kind == "power" else (scalar, Fraction(1))


def multiply(left: Term, right: Term) -> Term:
    """Multiply matrices, or a scalar and anything."""
    if left.is_scalar:
        return scaled(left, right)
    if right.is_scalar:
        return scaled(right, left)
    shape = (left.shape[0], right.shape[1])
    if is_zero(left) or is_zero(right):
        return zero(shape)
    factor = number(1)
    inner: list[Term] = []
    for part in (left, right):
        while part.kind == "scaled":
            factor, part = scaled(part.parts[0], factor), part.parts[1]
        inner.extend(part.parts if part.kind == "product" else (part,))
    return scaled(factor, Term("product", shape, tuple(inner)))


def hadamard(left: Term, right: Term) -> Term:
    """Multiply entry by entry."""
    if left.is_scalar:
        return multiply(left, right)
    if is_zero(left) or is_zero(right):
        return zero(left.shape)
    (one, left), (two, right) = coefficient(left), coefficient(right)
    inner = [f for part in (left, right) for f in (part.parts if part.kind == "hadamard" else (part,))]
    inner = [factor for factor in inner if factor.kind != "ones"] or [ones(left.shape)]
    return times(one * two, inner[0] if len(inner) == 1 else Term("hadamard", left.shape, tuple(inner)))


def over(top: Term, bottom: Term) -> Term:
    """Divide entry by entry, or a term by a scalar."""
    if is_zero(top):
        return top
    if bottom.is_scalar:
        return scaled(power(bottom, -1), top)
    (one, top), (two, bottom) = coefficient(top), coefficient(bottom)
    return times(one / two, Term("over", top.shape, (top, bottom)))


def power(scalar: Term, exponent: Fraction | int) -> Term:
    """Raise a scalar to a number."""
    exponent = Fraction(exponent)
    if exponent == 0:
        return number(1)
    if exponent == 1:
        return scalar
    if scalar.kind == "number" and scalar.datum and exponent.denominator == 1:
        return number(scalar.datum ** int(exponent))
    return Term("power", SCALAR, (scalar,), exponent)


def transpose(term: Term) -> Term:
    """Transpose, and push it down to the symbols."""
    rows, columns = term.shape
    if term.is_scalar:
        return term
    if term.kind in ("zero", "ones"):
        return Term(term.kind, (columns, rows))
    if term.kind == "transpose":
        return term.parts[0]
    if term.kind == "scaled":
        return scaled(term.parts[0], transpose(term.parts[1]))
    if term.kind == "explicit":
        cells = [[term.parts[i * int(columns) + j] for i in range(int(rows))] for j in range(int(columns))]
        return explicit(cells)
    parts = tuple(transpose(part) for part in term.parts)
    if term.kind == "product":
        return Term("product", (columns, rows), parts[::-1])
    if term.kind in ("sum", "hadamard", "over", "apply"):
        return Term(term.kind, (columns, rows), parts, term.datum)
    return Term("transpose", (columns, rows), (term,))


def inverse(term: Term) -> Term:
    if term.is_scalar:
        return power(term, -1)
    value, core = coefficient(term)
    inner = core.parts[0] if core.kind == "inverse" else Term("inverse", core.shape, (core,))
    return times(1 / value, inner)


def apply(name: str, term: Term) -> Term:
    """Apply a function to each entry."""
    return Term("apply", term.shape, (term,), name)


def trace(term: Term) -> Term:
    value, core = coefficient(term)
    if core.is_scalar:
        return term
    if core.kind == "sum":
        return add(*(trace(part) for part in core.parts))
    if is_zero(core):
        return number(0)
    if core.kind == "scaled":
        return times(value, scaled(core.parts[0], trace(core.parts[1])))
    return times(value, Term("trace", SCALAR, (core,)))


def det(term: Term) -> Term:
    return term if term.is_scalar else Term("det", SCALAR, (term,))


def norm(term: Term, kind: str) -> Term:
    """Return the norm of a term: "2" of a vector, "F" of a matrix."""
    return Term("norm", SCALAR, (term,), kind)


def symbols(term: Term) -> dict[str, Term]:
    """Return the symbols of a term by name, in the order in which they are met."""
    found: dict[str, Term] = {}
    stack = [term]
    while stack:
        one = stack.pop()
        if one.kind == "symbol":
            found.setdefault(one.datum, one)
        stack.extend(reversed(one.parts))
    return found


def sides(term: Term) -> list[Dimension]:
    """Return the rows and columns of a term and of all in it, those of a zero that has no symbol left included."""
    return [*term.shape, *(side for part in term.parts for side in sides(part))]


def shown(shape: Shape) -> str:
    """Write a shape.

    >>> shown(("d", 1))
    'd×1'
    """
    return f"{shape[0]}×{shape[1]}"
