"""How quantities and partial derivatives are written: plain text, LaTeX, SymPy."""

from dataclasses import dataclass
from typing import Any

from .packages import need


@dataclass(frozen=True)
class Quantity:
    """Something with a name: n4, w[2,5], x2[d], E, a block of a model.

    Attributes:
        text, latex: how it is written.
        commutes: whether a product may be reordered; Jacobian matrices of blocks do not commute.

    >>> Quantity("n4", "n_{4}").symbol()
    n4
    """

    text: str
    latex: str
    commutes: bool = True

    def symbol(self) -> Any:
        """Return it in SymPy."""
        return need("sympy").Symbol(self.text, commutative=self.commutes)


@dataclass(frozen=True)
class Slope(Quantity):
    """g'(a_i): the slope of the activation at what a neuron sums up."""

    of: str = ""

    def symbol(self) -> Any:
        """Return it in SymPy, as a function g' of the symbol a_i."""
        sympy = need("sympy")
        return sympy.Function("g'")(sympy.Symbol(self.of))


@dataclass(frozen=True)
class ErrorSlope(Quantity):
    """2(n_j − y_j): the slope of the quadratic error at an output."""

    output: str = ""
    target: str = ""

    def symbol(self) -> Any:
        """Return it in SymPy."""
        sympy = need("sympy")
        return sympy.Mul(2, sympy.Symbol(self.output) - sympy.Symbol(self.target), evaluate=False)


@dataclass(frozen=True)
class Partial:
    """∂of/∂by, one factor of the chain rule, and what it is equal to where that is known.

    >>> Partial(Quantity("n7", "n_{7}"), Quantity("n5", "n_{5}")).symbol.text
    '∂n7/∂n5'
    """

    of: Quantity
    by: Quantity
    closed_form: tuple[Quantity, ...] = ()
    direct: bool = False

    @property
    def symbol(self) -> Quantity:
        """The partial as one symbol; `direct` marks ∂E/∂u of a block u that reaches E by other ways too."""
        text, latex = (
            f"∂{self.of.text}/∂{self.by.text}",
            rf"\frac{{\partial {self.of.latex}}}{{\partial {self.by.latex}}}",
        )
        if self.direct:
            text, latex = f"{text}|direct", rf"{latex}|_{{\mathrm{{direct}}}}"
        return Quantity(text, latex, self.of.commutes and self.by.commutes)

    def factors(self, substituted: bool) -> tuple[Quantity, ...]:
        """Return what to write: the symbol, or what it means."""
        return self.closed_form if substituted and self.closed_form else (self.symbol,)


@dataclass(frozen=True)
class Fragment:
    """A piece of a formula, and whether it is a sum, which needs brackets inside a product."""

    text: str
    is_sum: bool = False


@dataclass(frozen=True)
class Style:
    """How formulas are put together; `quantity` picks a quantity's spelling."""

    latex: bool

    def write(self, quantity: Quantity) -> str:
        """Return a quantity's name."""
        return quantity.latex if self.latex else quantity.text

    def product(self, head: Fragment | None, factors: tuple[Quantity, ...]) -> Fragment:
        """Multiply a phrase by quantities on its right."""
        parts = [self.write(factor) for factor in factors]
        if head is not None:
            parts.insert(0, self.bracketed(head))
        return Fragment((" " if self.latex else " · ").join(parts))

    def bracketed(self, fragment: Fragment) -> str:
        """Put brackets around a sum."""
        if not fragment.is_sum:
            return fragment.text
        return rf"\left({fragment.text}\right)" if self.latex else f"({fragment.text})"

    def sum(self, fragments: list[Fragment]) -> Fragment:
        """Add phrases."""
        return fragments[0] if len(fragments) == 1 else Fragment(" + ".join(f.text for f in fragments), True)


TEXT, LATEX = Style(latex=False), Style(latex=True)
