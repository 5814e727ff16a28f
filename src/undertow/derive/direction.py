"""The verb: the directional derivative of a matrix expression, and whether numbers agree with it."""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, near
from ..frameworks.base import load
from . import matrices as m
from .differential import differential
from .evaluating import evaluate
from .matrices import Dimension, Shape, Term
from .packages import need
from .parser import parse
from .symbolic import is_explicit, sympy_of
from .writing import latex, text

STEP = 1e-5
_SIDE = re.compile(r"[1-9]\d*|[A-Za-z]\w*")


@dataclass(frozen=True, eq=False)
class Directional:
    """D f(X)[H]: how a matrix expression f changes along H, linear in H.

    Attributes:
        function: f, as a tree.
        wrt: X.
        direction: H, of the shape of X.
        derivative: D f(X)[H], as a tree.
    """

    function: Term
    wrt: Term
    direction: Term
    derivative: Term

    @property
    def direction_shape(self) -> Shape:
        """Rows and columns of H: numbers, or names such as "d"."""
        return self.direction.shape

    @property
    def result_shape(self) -> Shape:
        """Rows and columns of the derivative, which are those of f; (1, 1) for a scalar."""
        return self.derivative.shape

    @property
    def text(self) -> str:
        """The derivative as an equation, in plain text; between explicit matrices it is multiplied out."""
        right = _listed(self._multiplied_out) if self._is_explicit else text(self.derivative)
        return f"D({text(self.function)})[{self.direction.datum}] = {right}"

    @property
    def latex(self) -> str:
        """The derivative as an equation, in LaTeX."""
        if self._is_explicit:
            right = need("sympy").latex(self._multiplied_out, mat_delim="(")
        else:
            right = latex(self.derivative)
        return rf"\mathrm{{D}}\left({latex(self.function)}\right)[{self.direction.datum}] = {right}"

    @cached_property
    def expression(self) -> Any:
        """The derivative in SymPy.

        Raises:
            FrameworkError: SymPy is missing.
        """
        return self._multiplied_out if self._is_explicit else sympy_of(self.derivative)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Where f has no derivative, or none that this formula gives; each a sentence."""
        found = []
        stack = [self.function]
        while stack:
            term = stack.pop()
            if self.wrt.datum in m.symbols(term):
                found += list(_remark(term))
                stack.extend(reversed(term.parts))
        return tuple(dict.fromkeys(found))

    @property
    def _is_explicit(self) -> bool:
        return is_explicit(self.function)

    @cached_property
    def _multiplied_out(self) -> Any:
        found = sympy_of(self.derivative)
        return found.expand() if hasattr(found, "expand") else found

    def check(self, seed: int = 0) -> float:
        """Compare with forward-mode autograd (`torch.func.jvp`) on random matrices, in float64.

        Returns:
            The largest absolute difference, relative to the largest absolute value of the derivative or of one of the
            terms that it is the sum of (they may cancel, as in D(X ⊘ X)).

        Raises:
            InputError: f has no finite value at any of the points tried.
            FrameworkError: PyTorch is missing.
        """
        jvp = importlib.import_module(".directional", load("torch").__name__).jvp  # type: ignore[attr-defined]
        values, sizes, ours = self._at_a_point(seed)
        theirs = jvp(
            lambda at, lib: evaluate(self.function, at, sizes, lib),
            values,
            self.wrt.datum,
            values[self.direction.datum],
        )
        return self._relative(ours, theirs, values, sizes)

    def check_by_differences(self, seed: int = 0) -> float:
        """Compare with a central difference on the same random matrices; it is right to about 1e-8 itself.

        Returns:
            The largest absolute difference, relative as in `check`.

        Raises:
            InputError: f has no finite value at any of the points tried.
        """
        values, sizes, ours = self._at_a_point(seed)
        name, step = self.wrt.datum, STEP * values[self.direction.datum]
        ahead, behind = (
            evaluate(self.function, {**values, name: values[name] + move}, sizes, np) for move in (step, -step)
        )
        return self._relative(ours, (ahead - behind) / (2 * STEP), values, sizes)

    def _relative(self, ours: Any, theirs: Any, values: Mapping[str, Any], sizes: Mapping[Dimension, int]) -> float:
        terms = self.derivative.parts if self.derivative.kind == "sum" else ()
        largest = max(float(np.abs(one).max()) for one in (theirs, *(evaluate(t, values, sizes, np) for t in terms)))
        return float(np.abs(ours - theirs).max()) / (largest or 1.0)

    def _at_a_point(self, seed: int) -> tuple[dict[str, Any], dict[Dimension, int], npt.NDArray[np.float64]]:
        """Return random matrices and sizes, and the derivative there; positive matrices where others will not do."""
        rng = np.random.default_rng(seed)
        known = {**m.symbols(self.function), **{s.datum: s for s in (self.wrt, self.direction)}}
        sides = dict.fromkeys(side for side in (*m.sides(self.function), *self.wrt.shape) if isinstance(side, str))
        sizes: dict[Dimension, int] = dict(zip(sides, _sizes(len(sides), rng), strict=True))
        for attempt in range(40):
            values = {name: _random(s.shape, sizes, attempt % 2 == 1, rng) for name, s in known.items()}
            with np.errstate(all="ignore"):
                both = [evaluate(term, values, sizes, np) for term in (self.function, self.derivative)]
            if all(np.isfinite(one).all() for one in both):
                return values, sizes, both[1]
        raise InputError(
            f"{text(self.function)} has no finite value at any of 40 random points; is it defined anywhere?"
        )


def directional(text: str, wrt: str, shapes: Mapping[str, Any] | None = None) -> Directional:
    """Derive the directional derivative of a matrix expression.

    Understood are + - * / (by a scalar), ** (a number), .T, inv, tr, det, norm (2-norm of a vector), normF
    (Frobenius), .* or ∘ and ./ or ⊘ (entry by entry), exp, log, sin, cos, tanh, sigmoid, sqrt, relu of each entry,
    numbers, and Matrix([[1, x2], [sin(x1), 0]]) with the entries x1, x2, ... of the vector `wrt`. Nothing is executed.

    Args:
        text: the expression.
        wrt: the name that varies.
        shapes: for each name its rows and columns, such as ("d", "k"), (3, 1) or "d,k"; one side alone is a column.
            Where `wrt` occurs by its entries alone, it may be left out: a column as long as its largest index.

    Raises:
        InputError: with the column in the text, a word that is not known or shapes that do not fit.

    >>> d = directional("X*a", wrt="X", shapes={"X": ("d", "k"), "a": ("k", 1)})
    >>> d.text, d.direction_shape, d.result_shape
    ('D(Xa)[H] = Ha', ('d', 'k'), ('d', 1))
    >>> print(directional("C*X*B*X.T", wrt="X", shapes=dict.fromkeys("CXB", ("d", "d"))).text)
    D(CXBXᵀ)[H] = CHBXᵀ + CXBHᵀ
    """
    known = {name: _shape(name, given) for name, given in (shapes or {}).items()}
    if wrt not in known:
        indices = [int(index) for index in re.findall(rf"\b{re.escape(wrt)}([1-9]\d*)\b", text)]
        if not indices:
            hint = near(wrt, known) or f"; give it one, as in --shape {wrt}=d,d"
            raise InputError(f"{wrt!r}, by which to derive, has no shape{hint}")
        known[wrt] = (max(indices), 1)
    function = parse(text, known, vector=wrt)
    variable = m.symbol(wrt, known[wrt])
    free = (name for name in ("H", "V", "D", *(f"H{i}" for i in range(1, 100))) if name not in known)
    direction = m.symbol(next(free), known[wrt])
    return Directional(function, variable, direction, differential(function, variable, direction))


def _listed(value: Any) -> str:
    """Write a SymPy matrix as this library reads one."""
    return str(value.tolist()).join(["Matrix(", ")"]) if hasattr(value, "tolist") else str(value)


def _shape(name: str, given: Any) -> Shape:
    sides: Sequence[Any] = (
        given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
    )
    words = [str(side).strip() for side in sides]
    if len(words) not in (1, 2) or not all(_SIDE.fullmatch(word) for word in words):
        raise InputError(f"shape {given!r} of {name!r} is not understood; write rows and columns, as in d,d or 3,1")
    rows, columns = [int(word) if word.isdecimal() else word for word in (*words, "1")[:2]]
    return rows, columns


def _sizes(count: int, rng: np.random.Generator) -> list[int]:
    """Return sizes that differ, so that a transpose too many does not go unseen."""
    return [int(size) for size in rng.permutation(np.arange(2, 2 + max(count, 3)))[:count]]


def _random(shape: Shape, sizes: Mapping[Dimension, int], positive: bool, rng: np.random.Generator) -> Any:
    rows, columns = (int(sizes.get(side, side)) for side in shape)
    return rng.uniform(0.2, 1.2, (rows, columns)) if positive else rng.standard_normal((rows, columns))


def _remark(term: Term) -> Iterator[str]:
    inner = text(term.parts[0]) if term.parts else ""
    if term.kind == "norm":
        yield f"{text(term)} is not differentiable where {inner} = 0"
    elif term.kind == "inverse":
        yield f"{text(term)} needs {inner} invertible"
    elif term.kind == "det":
        yield f"this form of D {text(term)} needs {inner} invertible"
    elif term.kind == "apply" and term.datum == "relu":
        yield f"{text(term)} is not differentiable where an entry of {inner} is 0; 0 is taken there"
    elif term.kind == "apply" and term.datum in ("sqrt", "log"):
        yield f"{text(term)} is differentiable where all entries of {inner} are positive"
    elif term.kind == "over":
        yield f"{text(term)} needs all entries of {text(term.parts[1])} other than 0"
    elif term.kind == "power" and term.datum < 0:
        yield f"{text(term)} needs {inner} other than 0"
    elif term.kind == "power" and term.datum.denominator != 1:
        yield f"{text(term)} is differentiable where {inner} is positive"
