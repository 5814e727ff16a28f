"""Networks of neurons, written as edges: "x1>n1 n1>n2"."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, final

from ..display import FrozenRows, Part, Pictures, brief, counted
from ..errors import InputError, did_you_mean
from ..frameworks.base import capability
from ..show.graph import draw_network
from ..show.plots import as_image
from .chain import MAX_EDGES_DRAWN, Derivative, DifferentiableGraph
from .graph import END
from .notation import ErrorSlope, Partial, Quantity, Slope
from .numbers import ACTIVATIONS, Values, difference, random_values, with_partials
from .packages import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EDGE = re.compile(r"(?P<source>[^\s>→]+)(?:>|→)(?P<target>[^\s>→]+)")
_NODE = re.compile(r"[xn]\d+")
_COMPONENT = r"(?:\[([a-z]|[1-9][0-9]{0,3})\])?"
_WRT = {
    "n": re.compile(r"n(\d+)"),
    "b": re.compile(r"b\[(\d+)\]"),
    "w": re.compile(r"w\[(\d+),(\d+)\]"),
    "v": re.compile(rf"v\[(\d+),(\d+)\]{_COMPONENT}"),
    "x": re.compile(rf"x(\d+){_COMPONENT}"),
}
FORMS = "n4, w[2,5], b[3], v[1,1], v[1,1][d], x2 or x2[d]"


@final
@dataclass(frozen=True, repr=False)
class Network(DifferentiableGraph):
    """A directed acyclic graph of neurons n_i = g(b_i + Σ_k w_{k,i} n_k + Σ_l v_{l,i}·x_l) over vector inputs x_l.

    Neurons that no other reads are the outputs; E = Σ over data of Σ_j (n_j − y_j)², j over the outputs.

    Attributes:
        edges: (source, target), such as ("x1", "n1"), in the given order.

    >>> network = Network.parse("x1>n1 n1>n2 n1>n3 n2>n4 n3>n4")
    >>> print(network.derivative("b[1]").text)
    ∂E/∂b[1] = Σ_p (∂E/∂n4 · ∂n4/∂n2 · ∂n2/∂n1 + ∂E/∂n4 · ∂n4/∂n3 · ∂n3/∂n1) · ∂n1/∂b[1]
    """

    edges: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        if isinstance(self.edges, str):
            raise InputError(f"Network takes pairs of names; for text, write Network.parse({self.edges!r})")
        object.__setattr__(self, "edges", FrozenRows(self.edges))  # a tuple that shows itself, however long

    @classmethod
    def parse(cls, text: str) -> "Network":
        """Read edges such as "x1>n1 n1>n2", separated by spaces, commas or newlines.

        Raises:
            InputError: a word that is not an edge, a duplicate edge or a cycle; with its column in the text.
            FrameworkError: networkx is missing.
        """
        columns: dict[tuple[str, str], int] = {}
        for word in re.finditer(r"[^\s,;]+", text):
            edge = _parse_edge(word[0], word.start() + 1)
            if edge in columns:
                raise InputError(f"{word[0]} at column {word.start() + 1} is a duplicate of column {columns[edge]}")
            columns[edge] = word.start() + 1
        if not columns:
            raise InputError("the network has no edges; write them as in 'x1>n1 n1>n2'")
        _raise_on_cycle(columns)
        return cls(tuple(columns))

    @classmethod
    def layered(cls, widths: Sequence[int]) -> "Network":
        """Return a fully connected network with these numbers of neurons per layer; input x1 feeds the first layer.

        Raises:
            InputError: no layer, or a layer without neurons.

        >>> Network.layered([1, 2]).edges
        (('x1', 'n1'), ('n1', 'n2'), ('n1', 'n3'))
        """
        if not widths or min(widths) < 1:
            raise InputError(f"widths {list(widths)} do not make a network; every layer needs at least one neuron")
        numbers = iter(range(1, sum(widths) + 1))
        layers = [["x1"], *([f"n{next(numbers)}" for _ in range(width)] for width in widths)]
        return cls(tuple((a, b) for low, high in pairwise(layers) for a in low for b in high))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Inputs and neurons, in the order of their first edge."""
        return tuple(dict.fromkeys(node for edge in self.edges for node in edge))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The neurons that no other neuron reads; E is computed from them."""
        return tuple(node for node in self.nodes if self.readers.get(node) == (END,))

    @cached_property
    def sources(self) -> Mapping[str, Sequence[str]]:
        """For each neuron the inputs and neurons that it reads."""
        return {n: tuple(a for a, b in self.edges if b == n) for n in self.nodes if n[0] == "n"}

    @cached_property
    def readers(self) -> Mapping[str, Sequence[str]]:
        """For each neuron the neurons that read it, or `END` for an output."""
        targets: dict[str, list[str]] = {node: [] for node in self.nodes if node[0] == "n"}
        for source, target in self.edges:
            if source in targets:
                targets[source].append(target)
        return {node: tuple(readers) or (END,) for node, readers in targets.items()}

    @cached_property
    def order(self) -> Sequence[str]:
        """The neurons, each after those that it reads."""
        return [node for node in _topological_order(self.edges, self.nodes) if node[0] == "n"]

    def quantity(self, node: str) -> Quantity:
        """Return the symbol of an input or a neuron."""
        return Quantity(node, f"{node[0]}_{{{node[1:]}}}")

    def delta_name(self, node: str) -> Quantity:
        """Return the name of ∂E/∂node as in backpropagation: δ4 for neuron n4."""
        return Quantity(f"δ{node[1:]}", rf"\delta_{{{node[1:]}}}")

    def partial(self, reader: str, node: str) -> Partial:
        """Return ∂n_k/∂n_i = g'(a_k) w_{i,k}, or ∂E/∂n_j = 2(n_j − y_j)."""
        i = node[1:]
        if reader == END:
            slope = ErrorSlope(f"2({node} − y{i})", rf"2(n_{{{i}}} - y_{{{i}}})", True, node, f"y{i}")
            return Partial(Quantity("E", "E"), self.quantity(node), (slope,))
        weight = _indexed("w", i, reader[1:])
        return Partial(self.quantity(reader), self.quantity(node), (_slope(reader), weight))

    def derivative(self, wrt: str, substitute: bool = False) -> Derivative:
        """Return ∂E/∂wrt by the chain rule.

        Args:
            wrt: n4, w[2,5] (from n2 to n5), b[3], v[1,1] (the vector of weights from x1 to n1) or x2; a vector's
                component as `v[1,1][d]` or `x2[3]`, counted from 1.
            substitute: replace partials by g', the weights and the slope of the quadratic error.

        Raises:
            InputError: a name that is not a quantity or not in the network, or a weight without an edge.
        """
        kind, *indices = _parse_wrt(wrt)
        if kind == "x":
            return self._by_input(wrt, indices[0], indices[1], substitute)
        if kind != "n":
            return self._by_parameter(wrt, kind, indices, substitute)
        node = f"n{indices[0]}"
        self._require_node(node, wrt)
        return Derivative(self, wrt, self.quantity(node), ((node, None),), False, substitute)

    def check(self, derivative: Derivative, seed: int) -> float:
        """Compare a derivative's expression with autograd; see `Derivative.check`."""
        autograd = capability("torch", "inspect.derivatives")
        component = re.search(r"\[(\d+)\]$", derivative.wrt.text) if derivative.wrt.text[0] in "xv" else None
        width = max(2, int(component[1])) if component else 2
        differences = []
        for activation in ACTIVATIONS:
            values = random_values(self.order, self.sources, self.nodes, activation, seed, width)
            theirs = Values(autograd.gradients(self.order, self.edges, values, activation))
            differences.append(difference(derivative, derivative.expression, with_partials(self, values), theirs))
        return max(differences)

    def figure(self, derivative: Derivative | None, title: str) -> "Figure":
        """Draw the network, with the edges of a derivative highlighted; see `Derivative.plot`."""
        edges = [*self.edges, *((output, END) for output in self.outputs)]
        labels = {END: END, **{n: self.quantity(n).latex for n in self.nodes}}
        if derivative is None:
            return draw_network(edges, (), title, own_edges=(), own_nodes=(), labels=labels, partials={})
        kind, *indices = _parse_wrt(derivative.name)
        node = f"{kind}{indices[0]}" if kind in "nx" else f"n{indices[0]}"
        own_edges = {(node, target) for target, _ in derivative.ends} if kind == "x" else set()
        if kind in "wv":
            own_edges = {(f"{'n' if kind == 'w' else 'x'}{indices[0]}", f"n{indices[1]}")}
        partials = {edge: self.partial(edge[1], edge[0]).symbol.latex for edge in derivative.carrying}
        last_partials = {target: last.symbol.latex for target, last in derivative.ends if last is not None}
        partials |= {edge: last_partials[edge[1]] for edge in own_edges}
        own_nodes = {node} if kind in "nbx" else set()
        heading = title or f"${Partial(Quantity('E', 'E'), derivative.wrt).symbol.latex}$"
        return draw_network(
            edges, derivative.carrying, heading,
            own_edges=own_edges, own_nodes=own_nodes, labels=labels, partials=partials,
        )  # fmt: skip

    def _shown(self) -> Iterator[Part]:
        yield f"Network of {counted(len(self.nodes), 'node')} and {counted(len(self.edges), 'edge')}"
        yield f"outputs {brief(self.outputs)}"
        yield " ".join(f"{a}>{b}" for a, b in self.edges[:60]) + " ..." * (len(self.edges) > 60)
        if len(self.edges) <= MAX_EDGES_DRAWN:
            yield Pictures(lambda: [("", as_image(self.figure(None, ""), 80))])

    def _by_input(self, wrt: str, number: str, component: str | None, substitute: bool) -> Derivative:
        name = f"x{number}"
        self._require_node(name, wrt)
        x = _component(self.quantity(name), component)
        ends = []
        for source, target in self.edges:
            if source == name:
                weight = _component(_indexed("v", number, target[1:]), component)
                ends.append((target, Partial(self.quantity(target), x, (_slope(target), weight))))
        return Derivative(self, wrt, x, tuple(ends), False, substitute)

    def _by_parameter(self, wrt: str, kind: str, indices: Sequence[Any], substitute: bool) -> Derivative:
        if kind == "b":
            target, quantity = f"n{indices[0]}", _indexed("b", *indices)
            self._require_node(target, wrt)
            closed_form: tuple[Quantity, ...] = (_slope(target),)
        else:
            k, i, component = (*indices, None)[:3]
            source, target = f"{'n' if kind == 'w' else 'x'}{k}", f"n{i}"
            self._require_edge(source, target, wrt)
            quantity = _component(_indexed(kind, k, i), component)
            closed_form = (_slope(target), _component(self.quantity(source), component))
        ends = ((target, Partial(self.quantity(target), quantity, closed_form)),)
        return Derivative(self, wrt, quantity, ends, True, substitute)

    def _require_node(self, node: str, wrt: str) -> None:
        if node not in self.nodes:
            hint = did_you_mean(node, self.nodes) or f"; there are {', '.join(self.nodes[:12])}"
            raise InputError(f"{wrt!r}: there is no {node} in the network{hint}")

    def _require_edge(self, source: str, target: str, wrt: str) -> None:
        self._require_node(source, wrt)
        self._require_node(target, wrt)
        if (source, target) not in self.edges:
            targets = [b for a, b in self.edges if a == source]
            raise InputError(
                f"{wrt!r}: there is no edge {source}>{target}, so no such weight; "
                f"{source} feeds {', '.join(targets) or 'no neuron'}"
            )


def _parse_wrt(wrt: str) -> tuple[Any, ...]:
    """Return a quantity's letter and indices, and for v and x the component or None."""
    for kind, pattern in _WRT.items():
        match = pattern.fullmatch(re.sub(r"\s", "", wrt))
        if match:
            return (kind, *match.groups())
    raise InputError(f"{wrt!r} is not understood; write {FORMS}")


def _parse_edge(word: str, column: int) -> tuple[str, str]:
    match = _EDGE.fullmatch(word)
    if match is None:
        raise InputError(f"{word!r} at column {column} is not an edge; write x1>n1 or n1>n3")
    for part in ("source", "target"):
        if not _NODE.fullmatch(match[part]):
            at = column + match.start(part)
            raise InputError(f"{match[part]!r} at column {at} is neither an input such as x1 nor a neuron such as n1")
    if match["target"][0] == "x":
        raise InputError(
            f"{match['target']!r} at column {column + match.start('target')} is an input; no edge can lead to it"
        )
    return match["source"], match["target"]


def _raise_on_cycle(columns: Mapping[tuple[str, str], int]) -> None:
    networkx = need("networkx")
    try:
        cycle = networkx.find_cycle(networkx.DiGraph(list(columns)))
    except networkx.NetworkXNoCycle:
        return
    round_trip = " > ".join([*(a for a, _ in cycle), cycle[0][0]])
    last = max(cycle, key=lambda edge: columns[edge])
    raise InputError(
        f"the network has a cycle, {round_trip}, closed by {'>'.join(last)} at column {columns[last]}; remove an edge"
    )


def _topological_order(edges: Sequence[tuple[str, str]], nodes: Sequence[str]) -> list[str]:
    """Return nodes in topological order; ties keep the given order."""
    networkx = need("networkx")
    graph = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    position = {node: i for i, node in enumerate(nodes)}
    return list(networkx.lexicographical_topological_sort(graph, key=position.__getitem__))


def _indexed(letter: str, *indices: str) -> Quantity:
    listed = ",".join(indices)
    return Quantity(f"{letter}[{listed}]", f"{letter}_{{{listed}}}")


def _component(vector: Quantity, component: str | None) -> Quantity:
    """Return a component of a vector; in LaTeX it joins the subscript."""
    if component is None:
        return vector
    return Quantity(f"{vector.text}[{component}]", f"{vector.latex[:-1]},{component}}}")


def _slope(neuron: str) -> Slope:
    i = neuron[1:]
    return Slope(f"g'(a{i})", f"g'(a_{{{i}}})", True, f"a{i}")
