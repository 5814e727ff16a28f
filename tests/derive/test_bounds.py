"""What cannot be worked out is refused at once, in one line that names it; what is merely long is quick."""

import time

import pytest

from undertow.derive import Network, directional
from undertow.errors import InputError

SQUARE = {"X": ("d", "d"), "A": ("d", "d")}
NINES = "9" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2**999999999*X", "'999999999' is too large an exponent of '2': a number of 301,029,995 digits"),
        ("1/3**9999*X", "'9999' is too large an exponent of '3'"),
        ("0.5**(-99999)*X", "too large an exponent"),
        (f"{NINES}*X", r"column 1: '9+\.\.\.' has 5,000 digits; 300 are the most"),
        (f"X*2**{NINES}", "has 5,000 digits"),
        (f"X*1.{NINES}", "has 5,002 digits"),
        ("X" + "*99999999" * 50, r"cannot be worked out: a number of more than 300 digits"),
        ("X" + "/7" * 500, r"cannot be worked out: a number of more than 300 digits"),
        ("*".join(["X"] * 301), "a product of 301 factors"),
        ("((X**20)**20)**20", "a product of 320 factors"),
        (".*".join(["X"] * 301), "a product of 301 factors"),
        ("X" + "+X" * 60_000, "more than 100,000 words"),
        ("(" * 5000 + "X", "nested more than 60 levels"),
    ],
    ids=lambda value: value[:20],
)
def test_numbers_and_products_that_are_too_long(text, message):
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        directional(text, "X", SQUARE)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - started < 60  # it does not hang, on a busy machine either


@pytest.mark.parametrize(
    ("text", "shapes", "message"),
    [
        ("tr(X)", {"X": (99999999, 99999999)}, "X of shape 99999999×99999999 is too large"),
        ("normF(X*X.T)", {"X": (100_000, 1)}, "a product of shape 100000×100000 is too large"),
        ("tr(X)", {"X": f"{NINES},{NINES}"}, "is not understood"),
        (f"X{NINES}*X", SQUARE, "has no shape"),
        ("X1*A", {"X": (1, 9), "A": (2_000, 2_000)}, "A of shape 2000×2000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_shapes_that_are_too_large(text, shapes, message):
    with pytest.raises(InputError, match=message):
        directional(text, "X", shapes)


@pytest.mark.parametrize(
    "text",
    [
        "*".join(f"Matrix([[x{i} + 1]])" for i in range(1, 40)),
        "Matrix([[(x1 + x2 + x3)**4000]])",
        "Matrix([[x1, x2], [x3, x4]])**20",
        "det(Matrix([[" + "], [".join(", ".join(f"x{6 * i + j + 1}" for j in range(6)) for i in range(6)) + "]]))",
    ],
    ids=["product", "power", "matrix power", "determinant"],
)
def test_explicit_matrices_that_sympy_would_multiply_out_for_ever(text):
    with pytest.raises(InputError, match="multiplied out, the derivative would have some"):
        directional(text, "x")


def test_what_is_explicit_and_short_is_still_multiplied_out():
    d = directional("det(Matrix([[x1, x2, x3], [x4, x5, x6], [x7, x8, 1]]))", "x")
    assert d.check() < 1e-9
    assert "H" in d.text or "x1" in d.text
    assert directional("Matrix([[x1, x2], [x3, 1]])**4", "x").check() < 1e-12


def test_two_thousand_terms_take_well_under_a_second_or_so():
    text = " + ".join(f"{i}*A*X*inv(A)" for i in range(1, 2001))
    started = time.monotonic()
    d = directional(text, "X", SQUARE)
    assert d.text == "D(2001000AXA⁻¹)[H] = 2001000AHA⁻¹"
    assert time.monotonic() - started < 60  # 0.3 s where the processor is free


@pytest.mark.parametrize("sign", ["/", "*"])
def test_a_chain_of_scalars(sign):
    traces = [f"tr({'X*' * (1 + i % 7)}{'A*' * (i // 7)}A)" for i in range(200)]
    with pytest.raises(InputError, match="a product with 61 scalars"):
        directional(f"1{sign}" + sign.join(traces), "X", SQUARE)
    d = directional(f"1{sign}" + sign.join(traces[:30]), "X", SQUARE)
    assert d.latex.count("tr") < 10_000  # each is written once, though fractions stand within fractions
    assert d.check() < 1e-9


def test_a_matrix_that_is_singular_wherever_it_is_tried():
    with pytest.raises(InputError, match="has no finite value at any of 40 random points"):
        directional("inv(X - X)*X", "X", SQUARE).check()
    assert directional("inv(relu(X))*X", "X", SQUARE).check() < 1e-6  # at some


def test_components_beyond_sense():
    network = Network.parse("x1>n1 n1>n2")
    for wrt in ("x1[99999999]", f"v[1,1][{NINES}]"):
        with pytest.raises(InputError):
            network.derivative(wrt)
    assert network.derivative("x1[3]").check() < 1e-9
