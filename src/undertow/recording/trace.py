"""`trace`: one pass of a network, as its module calls."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, overload

import numpy as np

from ..display import BAD, GOOD, FrozenRows, Mark, Part, Rows, Shown, ShownTable, counted
from ..errors import InputError, did_you_mean
from ..frameworks.base import as_numpy, bound, capability, framework_of_input
from ..frameworks.results import DIFFERS, EQUAL, NO_FORMULA, WRONG, Call, Checked

_MAX_REMARKS = 4
PRINTED_IN_FULL = 8  # tensors of at most so many elements are printed in full


@dataclass(frozen=True)
class CallRow:
    """One module call in numbers; norms are ℓ2, None where nothing made that gradient.

    Attributes:
        name, kind, call: as in `Call`.
        input_shape, output_shape: of the first tensor in and out; None where there is none.
        input_gradient: norm of the gradient by the first input.
        output_gradient: norm of the gradient by the first output.
        parameter_gradients: norms, by the parameters' names.
        formula: "equal", "differs" or "none".
        difference: the largest absolute one from the closed formula, over all gradients; None without a formula.
        note: why gradients are missing.
    """

    name: str
    kind: str
    call: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    input_gradient: float | None
    output_gradient: float | None
    parameter_gradients: dict[str, float | None]
    formula: str
    difference: float | None
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Trace(Shown, Sequence[Call]):
    """The module calls of one pass, in the order in which they began; on the last line of a notebook's cell a table.

    `trace[0]` is a call by position, `trace["fc1"]` by name, `trace["fc1", 1]` the second call of a reused module.

    Attributes:
        calls: every call inside which no other module was called, and every other one of a module that has parameters
            of its own beside those of its parts.
        functions: the user's own autograd functions in the graph, each call checked by finite differences.
        unreached: modules with parameters that this pass did not call.
    """

    calls: tuple[Call, ...]
    functions: tuple[Checked, ...] = ()
    unreached: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("calls", "functions", "unreached"):
            object.__setattr__(self, name, FrozenRows(getattr(self, name)))  # tuples that show themselves, however long

    @overload
    def __getitem__(self, key: int | str | tuple[str, int]) -> Call: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Call]: ...
    def __getitem__(self, key: Any) -> Any:
        """Return a call by position, name, or name and number.

        Raises:
            InputError: no call has that name and number, or several have that name.
        """
        if not isinstance(key, str | tuple):
            return self.calls[key]
        name, number = key if isinstance(key, tuple) else (key, None)
        calls = [call for call in self.calls if call.name == name and number in (None, call.call)]
        if len(calls) == 1:
            return calls[0]
        if calls:
            raise InputError(f"{name!r} was called {len(calls)} times; take one, as in trace[{name!r}, 0]")
        which = "" if number is None else f", {number}"
        raise InputError(
            f"no call {name!r}{which} among {len(self)}{did_you_mean(str(name), {c.name for c in self.calls})}"
        )

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def wrong(self) -> tuple[Checked, ...]:
        """The custom autograd functions whose backward is not the derivative of their forward."""
        return tuple(checked for checked in self.functions if checked.status == WRONG)

    def table(self) -> list[CallRow]:
        """Return one row for each call: shapes, norms, and what the closed formula says."""
        return Rows(_row(call) for call in self.calls)

    def _shown(self) -> Iterator[Part]:
        verdicts = [call.verdict for call in self.calls]
        counts = {"equal": verdicts.count(EQUAL), "differ from": verdicts.count(DIFFERS)}
        formulas = ", ".join(f"{count:,} {word} their closed formula" for word, count in counts.items() if count)
        yield f"Trace of {counted(len(self), 'module call')}{': ' * bool(formulas)}{formulas}"
        remarks = list(islice(_remarks(self), _MAX_REMARKS + 1))
        yield from remarks[:_MAX_REMARKS]
        if len(remarks) > _MAX_REMARKS:
            yield "... and more remarks; print(trace) has all"
        rows = ([*cells[:-1], _marked(cells[-1])] for cells in (_cells(_row(call)) for call in self.calls))
        yield ShownTable(_HEADINGS, rows, len(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the table, the checked functions and the modules not called, for JSON; NaN and infinity as strings."""
        plain = {
            "calls": [asdict(row) for row in self.table()],
            "functions": [asdict(checked) for checked in self.functions],
            "unreached": list(self.unreached),
        }
        return _finite(plain)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """Return the table as text; numbers to four digits below each call of a small network."""
        lines = _aligned([_HEADINGS, *(_cells(row) for row in self.table())])
        if all(_size(t) <= PRINTED_IN_FULL for call in self.calls for t in call.tensors.values() if t is not None):
            numbers = [_numbers(call) for call in self.calls]
            lines = [lines[0], *(line for row, more in zip(lines[1:], numbers, strict=True) for line in [row, *more])]
        return "\n".join([*lines, *_remarks(self)])


def trace(model: Any, x: Any, gradient: Any = None) -> Trace:
    """Trace one pass: the inputs and outputs of every module call, and the gradients by them and by its parameters.

    The model, its parameters and their `.grad`, its buffers, hooks and mode, the random state and `x` are as before
    afterwards. It costs two forward passes and two backward passes (three forward where a module returns its input or
    a view of it, one more where there are custom functions), and the memory of all tensors at once. A module called
    inside one with parameters of its own runs twice, and so do a user's hooks on it.

    For Linear, Conv2d (padded with zeros), Sigmoid, Tanh, ReLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, BatchNorm1d,
    BatchNorm2d, Softmax and Flatten each gradient is also computed by a closed formula, in float64. "equal" means that
    they differ by no more than rounding: 1e-5 in float32 (2e-3 for products on CUDA, which may use TF32), 1e-10 in
    float64, 1e-2 in float16 and 8e-2 in bfloat16, relative to the largest sum of absolute values. A sum of n terms may
    be off by n units of roundoff (2⁻²⁴ in float32); in half precision by √(n/1000) times as much where n > 1000.

    A user's own `torch.autograd.Function` is checked by central differences in float64 along random directions; where
    that is impossible (kinks, random or float32-only forwards) its status is "not checked".

    Args:
        model: an `nn.Module`, in any mode; of a compiled one the module behind it. Or a Keras model, or a Flax or
            Equinox module.
        x: a batch, or a tuple of them, passed as `model(*x)`.
        gradient: of the objective at the output, of its shape; a tuple for several outputs. Default: ones.

    Returns:
        Trace: plain data; `print` shows it.

    Raises:
        InputError: an argument that cannot be used, or an output without a gradient.
        ModelError: the model overwrites in place what it reads again elsewhere, or differs from run to run.
        FrameworkError: the tensors' framework is not installed.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.ReLU())
    >>> _ = net[0].weight.data.copy_(torch.tensor([[2.0, -1.0]])), net[0].bias.data.zero_()
    >>> seen = trace(net, torch.tensor([[3.0, 1.0]]))
    >>> seen["0"].parameter_gradients["weight"], seen["0"].input_gradients[0]
    (tensor([[3., 1.]]), tensor([[ 2., -1.]]))
    >>> [row.formula for row in seen.table()]
    ['equal', 'equal']
    """
    inputs = x if isinstance(x, tuple) else (x,)
    if not inputs:
        raise InputError("x is an empty tuple; pass a batch, or a tuple of batches")
    model = bound(model)
    traced = capability(framework_of_input(inputs[0], model), "inspect.trace").trace(model, inputs, gradient)
    return Trace(traced.calls, traced.functions, traced.unreached)


def _row(call: Call) -> CallRow:
    return CallRow(
        name=call.name,
        kind=call.kind,
        call=call.call,
        input_shape=_shape(call.inputs),
        output_shape=_shape(call.outputs),
        input_gradient=_norm(_first(call.input_gradients)),
        output_gradient=_norm(_first(call.output_gradients)),
        parameter_gradients={name: _norm(g) for name, g in call.parameter_gradients.items()},
        formula=call.verdict,
        difference=max((d.largest for d in call.formula.values()), default=None),
        note=call.note,
    )


def _first(tensors: tuple[Any, ...]) -> Any:
    return tensors[0] if tensors else None


def _shape(tensors: tuple[Any, ...]) -> tuple[int, ...] | None:
    return tuple(tensors[0].shape) if tensors else None


def _norm(tensor: Any) -> float | None:
    return None if tensor is None else float(np.linalg.norm(as_numpy(tensor).astype(np.float64)))


def _size(tensor: Any) -> int:
    return math.prod(tensor.shape)


_HEADINGS = ("name", "kind", "call", "input", "output", "|g| in", "|g| out", "parameters", "formula")


def _cells(row: CallRow) -> tuple[str, ...]:
    shapes = ("x".join(map(str, shape)) if shape is not None else "" for shape in (row.input_shape, row.output_shape))
    norms = (_short(norm) for norm in (row.input_gradient, row.output_gradient))
    parameters = " ".join(f"{name} {_short(norm)}" for name, norm in row.parameter_gradients.items())
    formula = "no formula" if row.formula == NO_FORMULA else row.formula
    if row.formula == DIFFERS:
        formula += f" ({_short(row.difference)})"
    return (row.name or "(model)", row.kind, str(row.call), *shapes, *norms, parameters, formula)


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _marked(formula: str) -> Mark | str:
    return Mark(formula, GOOD if formula == EQUAL else BAD) if formula.startswith((EQUAL, DIFFERS)) else formula


def _numbers(call: Call) -> list[str]:
    return [f"    {name:<22}{_digits(tensor)}" for name, tensor in call.tensors.items() if tensor is not None]


def _digits(tensor: Any) -> str:
    return np.array2string(as_numpy(tensor), precision=4, suppress_small=True, separator=", ").replace("\n", "")


def _remarks(trace: Trace) -> Iterator[str]:
    for call in trace.calls:
        if call.note:
            yield f"no gradients at {call.name or '(model)'} (call {call.call}): {call.note}"
        for part, difference in call.formula.items():
            if not difference.equal:
                where = f"{call.name or '(model)'} (call {call.call}), gradient by {part}"
                yield f"DIFFERS from its closed formula: {where}, by up to {_short(difference.largest)}"
    for checked in trace.functions:
        where = f"{checked.function} in {checked.name or '(model)'} (call {checked.call})"
        if checked.status == WRONG:
            yield (
                f"WRONG backward: {where}, {checked.reason}: "
                f"{_short(checked.backward)} where finite differences give {_short(checked.differences)}"
            )
        else:
            yield f"backward {checked.status}: {where}{': ' * bool(checked.reason)}{checked.reason}"
    if trace.unreached:
        yield f"not called: {', '.join(trace.unreached)}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
