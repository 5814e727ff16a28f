"""Which places of a network are read: kinds, globs on dotted names, slices in the order of execution, parameters.

    conv                 every convolution; also linear, norm, relu, pool, and any class name, such as Bottleneck
    features.*           names, where * stands for one part of a dotted name and ** for any number of parts
    conv[:2], conv[-1]   the two nearest to the input, the one nearest to the output
    conv[:2], fc         both
    params               every parameter, in the order of definition
    params:layer4, params:norm
                         those of the modules that a kind or a glob names, or that lie in them
    layer4.*.weight      a glob that names no module may name parameters

No framework is imported until a model is given.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .display import Rows
from .errors import InputError, did_you_mean
from .frameworks.base import NamedModule, NamedParameter, Recorder, bound, capability, framework_of

KINDS = ("conv", "linear", "norm", "relu", "pool")
PARAMETERS, PARAMETER = "params", "parameter"  # what people write, and the kind of such a site
Predicate = Callable[[str, Any], bool]
_SLICE = re.compile(r"(.*?)\[(-?\d*(?::-?\d*){0,2})\]")


@dataclass(frozen=True)
class Site:
    """A place that can be read: the output of a module.

    Attributes:
        name: dotted; "" for a model that is one layer.
        kind: conv, linear, norm, relu, pool, or else the class name in lower case; "parameter" for a parameter.
        type: class name.
        shape: of the first call's output, or None where the network was not run, so that sites are in the order in
            which the network defines them. Several outputs have their shapes in a tuple. A parameter's own shape.
        calls: how often one pass calls it; None where the network was not run, and for a parameter.
    """

    name: str
    kind: str
    type: str
    shape: tuple[Any, ...] | None = None
    calls: int | None = None


@dataclass(frozen=True)
class SiteTerm:
    """One term of a selection: what to match, and which of the matches, in order of execution."""

    pattern: str | Predicate
    which: slice | int | None = None
    is_name: bool = False
    of_parameters: bool = False

    def matches(self, named: NamedModule) -> bool:
        """Whether it names the module by kind, class, or any of its dotted names."""
        return not self.of_parameters and self._names(named)

    def parameters(self, modules: Sequence[NamedModule], parameters: Sequence[NamedParameter]) -> list[str]:
        """Return the parameters that it names: those of `params:`, or any by its whole name if it names no module."""
        if callable(self.pattern):
            return []
        glob = _regex(self.pattern)
        if self.of_parameters:
            around = {name for module in modules if self._names(module) for name in module.names}
            named = [p.name for p in parameters if any(glob.fullmatch(n) or _lies_in(n, around) for n in p.names)]
        elif any(self._names(module) for module in modules):
            return []
        else:
            named = [p.name for p in parameters if any(glob.fullmatch(name) for name in p.names)]
        return list(self.pick(named))

    def _names(self, named: NamedModule) -> bool:
        if callable(self.pattern):
            return bool(self.pattern(named.name, named.module))
        if not self.is_name and (self.pattern in KINDS or self.pattern in named.types):
            return self.pattern in (named.kind, *named.types)
        glob = _regex(self.pattern)
        return any(glob.fullmatch(name) for name in named.names)

    def pick(self, names: Sequence[str]) -> Sequence[str]:
        """Take the slice of the names, which are in order of execution."""
        if isinstance(self.which, int):
            return names[self.which :][:1] if -len(names) <= self.which else ()
        return names if self.which is None else names[self.which]


@dataclass(frozen=True)
class Selection:
    """What was asked for, before a network has run."""

    text: str
    terms: tuple[SiteTerm, ...]

    @property
    def sliced(self) -> bool:
        """Whether the order of execution matters."""
        return any(term.which is not None for term in self.terms)

    def candidates(self, modules: Sequence[NamedModule], parameters: Sequence[NamedParameter] = ()) -> list[str]:
        """Return the names of modules that match but for the slices, in the order of definition.

        Raises:
            InputError: some term names neither a module nor a parameter, with near names.
        """
        for term in self.terms:
            if not any(term.matches(module) for module in modules) and not term.parameters(modules, parameters):
                raise InputError(self._nothing(term, modules, parameters))
        return [module.name for module in modules if any(term.matches(module) for term in self.terms)]

    def chosen(self, modules: Sequence[NamedModule], order: Sequence[str] | None) -> list[str]:
        """Return the names that are selected, in order of execution, then those that were not executed.

        Args:
            order: the names in the order in which they first gave an output; None takes the order of definition.

        Raises:
            InputError: nothing is selected.
        """
        by_name = {module.name: module for module in modules}
        executed = set(by_name if order is None else order)
        names = list(by_name) if order is None else [*order, *(name for name in by_name if name not in executed)]
        selected: set[str] = set()
        for term in self.terms:
            matching = [name for name in names if name in by_name and term.matches(by_name[name])]
            if term.which is None or not matching:  # none where it names parameters
                selected.update(matching)
                continue
            picked = term.pick([name for name in matching if name in executed])
            if not picked:
                raise InputError(f"sites {self.text!r} select nothing: a slice is beyond the {len(matching)} matches")
            selected.update(picked)
        return [name for name in names if name in selected]

    def parameters(self, modules: Sequence[NamedModule], parameters: Sequence[NamedParameter]) -> list[str]:
        """Return the names of parameters that are selected, in the order of definition."""
        selected = {name for term in self.terms for name in term.parameters(modules, parameters)}
        return [parameter.name for parameter in parameters if parameter.name in selected]

    def _nothing(
        self, term: SiteTerm, modules: Sequence[NamedModule], parameters: Sequence[NamedParameter] = ()
    ) -> str:
        if callable(term.pattern):
            return f"the predicate selects none of the {len(modules)} modules"
        if term.of_parameters:
            what = "" if term.pattern == "**" else f":{term.pattern}"
            there = ", ".join(parameter.name for parameter in parameters[:3])
            there = f"names like {there}" if there else "none to record, and of Keras none can be yet; select layers"
            return f"sites '{PARAMETERS}{what}' select no parameter (there are {there})"
        names = [name for module in modules for name in module.names if name]
        names += [name for parameter in parameters for name in parameter.names]
        types = [kind for module in modules for kind in module.types[:1]]
        hint = did_you_mean(term.pattern, [*names, *types, *KINDS])
        there = ", ".join(dict.fromkeys([*(m.kind for m in modules if m.kind in KINDS), *types]))
        return f"sites {term.pattern!r} select nothing{hint} (there are {there}; names like {', '.join(names[:3])})"


def select(
    model: Any,
    what: str | Predicate | Iterable[str | Site] | None = None,
    *,
    kind: str | None = None,
    name: str | None = None,
    example: Any = None,
) -> Rows[Site]:
    """Choose places of a network. Returns a list, which shows itself as a table.

    With an `example` the network runs once, without gradients, and is as before afterwards: sites come in the order
    in which they first gave an output, and slices follow it. Without one, order and slices are those of definition,
    which in some networks differ; `Site.calls` is then None. Recording always takes the order of execution, that of
    the first batch.

    Args:
        what: a selection such as "conv[:2], layer4.**.conv2", names or sites, or a predicate `(name, module) -> bool`.
            A word that is a kind (conv, linear, norm, relu, pool) means the kind; `name=` takes it as a name.
            "params" and "params:layer4" are parameters; so is a name or glob that fits parameters and no module.
        kind: conv, linear, norm, relu, pool, or a class name.
        name: a glob on dotted names; together with `kind` and `what`, all must hold.
        example: the network's input, a tensor or a tuple of them.

    Raises:
        InputError: nothing is selected, or a selection that is not understood.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 3, 3))
    >>> [site.name for site in select(net, "conv[-1], relu", example=torch.zeros(1, 1, 8, 8))]
    ['1', '2']
    """
    model = bound(model)
    recorder = recorder_of(model)
    modules, parameters = recorder.named_modules(model), recorder.named_parameters(model)
    visits = None if example is None else recorder.visits(model, example)
    order = None if visits is None else list(visits)
    selections = [selection(what)] if what is not None else []
    selections += [selection(kind)] if kind is not None else []
    selections += [Selection(name, (SiteTerm(name, is_name=True),))] if name is not None else []
    if not selections:
        raise InputError("nothing says which sites; pass a selection such as 'conv[:2]', kind= or name=")
    for chosen in selections:
        chosen.candidates(modules, parameters)
    names = _in_all([chosen.chosen(modules, order) for chosen in selections])
    of_parameters = _in_all([chosen.parameters(modules, parameters) for chosen in selections])
    if not names and not of_parameters:
        raise InputError(f"no module is all of {' and '.join(repr(chosen.text) for chosen in selections)}")
    by_name = {module.name: module for module in modules}
    shapes = {parameter.name: tuple(parameter.parameter.shape) for parameter in parameters}
    described = [Site(name, PARAMETER, "Parameter", shapes[name]) for name in of_parameters]
    return Rows([_site(by_name[name], visits) for name in names] + described)


def _in_all(several: Sequence[Sequence[str]]) -> list[str]:
    first, *others = several
    return [name for name in first if all(name in other for other in others)]


def _lies_in(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter lies in one of the named modules."""
    parts = name.split(".")[:-1]
    return any(".".join(parts[:n]) in modules for n in range(len(parts) + 1))


def _site(module: NamedModule, visits: dict[str, Any] | None) -> Site:
    """Describe a module as a site, with its shape and calls where the network has run."""
    shapes = [] if visits is None else visits.get(module.name, [])
    calls = None if visits is None else len(shapes)
    return Site(module.name, module.kind, module.types[0], shapes[0] if shapes else None, calls)


def selection(what: str | Predicate | Iterable[str | Site] | Selection) -> Selection:
    """Read a selection.

    Raises:
        InputError: it is empty or not understood.

    >>> [term.which for term in selection("conv[:2], fc, norm[-1]").terms]
    [slice(None, 2, None), None, -1]
    """
    if isinstance(what, Selection):
        return what
    if isinstance(what, str):
        words = [word.strip() for word in what.split(",")]
        terms = tuple(_term(word) for word in words if word)
        if not terms or len(terms) < len(words):
            raise InputError(f"sites {what!r} are not understood; write 'conv', 'features.*' or 'conv[:2], fc'")
        return Selection(what, terms)
    if callable(what):
        return Selection(getattr(what, "__qualname__", type(what).__name__), (SiteTerm(what),))
    names = [site.name if isinstance(site, Site) else site for site in what]
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError("sites must be a selection such as 'conv[:2]', names, sites of select(), or a predicate")
    by_name = (_term(name) if _of_parameters(name) else SiteTerm(name, is_name=True) for name in names)
    return Selection(", ".join(names), tuple(by_name))


def recorder_of(model: Any) -> Recorder:
    """Return what reads the networks of a model's framework.

    Raises:
        InputError: the model is of no known framework.
    """
    framework = framework_of(model)
    if framework is None:
        kind = type(model).__name__
        raise InputError(
            f"model is a {kind}, whose modules cannot be listed; pass a torch.nn.Module, a Keras model, a Flax or "
            "Equinox module, or of a JAX function its trace, jax.jit(function).trace(*arguments)"
        )
    return capability(framework, "record")


def _term(word: str) -> SiteTerm:
    sliced = _SLICE.fullmatch(word)
    pattern = sliced[1] if sliced else word
    if of_parameters := _of_parameters(pattern):
        pattern = pattern.removeprefix(PARAMETERS).removeprefix(":") or "**"
    if not re.fullmatch(r"[^\s\[\]]+", pattern):
        raise InputError(f"site {word!r} is not understood; write a kind or a name, then [:2], [-1] or nothing")
    return SiteTerm(pattern, _which(sliced[2], word) if sliced else None, of_parameters=of_parameters)


def _of_parameters(word: str) -> bool:
    return word.partition(":")[0].partition("[")[0] == PARAMETERS


def _which(text: str, word: str) -> slice | int:
    bounds = [int(bound) if bound else None for bound in text.split(":")]
    if len(bounds) == 1:
        if bounds[0] is None:
            raise InputError(f"site {word!r} has an empty slice; write [:2], [-1] or nothing")
        return bounds[0]
    if len(bounds) == 3 and bounds[2] == 0:
        raise InputError(f"site {word!r} has a step of 0; leave the step out or take another")
    return slice(*bounds)


def _regex(glob: str) -> re.Pattern[str]:
    """Translate a glob on dotted names: * and ? stay within a part, ** is any number of parts, none included."""
    pieces = []
    parts = glob.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            pieces.append(r"[^.]+(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*")
        else:
            escaped = re.escape(part).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
            pieces.append(escaped + ("" if last else r"\."))
    return re.compile("".join(pieces))
