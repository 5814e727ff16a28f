"""How a gradient passes an activation, and by tables any operation: a paper in a few lines each.

A rule for activations alone is a function `(g, local) -> g`. `g` is the gradient that arrives at the activation's
output; `local` is the activation's own backward, `h -> f'(x) * h`. What the rule returns is the gradient at the
activation's input, with the shape and dtype of `g`. Rules are framework-free: they touch arrays through `relu` and
arithmetic alone.

Where the rules differ (x is the pre-activation):

| activation | where | gradient | deconvnet | guided |
|---|---|---|---|---|
| ReLU | x <= 0 | 0 | relu(g) | 0 |
| ReLU6, Hardtanh | beyond a plateau's edge | 0 | relu(g) | 0: the plateau passes nothing, whatever the sign of g |
| LeakyReLU, PReLU, RReLU | x < 0, slope a | a·g | relu(g) | a·relu(g): the slope is kept, and its sign with it |

Transformers are explained by rules for more kinds of operations: AttnLRP and CP-LRP are tables (`undertow.tables`) of
functions `(g, local, op) -> g`; their map is the gradient that so arises, times the input. Convolutional networks have
LRP's composites, such as "lrp:epsilon-plus-flat", whose rows stand in `undertow.lrp`; DeepLIFT compares with a
baseline.

Attention layers have maps of their own, which are no gradients: "attention-rollout" multiplies their weights, layer by
layer, "attention-gradient" weighs them by the score's gradient.
"""

from collections.abc import Sequence
from typing import Any

from .errors import InputError, RuleError, did_you_mean
from .lrp import alpha_beta, box, epsilon, excitation, flat, gamma
from .tables import ActivationRule, AttentionRule, Local, Operation, Row, Rule, may_hold
from .tables import relu as relu


def gradient(g: Any, local: Local) -> Any:
    """Pass the gradient as it is: the plain derivative of the score.

    Source: Simonyan et al. 2013, arXiv 1312.6034.

    >>> import numpy as np
    >>> gradient(np.array([-2.0, 3.0]), lambda h: h * np.array([1.0, 0.0]))
    array([-2.,  0.])
    """
    return local(g)


def deconvnet(g: Any, local: Local) -> Any:
    """Pass the gradient's positive part and ignore what the activation saw.

    Source: Zeiler and Fergus 2013, arXiv 1311.2901.

    >>> import numpy as np
    >>> deconvnet(np.array([-2.0, 3.0]), lambda h: h * np.array([1.0, 0.0]))
    array([0., 3.])
    """
    return relu(g)


def guided(g: Any, local: Local) -> Any:
    """Pass the gradient's positive part through the activation's own backward.

    Source: Springenberg et al. 2014, arXiv 1412.6806.

    >>> import numpy as np
    >>> guided(np.array([-2.0, 3.0, 4.0]), lambda h: h * np.array([1.0, 0.0, 1.0]))
    array([0., 0., 4.])
    """
    return local(relu(g))


RULES: dict[str, ActivationRule] = {rule.__name__: rule for rule in (gradient, deconvnet, guided)}


def identity(g: Any, local: Local, op: Operation) -> Any:
    """Pass an activation's relevance as it is: g·f(x)/x, and the gradient itself where x is zero."""
    own, x = local(g), op.input
    is_zero = x == 0
    if not may_hold(is_zero):
        return g * op.output / x
    return g * op.output / (x + is_zero) * ~is_zero + own * is_zero


def halve(g: Any, local: Local, op: Operation) -> Any:
    """Share the relevance of a product equally between its two factors."""
    return local(g / 2)


def hold_spread(g: Any, local: Local, op: Operation) -> Any:
    """Hold a norm's standard deviation or root mean square constant: the norm is linear then."""
    return op.hold_spread(g)


def hold_statistic(g: Any, local: Local, op: Operation) -> Any:
    """Hold the statistic constant by which a norm that is written out multiplies or divides."""
    return scaled(local(g), (1, 0))


def share_attention(g: Any, local: Local, op: Operation) -> Any:
    """Share the relevance of attention as its two products would: half to values, a quarter to queries and keys.

    A product of which one factor is a constant gives all to the other.
    """
    parts = local(g)
    queries, keys, values, mask = (part is not None for part in (*parts, None)[:4])
    weights = 1 / 2 if values else 1
    each = weights / 2 if queries and keys else weights
    return scaled(parts, (each, each, 1 / 2 if queries or keys or mask else 1, weights))


def values_alone(g: Any, local: Local, op: Operation) -> Any:
    """Hold the weights of attention constant: all relevance goes to the values."""
    return scaled(local(g), (0, 0, 1, 0))


def nothing(g: Any, local: Local, op: Operation) -> Any:
    """Let no relevance through."""
    return local(g * 0)


def hold_gate(g: Any, local: Local, op: Operation) -> Any:
    """Hold the factor constant that a softmax, a sigmoid or an activation computed; halve where there is none."""
    if op.gate is None:
        return local(g / 2)
    return scaled(local(g), (0, 1) if op.gate == 0 else (1, 0))


def scaled(parts: Sequence[Any], factors: Sequence[float]) -> tuple[Any, ...]:
    """Return the operands' gradients, each times its factor; None, of an operand off the way, stays."""
    return tuple(None if part is None else part * factor for part, factor in zip(parts, factors, strict=False))


ATTNLRP = Rule(
    {
        **dict.fromkeys(("relu", "smooth"), identity),
        **dict.fromkeys(("product", "matmul"), halve),
        "attention": share_attention,
        "norm": hold_spread,
        "spread": hold_statistic,
    },
    name="attnlrp",
    values="input-times",
    source="Achtibat et al. 2024, arXiv 2402.05602",
)
CP_LRP = Rule(
    {
        **ATTNLRP.rows,
        **dict.fromkeys(("product", "matmul"), hold_gate),
        "attention": values_alone,
        "softmax": nothing,
    },
    name="cp-lrp",
    values="input-times",
    source="Ali et al. 2022, arXiv 2202.07304",
)


def rescale(g: Any, local: Local, op: Operation) -> Any:
    """Pass g·(f(x) - f(x₀)) / (x - x₀), x₀ the baseline's; the gradient where the two hardly differ."""
    arriving = _of_the_input(g)
    own, x, y = _halves(local(g)), _halves(op.input), _halves(op.output)
    way = x[0] - x[1]
    is_short = (way * way) ** 0.5 < _SHORT
    slope = (y[0] - y[1]) / (way + is_short) * ~is_short
    return _beside_nothing(arriving * slope + own[0] * is_short, op.input)


def midway(g: Any, local: Local, op: Operation) -> Any:
    """Pass a product with the mean of the other factor and its baseline, so that both differences add up."""
    arriving = _halves(g) * 0 + _of_the_input(g)  # at both ends
    parts = local(arriving.reshape(g.shape))
    return tuple(part if part is None else _beside_nothing(_halves(part).mean(0), part) for part in parts)


def follow_maxima(g: Any, local: Local, op: Operation) -> Any:
    """Give what a maximum rises by, from the baseline's up to the input's, to the places that held the two.

    So do Captum and SHAP: the rise up to the larger of the two goes to the input's place, what is left to the
    baseline's; the gradient where the input and the baseline hardly differ.
    """
    arriving = _of_the_input(g)
    x, y = _halves(op.input), _halves(op.output)
    higher = y[1] + relu(y[0] - y[1])
    own = _halves(local(g))[0]
    ends = _halves(g) * 0
    ends[0], ends[1] = arriving * (higher - y[1]), arriving * (y[0] - higher)
    shares = _halves(local(ends.reshape(g.shape))).sum(0)
    way = x[0] - x[1]
    is_short = (way * way) ** 0.5 < _SHORT
    return _beside_nothing(shares / (way + is_short) * ~is_short + own * is_short, op.input)


_SHORT = 1e-6


def _halves(values: Any) -> Any:
    """Return the input's part and the baseline's, stacked: `(2, B, ...)`."""
    if len(values) % 2:
        raise RuleError(_NOT_FIRST)
    return values.reshape(2, len(values) // 2, *values.shape[1:])


def _of_the_input(g: Any) -> Any:
    """Return the gradient of the input's part; none arrives at the baseline's, as it is not what is explained."""
    own, baseline = _halves(g)
    if bool((baseline != 0).any()):
        raise RuleError(_NOT_FIRST)
    return own


def _beside_nothing(values: Any, like: Any) -> Any:
    """Return the gradient of the input's part with that of the baseline's, zero."""
    whole = _halves(like * 0)
    whole[0] = values
    return whole.reshape(like.shape)


_NOT_FIRST = (
    "a rule that compares with a baseline needs samples along the first axis of every operation, and in this model "
    "some operation has others there, such as time; batch_first=True is the remedy, or estimator='integrated'"
)


def composite(name: str, conv: Row, first: Row | None = None, linear: Row | None = None, source: str = "") -> Rule:
    """Return a table of layer-wise relevance propagation, a rule for each kind of layer; see `undertow.lrp`.

    Args:
        name: for messages and results.
        conv: of convolutions.
        first: of the first layers; None: as the others.
        linear: of all other matrix products with constants; None: ε.

    >>> composite("mine", gamma(0.1), box(-2.0, 2.0)).values
    'relevance'
    """
    rows: dict[str, Row] = {
        "conv": conv,
        "linear": epsilon() if linear is None else linear,
        **dict.fromkeys(("relu", "smooth"), identity),
        **dict.fromkeys(("product", "matmul"), hold_gate),
        "attention": values_alone,
        "norm": hold_spread,
        "spread": hold_statistic,
    }
    rows |= {} if first is None else {"first": first}
    return Rule(rows, name=name, values="relevance", strict=True, source=source)


DEEPLIFT = Rule(
    {**dict.fromkeys(("relu", "smooth"), rescale), "product": midway, "pool": follow_maxima},
    name="deeplift",
    values="difference",
    source="Shrikumar et al. 2017, arXiv 1704.02685, the rescale rule",
)
_MONTAVON = "Montavon et al. 2019, doi 10.1007/978-3-030-28954-6_10"
TABLES: dict[str, Rule] = {
    table.name: table
    for table in (
        ATTNLRP,
        CP_LRP,
        DEEPLIFT,
        composite("lrp:epsilon", epsilon(), source="Bach et al. 2015, doi 10.1371/journal.pone.0130140"),
        composite("lrp:epsilon-plus-flat", alpha_beta(1, 0), flat, source=_MONTAVON),
        composite("lrp:epsilon-gamma-box", gamma(), box(), source=_MONTAVON),
        composite("lrp:epsilon-alpha2-beta1", alpha_beta(2, 1), source=_MONTAVON),
        composite(
            "excitation",
            excitation,
            linear=excitation,
            source="Zhang et al. 2016, arXiv 1608.00507",
        ),
    )
}


ATTENTION: dict[str, AttentionRule] = {
    rule.name: rule
    for rule in (
        AttentionRule("attention-rollout", False, "Abnar and Zuidema 2020, arXiv 2005.00928"),
        AttentionRule("attention-gradient", True, "Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6"),
    )
}


def resolve(rule: str | ActivationRule | Rule | AttentionRule) -> tuple[str, ActivationRule | Rule | AttentionRule]:
    """Return a rule's name, and its function, its table or its map of attention, from any of them.

    Raises:
        InputError: no rule has that name, or the argument is neither a name, a function nor a table.

    >>> resolve("guided")[0], resolve("attnlrp")[1].source
    ('guided', 'Achtibat et al. 2024, arXiv 2402.05602')
    """
    if isinstance(rule, Rule | AttentionRule):
        return rule.name, rule
    if callable(rule):
        return getattr(rule, "__name__", type(rule).__name__), rule
    known = RULES | TABLES | ATTENTION
    if isinstance(rule, str) and rule in known:
        return rule, known[rule]
    hint = did_you_mean(str(rule), known)
    raise InputError(
        f"unknown rule {rule!r}{hint} (known: {', '.join(known)}, or a function (g, local) -> g, or ut.Rule({{...}}))"
    )
