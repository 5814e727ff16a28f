"""Symbols of quantities and partial derivatives in plain text, LaTeX and SymPy."""

from dataclasses import dataclass
from typing import Any

from .packages import need


@dataclass(frozen=True)
class Quantity:
    """A named quantity: n4, w[2,5], x2[d], E, a block of a model.

    Attributes:
        text, latex: its symbol.
        commutes: whether a product may be reordered; Jacobian matrices of blocks do not commute.

    >>> Quantity("n4", "n_{4}").symbol()
    n4
    """

    text: str
    latex: str
    commutes: bool = True

    def symbol(self) -> Any:
        """Return the quantity as a SymPy symbol."""
        return need("sympy").Symbol(self.text, commutative=self.commutes)


@dataclass(frozen=True)
class Slope(Quantity):
    """g'(a_i): the slope of the activation at a neuron's weighted sum a_i, named by `of`."""

    of: str = ""

    def symbol(self) -> Any:
        """Return the slope in SymPy: a function g' of the symbol a_i."""
        sympy = need("sympy")
        return sympy.Function("g'")(sympy.Symbol(self.of))


@dataclass(frozen=True)
class ErrorSlope(Quantity):
    """2(n_j − y_j): the slope of the quadratic error at an output."""

    output: str = ""
    target: str = ""

    def symbol(self) -> Any:
        """Return the product in SymPy, not expanded."""
        sympy = need("sympy")
        return sympy.Mul(2, sympy.Symbol(self.output) - sympy.Symbol(self.target), evaluate=False)


@dataclass(frozen=True)
class Partial:
    """∂of/∂by, one factor of the chain rule, and its closed form as factors where one is known.

    >>> Partial(Quantity("n7", "n_{7}"), Quantity("n5", "n_{5}")).symbol.text
    '∂n7/∂n5'
    """

    of: Quantity
    by: Quantity
    closed_form: tuple[Quantity, ...] = ()
    direct: bool = False

    @property
    def symbol(self) -> Quantity:
        """The partial as one symbol; `direct` marks ∂E/∂u of a block u that reaches E by other paths too."""
        text, latex = (
            f"∂{self.of.text}/∂{self.by.text}",
            rf"\frac{{\partial {self.of.latex}}}{{\partial {self.by.latex}}}",
        )
        if self.direct:
            text, latex = f"{text}|direct", rf"{latex}|_{{\mathrm{{direct}}}}"
        return Quantity(text, latex, self.of.commutes and self.by.commutes)

    def factors(self, substituted: bool) -> tuple[Quantity, ...]:
        """Return the factors to write: those of the closed form if substituted and known, else the symbol."""
        return self.closed_form if substituted and self.closed_form else (self.symbol,)


@dataclass(frozen=True)
class Fragment:
    """A part of a formula; a sum needs brackets inside a product."""

    text: str
    is_sum: bool = False


@dataclass(frozen=True)
class Style:
    """Plain text or LaTeX: how formulas are joined."""

    latex: bool

    def write(self, quantity: Quantity) -> str:
        """Return a quantity's symbol in this style."""
        return quantity.latex if self.latex else quantity.text

    def product(self, head: Fragment | None, factors: tuple[Quantity, ...]) -> Fragment:
        """Multiply a fragment, if any, by factors on its right."""
        parts = [self.write(factor) for factor in factors]
        if head is not None:
            parts.insert(0, self.bracketed(head))
        return Fragment((" " if self.latex else " · ").join(parts))

    def bracketed(self, fragment: Fragment) -> str:
        """Return the text, with brackets around a sum."""
        if not fragment.is_sum:
            return fragment.text
        return rf"\left({fragment.text}\right)" if self.latex else f"({fragment.text})"

    def sum(self, fragments: list[Fragment]) -> Fragment:
        """Add fragments."""
        return fragments[0] if len(fragments) == 1 else Fragment(" + ".join(f.text for f in fragments), True)


TEXT, LATEX = Style(latex=False), Style(latex=True)
