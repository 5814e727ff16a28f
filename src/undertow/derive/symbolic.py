"""Conversion of matrix expressions to SymPy."""

import math
from collections.abc import Callable
from functools import reduce
from operator import add, mul
from typing import Any

from .matrices import Dimension, MatrixExpr
from .packages import need

MAX_TERMS = 20_000
"""Of an explicit derivative, multiplied out: SymPy takes seconds for as many."""


def to_sympy(expr: MatrixExpr) -> Any:
    """Return a SymPy matrix expression; a scalar for a scalar, an ImmutableMatrix for an explicit matrix.

    Raises:
        FrameworkError: SymPy is missing.

    >>> from .parser import parse
    >>> to_sympy(parse("X*X.T", {"X": ("d", "d")}))
    X*X.T
    """
    sympy = need("sympy")
    if expr.kind in ("number", "symbol", "entry", "zero", "ones"):
        return _leaf(expr, sympy)
    operands = [to_sympy(operand) for operand in expr.operands]
    if expr.kind == "explicit":
        return sympy.ImmutableMatrix(*expr.shape, [_scalar(operand, sympy) for operand in operands])
    return _CONVERTERS[expr.kind](sympy, expr, operands)


def is_explicit(expr: MatrixExpr) -> bool:
    """Return whether an expression has an explicit matrix, and otherwise only numbers and entries of vectors."""
    kinds = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        kinds.add(node.kind)
        stack.extend(() if node.kind == "entry" else node.operands)
    return "explicit" in kinds and "symbol" not in kinds


def count_terms(expr: MatrixExpr) -> float:
    """Return about how many products an explicit expression has in all of its entries, once it is multiplied out."""
    counts = [count_terms(operand) for operand in expr.operands]
    try:
        return _COUNTS[expr.kind](expr, counts) if expr.kind in _COUNTS else sum(counts) or 1.0
    except OverflowError:
        return math.inf


def _product_terms(expr: MatrixExpr, counts: list[float]) -> float:
    """Entries are sums over the sides that meet: with counts spread evenly, each such side divides their product."""
    inner = [operand.shape[1] for operand in expr.operands[:-1]]
    return float(math.prod(counts)) / math.prod(side for side in inner if isinstance(side, int))


def _power_terms(expr: MatrixExpr, counts: list[float]) -> float:
    exponent = expr.payload
    return counts[0] ** int(exponent) if exponent.denominator == 1 and exponent > 0 else counts[0]


def _gaussian_terms(expr: MatrixExpr, counts: list[float]) -> float:
    """A determinant has n! products of n entries, and each entry of an inverse has one on either side of the bar."""
    size = int(expr.operands[0].shape[0]) if isinstance(expr.operands[0].shape[0], int) else 1
    entry = max(counts[0] / size**2, 1.0)
    products = math.factorial(min(size, 100)) * entry**size
    return products**2 if expr.kind == "inverse" else products


_COUNTS: dict[str, Callable[[MatrixExpr, list[float]], float]] = {
    "product": _product_terms,
    "scaled": lambda expr, counts: float(math.prod(counts)),
    "hadamard": lambda expr, counts: float(math.prod(counts)),
    "quotient": lambda expr, counts: float(math.prod(counts)),
    "power": _power_terms,
    "inverse": _gaussian_terms,
    "det": _gaussian_terms,
    "entry": lambda expr, counts: 1.0,
}


def _leaf(expr: MatrixExpr, sympy: Any) -> Any:
    if expr.kind == "number":
        return sympy.Rational(expr.payload.numerator, expr.payload.denominator)
    if expr.kind == "entry":
        return sympy.Symbol(f"{expr.operands[0].payload}{expr.payload}", real=True)
    shape = [_dimension(dimension, sympy) for dimension in expr.shape]
    if expr.kind == "symbol":
        return sympy.Symbol(expr.payload, real=True) if expr.is_scalar else sympy.MatrixSymbol(expr.payload, *shape)
    return (sympy.ZeroMatrix if expr.kind == "zero" else sympy.OneMatrix)(*shape)


def _dimension(dimension: Dimension, sympy: Any) -> Any:
    return sympy.Symbol(dimension, integer=True, positive=True) if isinstance(dimension, str) else dimension


def _scalar(value: Any, sympy: Any) -> Any:
    """Return a 1×1 matrix as its only entry."""
    if not getattr(value, "is_Matrix", False):
        return value
    return value[0, 0] if isinstance(value, sympy.MatrixBase) else sympy.Trace(value)


def _function(name: str, sympy: Any) -> Any:
    formulas = {
        "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
        "relu": lambda a: sympy.Max(a, 0),
        "step": lambda a: sympy.Heaviside(a, 0),
    }
    return formulas.get(name) or getattr(sympy, name)


def _apply(sympy: Any, expr: MatrixExpr, operands: list[Any]) -> Any:
    function = _function(expr.payload, sympy)
    if expr.is_scalar:
        return function(_scalar(operands[0], sympy))
    dummy = sympy.Dummy("a", real=True)
    return operands[0].applyfunc(sympy.Lambda(dummy, function(dummy)))


def _entrywise(sympy: Any, operands: list[Any]) -> Any:
    if all(isinstance(operand, sympy.MatrixBase) for operand in operands):
        return reduce(sympy.matrices.dense.matrix_multiply_elementwise, operands).as_immutable()
    return sympy.HadamardProduct(*operands)


def _quotient(sympy: Any, expr: MatrixExpr, operands: list[Any]) -> Any:
    numerator, denominator = operands
    if isinstance(denominator, sympy.MatrixBase):
        return _entrywise(sympy, [numerator, denominator.applyfunc(lambda a: 1 / a)])
    return sympy.HadamardProduct(numerator, sympy.HadamardPower(denominator, -1))


def _norm(sympy: Any, expr: MatrixExpr, operands: list[Any]) -> Any:
    a = operands[0]
    if not getattr(a, "is_Matrix", False):
        return sympy.Abs(a)
    return sympy.sqrt(_trace(sympy, a.T * a))


def _trace(sympy: Any, matrix: Any) -> Any:
    return matrix.trace() if isinstance(matrix, sympy.MatrixBase) else sympy.Trace(matrix)


_CONVERTERS: dict[str, Callable[[Any, MatrixExpr, list[Any]], Any]] = {
    "sum": lambda sympy, expr, operands: reduce(
        add, [_scalar(operand, sympy) for operand in operands] if expr.is_scalar else operands
    ),
    "product": lambda sympy, expr, operands: reduce(mul, operands),
    "scaled": lambda sympy, expr, operands: _scalar(operands[0], sympy) * operands[1],
    "hadamard": lambda sympy, expr, operands: _entrywise(sympy, operands),
    "quotient": _quotient,
    "transpose": lambda sympy, expr, operands: operands[0].T,
    "inverse": lambda sympy, expr, operands: operands[0].inv(),
    "power": lambda sympy, expr, operands: (
        _scalar(operands[0], sympy) ** sympy.Rational(expr.payload.numerator, expr.payload.denominator)
    ),
    "apply": _apply,
    "trace": lambda sympy, expr, operands: _trace(sympy, operands[0]),
    "det": lambda sympy, expr, operands: sympy.Determinant(operands[0]).doit(),
    "norm": _norm,
}
