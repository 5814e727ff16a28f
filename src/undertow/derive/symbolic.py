"""A matrix expression in SymPy, for whoever wants to go on with it there."""

from collections.abc import Callable
from functools import reduce
from operator import add, mul
from typing import Any

from .matrices import Dimension, Term
from .packages import need


def sympy_of(term: Term) -> Any:
    """Return a term as a SymPy matrix expression; a scalar as a scalar, an explicit matrix as one.

    Raises:
        FrameworkError: SymPy is missing.

    >>> from .parser import parse
    >>> sympy_of(parse("X*X.T", {"X": ("d", "d")}))
    X*X.T
    """
    sympy = need("sympy")
    if term.kind in ("number", "symbol", "entry", "zero", "ones"):
        return _leaf(term, sympy)
    parts = [sympy_of(part) for part in term.parts]
    if term.kind == "explicit":
        return sympy.ImmutableMatrix(*term.shape, [_scalar(part, sympy) for part in parts])
    return _KINDS[term.kind](sympy, term, parts)


def is_explicit(term: Term) -> bool:
    """Whether it is made of numbers, entries and explicit matrices alone, one matrix at least."""
    kinds = set()
    stack = [term]
    while stack:
        one = stack.pop()
        kinds.add(one.kind)
        stack.extend(() if one.kind == "entry" else one.parts)
    return "explicit" in kinds and "symbol" not in kinds


def _leaf(term: Term, sympy: Any) -> Any:
    if term.kind == "number":
        return sympy.Rational(term.datum.numerator, term.datum.denominator)
    if term.kind == "entry":
        return sympy.Symbol(f"{term.parts[0].datum}{term.datum}", real=True)
    shape = [_side(side, sympy) for side in term.shape]
    if term.kind == "symbol":
        return sympy.Symbol(term.datum, real=True) if term.is_scalar else sympy.MatrixSymbol(term.datum, *shape)
    return (sympy.ZeroMatrix if term.kind == "zero" else sympy.OneMatrix)(*shape)


def _side(side: Dimension, sympy: Any) -> Any:
    return sympy.Symbol(side, integer=True, positive=True) if isinstance(side, str) else side


def _scalar(value: Any, sympy: Any) -> Any:
    """Return a 1×1 matrix as the number in it."""
    if not getattr(value, "is_Matrix", False):
        return value
    return value[0, 0] if isinstance(value, sympy.MatrixBase) else sympy.Trace(value)


def _function(name: str, sympy: Any) -> Any:
    known = {
        "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
        "relu": lambda a: sympy.Max(a, 0),
        "step": lambda a: sympy.Heaviside(a, 0),
    }
    return known.get(name) or getattr(sympy, name)


def _apply(sympy: Any, term: Term, parts: list[Any]) -> Any:
    function = _function(term.datum, sympy)
    if term.is_scalar:
        return function(_scalar(parts[0], sympy))
    dummy = sympy.Dummy("a", real=True)
    return parts[0].applyfunc(sympy.Lambda(dummy, function(dummy)))


def _entrywise(sympy: Any, parts: list[Any]) -> Any:
    if all(isinstance(part, sympy.MatrixBase) for part in parts):
        return reduce(sympy.matrices.dense.matrix_multiply_elementwise, parts).as_immutable()
    return sympy.HadamardProduct(*parts)


def _over(sympy: Any, term: Term, parts: list[Any]) -> Any:
    top, bottom = parts
    if isinstance(bottom, sympy.MatrixBase):
        return _entrywise(sympy, [top, bottom.applyfunc(lambda a: 1 / a)])
    return sympy.HadamardProduct(top, sympy.HadamardPower(bottom, -1))


def _norm(sympy: Any, term: Term, parts: list[Any]) -> Any:
    a = parts[0]
    if not getattr(a, "is_Matrix", False):
        return sympy.Abs(a)
    return sympy.sqrt(_trace(sympy, a.T * a))


def _trace(sympy: Any, matrix: Any) -> Any:
    return matrix.trace() if isinstance(matrix, sympy.MatrixBase) else sympy.Trace(matrix)


_KINDS: dict[str, Callable[[Any, Term, list[Any]], Any]] = {
    "sum": lambda sympy, term, parts: reduce(
        add, [_scalar(part, sympy) for part in parts] if term.is_scalar else parts
    ),
    "product": lambda sympy, term, parts: reduce(mul, parts),
    "scaled": lambda sympy, term, parts: _scalar(parts[0], sympy) * parts[1],
    "hadamard": lambda sympy, term, parts: _entrywise(sympy, parts),
    "over": _over,
    "transpose": lambda sympy, term, parts: parts[0].T,
    "inverse": lambda sympy, term, parts: parts[0].inv(),
    "power": lambda sympy, term, parts: (
        _scalar(parts[0], sympy) ** sympy.Rational(term.datum.numerator, term.datum.denominator)
    ),
    "apply": _apply,
    "trace": lambda sympy, term, parts: _trace(sympy, parts[0]),
    "det": lambda sympy, term, parts: sympy.Determinant(parts[0]).doit(),
    "norm": _norm,
}
