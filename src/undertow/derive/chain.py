"""One derivative by the chain rule: factored as backpropagation computes it, or summed path by path."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..display import Part, ShownFormula, counted
from ..errors import InputError
from ..show.plots import drawn_or_saved
from .graph import END, Graph, sympy_product, sympy_sum
from .notation import LATEX, TEXT, Fragment, Partial, Quantity, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PATHS = 10_000
MAX_EDGES_DRAWN = 80  # of a graph on the last line of a notebook's cell


class Count(NamedTuple):
    """A number of multiplications and additions."""

    multiplications: int
    additions: int


@dataclass(frozen=True)
class Operations:
    """The cost of a derivative for one data point, given the value of every partial.

    Attributes:
        factored: with each ∂E/∂node computed once: one multiplication per edge and per last factor, one addition per
            further term of a sum. Grows with the number of edges.
        expanded: with one product per path, summed. Grows with the number of paths.
        paths: the number of paths from E to the quantity.
    """

    factored: Count
    expanded: Count
    paths: int


class DifferentiableGraph(Graph):
    """A graph that can also check and draw the derivatives over it."""

    @abstractmethod
    def check(self, derivative: "Derivative", seed: int) -> float:
        """Return the largest relative difference between a derivative's expression and autograd; no unit."""

    @abstractmethod
    def figure(self, derivative: "Derivative | None", title: str) -> "Figure":
        """Draw the graph, with the edges of a derivative highlighted; see `Derivative.plot`."""

    def plot(self, path: str | Path | None = None, title: str = "", *, ground: str = "white") -> "Figure":
        """Draw the graph; arguments and errors as of `Derivative.plot`."""
        return drawn_or_saved(self.figure(None, title), path, ground)


@dataclass(frozen=True, eq=False, repr=False)
class Derivative(ShownFormula):
    """∂E/∂(a quantity), as a sum over nodes of ∂E/∂node · ∂node/∂(the quantity).

    Attributes:
        graph: the graph that the chain rule runs over.
        name: the quantity as the caller wrote it.
        wrt: the quantity to differentiate by.
        ends: (node, ∂node/∂quantity) for each node that reads the quantity directly; (node, None) if the quantity is
            that node.
        summed: whether it is a sum over the data points, as for weights; the derivative by a neuron or an input is
            per data point.
        substituted: whether partials are replaced by their closed forms.
    """

    graph: DifferentiableGraph
    name: str
    wrt: Quantity
    ends: tuple[tuple[str, Partial | None], ...]
    summed: bool = False
    substituted: bool = False

    @property
    def text(self) -> str:
        """The factored form, in plain text; a ∂E/∂node used more than once has a name and a line of its own."""
        first, *others = self._lines(TEXT)
        return "\n".join([first, *(f"  where {line}" for line in others)])

    @property
    def latex(self) -> str:
        """The factored form in LaTeX; in `aligned` (amsmath, MathJax) if it has several lines."""
        lines = self._lines(LATEX)
        if len(lines) == 1:
            return lines[0]
        body = " \\\\\n".join(line.replace(" = ", " &= ", 1) for line in lines)
        return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"

    @cached_property
    def expression(self) -> Any:
        """The factored form in SymPy, for one data point: a shared ∂E/∂node is one object, nothing is expanded.

        Every partial is a symbol with the name that it has in `text`. Printing repeats a shared ∂E/∂node each time.
        """
        terms = []
        for node, last in self.ends:
            factors = [] if last is None else [factor.symbol() for factor in last.factors(self.substituted)]
            terms.append(sympy_product([*self.graph.delta_factors(node, self.substituted), *factors]))
        return sympy_sum(terms)

    @cached_property
    def expanded(self) -> Any:
        """The sum over all paths in SymPy, for one data point.

        Raises:
            InputError: there are more than 10,000 paths.
        """
        return sympy_sum([sympy_product([factor.symbol() for factor in factors]) for factors in self._products()])

    @property
    def expanded_text(self) -> str:
        """The sum over all paths in plain text.

        Raises:
            InputError: there are more than 10,000 paths.
        """
        return self._equation(TEXT, TEXT.sum([TEXT.product(None, factors) for factors in self._products()]))

    @cached_property
    def operations(self) -> Operations:
        """The number of multiplications and additions in both forms."""
        readers, nodes = self.graph.readers, self.graph.downstream(node for node, _ in self.ends)
        paths, lengths = Counter({END: 1}), Counter({END: 0})
        for node in nodes:
            paths[node] = sum(paths[reader] for reader in readers[node])
            lengths[node] = sum(lengths[reader] + paths[reader] for reader in readers[node])
        edges = sum(1 for node in nodes for reader in readers[node] if reader != END)
        joins = sum(len(readers[node]) - 1 for node in nodes)
        last_factors = sum(last is not None for _, last in self.ends)
        count = sum(paths[node] for node, _ in self.ends)
        length = sum(lengths[node] + (paths[node] if last else 0) for node, last in self.ends)
        return Operations(
            Count(edges + last_factors, joins + len(self.ends) - 1), Count(length - count, count - 1), paths=count
        )

    @property
    def carrying(self) -> tuple[tuple[str, str], ...]:
        """The edges (node, reader) that the derivative flows along; the reader is `END` where it starts from E."""
        nodes = reversed(self.graph.downstream(node for node, _ in self.ends))
        return tuple((node, reader) for node in nodes for reader in self.graph.readers[node])

    def check(self, seed: int = 0) -> float:
        """Evaluate the expression with numbers and compare it with autograd.

        For a network of neurons: at random weights, biases and five data points, in float64, once each for sigmoid,
        tanh, ReLU and softplus. For blocks of a model: the gradients that the edges of this derivative carried to each
        node in the recorded pass; `seed` is not used.

        Returns:
            The largest absolute difference over the derivative's largest absolute value; no unit.

        Raises:
            FrameworkError: PyTorch is missing.
        """
        return self.graph.check(self, seed)

    def plot(self, path: str | Path | None = None, title: str = "", *, ground: str = "white") -> "Figure":
        """Draw the graph with the edges that carry this derivative highlighted.

        Args:
            path: also write it there, as PNG, SVG or PDF; replaced atomically.
            title: at the top; $...$ is LaTeX.
            ground: "white", "dark" or "transparent".

        Raises:
            InputError: a file type or a ground that is unknown.
            FrameworkError: matplotlib is missing.
        """
        return drawn_or_saved(self.graph.figure(self, title), path, ground)

    def _shown(self) -> Iterator[Part]:
        yield self.text
        count = self.operations
        costs = (f"{c.multiplications:,} × and {c.additions:,} +" for c in (count.factored, count.expanded))
        yield "  operations: factored {}; path by path {} ({})".format(*costs, counted(count.paths, "path"))

    def _equation(self, style: Style, fragment: Fragment) -> str:
        left = Partial(Quantity("E", "E"), self.wrt).symbol
        over = (r"\sum_{p} " if style.latex else "Σ_p ") if self.summed else ""
        right = f"{over}{style.bracketed(fragment)}" if self.summed else fragment.text
        return f"{style.write(left)} = {right}"

    def _lines(self, style: Style) -> list[str]:
        """Write the derivative, then each shared ∂E/∂node, those nearest to the derivative first."""
        graph, shared = self.graph, self._shared()
        fragments: dict[str, Fragment] = {}
        lines = []
        for node in graph.downstream(node for node, _ in self.ends):
            terms = [
                style.product(fragments.get(reader), graph.partial(reader, node).factors(self.substituted))
                for reader in graph.readers[node]
            ]
            fragments[node] = style.sum(terms)
            if node in shared:
                name, whole = graph.delta_name(node), Partial(Quantity("E", "E"), graph.quantity(node)).symbol
                lines.append(f"{style.write(name)} = {style.write(whole)} = {fragments[node].text}")
                fragments[node] = Fragment(style.write(name))
        terms = [
            fragments[node] if last is None else style.product(fragments[node], last.factors(self.substituted))
            for node, last in self.ends
        ]
        return [self._equation(style, style.sum(terms)), *reversed(lines)]

    def _shared(self) -> set[str]:
        """Return the nodes whose ∂E/∂node is used more than once here and is more than a single partial."""
        readers = self.graph.readers
        uses = Counter(node for node, _ in self.ends)
        for node in self.graph.downstream(uses):
            uses.update(readers[node])
        return {node for node, count in uses.items() if count > 1 and node != END and list(readers[node]) != [END]}

    def _products(self) -> Iterator[tuple[Quantity, ...]]:
        """Yield each path as its factors, from E to the quantity."""
        if self.operations.paths > MAX_PATHS:
            raise InputError(
                f"∂E/∂{self.wrt.text} has {self.operations.paths:,} paths, more than {MAX_PATHS:,}: "
                "too many to write out; use the factored form"
            )
        for node, last in self.ends:
            tail = () if last is None else last.factors(self.substituted)
            for path in self._paths(node):
                yield (*path, *tail)

    def _paths(self, node: str) -> Iterator[tuple[Quantity, ...]]:
        stack: list[tuple[str, tuple[Quantity, ...]]] = [(node, ())]
        while stack:
            end, factors = stack.pop()
            if end == END:
                yield factors
                continue
            for reader in reversed(self.graph.readers[end]):
                stack.append((reader, (*self.graph.partial(reader, end).factors(self.substituted), *factors)))
