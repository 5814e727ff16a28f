"""The directional derivative of a matrix expression, and its numerical checks."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..display import Part, ShownFormula
from ..errors import InputError, did_you_mean
from ..frameworks.base import capability
from . import matrices as m
from .differential import differential
from .evaluating import evaluate
from .matrices import Dimension, MatrixExpr, Shape
from .packages import need
from .parser import parse
from .symbolic import MAX_TERMS, count_terms, is_explicit, to_sympy
from .writing import to_latex, to_text

STEP = 1e-5
MAX_ELEMENTS = 1_000_000
"""Of a matrix in an expression: the check works it out at a random point."""
_DIMENSION = re.compile(r"[1-9][0-9]{0,8}|[A-Za-z]\w*")
_TIMES = re.compile(r"(\w+)\s*×\s*(\w+)|([a-zA-Z]\w?|\d+)\s*x\s*([a-zA-Z]\w?|\d+)")  # d×k, dxk, 3 x 1; not "max"


@dataclass(frozen=True, eq=False, repr=False)
class Directional(ShownFormula):
    """D f(X)[H]: the directional derivative of a matrix expression f at X along H, linear in H.

    Attributes:
        function: f.
        wrt: the symbol X.
        direction: the symbol H, of the shape of X.
        derivative: D f(X)[H], of the shape of f.
    """

    function: MatrixExpr
    wrt: MatrixExpr
    direction: MatrixExpr
    derivative: MatrixExpr

    @property
    def direction_shape(self) -> Shape:
        """Rows and columns of H: numbers, or names such as "d"."""
        return self.direction.shape

    @property
    def result_shape(self) -> Shape:
        """Rows and columns of the derivative, the same as of f; (1, 1) for a scalar."""
        return self.derivative.shape

    @property
    def text(self) -> str:
        """The derivative as an equation, in plain text; explicit matrices are multiplied out."""
        right = _format_sympy(self.expression) if self._is_explicit else to_text(self.derivative)
        return f"D({to_text(self.function)})[{self.direction.payload}] = {right}"

    @property
    def latex(self) -> str:
        """The derivative as an equation, in LaTeX."""
        right = need("sympy").latex(self.expression, mat_delim="(") if self._is_explicit else to_latex(self.derivative)
        return rf"\mathrm{{D}}\left({to_latex(self.function)}\right)[{self.direction.payload}] = {right}"

    @cached_property
    def expression(self) -> Any:
        """The derivative in SymPy.

        Raises:
            FrameworkError: SymPy is missing.
        """
        expression = to_sympy(self.derivative)
        return expression.expand() if self._is_explicit and hasattr(expression, "expand") else expression

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences about where f, or this formula, has no derivative."""
        sentences: list[str] = []
        stack = [self.function]
        while stack:
            expr = stack.pop()
            if self.wrt.payload in m.symbols(expr):
                sentences += _remark(expr)
                stack.extend(reversed(expr.operands))
        return tuple(dict.fromkeys(sentences))

    def _shown(self) -> Iterator[Part]:
        yield self.text
        (rows, columns), direction = self.result_shape, self.direction_shape
        name = self.direction.payload
        yield f"  {name} ∈ ℝ^{{{direction[0]}×{direction[1]}}}, the result ∈ ℝ^{{{rows}×{columns}}}"
        yield from (f"  {remark}" for remark in self.remarks)

    @property
    def _is_explicit(self) -> bool:
        return is_explicit(self.function)

    def check(self, seed: int = 0) -> float:
        """Compare with forward-mode autograd (`torch.func.jvp`) on random matrices, in float64.

        Returns:
            The largest absolute difference over the largest absolute value of the derivative or of one of its terms
            (they may cancel, as in D(X ⊘ X)); no unit.

        Raises:
            InputError: f has no finite value at any of the points tried.
            FrameworkError: PyTorch is missing.
        """
        jvp = capability("torch", "inspect.derivatives").jvp
        values, sizes, ours = self._at_random_point(seed)
        theirs = jvp(
            lambda point, lib: evaluate(self.function, point, sizes, lib),
            values,
            self.wrt.payload,
            values[self.direction.payload],
        )
        return self._relative(ours, theirs, values, sizes)

    def check_by_differences(self, seed: int = 0) -> float:
        """Compare with a central difference on the same random matrices; its own error is about 1e-8.

        Returns:
            The largest relative difference, as in `check`.

        Raises:
            InputError: f has no finite value at any of the points tried.
        """
        values, sizes, ours = self._at_random_point(seed)
        name, step = self.wrt.payload, STEP * values[self.direction.payload]
        ahead, behind = (
            evaluate(self.function, {**values, name: values[name] + move}, sizes, np) for move in (step, -step)
        )
        return self._relative(ours, (ahead - behind) / (2 * STEP), values, sizes)

    def _relative(self, ours: Any, theirs: Any, values: Mapping[str, Any], sizes: Mapping[Dimension, int]) -> float:
        terms = self.derivative.operands if self.derivative.kind == "sum" else ()
        largest = max(float(np.abs(x).max()) for x in (theirs, *(evaluate(term, values, sizes, np) for term in terms)))
        return float(np.abs(ours - theirs).max()) / (largest or 1.0)

    def _at_random_point(self, seed: int) -> tuple[dict[str, Any], dict[Dimension, int], npt.NDArray[np.float64]]:
        """Return random matrices, sizes and the derivative there; every second attempt draws positive matrices."""
        rng = np.random.default_rng(seed)
        symbols = {**m.symbols(self.function), **{s.payload: s for s in (self.wrt, self.direction)}}
        dimensions = dict.fromkeys(
            dimension for dimension in (*m.dimensions(self.function), *self.wrt.shape) if isinstance(dimension, str)
        )
        sizes: dict[Dimension, int] = dict(zip(dimensions, _distinct_sizes(len(dimensions), rng), strict=True))
        for attempt in range(40):
            values = {name: _random_matrix(s.shape, sizes, attempt % 2 == 1, rng) for name, s in symbols.items()}
            with np.errstate(all="ignore"), suppress(np.linalg.LinAlgError, OverflowError):  # singular at this point
                f, df = (evaluate(expr, values, sizes, np) for expr in (self.function, self.derivative))
                if np.isfinite(f).all() and np.isfinite(df).all():
                    return values, sizes, df
        raise InputError(
            f"{to_text(self.function)} has no finite value at any of 40 random points; is it defined anywhere?"
        )


def directional(text: str, wrt: str, shapes: Mapping[str, Any] | None = None) -> Directional:
    """Derive the directional derivative of a matrix expression.

    Operators and functions: + - * / (by a scalar), ** (a number), .T, inv, tr, det, norm (2-norm of a vector), normF
    (Frobenius), .* or ∘ and ./ or ⊘ (entry by entry), exp, log, sin, cos, tanh, sigmoid, sqrt, relu of each entry,
    numbers, and Matrix([[1, x2], [sin(x1), 0]]) with the entries x1, x2, ... of the vector `wrt`. Nothing is executed.

    Args:
        text: the expression.
        wrt: the name of the matrix to differentiate by.
        shapes: rows and columns of each name, such as ("d", "k"), (3, 1), "d,k" or "d×k"; a single number or name is
            the length of a column. If only entries of `wrt` occur, its shape may be omitted: a column as long as the
            largest index.

    Raises:
        InputError: an unknown word or shapes that do not fit, with the column in the text; numbers, shapes or explicit
            matrices that are too large to be worked out.

    >>> d = directional("X*a", wrt="X", shapes={"X": ("d", "k"), "a": ("k", 1)})
    >>> d.text, d.direction_shape, d.result_shape
    ('D(Xa)[H] = Ha', ('d', 'k'), ('d', 1))
    >>> print(directional("C*X*B*X.T", wrt="X", shapes=dict.fromkeys("CXB", ("d", "d"))).text)
    D(CXBXᵀ)[H] = CHBXᵀ + CXBHᵀ
    """
    all_shapes = {name: _shape(name, given) for name, given in (shapes or {}).items()}
    if wrt not in all_shapes:
        indices = [int(index) for index in re.findall(rf"\b{re.escape(wrt)}([1-9][0-9]{{0,8}})\b", text)]
        if not indices:
            hint = did_you_mean(wrt, all_shapes) or f"; give it one, as in --shape {wrt}=d,d"
            raise InputError(f"{wrt!r}, the variable to differentiate by, has no shape{hint}")
        all_shapes[wrt] = (max(indices), 1)
    try:
        return _derived(text, wrt, all_shapes)
    except RecursionError as error:
        raise InputError("the expression is nested too deeply, as in a/b/c/...; put divisors into brackets") from error


def _derived(text: str, wrt: str, all_shapes: Mapping[str, Shape]) -> Directional:
    function = parse(text, all_shapes, vector=wrt)
    variable = m.symbol(wrt, all_shapes[wrt])
    free = (name for name in ("H", "V", "D", *(f"H{i}" for i in range(1, 100))) if name not in all_shapes)
    direction = m.symbol(next(free), all_shapes[wrt])
    derivative = differential(function, variable, direction)
    for expr in (function, derivative, variable):
        _refuse_large(expr)
    if is_explicit(function) and (count := count_terms(derivative)) > MAX_TERMS:
        raise InputError(
            f"multiplied out, the derivative would have some {count:.1g} terms; {MAX_TERMS:,} are the most"
        )
    return Directional(function, variable, direction, derivative)


def _refuse_large(expr: MatrixExpr) -> None:
    """Refuse a matrix that would take too long to work out at a point.

    Raises:
        InputError: it is too large.
    """
    for node in (*m.symbols(expr).values(), *m.nodes(expr)):
        sides = [side for side in node.shape if isinstance(side, int)]
        if math.prod(sides) > MAX_ELEMENTS:
            name = node.payload if node.kind == "symbol" else f"a {node.kind}"
            size = f"{name} of shape {m.format_shape(node.shape)}"
            raise InputError(f"{size} is too large to be checked by numbers; name its sides, as in d,k")


def _format_sympy(value: Any) -> str:
    """Write a SymPy matrix in the syntax of `parse`."""
    return str(value.tolist()).join(["Matrix(", ")"]) if hasattr(value, "tolist") else str(value)


def _shape(name: str, given: Any) -> Shape:
    dimensions: Sequence[Any]
    if isinstance(given, str):
        times = _TIMES.fullmatch(given.strip())
        dimensions = [side for side in times.groups() if side] if times else given.split(",")
    else:
        dimensions = given if isinstance(given, Sequence) else [given]
    sides = [str(dimension).strip() for dimension in dimensions]
    if len(sides) not in (1, 2) or not all(_DIMENSION.fullmatch(side) for side in sides):
        raise InputError(f"shape {given!r} of {name!r} is not understood; write rows and columns, as in d,d or 3,1")
    rows, columns = [int(side) if side.isdecimal() else side for side in (*sides, "1")[:2]]
    return rows, columns


def _distinct_sizes(count: int, rng: np.random.Generator) -> list[int]:
    """Return distinct sizes, so that a wrong transpose is a shape error."""
    return [int(size) for size in rng.permutation(np.arange(2, 2 + max(count, 3)))[:count]]


def _random_matrix(shape: Shape, sizes: Mapping[Dimension, int], positive: bool, rng: np.random.Generator) -> Any:
    rows, columns = (int(sizes.get(dimension, dimension)) for dimension in shape)
    return rng.uniform(0.2, 1.2, (rows, columns)) if positive else rng.standard_normal((rows, columns))


def _remark(expr: MatrixExpr) -> Iterator[str]:
    inner = to_text(expr.operands[0]) if expr.operands else ""
    if expr.kind == "norm":
        yield f"{to_text(expr)} is not differentiable where {inner} = 0"
    elif expr.kind == "inverse":
        yield f"{to_text(expr)} needs {inner} invertible"
    elif expr.kind == "det":
        yield f"this form of D {to_text(expr)} needs {inner} invertible"
    elif expr.kind == "apply" and expr.payload == "relu":
        yield f"{to_text(expr)} is not differentiable where an entry of {inner} is 0; 0 is used there"
    elif expr.kind == "apply" and expr.payload in ("sqrt", "log"):
        yield f"{to_text(expr)} is differentiable where all entries of {inner} are positive"
    elif expr.kind == "quotient":
        yield f"{to_text(expr)} needs all entries of {to_text(expr.operands[1])} other than 0"
    elif expr.kind == "power" and expr.payload < 0:
        yield f"{to_text(expr)} needs {inner} other than 0"
    elif expr.kind == "power" and expr.payload.denominator != 1:
        yield f"{to_text(expr)} is differentiable where {inner} is positive"
