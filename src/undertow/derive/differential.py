"""Differentiation rules for D f(X)[H]: one per kind of expression, each linear in H.

Source: the product and chain rule; D(X⁻¹)[H] = −X⁻¹HX⁻¹ and D(det X)[H] = det(X) tr(X⁻¹H) (Jacobi's formula), as in
Petersen and Pedersen, The Matrix Cookbook, 2012, section 2.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import reduce

from . import matrices as m
from .matrices import MatrixExpr

# name of f: the differential of f(a), entry by entry, from a and its differential da
DIFFERENTIALS: dict[str, Callable[[MatrixExpr, MatrixExpr], MatrixExpr]] = {
    "exp": lambda a, da: m.hadamard(m.apply("exp", a), da),
    "log": lambda a, da: m.divide(da, a),
    "sin": lambda a, da: m.hadamard(m.apply("cos", a), da),
    "cos": lambda a, da: m.negative(m.hadamard(m.apply("sin", a), da)),
    "tanh": lambda a, da: m.hadamard(_one_minus(m.hadamard(m.apply("tanh", a), m.apply("tanh", a))), da),
    "sigmoid": lambda a, da: m.hadamard(m.hadamard(m.apply("sigmoid", a), _one_minus(m.apply("sigmoid", a))), da),
    "sqrt": lambda a, da: m.divide(da, m.times(2, m.apply("sqrt", a))),
    "relu": lambda a, da: m.hadamard(m.apply("step", a), da),
}


def _one_minus(expr: MatrixExpr) -> MatrixExpr:
    return m.add(m.ones(expr.shape), m.negative(expr))


def differential(expr: MatrixExpr, wrt: MatrixExpr, direction: MatrixExpr) -> MatrixExpr:
    """Return D expr[direction], of the shape of `expr`.

    Args:
        wrt: the symbol to differentiate by.
        direction: a symbol of the same shape.

    >>> X, H = m.symbol("X", ("d", "d")), m.symbol("H", ("d", "d"))
    >>> differential(m.multiply(X, X), X, H) == m.add(m.multiply(H, X), m.multiply(X, H))
    True
    """
    if expr.kind == "symbol":
        return direction if expr == wrt else m.zero(expr.shape)
    if expr.kind == "entry":
        return m.entry(direction, expr.payload) if expr.operands[0] == wrt else m.number(0)
    if wrt.payload not in m.symbols(expr):
        return m.zero(expr.shape)
    return _RULES[expr.kind](expr, [differential(operand, wrt, direction) for operand in expr.operands])


def _product_rule(
    join: Callable[[MatrixExpr, MatrixExpr], MatrixExpr],
) -> Callable[[MatrixExpr, list[MatrixExpr]], MatrixExpr]:
    """Return the product rule for this kind of product: each factor in turn is replaced by its differential."""

    def _rule(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
        operands = expr.operands
        terms = [(*operands[:i], d, *operands[i + 1 :]) for i, d in enumerate(differentials) if not m.is_zero(d)]
        return m.add(*(reduce(join, factors) for factors in terms)) if terms else m.zero(expr.shape)

    return _rule


def _quotient(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
    numerator, denominator = expr.operands
    second = m.divide(m.hadamard(numerator, differentials[1]), m.hadamard(denominator, denominator))
    return m.add(m.divide(differentials[0], denominator), m.negative(second))


def _inverse(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
    return m.negative(reduce(m.multiply, (expr, differentials[0], expr)))


def _power(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
    exponent: Fraction = expr.payload
    return m.scaled(m.times(exponent, m.power(expr.operands[0], exponent - 1)), differentials[0])


def _det(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
    return m.scaled(expr, m.trace(m.multiply(m.inverse(expr.operands[0]), differentials[0])))


def _norm(expr: MatrixExpr, differentials: list[MatrixExpr]) -> MatrixExpr:
    """A row a: a·daᵀ/‖a‖; a column: aᵀ·da/‖a‖; a matrix: tr(aᵀ·da)/‖a‖."""
    a, da = expr.operands[0], differentials[0]
    inner = m.multiply(a, m.transpose(da)) if a.shape[0] == 1 else m.trace(m.multiply(m.transpose(a), da))
    return m.divide(inner, expr)


_RULES: dict[str, Callable[[MatrixExpr, list[MatrixExpr]], MatrixExpr]] = {
    "sum": lambda expr, differentials: m.add(*differentials),
    "product": _product_rule(m.multiply),
    "scaled": _product_rule(m.scaled),
    "hadamard": _product_rule(m.hadamard),
    "quotient": _quotient,
    "transpose": lambda expr, differentials: m.transpose(differentials[0]),
    "inverse": _inverse,
    "power": _power,
    "apply": lambda expr, differentials: DIFFERENTIALS[expr.payload](expr.operands[0], differentials[0]),
    "trace": lambda expr, differentials: m.trace(differentials[0]),
    "det": _det,
    "norm": _norm,
    "explicit": lambda expr, differentials: MatrixExpr("explicit", expr.shape, tuple(differentials)),
}
