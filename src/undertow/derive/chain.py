"""One derivative by the chain rule: factored as backpropagation shares its tails, or path by path."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .graph import END, Graph, sympy_product, sympy_sum
from .notation import LATEX, TEXT, Fragment, Partial, Quantity, Style

MAX_PATHS = 10_000


class Count(NamedTuple):
    """How many multiplications and additions."""

    multiplications: int
    additions: int


@dataclass(frozen=True)
class Operations:
    """What it costs to evaluate a derivative for one data point when every partial is a given number.

    Attributes:
        factored: each ∂E/∂node computed once: a multiplication for each edge and each last factor, and an addition
            wherever one more term joins. It grows with the edges.
        expanded: each path a product, and the products added. It grows with the paths.
        paths: how many there are from E to the quantity.
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
    def plot(self, derivative: "Derivative", path: str | Path, title: str) -> Path:
        """Draw the graph with the edges of a derivative highlighted; see `Derivative.plot`."""


@dataclass(frozen=True, eq=False)
class Derivative:
    """∂E/∂(a quantity), as a sum over nodes of ∂E/∂node times what the quantity does to that node.

    Attributes:
        graph: in which it is.
        name: as it was asked for.
        wrt: the quantity.
        ends: for each node that reads the quantity directly, that node and ∂node/∂quantity; for a node's own
            derivative the node and None.
        summed: whether it is a sum over the data points, as those of weights are; the derivative by a neuron or an
            input is that of one data point.
        substituted: whether partials are replaced by what they mean.
    """

    graph: DifferentiableGraph
    name: str
    wrt: Quantity
    ends: tuple[tuple[str, Partial | None], ...]
    summed: bool = False
    substituted: bool = False

    @property
    def text(self) -> str:
        """The factored form, in plain text; a tail that is used more than once has a line and a name of its own."""
        first, *others = self._lines(TEXT)
        return "\n".join([first, *(f"  where {line}" for line in others)])

    @property
    def latex(self) -> str:
        """The factored form in LaTeX; `aligned`, of amsmath and MathJax, where it has several lines."""
        lines = self._lines(LATEX)
        if len(lines) == 1:
            return lines[0]
        body = " \\\\\n".join(line.replace(" = ", " &= ", 1) for line in lines)
        return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"

    @cached_property
    def expression(self) -> Any:
        """The factored form in SymPy, for one data point: shared tails are one object, nothing is expanded.

        Every partial is a symbol of the name that it has in `text`. Printing it writes a shared tail out each time.
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
        """How many multiplications and additions both forms take."""
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
        """The edges (node, reader) by which the derivative travels; `END` as the reader where it sets out from E."""
        nodes = reversed(self.graph.downstream(node for node, _ in self.ends))
        return tuple((node, reader) for node in nodes for reader in self.graph.readers[node])

    def check(self, seed: int = 0) -> float:
        """Evaluate the expression with numbers and compare it with autograd.

        For a network of neurons: random weights, biases and five data points, in float64, once for each of sigmoid,
        tanh, ReLU and softplus. For blocks of a model: what the edges of this derivative brought to each node in the
        pass that was watched.

        Returns:
            The largest absolute difference, relative to the derivative's largest absolute value.

        Raises:
            FrameworkError: PyTorch is missing.
        """
        return self.graph.check(self, seed)

    def plot(self, path: str | Path, title: str = "") -> Path:
        """Draw the graph with the edges that carry this derivative highlighted, as PNG, SVG or PDF.

        Raises:
            InputError: a file type that cannot be written.
            FrameworkError: matplotlib is missing.
        """
        return self.graph.plot(self, path, title)

    def _equation(self, style: Style, fragment: Fragment) -> str:
        left = Partial(Quantity("E", "E"), self.wrt).symbol
        over = (r"\sum_{p} " if style.latex else "Σ_p ") if self.summed else ""
        right = f"{over}{style.bracketed(fragment)}" if self.summed else fragment.text
        return f"{style.write(left)} = {right}"

    def _lines(self, style: Style) -> list[str]:
        """Write the derivative, then each shared tail, those nearest to the derivative first."""
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
        """The nodes whose ∂E/∂node is used more than once here, and is more than one partial."""
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
                "too many to write out; take the factored form"
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
