"""Directional derivatives: known results, formulas by hand, and any expression against forward-mode autograd."""

import re

import numpy as np
import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser

import undertow as ut
from undertow.derive import directional
from undertow.derive.evaluating import evaluate

SQUARE, TALL = ("d", "d"), ("d", "k")
SHAPES = {
    **dict.fromkeys("XABC", SQUARE), "Y": TALL, "Z": TALL, "a": ("k", 1), "b": ("d",), "r": (1, "d"), "s": (1, 1),
}  # fmt: skip
KNOWN = {  # text, by what: the derivative, the shapes of H and of the result
    ("Y*a", "Y"): ("D(Ya)[H] = Ha", TALL, ("d", 1)),
    ("X*X.T", "X"): ("D(XXᵀ)[H] = HXᵀ + XHᵀ", SQUARE, SQUARE),
    ("X*C*X", "X"): ("D(XCX)[H] = HCX + XCH", SQUARE, SQUARE),
    ("C*X*B*X.T*A*X", "X"): ("D(CXBXᵀAX)[H] = CHBXᵀAX + CXBHᵀAX + CXBXᵀAH", SQUARE, SQUARE),
    ("norm(r)", "r"): ("D(‖r‖₂)[H] = rHᵀ/‖r‖₂", (1, "d"), (1, 1)),
    ("norm(b)", "b"): ("D(‖b‖₂)[H] = bᵀH/‖b‖₂", ("d", 1), (1, 1)),
    ("normF(Y)", "Y"): ("D(‖Y‖_F)[H] = tr(YᵀH)/‖Y‖_F", TALL, (1, 1)),
    ("inv(X)", "X"): ("D(X⁻¹)[H] = −X⁻¹HX⁻¹", SQUARE, SQUARE),
    ("det(X)", "X"): ("D(det(X))[H] = det(X) · tr(X⁻¹H)", SQUARE, (1, 1)),
    ("tr(A*X)", "X"): ("D(tr(AX))[H] = tr(AH)", SQUARE, (1, 1)),
    ("Y .* Z", "Y"): ("D(Y ∘ Z)[H] = H ∘ Z", TALL, TALL),
    ("exp(Y)", "Y"): ("D(exp(Y))[H] = exp(Y) ∘ H", TALL, TALL),
    ("log(Y)", "Y"): ("D(log(Y))[H] = H ⊘ Y", TALL, TALL),
    ("cos(Y)", "Y"): ("D(cos(Y))[H] = −sin(Y) ∘ H", TALL, TALL),
    ("relu(Y)", "Y"): ("D(relu(Y))[H] = step(Y) ∘ H", TALL, TALL),
    ("b/norm(b)", "b"): ("D(b/‖b‖₂)[H] = −(bᵀH) · b/‖b‖₂³ + H/‖b‖₂", ("d", 1), ("d", 1)),
    ("b.T*A*b", "b"): ("D(bᵀAb)[H] = HᵀAb + bᵀAH", ("d", 1), (1, 1)),
    ("X**3", "X"): ("D(X³)[H] = HX² + XHX + X²H", SQUARE, SQUARE),
    ("(X*A).T", "X"): ("D(AᵀXᵀ)[H] = AᵀHᵀ", SQUARE, SQUARE),
    ("X + X - 2*X", "X"): ("D(0)[H] = 0", SQUARE, SQUARE),
    ("A", "X"): ("D(A)[H] = 0", SQUARE, SQUARE),
    ("1/s", "s"): ("D(1/s)[H] = −H/s²", (1, 1), (1, 1)),
    ("inv(X.T)", "X"): ("D((Xᵀ)⁻¹)[H] = −(Xᵀ)⁻¹Hᵀ(Xᵀ)⁻¹", SQUARE, SQUARE),
    ("X*A + 3*B", "X"): ("D(XA + 3B)[H] = HA", SQUARE, SQUARE),
}


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_known_derivatives(case):
    d = directional(case[0], case[1], SHAPES)
    assert (d.text, d.direction_shape, d.result_shape) == KNOWN[case]
    assert d.check() < 1e-12
    assert d.check_by_differences() < 1e-6
    MathTextParser("agg").parse(f"${d.latex}$")


EVERY_RULE = (
    *(f"{name}(Y*a + b)" for name in ("exp", "log", "sin", "cos", "tanh", "sigmoid", "sqrt", "relu")),
    *("Z ./ Y", "Y ./ (Y .* Z)", "Y .* Y .* Z", "normF(Y*a)*Y", "norm(Y*a)", "norm((Y*a).T)", "tr(Y.T*Y)/norm(a)"),
    *("det(Y.T*Y)", "inv(Y.T*Y)", "(Y.T*Y)**3", "(Y.T*Y)**-2", "tr(Y.T*Y)**-1.5*Y", "Y*Y.T*(Z*Y.T).T", "-(Y - Z)*s"),
)


@pytest.mark.parametrize("text", EVERY_RULE)
def test_every_rule_by_autograd_and_by_differences(text):
    d = directional(text, "Y", {**SHAPES, "Y": ("k", "k"), "Z": ("k", "k"), "b": ("k",)})
    for seed in (1, 2):
        assert d.check(seed) < 1e-10
        assert d.check_by_differences(seed) < 1e-5


class Plain:
    """A matrix that Python's own operators compute with: a second reading of a text, with no tree and no rules."""

    def __init__(self, value) -> None:
        self.value = np.atleast_2d(np.asarray(value, dtype=float))

    @property
    def T(self) -> "Plain":
        return Plain(self.value.T)

    def __mul__(self, other: "Plain") -> "Plain":
        a, b = self.value, other.value
        return Plain(a * b if 1 in (a.size, b.size) else a @ b)

    def __pow__(self, other: "Plain") -> "Plain":
        n = other.value.item()
        return Plain(self.value**n if self.value.size == 1 else np.linalg.matrix_power(self.value, int(n)))

    def __add__(self, other: "Plain") -> "Plain":
        return Plain(self.value + other.value)

    def __sub__(self, other: "Plain") -> "Plain":
        return Plain(self.value - other.value)

    def __truediv__(self, other: "Plain") -> "Plain":
        return Plain(self.value / other.value)

    def __mod__(self, other: "Plain") -> "Plain":
        return Plain(self.value * other.value)

    def __floordiv__(self, other: "Plain") -> "Plain":
        return self / other

    def __neg__(self) -> "Plain":
        return Plain(-self.value)


FUNCTIONS = {
    **{name: getattr(np, name) for name in ("exp", "log", "sin", "cos", "tanh", "sqrt")},
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "relu": lambda a: np.maximum(a, 0),
    "tr": np.trace,
    "det": np.linalg.det,
    "inv": np.linalg.inv,
    "norm": np.linalg.norm,
    "normF": np.linalg.norm,
}


def read_by_python(text: str, values: dict[str, np.ndarray]) -> np.ndarray:
    """Evaluate a text by Python, in which % and // have the rank of .* and ./ here."""

    def wrapped(function):
        return lambda a: Plain(function(a.value))

    words = {name: wrapped(function) for name, function in FUNCTIONS.items()}
    words |= {"Plain": Plain, **{name: Plain(value) for name, value in values.items()}}
    numbered = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)", r"Plain(\1)", text.replace(".*", "%").replace("./", "//"))
    return eval(numbered, words).value


READINGS = (
    *EVERY_RULE,
    *("inv(3*Y)", "inv(inv(Y))*2", "(2*Y).T", "-Y*2*Z", "Y/2/4", "2/(4*s)", "-s**2", "Y - Z - Y", "Y*Z .* Y*Z"),
    *("tr(2*Y - Z)", "det(2*Y)", "norm(2*b)", "(s*b)*(b.T*b)", "2**3*Y", "(Y + Z)*(Y - Z)", "6*Y ./ (2*Z)"),
    *("(Y .* Z).T", "(Y ./ (3*Z)).T", "exp(2*Y).T", "(s*Y*Z).T", "((Y*Z).T).T", "s*s*s", "1/s/s", "s/(s*s)*Y"),
    *("2*(3*s)**2", "Y*(s*Z)*s", "Y .* (Z*3)", "1 - s - 2", "tr(Y)*tr(Z)/tr(Y)", "inv(Y.T).T", "2*inv(2*Y)*Y"),
)


@pytest.mark.parametrize("text", READINGS)
def test_a_text_means_what_python_makes_of_it(text):
    d = directional(text, "Y", {**SHAPES, "Y": ("k", "k"), "Z": ("k", "k"), "b": ("k",)})
    values, _, sizes = values_for(d, 2)
    theirs = read_by_python(text, values)
    assert np.allclose(evaluate(d.function, values, sizes, np), theirs, rtol=1e-9, atol=1e-12 * np.abs(theirs).max())


def test_terms_that_cancel_leave_rounding_and_no_alarm():
    d = directional("X ./ X + s*inv(X)*X/s", "X", SHAPES)
    assert d.check() < 1e-12
    assert d.check_by_differences() < 1e-6


def values_for(d, seed: int) -> tuple[dict, np.ndarray, dict]:
    values, sizes, ours = d._at_random_point(seed)
    return values, ours, sizes


def test_formulas_by_hand():
    d = directional("C*X*B*X.T*A*X", "X", SHAPES)
    v, ours, _ = values_for(d, 3)
    a, b, c, x, h = (v[name] for name in "ABCXH")
    assert np.allclose(ours, c @ h @ b @ x.T @ a @ x + c @ x @ b @ h.T @ a @ x + c @ x @ b @ x.T @ a @ h, rtol=1e-13)
    d = directional("det(X)*inv(X)", "X", SHAPES)
    v, ours, _ = values_for(d, 4)
    x, h, inverse, size = v["X"], v["H"], np.linalg.inv(v["X"]), np.linalg.det(v["X"])
    assert np.allclose(ours, size * np.trace(inverse @ h) * inverse - size * inverse @ h @ inverse, rtol=1e-12)
    d = directional("sigmoid(Y*a)", "Y", SHAPES)
    v, ours, _ = values_for(d, 5)
    s = 1 / (1 + np.exp(-v["Y"] @ v["a"]))
    assert np.allclose(ours, s * (1 - s) * (v["H"] @ v["a"]), rtol=1e-13)


def test_matrices_of_functions_of_a_vectors_entries():
    d = directional("Matrix([[1, x2]]) * Matrix([[1, x2**3], [sin(x2), x1]])", "x", {"x": 2})
    assert d.text.endswith("= Matrix([[H2*x2*cos(x2) + H2*sin(x2), H1*x2 + H2*x1 + 3*H2*x2**2]])")
    assert (d.direction_shape, d.result_shape) == ((2, 1), (1, 2))
    assert d.check() < 1e-12
    assert d.check_by_differences() < 1e-7
    x1, x2, h1, h2, e = sympy.symbols("x1 x2 H1 H2 e", real=True)
    product = sympy.Matrix([[1, x2]]) * sympy.Matrix([[1, x2**3], [sympy.sin(x2), x1]])
    moved = product.subs({x1: x1 + e * h1, x2: x2 + e * h2}, simultaneous=True)
    assert (sympy.diff(moved, e).subs(e, 0) - d.expression).applyfunc(sympy.expand) == sympy.zeros(1, 2)
    assert directional("Matrix([[x1, x3]])", "x").direction_shape == (3, 1)
    MathTextParser("agg")  # pmatrix is no mathtext; SymPy's own printer wrote the right side
    assert d.latex.endswith(sympy.latex(d.expression, mat_delim="("))


@pytest.mark.parametrize(
    "text", ["X*A*X.T", "tr(X*A)*X - 2*B", "inv(X)*A", "exp(X) .* X", "det(X)*X", "X*norm(b)", "s**3*A*s"]
)
def test_the_sympy_expression_is_the_same_function(text):
    d = directional(text, "s" if "s*" in text else "X", {**SHAPES, **dict.fromkeys("XAB", (2, 2)), "b": (2,)})
    values, ours, _ = values_for(d, 1)
    expression = d.expression
    for name, value in values.items():
        shape = value.shape
        if shape == (1, 1):
            expression = expression.subs(sympy.Symbol(name, real=True), value[0, 0])
        else:
            expression = expression.subs(sympy.MatrixSymbol(name, *shape), sympy.ImmutableMatrix(value))
    assert np.allclose(np.array(expression.doit(), dtype=float), ours, rtol=1e-9)


def test_where_it_is_not_differentiable_is_said():
    message = {"norm(b)": "‖b‖₂ is not differentiable where b = 0", "relu(A*b)": "where an entry of Ab is 0",
            "log(b)": "where all entries of b are positive", "1/(b.T*b)": "needs bᵀb other than 0"}  # fmt: skip
    for text, words in message.items():
        assert any(words in remark for remark in directional(text, "b", SHAPES).remarks)
    assert "X invertible" in directional("det(X)", "X", SHAPES).remarks[0]
    assert directional("X*norm(b)", "X", SHAPES).remarks == ()


def test_the_direction_has_a_name_of_its_own():
    d = directional("X*H", "X", {"X": SQUARE, "H": SQUARE})
    assert d.text == "D(XH)[V] = VH"
    assert directional("H*H", "H", {"H": SQUARE}).text == "D(H²)[V] = VH + HV"


def test_longer_names_are_kept_apart():
    d = directional("W1*xs + beta_2", "W1", {"W1": ("m", "n"), "xs": ("n",), "beta_2": ("m",)})
    assert d.text == "D(W1 · xs + beta_2)[H] = H · xs"
    assert directional("α*X", "α", {"X": SQUARE, "α": (1, 1)}).latex.endswith("= H X")


PIECES = {
    SQUARE: ["X", "A", "X.T", "X*A", "inv(X + 9*A*A.T)", "Y*Z.T"],
    TALL: ["Y", "Z", "X*Y", "Y .* Z"],
    (1, 1): ["2", "s", "1/3", "tr(X)", "normF(Y)", "norm(b)", "det(X)", "r*b"],
}


def expressions(shape: tuple, depth: int = 3) -> st.SearchStrategy[str]:
    """Texts of matrix expressions of a shape, from every rule of the grammar."""
    leaf = st.sampled_from(PIECES[shape])
    if depth == 0:
        return leaf
    same, scalar, square = expressions(shape, depth - 1), expressions((1, 1), depth - 1), expressions(SQUARE, depth - 1)
    join = st.sampled_from(["({} + {})", "({} - {})", "{} .* {}", "{} ./ (2 + {} .* {})"])
    bend = st.sampled_from(["tanh({})", "sin({})", "cos({})", "sigmoid({})", "relu({})", "-({})", "exp(tanh({}))"])
    grown = [leaf, st.builds(str.format, bend, same), st.builds(lambda s, m: f"({s})*({m})", scalar, same)]
    if shape == (1, 1):
        grown += [st.builds("tr({})".format, square), st.builds("normF({})".format, square)]
        grown += [st.builds("({})**2".format, same), st.builds("({})/(4 + ({})**2)".format, same, same)]
    else:
        grown.append(st.builds(lambda j, a, b: _joined(j, a, b), join, same, same))
        grown.append(st.builds("({})*({})".format, square, same))
    if shape == SQUARE:
        grown += [
            st.builds("({}).T".format, same),
            st.builds("({})*({}).T".format, expressions(TALL, 0), st.sampled_from(PIECES[TALL])),
        ]
    return st.one_of(grown)


def _joined(join: str, a: str, b: str) -> str:
    if join.count("{}") == 2:
        return join.format(f"({a})", f"({b})")
    return f"({a}) ./ (exp(0*({b})) + ({b}) .* ({b}))"  # a divisor that is never 0


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(expressions(SQUARE), expressions(TALL), expressions((1, 1))), wrt=st.sampled_from("XYsb"))
def test_any_expression_is_forward_mode_autograds(text, wrt):
    d = directional(text, wrt, SHAPES)
    assert d.check() < 1e-8, (text, d.text)
    values, _, sizes = values_for(d, 0)
    if SHAPES.keys() & set(re.findall(r"\w+", text)) <= values.keys():  # X - X leaves no X to give a value to
        theirs = read_by_python(text, values)
        assert np.allclose(evaluate(d.function, values, sizes, np), theirs, rtol=1e-8, atol=1e-9), text


def test_wrong_derivatives_are_seen():
    d = directional("X*A*X", "X", SHAPES)
    others = (directional(text, "X", SHAPES) for text in ("X*A*A + X", "A*X*X", "-X*A*X", "X.T*A*X"))
    for other in others:
        wrong = type(d)(d.function, d.wrt, d.direction, other.derivative)
        assert wrong.check() > 1e-2
        assert wrong.check_by_differences() > 1e-2


def test_a_function_without_a_finite_value_is_said():
    with pytest.raises(ut.InputError, match="no finite value"):
        directional("log(-1 - norm(b)*norm(b))*X", "X", SHAPES).check()
    assert directional("log(X)", "X", SHAPES).check() < 1e-12  # positive matrices are tried too


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Y*b", "column 3: 'b' is d×1 and cannot stand to the right of 'Y', d×k (k ≠ d)"),
        ("X*X.T*Y*X", "column 9: 'X' is d×d and cannot stand to the right of 'X*X.T*Y', d×k"),
        ("X + Y", "column 5: 'Y' is d×k and cannot be added to 'X', d×d"),
        ("X + 1", "column 5: '1' is a scalar and cannot be added to 'X', d×d"),
        ("s + X", "column 5: 'X' is d×d and cannot be added to 's', a scalar"),
        ("X .* Y", "column 6: 'Y' is d×k and cannot be multiplied entry by entry with 'X'"),
        ("X/Y", "column 3: 'Y' is d×k and cannot be a divisor"),
        ("tr(2)", "column 4: '2' is a scalar; tr needs a matrix"),
        ("inv(tr(X))", "column 5: 'tr(X)' is a scalar; inv needs a matrix"),
        ("2*det(tr(X))", "column 7: 'tr(X)' is a scalar"),
        ("det(Y)", "column 5: 'Y' is d×k and not square, which det needs"),
        ("Y**2", "column 1: 'Y' is d×k and not square"),
        ("norm(X)", "column 6: 'X' is d×d and not a vector"),
        ("X**A", "column 4: 'A' cannot be an exponent"),
        ("X**0.5", "column 4: '0.5' cannot be an exponent of a matrix"),
        ("X**99", "a nonzero integer up to ±20"),
        ("1/0*X", "column 3: division by zero"),
        ("Q*X", "column 1: 'Q' has no shape"),
        ("foo(X)", "column 1: 'foo' is not a function"),
        ("trr(X)", "did you mean tr"),
        ("X(A)", "column 1: 'X' is a matrix, not a function"),
        ("X A", "column 3: 'A' is unexpected; is a * missing"),
        ("X*", "column 3: the end is unexpected"),
        ("(X", "column 3: the end is unexpected; expected ')'"),
        ("", "column 1: the end"),
        ("X*$", "column 3: '$' is not understood"),
        ("__import__('os')", "column 1: '_' is not understood"),
        ("X.shape", "column 2: '.' is not understood"),
        ("sin", "column 1: 'sin' is a function"),
        ("Matrix([[X]])", "column 10: 'X' is d×d and cannot be an entry"),
        ("Matrix([[1, 2], [3]])", "column 17: '[' begins a row of 1, but the first row has 2"),
        ("(" * 100 + "X" + ")" * 100, "nested more than 60 levels deep"),
        ("b9", "column 1: 'b9' has no shape"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_its_place(text, message):
    with pytest.raises(ut.InputError, match=re.escape(message)) as caught:
        directional(text, "X", SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "shape"),
    [
        ("nxk", ("n", "k")),
        ("n × k", ("n", "k")),
        ("4x1", (4, 1)),
        ("d1 x d2", ("d1", "d2")),
        ("rows×cols", ("rows", "cols")),
    ],
)
def test_a_shape_is_read_as_it_is_printed(written, shape):
    assert directional("X", "X", {"X": written}).direction_shape == shape


def test_a_side_may_have_an_x_in_its_name():
    assert directional("X", "X", {"X": "max"}).direction_shape == ("max", 1)
    assert directional("X", "X", {"X": "x,index"}).direction_shape == ("x", "index")


def test_shapes_that_are_none_are_said():
    for shapes, message in (
        ({"X": "d,d,d"}, "rows and columns"),
        ({"X": "-1,2"}, "rows and columns"),
        ({}, "has no shape"),
    ):
        with pytest.raises(ut.InputError, match=message):
            directional("X", "X", shapes)
    with pytest.raises(ut.InputError, match="not an entry of x, 3×1"):
        directional("x4*x1", "x", {"x": 3})


def test_numbers_are_exact():
    d = directional("X/3 - 0.1*X", "X", SHAPES)
    assert d.text == "D((7/30)X)[H] = (7/30)H"
    values = {"X": np.ones((2, 2)), "H": np.ones((2, 2))}
    assert np.allclose(evaluate(d.derivative, values, {}, np), 7 / 30, rtol=1e-15)
