"""The chain rule on paper: by hand, against autograd, and without growing with the paths."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser

import undertow as ut
from undertow.derive import Network
from undertow.derive.numbers import (
    ACTIVATIONS,
    Values,
    difference,
    evaluate,
    random_values,
    relative_difference,
    with_partials,
)
from undertow.frameworks.torch.inspect.derivatives import gradients

EXERCISE = "x1>n1 x2>n2 n1>n3 n1>n4 n2>n4 n2>n5 n3>n6 n4>n6 n4>n7 n5>n7"
BY_HAND = {
    "n4": "∂E/∂n4 = ∂E/∂n6 · ∂n6/∂n4 + ∂E/∂n7 · ∂n7/∂n4",
    "n6": "∂E/∂n6 = ∂E/∂n6",
    "w[2,5]": "∂E/∂w[2,5] = Σ_p ∂E/∂n7 · ∂n7/∂n5 · ∂n5/∂w[2,5]",
    "b[3]": "∂E/∂b[3] = Σ_p ∂E/∂n6 · ∂n6/∂n3 · ∂n3/∂b[3]",
    "v[1,1][d]": "∂E/∂v[1,1][d] = Σ_p (∂E/∂n6 · ∂n6/∂n3 · ∂n3/∂n1 + (∂E/∂n6 · ∂n6/∂n4 + ∂E/∂n7 · ∂n7/∂n4) · ∂n4/∂n1)"
    " · ∂n1/∂v[1,1][d]",
    "x2[d]": "∂E/∂x2[d] = ((∂E/∂n6 · ∂n6/∂n4 + ∂E/∂n7 · ∂n7/∂n4) · ∂n4/∂n2 + ∂E/∂n7 · ∂n7/∂n5 · ∂n5/∂n2) · ∂n2/∂x2[d]",
}


def random_network(seed: int) -> Network:
    """Up to 30 neurons in an order of their own, each read by later ones; one to three inputs."""
    rng = random.Random(seed)
    count = rng.randint(2, 30)
    names = [f"n{i}" for i in rng.sample(range(1, 60), count)]
    edges = [(f"x{i}", rng.choice(names)) for i in range(1, rng.randint(2, 4))]
    for index, name in enumerate(names[:-1]):
        readers = rng.sample(names[index + 1 :], min(rng.choice((1, 1, 2, 3)), count - index - 1))
        edges += [(name, reader) for reader in readers if rng.random() < 0.9]
    edges += [("x1", name) for name in names if all(name not in edge for edge in edges)]
    rng.shuffle(edges)
    return Network.parse(" ".join(f"{a}>{b}" for a, b in dict.fromkeys(edges)))


def every_name(network: Network) -> list[str]:
    letters = {"n": "w", "x": "v"}
    weights = [f"{letters[a[0]]}[{a[1:]},{b[1:]}]" for a, b in network.edges]
    parts = [f"{name}[d]" for name in (*weights, *network.nodes) if name[0] in "vx"]
    return [*network.nodes, *weights, *parts, *(f"b[{n[1:]}]" for n in network.nodes if n[0] == "n")]


def point(network: Network, activation: str, seed: int) -> tuple[Values, Values]:
    values = random_values(network.order, network.sources, network.nodes, activation, seed)
    return with_partials(network, values), Values(gradients(network.order, network.edges, values, activation))


@pytest.mark.parametrize("name", BY_HAND)
def test_the_exercise_by_hand(name):
    assert Network.parse(EXERCISE).derivative(name).text == BY_HAND[name]


def test_substituted_by_hand():
    network = Network.parse(EXERCISE)
    text = network.derivative("w[2,5]", substitute=True).text
    assert text == "∂E/∂w[2,5] = Σ_p 2(n7 − y7) · g'(a7) · w[5,7] · g'(a5) · n2"
    text = network.derivative("x1[3]", substitute=True).text
    assert text.endswith(" · g'(a1) · v[1,1][3]")
    assert text.startswith("∂E/∂x1[3] = (2(n6 − y6) · g'(a6) · w[3,6] · g'(a3) · w[1,3] + (")
    latex = network.derivative("w[2,5]", substitute=True).latex
    assert latex.endswith(r"= \sum_{p} 2(n_{7} - y_{7}) g'(a_{7}) w_{5,7} g'(a_{5}) n_{2}")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_derivative_of_75_random_networks_is_autograds(activation):
    checked = 0
    for seed in range(list(ACTIVATIONS).index(activation), 300, 4):
        network = random_network(seed)
        values, autograd = point(network, activation, seed)
        for name in every_name(network):
            d = network.derivative(name)
            assert difference(d, d.expression, values, autograd) < 1e-10, (seed, name)
            if d.operations.paths <= 12:
                assert difference(d, d.expanded, values, autograd) < 1e-10, (seed, name)
            checked += 1
        name = random.Random(seed).choice(every_name(network))
        d = network.derivative(name, substitute=True)
        assert difference(d, d.expression, values, autograd) < 1e-10, (seed, name)
    assert checked > 2_500


def test_a_wrong_sign_a_missing_path_and_a_wrong_weight_are_seen():
    network = Network.parse(EXERCISE)
    values, autograd = point(network, "tanh", 3)
    d = network.derivative("x2[d]")
    assert difference(d, -d.expression, values, autograd) > 1
    assert difference(d, d.expanded.args[0], values, autograd) > 1e-3
    for name in values:
        if name[0] == "∂" and name in d.text:
            wrong = Values({**values, name: 1.01 * values[name]})
            assert difference(d, d.expression, wrong, autograd) > 1e-5, name


@pytest.mark.parametrize("name", ["n4", "w[2,5]", "b[1]", "v[1,1][2]", "x2[1]"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_finite_differences_of_a_network_written_out(name, activation):
    """A third value, beside the expression and autograd: the seven neurons of the exercise, line by line."""
    network = Network.parse(EXERCISE)
    v, autograd = point(network, activation, 1)
    g = ACTIVATIONS[activation][0]

    def error(name: str, move: float) -> np.ndarray:
        moved = {key: value.copy() for key, value in v.items()}
        base, _, component = name.partition("]")[0].partition("[")
        shift = dict.fromkeys((f"n{i}" for i in range(1, 8)), 0.0)
        if name[0] == "n":
            shift[name] = move
        elif name[0] == "x":
            moved[base][:, int(component) - 1] += move
        elif name[0] == "v":
            moved["v[1,1]"][int(name[-2]) - 1] += move
        else:
            moved[name] = moved[name] + move
        n1 = g((moved["x1"] @ moved["v[1,1]"])[:, None] + moved["b[1]"]) + shift["n1"]
        n2 = g((moved["x2"] @ moved["v[2,2]"])[:, None] + moved["b[2]"]) + shift["n2"]
        n3 = g(n1 * moved["w[1,3]"] + moved["b[3]"]) + shift["n3"]
        n4 = g(n1 * moved["w[1,4]"] + n2 * moved["w[2,4]"] + moved["b[4]"]) + shift["n4"]
        n5 = g(n2 * moved["w[2,5]"] + moved["b[5]"]) + shift["n5"]
        n6 = g(n3 * moved["w[3,6]"] + n4 * moved["w[4,6]"] + moved["b[6]"]) + shift["n6"]
        n7 = g(n4 * moved["w[4,7]"] + n5 * moved["w[5,7]"] + moved["b[7]"]) + shift["n7"]
        return (n6 - v["y6"]) ** 2 + (n7 - v["y7"]) ** 2

    slope = (error(name, 1e-6) - error(name, -1e-6)) / 2e-6
    theirs = Values(autograd)[name]
    assert relative_difference(slope.sum(0) if theirs.ndim == 1 else slope, theirs) < 1e-7
    d = network.derivative(name)
    assert difference(d, d.expression, v, autograd) < 1e-12


def value_of(text: str, values: Values) -> np.ndarray:
    """Read the plain text back: partials become numbers, each δ its line."""
    first, *others = text.splitlines()
    deltas: dict[str, np.ndarray] = {}

    def number(formula: str) -> np.ndarray:
        scope, words = {}, formula.removeprefix("Σ_p ").replace("·", "*")
        for i, name in enumerate(dict.fromkeys(re.findall(r"∂[^ ()]+|δ\d+", words))):
            scope[f"q{i}"] = deltas[name] if name[0] == "δ" else values[name]
            words = re.sub(rf"{re.escape(name)}(?![\d\[])", f"q{i}", words)
        return eval(words, {"__builtins__": {}}, scope)

    for line in reversed(others):
        name, _, formula = line.removeprefix("  where ").split(" = ")
        deltas[name] = number(formula)
    return number(first.partition(" = ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_the_text_and_the_latex_say_what_the_expression_says(seed):
    network = random_network(seed)
    values, _ = point(network, "softplus", seed)
    d = network.derivative(network.order[0])
    assert relative_difference(value_of(d.text, values), evaluate(d.expression, values)) < 1e-12
    lines = d.latex.replace(r"\begin{aligned}", "").replace(r"\end{aligned}", "").replace("&", "").split(r"\\")
    for line in lines:
        MathTextParser("agg").parse(f"${line.strip()}$")
    for mark, count in (("·", d.operations.factored.multiplications), ("+", d.operations.factored.additions)):
        assert d.text.count(mark) == count
    if d.operations.paths <= 200:
        text = d.expanded_text
        assert relative_difference(value_of(text, values), evaluate(d.expression, values)) < 1e-10
        assert text.count("·") == d.operations.expanded.multiplications
        assert text.count("+") == d.operations.expanded.additions == d.operations.paths - 1


def test_a_network_with_a_million_paths_takes_as_much_as_it_has_edges():
    network = Network.layered([2] * 21)
    d = network.derivative("b[1]")
    assert d.operations.paths == 2**20
    edges = 2 * 2 * 19 + 2
    assert d.operations.factored == (edges + 1, edges // 2)
    assert d.operations.expanded == (21 * 2**20, 2**20 - 1)
    assert len(d.text) < 40 * edges
    assert len(d.latex) < 120 * edges
    distinct, stack = set(), [d.expression]
    while stack:
        node = stack.pop()
        if id(node) not in distinct:
            distinct.add(id(node))
            stack.extend(node.args)
    assert len(distinct) < 5 * edges
    assert d.check() < 1e-10
    with pytest.raises(ut.InputError, match="1,048,576 paths, more than 10,000"):
        _ = d.expanded


def test_a_tail_is_named_where_it_is_used_twice_and_no_sooner():
    network = Network.parse("x1>n1 n1>n2 n1>n3 n2>n4 n3>n4 n4>n5 n5>n6")
    assert network.derivative("n1").text == (
        "∂E/∂n1 = δ4 · ∂n4/∂n2 · ∂n2/∂n1 + δ4 · ∂n4/∂n3 · ∂n3/∂n1\n  where δ4 = ∂E/∂n4 = ∂E/∂n6 · ∂n6/∂n5 · ∂n5/∂n4"
    )
    assert "where" not in network.derivative("n2").text


def test_a_chain_of_a_thousand_neurons():
    network = Network.parse("x1>n1 " + " ".join(f"n{i}>n{i + 1}" for i in range(1, 1000)))
    d = network.derivative("x1")
    assert d.operations.factored == (1000, 0)
    assert d.text.count("∂n") == 2 * 999 + 2
    assert len(d.expression.args) == 1001


@pytest.mark.parametrize("name", ["n4", "w[2,5]", "v[1,1][d]", "v[1,1][7]", "x2[d]", "x2"])
def test_check_agrees_with_autograd_for_every_seed(name):
    d = Network.parse(EXERCISE).derivative(name)
    assert all(d.check(seed) < 1e-12 for seed in range(3))


def test_check_sees_a_derivative_of_something_else():
    network = Network.parse(EXERCISE)
    right, other = network.derivative("n4"), network.derivative("n5")
    wrong = type(right)(network, "n4", right.wrt, other.ends)
    assert wrong.check() > 1e-3


def test_the_derivative_by_a_weight_is_a_sum_over_the_data_and_by_a_neuron_is_not():
    network = Network.parse(EXERCISE)
    _, autograd = point(network, "sigmoid", 0)
    assert autograd["w[2,5]"].shape == (1,)
    assert autograd["n4"].shape == (5, 1)
    assert network.derivative("w[2,5]").summed
    assert not network.derivative("n4").summed
    assert not network.derivative("x2[d]").summed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no edges"),
        ("x1 n1", "'x1' at column 1 is not an edge"),
        ("x1>n1  n1>q2", "'q2' at column 11 is neither"),
        ("x1>n1 n1>x2", "'x2' at column 10 is an input"),
        ("x1>n1 n1>n2 x1>n1", "x1>n1 at column 13 is a duplicate of column 1"),
        ("x1>n1 n1>n2 n2>n3 n3>n1", "n1 > n2 > n3 > n1, closed by n3>n1 at column 19"),
        ("n1>n1", "n1 > n1"),
        ("x1>n1>n2", "is not an edge"),
    ],
)
def test_a_network_that_is_none_is_said_with_its_place(text, message):
    with pytest.raises(ut.InputError, match=re.escape(message)) as caught:
        Network.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w[2,6]", "no edge n2>n6, so no such weight; n2 feeds n4, n5"),
        ("v[1,2]", "no edge x1>n2"),
        ("n44", "no n44 in the network; did you mean n4"),
        ("x9[d]", "no x9"),
        ("b[9]", "no n9"),
        ("w[9,1]", "no n9"),
        ("foo", "write n4, w[2,5]"),
        ("n4[d]", "write n4"),
        ("v[1,1][0]", "write n4"),
        ("__import__('os')", "write n4"),
    ],
)
def test_a_name_that_is_none_is_said(name, message):
    with pytest.raises(ut.InputError, match=re.escape(message)):
        Network.parse(EXERCISE).derivative(name)


def test_layers_without_neurons_are_refused():
    for widths in ([], [2, 0]):
        with pytest.raises(ut.InputError, match="do not make a network"):
            Network.layered(widths)


@pytest.mark.parametrize(
    "words", ["import undertow; undertow.derive", "from undertow.cli import main; main(['--help'])"]
)
def test_nothing_heavy_is_loaded_before_it_is_needed(words):
    spy = (
        f"import sys\ntry:\n    exec({words!r})\nexcept SystemExit:\n    pass\n"
        "print('loaded:', sorted({'sympy', 'networkx', 'matplotlib', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")
