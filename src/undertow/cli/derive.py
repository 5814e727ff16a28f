"""`undertow derive`: the chain rule and directional derivatives on paper, checked numerically."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .photographs import ground_option, input_line, load_classifier, model_options, preprocess_option
from .printing import echo, print_json

if TYPE_CHECKING:
    from ..derive import Derivative

TOLERANCE = 1e-8
EXPRESSION_CHECK = ("the expression is", 1e-8)  # what is claimed, and the tolerance in float64
EDGES_CHECK = ("what the edges carry adds up to", 1e-5)  # the model computes in float32
EXAMPLES = """\b
Examples:
  undertow derive chain "x1>n1 n1>n2 n1>n3 n2>n4 n3>n4" --wrt 'w[1,2]' --wrt x1
  undertow derive directional "X*C*X" --wrt X --shape X=d,d --shape C=d,d
  undertow derive model --model torchvision:resnet18@none --depth 2 --wrt layer2.0
"""


@click.group(short_help="The chain rule and directional derivatives on paper, checked.", epilog=EXAMPLES)
def derive() -> None:
    """Derive on paper what backpropagation computes, and check each answer with numbers."""


_wrt = click.option("--wrt", "names", metavar="NAME", multiple=True, required=True, help="By what; may be repeated.")
_plot = click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the way of the derivative, as PNG, SVG or PDF; numbered where --wrt is repeated.",
)
_latex = click.option("--latex", "as_latex", is_flag=True, help="Print LaTeX instead of plain text.")
_seed = click.option("--seed", default=0, show_default=True, help="Of the random numbers.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@derive.command(
    short_help="The chain rule over a network of neurons.",
    epilog="""\b
Examples:
  undertow derive chain "x1>n1 n1>n2 n1>n3 n2>n4 n3>n4" --wrt n1 --wrt 'w[1,2]' --expand
  undertow derive chain "x1>n1 n1>n2" --wrt 'v[1,1][d]' --substitute --latex
  undertow derive chain "x1>n1 n1>n2" --wrt 'x1[d]' --plot way.svg
""",
)
@click.argument("network")
@_wrt
@click.option("--substitute", is_flag=True, help="Substitute g', the weights and the quadratic error.")
@click.option("--expand", is_flag=True, help="Also print the sum over all paths.")
@_latex
@_plot
@ground_option
@_seed
@_json
def chain(
    network: str,
    names: Sequence[str],
    substitute: bool,
    expand: bool,
    as_latex: bool,
    plot: Path | None,
    ground: str,
    seed: int,
    as_json: bool,
) -> int:
    """Derive E by NAME in a NETWORK such as "x1>n1 x2>n1 n1>n2": inputs x1, x2, ..., neurons n1, n2, ...

    Neurons compute n_i = g(b_i + Σ w[k,i] n_k + Σ v[l,i]·x_l); those that no other reads are the outputs of
    E = Σ over data of Σ_j (n_j − y_j)². NAME is n4, w[2,5], b[3], v[1,1], v[1,1][d], x2 or x2[d].
    """
    from ..derive import Network

    graph = Network.parse(network)
    derivatives = [graph.derivative(name, substitute) for name in names]
    return _print_derivatives(derivatives, *EXPRESSION_CHECK, as_latex, expand, plot, ground, seed, as_json)


@derive.command(
    short_help="The chain rule over the blocks of a model.",
    epilog="""\b
Examples:
  undertow derive model --model torchvision:resnet18@none --depth 2 --wrt layer2.0
  undertow derive model cat.jpg --model demo --wrt x --plot demo.png
""",
)
@click.argument("image", metavar="[IMAGE]", required=False, type=click.Path(path_type=Path))
@model_options
@click.option("--weights", metavar="FILE", type=click.Path(path_type=Path), help="A .safetensors file or a state dict.")
@preprocess_option
@click.option("--depth", default=1, show_default=True, help="Of nesting: 1 for the model's own parts.")
@click.option("--target", metavar="CLASS", help="Whose score E is, number or name; the predicted class if left out.")
@click.option("--shape", metavar="B,C,H,W", help="Of the random input; the model's own, one image, if left out.")
@_wrt
@click.option("--expand", is_flag=True, help="Also print the sum over all paths.")
@_latex
@_plot
@ground_option
@_seed
@_json
def model(
    image: Path | None,
    reference: str,
    classes: str | None,
    weights: Path | None,
    preprocess: str | None,
    depth: int,
    target: str | None,
    shape: str | None,
    names: Sequence[str],
    expand: bool,
    as_latex: bool,
    plot: Path | None,
    ground: str,
    seed: int,
    as_json: bool,
) -> int:
    """Derive the score of a class by the outputs of a block of a model, from one pass of an IMAGE or a random input.

    NAME is a module's dotted name at this depth, or "x". With --plot, line width is the gradient that an edge carries.
    """
    from ..classifier import find_class
    from ..derive import from_model
    from .trace import batch_for

    classifier = load_classifier(reference, weights, preprocess, None, classes)
    target_id = None if target is None else find_class(classifier, target)
    blocks = from_model(classifier.module, batch_for(classifier, image, shape, seed), depth, target_id)
    derivatives = [blocks.derivative(name) for name in names]
    if image is not None and not as_json:
        echo(input_line(classifier))
    return _print_derivatives(derivatives, *EDGES_CHECK, as_latex, expand, plot, ground, seed, as_json)


@derive.command(
    short_help="The directional derivative of a matrix expression.",
    epilog="""\b
Examples:
  undertow derive directional "X*X.T" --wrt X --shape X=d,d
  undertow derive directional "norm(x)" --wrt x --shape x=1,d
  undertow derive directional "Matrix([[1, x2]]) * Matrix([[x1], [sin(x2)]])" --wrt x --shape x=2
""",
)
@click.argument("expression")
@click.option("--wrt", metavar="NAME", required=True, help="The matrix that varies.")
@click.option(
    "--shape",
    "shapes",
    metavar="NAME=ROWS,COLUMNS",
    multiple=True,
    help="Of each name; names or numbers, also as in X=d×k.",
)
@_latex
@_seed
@_json
def directional(expression: str, wrt: str, shapes: Sequence[str], as_latex: bool, seed: int, as_json: bool) -> int:
    """Derive D f(X)[H], how an EXPRESSION f of matrices changes as X moves along H.

    \b
    + - * ** .T        sums, products, powers by a number, transpose; / by a scalar
    .* or ∘, ./ or ⊘   entry by entry
    inv tr det         of square matrices
    norm normF         2-norm of a vector, Frobenius norm
    exp log sin cos tanh sigmoid sqrt relu        of each entry
    Matrix([[1, x2], [sin(x1), 0]])               of the entries x1, x2, ... of the vector x
    """
    from ..derive import directional as derive_directional

    d = derive_directional(expression, wrt, _shapes(shapes))
    differences = {"jvp": d.check(seed), "central_difference": d.check_by_differences(seed)}
    agrees = differences["jvp"] <= TOLERANCE and differences["central_difference"] <= 1e-4
    if as_json:
        answer = {"text": d.text, "latex": d.latex, "direction": d.direction.payload}
        answer |= {"direction_shape": d.direction_shape, "result_shape": d.result_shape, "remarks": d.remarks}
        answer |= {"differences": differences, "agrees": agrees}
        print_json(answer)
        return 0 if agrees else 2
    echo(d.latex if as_latex else d.text)
    echo(f"  {d.direction.payload} ∈ {_space(d.direction_shape)}, the result ∈ {_space(d.result_shape)}")
    for remark in d.remarks:
        echo(f"  {remark}")
    jvp, central = _within(differences["jvp"], 1e-12), _within(differences["central_difference"], 1e-6)
    echo(f"  checked: {jvp} of torch.func.jvp, {central} of a central difference")
    return 0 if agrees else 2


def _print_derivatives(
    derivatives: "Sequence[Derivative]",
    claim: str,
    tolerance: float,
    as_latex: bool,
    expand: bool,
    plot: Path | None,
    ground: str,
    seed: int,
    as_json: bool,
) -> int:
    """Print derivatives, draw them if asked, and return 0 if all are within the tolerance, else 2."""
    differences = [d.check(seed) for d in derivatives]
    for i, d in enumerate(derivatives):
        if plot:
            d.plot(plot if len(derivatives) == 1 else plot.with_stem(f"{plot.stem}-{i + 1}"), ground=ground)
    if as_json:
        rows = [_to_dict(d, difference, expand) for d, difference in zip(derivatives, differences, strict=True)]
        print_json(rows)
    else:
        pairs = zip(derivatives, differences, strict=True)
        echo("\n\n".join(_report(d, claim, difference, as_latex, expand) for d, difference in pairs))
    return 0 if all(difference <= tolerance for difference in differences) else 2


def _report(d: "Derivative", claim: str, difference: float, as_latex: bool, expand: bool) -> str:
    count = d.operations
    lines = [d.latex if as_latex else d.text]
    if expand:
        lines.append(f"  path by path: {d.expanded_text}")
    lines.append(
        f"  operations: factored {_count(count.factored)}; "
        f"path by path {_count(count.expanded)} ({count.paths:,} {'path' if count.paths == 1 else 'paths'})"
    )
    return "\n".join([*lines, f"  checked: {claim} {_within(difference, 1e-12)} of autograd"])


def _count(count: Any) -> str:
    return f"{count.multiplications:,} × and {count.additions:,} +"


def _to_dict(d: "Derivative", difference: float, expand: bool) -> dict[str, Any]:
    count = d.operations
    answer = {"wrt": d.name, "text": d.text, "latex": d.latex, "paths": count.paths}
    answer |= {"factored": count.factored._asdict(), "expanded": count.expanded._asdict(), "difference": difference}
    if expand:
        answer["expanded_text"] = d.expanded_text
    return answer


def _within(difference: float, rounding: float) -> str:
    """Write a difference; one within `rounding`, which varies from machine to machine, is not printed in digits."""
    return f"within {rounding:.0e}" if difference <= rounding else f"within {difference:.1e}"


def _space(shape: Sequence[object]) -> str:
    return f"ℝ^{{{shape[0]}×{shape[1]}}}"


def _shapes(options: Sequence[str]) -> dict[str, str]:
    from ..errors import InputError

    pairs = [word.partition("=") for word in options]
    for (name, sign, shape), word in zip(pairs, options, strict=True):
        if not (name.strip() and sign and shape.strip()):
            raise InputError(f"--shape {word!r} is not understood; write NAME=ROWS,COLUMNS, as in X=d,k")
    return {name.strip(): shape for name, _, shape in pairs}
