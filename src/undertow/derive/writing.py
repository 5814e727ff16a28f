"""Printing of matrix expressions as plain text or LaTeX."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from .matrices import MatrixExpr, coefficient, power, symbols, times

SUM, PRODUCT, ATOM = range(3)  # precedence: how tightly the outermost operator binds
_SUPERSCRIPTS = str.maketrans("0123456789-/.", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᐟ·")


@dataclass(frozen=True)
class _Printed:
    text: str
    precedence: int

    def bracketed_below(self, min_precedence: int, latex: bool = False) -> str:
        """Return the text, in brackets if its precedence is lower."""
        if self.precedence >= min_precedence:
            return self.text
        return rf"\left({self.text}\right)" if latex else f"({self.text})"


def to_text(expr: MatrixExpr) -> str:
    """Return an expression as plain text.

    >>> from .parser import parse
    >>> to_text(parse("X*X.T - 2*inv(X)", {"X": ("d", "d")}))
    'XXᵀ − 2X⁻¹'
    """
    return _Printer(all(len(name.rstrip("0123456789'")) == 1 for name in symbols(expr)), False).write(expr).text


def to_latex(expr: MatrixExpr) -> str:
    r"""Return an expression in LaTeX.

    >>> from .parser import parse
    >>> to_latex(parse("X*X.T", {"X": ("d", "d")}))
    'X X^{\\top}'
    """
    return _Printer(True, True).write(expr).text


@dataclass(frozen=True)
class _Printer:
    juxtaposes: bool
    latex: bool

    def write(self, expr: MatrixExpr) -> _Printed:
        """Print an expression of any kind."""
        return _PRINTERS[expr.kind](self, expr)

    def _pick(self, plain: str, tex: str) -> str:
        return tex if self.latex else plain

    def _number(self, expr: MatrixExpr) -> _Printed:
        value: Fraction = expr.payload
        if value < 0:
            return _Printed(self._pick(f"−{-value}", str(value)), SUM)
        return _Printed(str(value), ATOM if value.denominator == 1 else PRODUCT)

    def _symbol(self, expr: MatrixExpr) -> _Printed:
        return _Printed(self._pick(expr.payload, _latex_name(expr.payload)), ATOM)

    def _entry(self, expr: MatrixExpr) -> _Printed:
        name = f"{expr.operands[0].payload}{expr.payload}"
        return _Printed(self._pick(name, _latex_name(name)), ATOM)

    def _constant(self, expr: MatrixExpr) -> _Printed:
        return _Printed("0" if expr.kind == "zero" else self._pick("𝟏", r"\mathbf{1}"), ATOM)

    def _explicit(self, expr: MatrixExpr) -> _Printed:
        columns = int(expr.shape[1])
        cells = [self.write(operand).text for operand in expr.operands]
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        if self.latex:
            body = r" \\ ".join(" & ".join(row) for row in rows)
            return _Printed(rf"\begin{{pmatrix}} {body} \end{{pmatrix}}", ATOM)
        return _Printed("Matrix([" + ", ".join(f"[{', '.join(row)}]" for row in rows) + "])", ATOM)

    def _sum(self, expr: MatrixExpr) -> _Printed:
        text = self.write(expr.operands[0]).text
        for operand in expr.operands[1:]:
            value, core = coefficient(operand)
            if value < 0:
                text += f" {self._pick('−', '-')} {self.write(times(-value, core)).text}"
            else:
                text += f" + {self.write(operand).text}"
        return _Printed(text, SUM)

    def _product(self, expr: MatrixExpr) -> _Printed:
        runs = [(factor, len(list(same))) for factor, same in groupby(expr.operands)]
        factors = [self._repeat(factor, count) for factor, count in runs]
        plain = self.juxtaposes and not any(factor.kind in ("apply", "explicit") for factor in expr.operands)
        return _Printed((" " if self.latex else "" if plain else " · ").join(factors), PRODUCT)

    def _repeat(self, factor: MatrixExpr, count: int) -> str:
        inner = self.write(factor).bracketed_below(ATOM, self.latex)
        if count == 1:
            return inner
        if factor.kind not in ("symbol", "sum"):
            return (" " if self.latex else "").join([inner] * count)
        return self._pick(f"{inner}{str(count).translate(_SUPERSCRIPTS)}", f"{inner}^{{{count}}}")

    def _scaled(self, expr: MatrixExpr) -> _Printed:
        scalar, body = expr.operands
        written = self.write(body)
        text = written.bracketed_below(PRODUCT, self.latex)
        if scalar.kind == "number":
            return self._with_number(scalar.payload, text)
        if scalar.kind == "power" and scalar.payload < 0:
            below = self.write(power(scalar.operands[0], -scalar.payload))
            if self.latex:
                return _Printed(rf"\frac{{{written.text}}}{{{below.text}}}", PRODUCT)
            return _Printed(f"{text}/{below.bracketed_below(ATOM)}", PRODUCT)
        front = self.write(scalar).bracketed_below(ATOM, self.latex)
        return _Printed(f"{front}{self._pick(' · ', ' ')}{text}", PRODUCT)

    def _with_number(self, value: Fraction, text: str) -> _Printed:
        minus = self._pick("−", "-") if value < 0 else ""
        size = abs(value)
        if size == 1:
            front = ""
        elif size.denominator == 1:
            front = str(size) + (" · " if text[0].isdigit() and not self.latex else "")
        else:
            front = self._pick(f"({size})", rf"\frac{{{size.numerator}}}{{{size.denominator}}} ")
        return _Printed(f"{minus}{front}{text}", SUM if minus else PRODUCT)

    def _entrywise(self, expr: MatrixExpr) -> _Printed:
        signs = {"hadamard": ("∘", r"\circ"), "quotient": ("⊘", r"\oslash")}
        sign = self._pick(*signs[expr.kind])
        return _Printed(
            f" {sign} ".join(self.write(p).bracketed_below(ATOM, self.latex) for p in expr.operands), PRODUCT
        )

    def _postfix(self, expr: MatrixExpr) -> _Printed:
        marks = {"transpose": ("ᵀ", r"\top"), "inverse": ("⁻¹", "-1")}
        plain, tex = marks[expr.kind]
        inside = self.write(expr.operands[0])
        if expr.operands[0].kind in marks:
            inside = _Printed(inside.text, PRODUCT)
        inner = inside.bracketed_below(ATOM, self.latex)
        return _Printed(self._pick(f"{inner}{plain}", f"{inner}^{{{tex}}}"), ATOM)

    def _power(self, expr: MatrixExpr) -> _Printed:
        inner = self.write(expr.operands[0]).bracketed_below(ATOM, self.latex)
        if expr.payload == -1 and not self.latex:
            return _Printed(f"1/{inner}", PRODUCT)
        exponent = str(expr.payload).translate(_SUPERSCRIPTS) if expr.payload.denominator == 1 else f"^({expr.payload})"
        return _Printed(self._pick(f"{inner}{exponent}", f"{{{inner}}}^{{{expr.payload}}}"), ATOM)

    def _function(self, expr: MatrixExpr) -> _Printed:
        name = expr.payload if expr.kind == "apply" else {"trace": "tr", "det": "det"}[expr.kind]
        inner = self.write(expr.operands[0]).text
        return _Printed(self._pick(f"{name}({inner})", rf"\operatorname{{{name}}}\left({inner}\right)"), ATOM)

    def _norm(self, expr: MatrixExpr) -> _Printed:
        inner = self.write(expr.operands[0]).text
        plain = f"‖{inner}‖{'₂' if expr.payload == '2' else '_F'}"
        return _Printed(self._pick(plain, rf"\left\Vert {inner} \right\Vert_{{{expr.payload}}}"), ATOM)


def _latex_name(name: str) -> str:
    stem = name.rstrip("0123456789")
    index = name[len(stem) :]
    if len(stem) == 1 and not stem.isascii():
        stem = "\\" + unicodedata.name(stem).rpartition(" ")[2].lower()  # α is GREEK SMALL LETTER ALPHA
    stem = stem if len(stem) == 1 or stem[0] == "\\" else rf"\mathrm{{{stem}}}".replace("_", r"\_")
    return f"{stem}_{{{index}}}" if index else stem


_PRINTERS: dict[str, Callable[[_Printer, MatrixExpr], _Printed]] = {
    "number": _Printer._number,
    "symbol": _Printer._symbol,
    "entry": _Printer._entry,
    "zero": _Printer._constant,
    "ones": _Printer._constant,
    "explicit": _Printer._explicit,
    "sum": _Printer._sum,
    "product": _Printer._product,
    "scaled": _Printer._scaled,
    "hadamard": _Printer._entrywise,
    "quotient": _Printer._entrywise,
    "transpose": _Printer._postfix,
    "inverse": _Printer._postfix,
    "power": _Printer._power,
    "apply": _Printer._function,
    "trace": _Printer._function,
    "det": _Printer._function,
    "norm": _Printer._norm,
}
