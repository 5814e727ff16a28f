"""The verb: check the arguments, let the framework compute the map, return an Attribution."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..classifier import Classifier, find_class
from ..errors import InputError, ModelError, TargetError, UndertowWarning, did_you_mean
from ..frameworks.base import AS_IS, BEFORE, Request, RulesExplainer, as_numpy, bound, capability, framework_of_input
from ..frameworks.results import Explanation
from ..inputs import ModelArguments, arguments_of
from ..layouts import Layout, find_layout
from ..outputs import Path, with_inputs
from ..rules import resolve
from ..structures import is_tensor, tensors_with_paths
from ..tables import ActivationRule, AttentionRule, Rule
from .estimators import LAYERED, Estimator, estimate
from .estimators import resolve as resolve_estimator
from .result import Attribution
from .unbatched import unbatched_named

THROUGH = ("graph", "swap", "hook")
ACTIVATIONS = ("relu-like", "all")
HEADS = (BEFORE, AS_IS)
BOUNDS = ("Clamp", "Maximum", "Minimum", "ClipByValue")  # by an epsilon, say: listed as skipped, and no activation
SATURATED = 1e-6  # of p (1 - p), which a softmax and a sigmoid leave of a gradient


def explain(
    model: Any,
    x: Any,
    *,
    rule: str | ActivationRule | Rule | AttentionRule = "guided",
    target: Any = None,
    through: str = "graph",
    activations: str = "relu-like",
    training: bool = False,
    estimator: str = "gradient",
    seed: int = 0,
    output: Path | None = None,
    head: str = "before",
    axes: str | None = None,
    at: str | Sequence[str] | None = None,
    baseline: Any = "zero",
    noise: float = 0.1,
    inner_batch: int = 8,
) -> Attribution:
    """Map how each element of the input speaks for a score, under a rule for the activations on the way.

    The model, its weights and their `.grad`, its hooks and modes, the random state and `x` are as before afterwards,
    whatever happens. One forward pass serves all targets. Calls from several threads do not meet.

    Args:
        model: any callable from tensors to scores `(B, classes)`: a module in eval mode, a function, a traced or
            exported program; or a `Classifier` of `ut.load`.
        x: a floating-point batch `(B, ...)` of any rank, such as `(B, C, H, W)`; or, nested as the model takes them, a
            tuple, passed as `model(*x)`, a dict, passed as `model(**x)` (to Keras as its named inputs), or a list (as
            a tuple, or as it is to a model that takes one argument). Integer tensors, None and numbers get no map.
        rule: for activations "gradient", "deconvnet", "guided" or a function `(g, local) -> g` as in `undertow.rules`;
            for operations of every kind "attnlrp", "cp-lrp", "lrp:epsilon-plus-flat" and other composites, "deeplift",
            "excitation", or a table `ut.Rule({...})`, see `undertow.tables`; of attention layers "attention-rollout"
            and "attention-gradient", whose maps have one channel.
        target: None (each sample's highest score), a class id, `(B,)` ids, `(B, K)` ids or nested lists for several
            classes a sample, one-hot labels, "top:K"; a class's name, where the model is a `Classifier` or has
            `config.id2label`; for dense scores a place after the batch axis, such as `(class, y, x)`, or one of
            `undertow.targets`: a region, a token, a unit inside, a detector's box; or a function that returns `(B,)`
            scores of the whole output as the model returned it, or, with two arguments, of the output and of `x`.
        through: "graph" acts on the autograd graph of this call and sees every activation. "swap" replaces modules in
            a private copy by a custom autograd function, "hook" puts backward hooks on them: both give the same
            numbers, or an error that names what they could not see.
        activations: "relu-like" (ReLU, ReLU6/Hardtanh, LeakyReLU, PReLU, RReLU, Threshold, clamp(min=0) and maximum
            with zero, in any spelling), or "all" (also GELU, SiLU, Mish, ELU, SELU, CELU, Softplus, Hardswish).
        training: explain although dropout or batch norm in training act, which `a.acting` then lists; batch statistics
            are put back afterwards.
        estimator: "gradient" (one backward pass), "smoothgrad[:N]", "integrated[:N]", "input-times",
            "grad-cam:LAYER" or "guided-grad-cam:LAYER", each around any rule; see `undertow.attribution.estimators`.
        seed: of SmoothGrad's noise.
        output: the part of the output that holds the scores, where the model returns several: a name, an index, or
            several, as in "heads.1". None takes `.logits` or ["logits"], else the first of a tuple.
        head: where the model ends in a softmax, log-softmax or sigmoid, a class target means the score before it
            ("before"), or what the model returns ("as is"); `a.head` says which was explained.
        axes: of Grad-CAM's layer, a letter for each, as in "bhwc", where they are not found: "grad-cam:LAYER:bhwc". Of
            three axes, "bcl" says that `x` is lines `(B, C, L)` too. With `at`, of that layer, for `a.map` over images.
        at: explain by a layer's output in place of `x`: its name, or several. `layer@1` is its second call. Of
            embeddings this gives token attributions for `x` of whole numbers alone; of images' patches, values that
            `a.map`, `a.image` and `a.overlay` lay over the image.
        baseline: where integrated gradients begin, and what "deeplift" compares with: "zero", "blur" (the image
            smoothed), a number, one for each channel, an array or tensor like `x` or like one sample; a list of these
            is averaged over. `a.completeness` says which part of the score's difference the map leaves out.
        noise: SmoothGrad's standard deviation, as a fraction of each sample's range.
        inner_batch: how many samples an estimator puts through the network at once, at most.

    Returns:
        Attribution: `values` of the shape and dtype of `x`, or `(B, K, ...)` for K targets a sample; in the structure
        of `x`, None where there is no map. Grad-CAM's have one channel: `(B, 1, H, W)`. With `at`, of the structure of
        the layer's output; in a dict by name where there are several layers or calls.

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
    (attribution,) = _explain(
        *(model, x, (rule,), target, through, activations, training, estimator, seed, output),
        *(head, axes, at, baseline, noise, inner_batch),
    )
    return attribution


def explain_rules(
    model: Any, x: Any, rules: Sequence[str | ActivationRule | Rule | AttentionRule], **options: Any
) -> Iterator[Attribution]:
    """Explain under several rules, in order, as `explain` does with the same options.

    One forward pass serves all where they act on its graph: rules for activations, and the estimator "gradient".

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)).eval()
    >>> [a.rule for a in explain_rules(net, torch.ones(1, 2), ["gradient", "guided"], target=0)]
    ['gradient', 'guided']
    """
    settings = {**(explain.__kwdefaults__ or {}), **options}
    del settings["rule"]
    return _explain(model, x, rules, **settings)


def _explain(
    model: Any,
    x: Any,
    rules: Sequence[str | ActivationRule | Rule | AttentionRule],
    target: Any,
    through: str,
    activations: str,
    training: bool,
    estimator: str,
    seed: int,
    output: Path | None,
    head: str,
    axes: str | None,
    at: str | Sequence[str] | None,
    baseline: Any,
    noise: float,
    inner_batch: int,
) -> Iterator[Attribution]:
    """Yield an attribution for each rule."""
    named = [resolve(rule) for rule in rules]
    resolved = replace(
        resolve_estimator(estimator if axes is None or at is not None else f"{estimator}:{axes}"),
        baselines=tuple(baseline) if isinstance(baseline, list) else (baseline,),
        noise=noise,
        inner_batch=inner_batch,
    )
    _check_choice("through", through, THROUGH)
    _check_choice("activations", activations, ACTIVATIONS)
    _check_choice("head", head, HEADS)
    names: Any = None
    if isinstance(model, Classifier):
        names, model, output = model, model.module, model.output if output is None else output
    model = bound(model)
    if not callable(model):
        raise InputError(f"model is a {type(model).__name__}, which cannot be called; pass a module or a function")
    names = _names(model) if names is None else names
    target = ids_of_names(target, names)
    arguments = arguments_of(x, model)
    requests = [
        Request(
            *(model, arguments.tensors, function, name, with_inputs(target, x), through, activations, training),
            output=output,
            head=head,
            fill=arguments.fill,
            structure=arguments.structure,
            is_plain=arguments.is_plain,
            is_list=type(x) is list and len(arguments.args) == 1,
        )
        for name, function in named
    ]
    framework = framework_of_input(arguments.tensors[0], model)
    with unbatched_named(framework, requests[0]):
        for request, (values, explanation) in zip(
            requests, _results(framework, requests, arguments, resolved, seed, at), strict=True
        ):
            plane = () if at is None else _plane(arguments.tensors, explanation)
            _warn_if_saturated(explanation, head)
            warn_if_left_alone(explanation, request.rule_name, "all" if isinstance(request.rule, Rule) else activations)
            yield Attribution(
                values=values,
                targets=explanation.targets,
                scores=explanation.scores,
                rule=request.rule_name,
                estimator=resolved.name,
                through=through,
                activations=activations,
                rewired=explanation.stats.rewired,
                switches=explanation.stats.switches,
                skipped=explanation.stats.skipped,
                opaque=explanation.stats.opaque,
                channels_last=explanation.channels_last,
                acting=explanation.acting,
                head=f"{BEFORE} {explanation.head}" if explanation.head and head == BEFORE else AS_IS,
                completeness=explanation.completeness,
                at=(at,) if isinstance(at, str) else tuple(at or ()),
                plane=plane,
                layout=_layout(values, explanation, plane, at, axes) if plane else None,
                names=_names_of(explanation.targets, names),
                token_ids=_token_ids(arguments.tensors, values, explanation.scores) if at else None,
                is_relevance=isinstance(request.rule, Rule) and request.rule.is_attribution,
            )


def _results(
    framework: str,
    requests: Sequence[Request],
    arguments: ModelArguments,
    estimator: Estimator,
    seed: int,
    at: str | Sequence[str] | None,
) -> Iterator[tuple[Any, Explanation]]:
    """Yield the values and the explanation of each request; they differ in their rule alone."""
    if at is None and estimator.kind == "gradient" and len(requests) > 1 and (shared := _sharing(framework, requests)):
        for explanation in shared.explain_rules(requests):
            yield arguments.in_structure(explanation.maps), explanation
        return
    for request in requests:
        if at is None:
            explanation = estimate(framework, request, estimator, seed)
            yield arguments.in_structure(explanation.maps), explanation
        else:
            yield _explain_at(framework, request, estimator, seed, at)


def _sharing(framework: str, requests: Sequence[Request]) -> RulesExplainer | None:
    """Return what explains all in one forward pass; None where the framework, or one of the rules, does not."""
    try:
        explainer = capability(framework, "explain.rules")
    except ModelError:
        return None
    return explainer if explainer.can_share(requests) else None


def _explain_at(
    framework: str, request: Request, estimator: Estimator, seed: int, at: str | Sequence[str]
) -> tuple[Any, Explanation]:
    """Return the values at the layers' outputs, and the explanation of the layer from which most was rewired."""
    if estimator.kind in LAYERED:
        raise InputError(f"{estimator.kind} names its layer itself; leave at= out")
    values, explanations = {}, []
    for layer in dict.fromkeys([at] if isinstance(at, str) else at):
        for call, (arguments, inside) in enumerate(capability(framework, "explain").at_layer(request, layer)):
            explanation = replace(estimate(framework, inside, estimator, seed), channel_axis=inside.channel_axis)
            values[f"{layer}@{call}" if call else layer] = arguments.in_structure(explanation.maps)
            explanations.append(explanation)
    if not explanations:
        raise InputError("at=() names no layer; name one, or leave at= out")
    first = next(iter(values.values()))
    return (
        first if isinstance(at, str) and len(values) == 1 else values,
        max(explanations, key=lambda e: e.stats.rewired),
    )


def _plane(inputs: Sequence[Any], explanation: Explanation) -> tuple[int, ...]:
    """Return the height and width of the images among the inputs; nothing where none or several are images."""
    images = [tuple(x.shape) for x in inputs if x.ndim == 4]
    if len(images) != 1:
        return ()
    return images[0][1:3] if explanation.channels_last else images[0][2:]


def _layout(
    values: Any, explanation: Explanation, plane: tuple[int, ...], layer: Any, axes: str | None
) -> Layout | None:
    """Return how a layer's values lie over images; None where that cannot be told.

    Args:
        axes: of the layer's output, as it was told.

    Raises:
        InputError: it was told, and does not fit.
    """
    if not is_tensor(values):
        return None
    shape = (values.shape[0], *values.shape[explanation.scores.ndim :])
    try:
        return find_layout(str(layer), shape, (shape[0], 1, *plane), explanation.channel_axis, axes or "")
    except InputError:
        if axes:
            raise
        return None


def _token_ids(inputs: Sequence[Any], values: Any, scores: Any) -> Any:
    """Return the input of whole numbers over which the values of a layer lie, `(B, T)`, if there is one."""
    axis = scores.ndim
    lengths = {(v.shape[0], v.shape[axis]) for _, v in tensors_with_paths(values) if v.ndim == axis + 2}
    candidates = (as_numpy(x) for x in inputs if x.ndim == 2 and tuple(x.shape) in lengths)
    return next((ids for ids in candidates if ids.dtype.kind in "iu"), None)


def ids_of_names(target: Any, names: Any) -> Any:
    """Return a target with class ids in the place of class names; "top:K" and all else as it is.

    Args:
        names: a `Classifier`, or the classes' names in order; None where none are known.

    Raises:
        TargetError: no class has the name, or no names are known.

    >>> ids_of_names("tabby", ["tench", "tabby"]), ids_of_names([["tabby", "tench"]], ["tench", "tabby"])
    (1, [[1, 0]])
    """
    if isinstance(target, list | tuple):
        return type(target)([ids_of_names(item, names) for item in target])
    if not isinstance(target, str) or target.startswith("top:"):
        return target
    if names is None:
        raise TargetError(
            f"target {target!r} is a name, and the model has none: pass a class id, 'top:K', or a classifier of ut.load"
        )
    return find_class(names, target)


def _names(model: Any) -> list[str] | None:
    """Return the class names that a Hugging Face model has in its configuration, unless its classes are tokens."""
    if getattr(model, "can_generate", bool)():
        return None  # every configuration has labels, though nobody gave them
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return [str(labels[i]) for i in range(len(labels))] if isinstance(labels, Mapping) and labels else None


def _names_of(targets: Any, names: Any) -> dict[int, str]:
    """Return the names of the explained classes by id, as far as there are any."""
    listed = names.classes if isinstance(names, Classifier) else names
    if targets is None or not listed:
        return {}
    return {int(i): listed[i] for i in np.unique(as_numpy(targets)).tolist() if 0 <= i < len(listed)}


def _warn_if_saturated(explanation: Explanation, head: str) -> None:
    """Warn where a map vanishes because its score is a probability next to 0 or 1."""
    if explanation.targets is None or (explanation.head and head == BEFORE):
        return
    scores = as_numpy(explanation.scores).astype(np.float64)
    p = np.exp(scores) if explanation.head.startswith("log") else scores
    saturated = np.abs(p * (1 - p)) <= SATURATED
    if not explanation.head:
        # a score near zero may be any network's
        saturated &= (scores > 0.5) & (_largest(explanation) <= SATURATED)
    if not saturated.any():
        return
    what = f"the {explanation.head} is saturated" if explanation.head else f"a score is {scores[saturated][0]:.7g}"
    remedy = (
        "leave head='as is' out to explain the score before it"
        if explanation.head
        else "if it is a probability, explain what it is computed from, by output= or a target function"
    )
    warnings.warn(f"{what} and the map vanishes; {remedy}", UndertowWarning, stacklevel=4)


def warn_if_left_alone(explanation: Explanation, rule: str, activations: str) -> None:
    """Warn of what may be an activation and does not follow the rule."""
    left_alone = {**explanation.stats.skipped, **explanation.stats.opaque}
    listed = ", ".join(f"{name} x{n}" for name, n in sorted(left_alone.items()) if not name.startswith(BOUNDS))
    if listed:
        message = f"{rule}: left alone on the way, as the gradient passes them: {listed}"
        remedy = "" if activations == "all" else "; activations='all' takes the smooth ones among them"
        warnings.warn(message + remedy, UndertowWarning, stacklevel=4)


def _largest(explanation: Explanation) -> Any:
    """Return the largest |value| of each map, in the shape of the scores."""
    shape = explanation.scores.shape
    maps = [np.abs(as_numpy(values)) for values in explanation.maps if values is not None]
    fitting = [values for values in maps if values.shape[: len(shape)] == tuple(shape)]
    return np.max([values.reshape(*shape, -1).max(-1, initial=0) for values in fitting], axis=0) if fitting else np.inf


def _check_choice(option: str, word: str, choices: tuple[str, ...]) -> None:
    if word not in choices:
        raise InputError(f"unknown {option} {word!r}{did_you_mean(str(word), choices)} (known: {', '.join(choices)})")
