"""A matrix expression with numbers in it, by the functions of NumPy or of any module that has the same."""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import matmul, mul
from typing import Any

from .matrices import Dimension, Term


def evaluate(term: Term, values: Mapping[str, Any], sizes: Mapping[Dimension, int], lib: Any) -> Any:
    """Evaluate a term; a scalar is `(1, 1)`.

    Args:
        values: of the symbols, `(rows, columns)`.
        sizes: of the dimensions that have names.
        lib: numpy or torch.

    >>> import numpy as np
    >>> from .parser import parse
    >>> evaluate(parse("X*X.T", {"X": (1, "d")}), {"X": np.array([[3.0, 4.0]])}, {"d": 2}, np)
    array([[25.]])
    """
    if term.kind == "symbol":
        return values[term.datum]
    if term.kind == "entry":
        return evaluate(term.parts[0], values, sizes, lib).reshape(-1)[term.datum - 1].reshape(1, 1)
    if term.kind in _CONSTANTS:
        shape = tuple(sizes.get(side, side) for side in term.shape)
        return _CONSTANTS[term.kind](term) * lib.ones(shape, dtype=lib.float64)
    parts = [evaluate(part, values, sizes, lib) for part in term.parts]
    if term.kind == "explicit":
        return lib.stack([part.reshape(()) for part in parts]).reshape(term.shape)
    return _KINDS[term.kind](lib, term, parts)


_CONSTANTS: dict[str, Callable[[Term], float]] = {
    "number": lambda term: float(term.datum),
    "zero": lambda term: 0.0,
    "ones": lambda term: 1.0,
}

_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sigmoid": lambda lib, a: 0.5 * (1 + lib.tanh(a / 2)),
    "relu": lambda lib, a: lib.where(a > 0, a, lib.zeros_like(a)),
    "step": lambda lib, a: lib.where(a > 0, lib.ones_like(a), lib.zeros_like(a)),
}

_KINDS: dict[str, Callable[[Any, Term, list[Any]], Any]] = {
    "sum": lambda lib, term, parts: sum(parts[1:], parts[0]),
    "product": lambda lib, term, parts: reduce(matmul, parts),
    "scaled": lambda lib, term, parts: parts[0] * parts[1],
    "hadamard": lambda lib, term, parts: reduce(mul, parts),
    "over": lambda lib, term, parts: parts[0] / parts[1],
    "transpose": lambda lib, term, parts: parts[0].T,
    "inverse": lambda lib, term, parts: lib.linalg.inv(parts[0]),
    "power": lambda lib, term, parts: parts[0] ** float(term.datum),
    "apply": lambda lib, term, parts: (_FUNCTIONS.get(term.datum) or _of(term.datum))(lib, parts[0]),
    "trace": lambda lib, term, parts: lib.diagonal(parts[0]).sum().reshape(1, 1),
    "det": lambda lib, term, parts: lib.linalg.det(parts[0]).reshape(1, 1),
    "norm": lambda lib, term, parts: lib.sqrt((parts[0] ** 2).sum()).reshape(1, 1),
}


def _of(name: str) -> Callable[[Any, Any], Any]:
    return lambda lib, a: getattr(lib, name)(a)
