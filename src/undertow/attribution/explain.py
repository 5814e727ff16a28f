"""The verb: check the arguments, let the framework compute the map, return an Attribution."""

from collections.abc import Callable
from typing import Any

from ..errors import InputError, did_you_mean
from ..frameworks.base import Request, framework_of_input
from ..inputs import arguments_of
from ..outputs import Path, with_inputs
from ..rules import Rule, resolve
from .estimators import estimate
from .estimators import resolve as resolve_estimator
from .result import Attribution
from .unbatched import unbatched_named

THROUGH = ("graph", "swap", "hook")
ACTIVATIONS = ("relu-like", "all")


def explain(
    model: Callable[..., Any],
    x: Any,
    *,
    rule: str | Rule = "guided",
    target: Any = None,
    through: str = "graph",
    activations: str = "relu-like",
    training: bool = False,
    estimator: str = "gradient",
    seed: int = 0,
    output: Path | None = None,
    axes: str | None = None,
) -> Attribution:
    """Map how each element of the input speaks for a score, under a rule for the activations on the way.

    The model, its weights and their `.grad`, its hooks and modes, the random state and `x` are as before afterwards,
    whatever happens. One forward pass serves all targets. Calls from several threads do not meet.

    Args:
        model: any callable from tensors to scores `(B, classes)`: a module in eval mode, a function, a traced or
            exported program.
        x: a floating-point batch `(B, ...)` of any rank, such as `(B, C, H, W)`; or, nested as the model takes them, a
            tuple, passed as `model(*x)`, a dict, passed as `model(**x)` (to Keras as its named inputs), or a list (as
            a tuple, or as it is to a model that takes one argument). Integer tensors, None and numbers get no map.
        rule: "gradient", "deconvnet", "guided", or a function `(g, local) -> g` as in `undertow.rules`.
        target: None (each sample's highest score), a class id, `(B,)` ids, `(B, K)` ids or nested lists for several
            classes a sample, one-hot labels, "top:K", or a function that returns `(B,)` scores of the whole output as
            the model returned it, or, with two arguments, of the output and of `x`.
        through: "graph" acts on the autograd graph of this call and sees every activation. "swap" replaces modules in
            a private copy by a custom autograd function, "hook" puts backward hooks on them: both give the same
            numbers, or an error that names what they could not see.
        activations: "relu-like" (ReLU, ReLU6/Hardtanh, LeakyReLU, PReLU, RReLU, Threshold, clamp(min=0) and maximum
            with zero, in any spelling), or "all" (also GELU, SiLU, Mish, ELU, SELU, CELU, Softplus, Hardswish).
        training: explain although dropout or batch norm in training act, which `a.acting` then lists; batch statistics
            are put back afterwards.
        estimator: "gradient" (one backward pass), "smoothgrad[:N]", "integrated[:N]" (from zero), "input-times",
            "grad-cam:LAYER" or "guided-grad-cam:LAYER", each around any rule; see `undertow.attribution.estimators`.
        seed: of SmoothGrad's noise.
        output: the part of the output that holds the scores, where the model returns several: a name, an index, or
            several, as in "heads.1". None takes `.logits` or ["logits"], else the first of a tuple.
        axes: of Grad-CAM's layer, a letter for each, as in "bhwc", where they are not found: "grad-cam:LAYER:bhwc".

    Returns:
        Attribution: `values` of the shape and dtype of `x`, or `(B, K, ...)` for K targets a sample; in the structure
        of `x`, None where there is no map. Grad-CAM's have one channel: `(B, 1, H, W)`.

    Raises:
        InputError: an argument that cannot be used: TargetError for a class, ModelError for the model or its output.
        RuleError: nothing to rewire, or a node that cannot be seen into.
        FrameworkError: the tensors' framework is not installed.

    Source: gradient arXiv 1312.6034, deconvnet arXiv 1311.2901, guided arXiv 1412.6806.

    >>> import torch, undertow as ut
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[2].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> a = ut.explain(net.eval(), torch.tensor([[3.0, 2.0]]), rule="guided", target=0)
    >>> a.values, a.scores, a.rewired
    (tensor([[1., 0.]]), tensor([1.]), 1)
    """
    name, function = resolve(rule)
    resolved = resolve_estimator(estimator if axes is None else f"{estimator}:{axes}")
    _check_choice("through", through, THROUGH)
    _check_choice("activations", activations, ACTIVATIONS)
    if not callable(model):
        raise InputError(f"model is a {type(model).__name__}, which cannot be called; pass a module or a function")
    arguments = arguments_of(x, model)
    request = Request(
        *(model, arguments.tensors, function, name, with_inputs(target, x), through, activations, training),
        output=output,
        fill=arguments.fill,
        structure=arguments.structure,
        is_plain=arguments.is_plain,
    )
    framework = framework_of_input(arguments.tensors[0], model)
    with unbatched_named(framework, request):
        explanation = estimate(framework, request, resolved, seed)
    return Attribution(
        values=arguments.in_structure(explanation.maps),
        targets=explanation.targets,
        scores=explanation.scores,
        rule=name,
        estimator=resolved.name,
        through=through,
        activations=activations,
        rewired=explanation.stats.rewired,
        switches=explanation.stats.switches,
        skipped=explanation.stats.skipped,
        opaque=explanation.stats.opaque,
        channels_last=explanation.channels_last,
        acting=explanation.acting,
    )


def _check_choice(option: str, word: str, choices: tuple[str, ...]) -> None:
    if word not in choices:
        raise InputError(f"unknown {option} {word!r}{did_you_mean(str(word), choices)} (known: {', '.join(choices)})")
