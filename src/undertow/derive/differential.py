"""The rules by which D f(X)[H] is formed: one for each kind of term, linear in H.

Source: the product and chain rule; D(X⁻¹)[H] = −X⁻¹HX⁻¹ and D(det X)[H] = det(X) tr(X⁻¹H) (Jacobi's formula), as in
Petersen and Pedersen, The Matrix Cookbook, 2012, section 2.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import reduce

from . import matrices as m
from .matrices import Term

# what a function's slope does to the differential of its argument
SLOPES: dict[str, Callable[[Term, Term], Term]] = {
    "exp": lambda a, da: m.hadamard(m.apply("exp", a), da),
    "log": lambda a, da: m.over(da, a),
    "sin": lambda a, da: m.hadamard(m.apply("cos", a), da),
    "cos": lambda a, da: m.negative(m.hadamard(m.apply("sin", a), da)),
    "tanh": lambda a, da: m.hadamard(_one_minus(m.hadamard(m.apply("tanh", a), m.apply("tanh", a))), da),
    "sigmoid": lambda a, da: m.hadamard(m.hadamard(m.apply("sigmoid", a), _one_minus(m.apply("sigmoid", a))), da),
    "sqrt": lambda a, da: m.over(da, m.times(2, m.apply("sqrt", a))),
    "relu": lambda a, da: m.hadamard(m.apply("step", a), da),
}


def _one_minus(term: Term) -> Term:
    return m.add(m.ones(term.shape), m.negative(term))


def differential(term: Term, wrt: Term, direction: Term) -> Term:
    """Return D term[direction], of the shape of the term.

    Args:
        wrt: the symbol that varies.
        direction: a symbol of its shape.

    >>> X, H = m.symbol("X", ("d", "d")), m.symbol("H", ("d", "d"))
    >>> differential(m.multiply(X, X), X, H) == m.add(m.multiply(H, X), m.multiply(X, H))
    True
    """
    if term.kind == "symbol":
        return direction if term == wrt else m.zero(term.shape)
    if term.kind == "entry":
        return m.entry(direction, term.datum) if term.parts[0] == wrt else m.number(0)
    if wrt.datum not in m.symbols(term):
        return m.zero(term.shape)
    return _RULES[term.kind](term, [differential(part, wrt, direction) for part in term.parts])


def _by_parts(join: Callable[[Term, Term], Term]) -> Callable[[Term, list[Term]], Term]:
    """Return the product rule for a product of this kind: each factor in turn gives way to its differential."""

    def rule(term: Term, ds: list[Term]) -> Term:
        parts = term.parts
        turns = [(*parts[:i], d, *parts[i + 1 :]) for i, d in enumerate(ds) if not m.is_zero(d)]
        return m.add(*(reduce(join, turn) for turn in turns)) if turns else m.zero(term.shape)

    return rule


def _over(term: Term, ds: list[Term]) -> Term:
    top, bottom = term.parts
    second = m.over(m.hadamard(top, ds[1]), m.hadamard(bottom, bottom))
    return m.add(m.over(ds[0], bottom), m.negative(second))


def _inverse(term: Term, ds: list[Term]) -> Term:
    return m.negative(reduce(m.multiply, (term, ds[0], term)))


def _power(term: Term, ds: list[Term]) -> Term:
    exponent: Fraction = term.datum
    return m.scaled(m.times(exponent, m.power(term.parts[0], exponent - 1)), ds[0])


def _det(term: Term, ds: list[Term]) -> Term:
    return m.scaled(term, m.trace(m.multiply(m.inverse(term.parts[0]), ds[0])))


def _norm(term: Term, ds: list[Term]) -> Term:
    """A row a: a·daᵀ/‖a‖; a column: aᵀ·da/‖a‖; a matrix: tr(aᵀ·da)/‖a‖."""
    a, da = term.parts[0], ds[0]
    inner = m.multiply(a, m.transpose(da)) if a.shape[0] == 1 else m.trace(m.multiply(m.transpose(a), da))
    return m.over(inner, term)


_RULES: dict[str, Callable[[Term, list[Term]], Term]] = {
    "sum": lambda term, ds: m.add(*ds),
    "product": _by_parts(m.multiply),
    "scaled": _by_parts(m.scaled),
    "hadamard": _by_parts(m.hadamard),
    "over": _over,
    "transpose": lambda term, ds: m.transpose(ds[0]),
    "inverse": _inverse,
    "power": _power,
    "apply": lambda term, ds: SLOPES[term.datum](term.parts[0], ds[0]),
    "trace": lambda term, ds: m.trace(ds[0]),
    "det": _det,
    "norm": _norm,
    "explicit": lambda term, ds: Term("explicit", term.shape, tuple(ds)),
}
