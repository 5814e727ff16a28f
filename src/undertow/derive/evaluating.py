"""Numerical evaluation of matrix expressions with NumPy or a module of the same functions, such as torch."""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import matmul, mul
from typing import Any

from .matrices import Dimension, MatrixExpr


def evaluate(expr: MatrixExpr, values: Mapping[str, Any], sizes: Mapping[Dimension, int], lib: Any) -> Any:
    """Evaluate an expression to a float64 array of its shape; a scalar is `(1, 1)`.

    Args:
        values: of the symbols by name, float64 `(rows, columns)`.
        sizes: of the named dimensions.
        lib: numpy or torch.

    >>> import numpy as np
    >>> from .parser import parse
    >>> evaluate(parse("X*X.T", {"X": (1, "d")}), {"X": np.array([[3.0, 4.0]])}, {"d": 2}, np)
    array([[25.]])
    """
    if expr.kind == "symbol":
        return values[expr.payload]
    if expr.kind == "entry":
        return evaluate(expr.operands[0], values, sizes, lib).reshape(-1)[expr.payload - 1].reshape(1, 1)
    if expr.kind in _CONSTANTS:
        shape = tuple(sizes.get(dimension, dimension) for dimension in expr.shape)
        return _CONSTANTS[expr.kind](expr) * lib.ones(shape, dtype=lib.float64)
    operands = [evaluate(operand, values, sizes, lib) for operand in expr.operands]
    if expr.kind == "explicit":
        return lib.stack([operand.reshape(()) for operand in operands]).reshape(expr.shape)
    return _OPERATIONS[expr.kind](lib, expr, operands)


_CONSTANTS: dict[str, Callable[[MatrixExpr], float]] = {
    "number": lambda expr: float(expr.payload),
    "zero": lambda expr: 0.0,
    "ones": lambda expr: 1.0,
}

_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sigmoid": lambda lib, a: 0.5 * (1 + lib.tanh(a / 2)),
    "relu": lambda lib, a: lib.where(a > 0, a, lib.zeros_like(a)),
    "step": lambda lib, a: lib.where(a > 0, lib.ones_like(a), lib.zeros_like(a)),
}

_OPERATIONS: dict[str, Callable[[Any, MatrixExpr, list[Any]], Any]] = {
    "sum": lambda lib, expr, operands: sum(operands[1:], operands[0]),
    "product": lambda lib, expr, operands: reduce(matmul, operands),
    "scaled": lambda lib, expr, operands: operands[0] * operands[1],
    "hadamard": lambda lib, expr, operands: reduce(mul, operands),
    "quotient": lambda lib, expr, operands: operands[0] / operands[1],
    "transpose": lambda lib, expr, operands: operands[0].T,
    "inverse": lambda lib, expr, operands: lib.linalg.inv(operands[0]),
    "power": lambda lib, expr, operands: operands[0] ** float(expr.payload),
    "apply": lambda lib, expr, operands: _apply(lib, expr.payload, operands[0]),
    "trace": lambda lib, expr, operands: lib.diagonal(operands[0]).sum().reshape(1, 1),
    "det": lambda lib, expr, operands: lib.linalg.det(operands[0]).reshape(1, 1),
    "norm": lambda lib, expr, operands: lib.sqrt((operands[0] ** 2).sum()).reshape(1, 1),
}


def _apply(lib: Any, name: str, a: Any) -> Any:
    return _FUNCTIONS[name](lib, a) if name in _FUNCTIONS else getattr(lib, name)(a)
