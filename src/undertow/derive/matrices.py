"""Matrix expressions as trees, built by functions that simplify as they go.

The functions below do not check shapes: the parser does, since it can point at the text. A scalar is an expression of
shape (1, 1). In the normal form numbers are outermost, scalars precede matrices, and only symbols are transposed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..display import Part, ShownItem
from ..errors import InputError

Dimension = str | int
Shape = tuple[Dimension, Dimension]
SCALAR: Shape = (1, 1)
MAX_DIGITS = 300
"""Of a number, before and after its fraction's bar: what float64 holds."""
MAX_FACTORS = 300
"""Of one product: its derivative has as many products."""
MAX_SCALARS = 60
"""Of one product, such as traces: they are nested, and simplifying them takes the cube of their number."""
_TOO_LONG = 10**MAX_DIGITS


@dataclass(frozen=True, repr=False)
class MatrixExpr(ShownItem):
    """A node of the tree.

    Attributes:
        kind: number, zero, ones, symbol, entry, explicit, sum, product, scaled, hadamard, over, transpose, inverse,
            power, apply, trace, det or norm.
        shape: rows and columns; numbers or names.
        operands: the subexpressions, in order.
        payload: a number's value, a symbol's name, an entry's index, a function's name, an exponent, the kind of norm.
    """

    kind: str
    shape: Shape
    operands: tuple["MatrixExpr", ...] = ()
    payload: Any = None

    @property
    def is_scalar(self) -> bool:
        """Whether the shape is (1, 1)."""
        return self.shape == SCALAR

    def _shown(self) -> Iterator[Part]:
        yield f"MatrixExpr of shape {format_shape(self.shape)}: {self._prefix(4)}"

    def _prefix(self, depth: int) -> str:
        """Return the tree as nested calls, to a depth."""
        if not self.operands:
            return str(self.kind if self.payload is None else self.payload)
        inner = ", ".join(o._prefix(depth - 1) for o in self.operands[:12]) if depth else "..."
        return f"{self.kind}({inner}{', ...' * (depth > 0 and len(self.operands) > 12)})"


def number(value: Fraction | int) -> MatrixExpr:
    """Return a rational number, a scalar.

    Raises:
        InputError: it has too many digits.
    """
    value = Fraction(value)
    if abs(value.numerator) >= _TOO_LONG or value.denominator >= _TOO_LONG:
        raise InputError(f"a number of more than {MAX_DIGITS} digits comes of it; write smaller numbers")
    return MatrixExpr("number", SCALAR, (), value)


def zero(shape: Shape) -> MatrixExpr:
    """Return a matrix of zeros, or the number 0 if the shape is (1, 1)."""
    return number(0) if shape == SCALAR else MatrixExpr("zero", shape)


def ones(shape: Shape) -> MatrixExpr:
    """Return a matrix of ones, or the number 1 if the shape is (1, 1)."""
    return number(1) if shape == SCALAR else MatrixExpr("ones", shape)


def symbol(name: str, shape: Shape) -> MatrixExpr:
    """Return a named matrix."""
    return MatrixExpr("symbol", shape, (), name)


def entry(vector: MatrixExpr, index: int) -> MatrixExpr:
    """Return a component of a vector, a scalar; indices count from 1."""
    return MatrixExpr("entry", SCALAR, (vector,), index)


def explicit(rows: list[list[MatrixExpr]]) -> MatrixExpr:
    """Return a matrix of scalar expressions, given as rows of equal length."""
    return MatrixExpr("explicit", (len(rows), len(rows[0])), tuple(cell for row in rows for cell in row))


def is_zero(expr: MatrixExpr) -> bool:
    """Return whether an expression is the number 0 or a matrix of zeros."""
    return expr.kind == "zero" or (expr.kind == "number" and expr.payload == 0)


def coefficient(expr: MatrixExpr) -> tuple[Fraction, MatrixExpr]:
    """Split an expression into its rational factor and the rest.

    >>> coefficient(scaled(number(3), symbol("X", ("d", "d"))))[0]
    Fraction(3, 1)
    """
    if expr.kind == "number":
        return expr.payload, number(1)
    if expr.kind == "scaled" and expr.operands[0].kind == "number":
        return expr.operands[0].payload, expr.operands[1]
    return Fraction(1), expr


def add(*terms: MatrixExpr) -> MatrixExpr:
    """Add; equal terms are collected."""
    counts: dict[MatrixExpr, Fraction] = {}
    for expr in terms:
        for operand in expr.operands if expr.kind == "sum" else (expr,):
            value, core = coefficient(operand)
            counts[core] = counts.get(core, Fraction(0)) + value
    summands = [times(value, core) for core, value in counts.items() if value and not is_zero(core)]
    if not summands:
        return zero(terms[0].shape)
    return summands[0] if len(summands) == 1 else MatrixExpr("sum", summands[0].shape, tuple(summands))


def times(value: Fraction | int, expr: MatrixExpr) -> MatrixExpr:
    """Multiply by a rational number."""
    own, core = coefficient(expr)
    value = own * value
    if value == 0:
        return zero(expr.shape)
    if core.kind == "number":
        return number(value)
    if core.kind == "sum":
        return core if value == 1 else add(*(times(value, operand) for operand in core.operands))
    return core if value == 1 else MatrixExpr("scaled", core.shape, (number(value), core))


def negative(expr: MatrixExpr) -> MatrixExpr:
    """Multiply by -1."""
    return times(-1, expr)


def scaled(scalar: MatrixExpr, body: MatrixExpr) -> MatrixExpr:
    """Multiply an expression by a scalar."""
    if is_zero(scalar) or is_zero(body):
        return zero(body.shape)
    number_of_scalar, scalar = coefficient(scalar)
    number_of_body, body = coefficient(body)
    value = number_of_scalar * number_of_body
    if scalar.kind == "number":
        return times(value, body)
    if body.kind == "number":
        return times(value, scalar)
    if body.kind == "power" and body.payload < 0 and scalar.kind != "power":  # divisors come first
        scalar, body = body, scalar
    if scalar.kind == "scaled":
        return times(value, scaled(scalar.operands[0], scaled(scalar.operands[1], body)))
    if body.kind == "scaled" and _base_and_exponent(scalar)[0] == _base_and_exponent(body.operands[0])[0]:
        (base, first), (_, second) = _base_and_exponent(scalar), _base_and_exponent(body.operands[0])
        return times(value, scaled(power(base, first + second), body.operands[1]))
    if (depth := _scalars(body)) > MAX_SCALARS:
        raise InputError(f"a product with {depth:,} scalars comes of it; {MAX_SCALARS} are the most")
    return times(value, MatrixExpr("scaled", body.shape, (scalar, body)))


def _scalars(expr: MatrixExpr) -> int:
    count = 1
    while expr.kind == "scaled":
        count, expr = count + 1, expr.operands[1]
    return count


def _base_and_exponent(scalar: MatrixExpr) -> tuple[MatrixExpr, Fraction]:
    return (scalar.operands[0], scalar.payload) if scalar.kind == "power" else (scalar, Fraction(1))


def multiply(left: MatrixExpr, right: MatrixExpr) -> MatrixExpr:
    """Multiply `(n, k)` by `(k, m)`, or anything by a scalar."""
    if left.is_scalar:
        return scaled(left, right)
    if right.is_scalar:
        return scaled(right, left)
    shape = (left.shape[0], right.shape[1])
    if is_zero(left) or is_zero(right):
        return zero(shape)
    factor = number(1)
    inner: list[MatrixExpr] = []
    for operand in (left, right):
        while operand.kind == "scaled":
            factor, operand = scaled(operand.operands[0], factor), operand.operands[1]
        inner.extend(operand.operands if operand.kind == "product" else (operand,))
    _refuse_long(inner)
    return scaled(factor, MatrixExpr("product", shape, tuple(inner)))


def _refuse_long(factors: list[MatrixExpr]) -> None:
    if len(factors) > MAX_FACTORS:
        raise InputError(f"a product of {len(factors):,} factors comes of it; {MAX_FACTORS} are the most")


def hadamard(left: MatrixExpr, right: MatrixExpr) -> MatrixExpr:
    """Multiply entry by entry."""
    if left.is_scalar:
        return multiply(left, right)
    if is_zero(left) or is_zero(right):
        return zero(left.shape)
    (a, left), (b, right) = coefficient(left), coefficient(right)
    inner = [f for operand in (left, right) for f in (operand.operands if operand.kind == "hadamard" else (operand,))]
    inner = [factor for factor in inner if factor.kind != "ones"] or [ones(left.shape)]
    _refuse_long(inner)
    return times(a * b, inner[0] if len(inner) == 1 else MatrixExpr("hadamard", left.shape, tuple(inner)))


def divide(numerator: MatrixExpr, denominator: MatrixExpr) -> MatrixExpr:
    """Divide entry by entry, or by a scalar."""
    if is_zero(numerator):
        return numerator
    if denominator.is_scalar:
        return scaled(power(denominator, -1), numerator)
    (a, numerator), (b, denominator) = coefficient(numerator), coefficient(denominator)
    return times(a / b, MatrixExpr("quotient", numerator.shape, (numerator, denominator)))


def power(scalar: MatrixExpr, exponent: Fraction | int) -> MatrixExpr:
    """Raise a scalar to a rational power."""
    exponent = Fraction(exponent)
    if exponent == 0:
        return number(1)
    if exponent == 1:
        return scalar
    if scalar.kind == "number" and scalar.payload and exponent.denominator == 1:
        digits = math.log10(max(abs(scalar.payload.numerator), scalar.payload.denominator)) * abs(int(exponent))
        if digits > MAX_DIGITS:
            raise InputError(f"a number of {digits:,.0f} digits comes of it; {MAX_DIGITS} are the most")
        return number(scalar.payload ** int(exponent))
    return MatrixExpr("power", SCALAR, (scalar,), exponent)


def transpose(expr: MatrixExpr) -> MatrixExpr:
    """Transpose; transposes are pushed down to the symbols."""
    rows, columns = expr.shape
    if expr.is_scalar:
        return expr
    if expr.kind in ("zero", "ones"):
        return MatrixExpr(expr.kind, (columns, rows))
    if expr.kind == "transpose":
        return expr.operands[0]
    if expr.kind == "scaled":
        return scaled(expr.operands[0], transpose(expr.operands[1]))
    if expr.kind == "explicit":
        cells = [[expr.operands[i * int(columns) + j] for i in range(int(rows))] for j in range(int(columns))]
        return explicit(cells)
    operands = tuple(transpose(operand) for operand in expr.operands)
    if expr.kind == "product":
        return MatrixExpr("product", (columns, rows), operands[::-1])
    if expr.kind in ("sum", "hadamard", "quotient", "apply"):
        return MatrixExpr(expr.kind, (columns, rows), operands, expr.payload)
    return MatrixExpr("transpose", (columns, rows), (expr,))


def inverse(expr: MatrixExpr) -> MatrixExpr:
    """Invert a square matrix or a scalar."""
    if expr.is_scalar:
        return power(expr, -1)
    value, core = coefficient(expr)
    inner = core.operands[0] if core.kind == "inverse" else MatrixExpr("inverse", core.shape, (core,))
    return times(1 / value, inner)


def apply(name: str, expr: MatrixExpr) -> MatrixExpr:
    """Apply a function to each entry."""
    return MatrixExpr("apply", expr.shape, (expr,), name)


def trace(expr: MatrixExpr) -> MatrixExpr:
    """Return the trace of a square matrix; it is linear, so sums and factors are taken out."""
    value, core = coefficient(expr)
    if core.is_scalar:
        return expr
    if core.kind == "sum":
        return add(*(trace(operand) for operand in core.operands))
    if is_zero(core):
        return number(0)
    if core.kind == "scaled":
        return times(value, scaled(core.operands[0], trace(core.operands[1])))
    return times(value, MatrixExpr("trace", SCALAR, (core,)))


def det(expr: MatrixExpr) -> MatrixExpr:
    """Return the determinant of a square matrix."""
    return expr if expr.is_scalar else MatrixExpr("det", SCALAR, (expr,))


def norm(expr: MatrixExpr, kind: str) -> MatrixExpr:
    """Return a norm: kind "2" of a vector, "F" (Frobenius) of a matrix."""
    return MatrixExpr("norm", SCALAR, (expr,), kind)


def nodes(expr: MatrixExpr) -> Iterator[MatrixExpr]:
    """Yield an expression and all of its subexpressions, each before its own."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.operands))


def symbols(expr: MatrixExpr) -> dict[str, MatrixExpr]:
    """Return the symbols in an expression by name, in order of first occurrence."""
    by_name: dict[str, MatrixExpr] = {}
    for node in nodes(expr):
        if node.kind == "symbol":
            by_name.setdefault(node.payload, node)
    return by_name


def dimensions(expr: MatrixExpr) -> list[Dimension]:
    """Return the rows and columns of all subexpressions; zeros have named dimensions that no symbol has."""
    return [dimension for node in nodes(expr) for dimension in node.shape]


def format_shape(shape: Shape) -> str:
    """Return a shape as text.

    >>> format_shape(("d", 1))
    'd×1'
    """
    return f"{shape[0]}×{shape[1]}"
