"""What is done to each shard: from batches of items to the files of a part."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..attribution.explain import explain_rules
from ..attribution.result import Attribution
from ..classifier import Classifier
from ..errors import FrameworkError, InputError, RuleError, RunError, UndertowError, one_line
from ..files import distinct, readable
from ..frameworks.base import as_numpy, capability, framework_of_model
from ..recording import record
from ..recording.photographs import OBJECTIVES, class_names, label_of
from ..rules import resolve
from ..runs.format import CLASSES
from ..tables import ActivationRule, Rule
from ..verdict.photograph import pairs_of, verdicts_of
from .columns import EXPLAIN_COLUMNS, TRUST_COLUMNS
from .folder import INDEX, Failure, storable, write_table
from .maps import MapFile


@dataclass(frozen=True)
class Item:
    """One item that was read: its position in the source, its name, where it lies, and its array."""

    index: int
    name: str
    path: str
    array: npt.NDArray[Any]


@dataclass
class Bench:
    """Where a task works: the network, its device, and the folder of the sweep.

    Attributes:
        batches: how many batches there are in the sweep.
        largest: how many items fit into memory at once, where that was found out.
        remarks: what was warned of, each once.
    """

    classifier: Classifier
    device: str
    folder: Path
    batches: int = 1
    largest: int | None = None
    remarks: dict[str, type[Warning]] = field(default_factory=dict)

    def batch(self, items: Sequence[Item]) -> Any:
        """Stack items into a batch on the device."""
        arrays = capability(framework_of_model(self.classifier.module), "arrays")
        return arrays.batch([item.array for item in items], self.device)

    @contextmanager
    def remarking(self) -> Iterator[None]:
        """Keep each warning of the same words once, where there would be one for each batch; Pillow's are dropped."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        self.remarks |= {str(w.message): w.category for w in caught if "PIL" not in Path(w.filename).parts}


Add = Callable[[int, Sequence[Item]], list[Failure]]
"""Takes the number of a batch and its items, and returns those that could not be done."""


class Task(Protocol):
    """What is done to each shard."""

    @property
    def name(self) -> str:
        """`explain`, `record` or `trust`."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a part's index; none: it has no index."""

    def settings(self) -> dict[str, Any]:
        """Return all that the result depends on, plain data for the manifest."""

    def writing(self, bench: Bench, folder: Path) -> AbstractContextManager[Add]:
        """Give what takes a shard's batches; the part's files are whole once the context is left."""


@dataclass(frozen=True)
class ExplainTask:
    """Maps of each item under several rules, for one or several classes.

    Args:
        rules: names or functions.
        target: "top:K", or class ids.
        options: further ones of `undertow.explain`.
    """

    rules: tuple[str | ActivationRule | Rule, ...] = ("guided",)
    target: str | tuple[int, ...] = "top:1"
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "explain"

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the index."""
        return EXPLAIN_COLUMNS

    @property
    def rule_names(self) -> list[str]:
        """The names of the rules, each once."""
        return list(dict.fromkeys(resolve(rule)[0] for rule in self.rules))

    def settings(self) -> dict[str, Any]:
        """Return all that the maps depend on."""
        return {"rules": self.rule_names, "target": self.target, **self.options}

    @contextmanager
    def writing(self, bench: Bench, folder: Path) -> Iterator[Add]:
        """Give what explains batches, and writes maps and index."""
        stems = distinct([readable(rule) for rule in self.rule_names])
        rows: dict[str, list[Any]] = {column: [] for column in EXPLAIN_COLUMNS}
        with ExitStack() as stack:
            files = {r: MapFile(folder / f"{s}.safetensors") for r, s in zip(self.rule_names, stems, strict=True)}
            for file in files.values():
                stack.callback(file.abandon)

            def add(number: int, items: Sequence[Item]) -> list[Failure]:
                done, failed = in_pieces(bench, items, lambda piece: self.explained(bench, piece))
                for piece, maps in done:
                    _append(rows, files, bench.classifier, piece, maps)
                return failed

            yield add
            for file in files.values():
                file.close()
                if not file.rows:
                    file.path.unlink()
        write_table(folder / INDEX, rows, EXPLAIN_COLUMNS)

    def explained(self, bench: Bench, items: Sequence[Item]) -> dict[str, Attribution]:
        """Return the maps of a batch under each rule."""
        x = bench.batch(items)
        classifier = bench.classifier
        target: Any = self.target if isinstance(self.target, str) else [list(self.target)] * len(items)
        with bench.remarking():
            maps = explain_rules(
                classifier.module, x, self.rules, target=target, output=classifier.output, **self.options
            )
            return dict(zip(self.rule_names, maps, strict=True))


def in_pieces(
    bench: Bench, items: Sequence[Item], compute: Callable[[Sequence[Item]], Any]
) -> tuple[list[tuple[Sequence[Item], Any]], list[Failure]]:
    """Compute something of all items at once; in halves where memory lacks, and one by one where one of them fails.

    Returns:
        The pieces with what was computed of each, in order, and the items of which nothing could be.
    """
    if bench.largest is not None and len(items) > bench.largest:
        pieces = [items[start : start + bench.largest] for start in range(0, len(items), bench.largest)]
        return _joined(in_pieces(bench, piece, compute) for piece in pieces)
    try:
        return ([(items, compute(items))] if items else []), []
    except (FrameworkError, RuleError, RunError):  # true of the network, whatever the item
        raise
    except Exception as error:
        fatal = not isinstance(error, UndertowError)
        lacking = is_out_of_memory(error)
        if (fatal and not lacking) or (lacking and len(items) == 1):
            raise
        reason = one_line(error)
    # outside of `except`, whose traceback holds on to the memory
    if lacking:
        bench.largest = len(items) // 2
        return in_pieces(bench, items, compute)
    if len(items) == 1:
        return [], [Failure(items[0].index, storable(items[0].name), reason)]
    return _joined(in_pieces(bench, [item], compute) for item in items)


def _joined(results: Iterable[tuple[list[Any], list[Failure]]]) -> tuple[list[Any], list[Failure]]:
    pieces, failures = [], []
    for done, failed in results:
        pieces += done
        failures += failed
    return pieces, failures


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a framework, or of Python, says that memory does not suffice.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("no"))
    (True, False)
    """
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _append(
    rows: dict[str, list[Any]],
    files: Mapping[str, MapFile],
    classifier: Classifier,
    items: Sequence[Item],
    maps: Mapping[str, Attribution],
) -> None:
    """Append the maps of a batch to their files, and a row for each to the index: by item, then rule, then target."""
    blocks = []
    for rule, a in maps.items():
        values = a.numpy()
        if not isinstance(values, np.ndarray):
            raise InputError("a sweep keeps maps of one input; this network's is nested")
        offset = files[rule].append(values.reshape(-1, *values.shape[2:]))
        facts = a.rewired, json.dumps(a.skipped, sort_keys=True), a.switches, a.head, files[rule].path.name
        blocks.append(
            (rule, as_numpy(a.targets).tolist(), as_numpy(a.scores).astype(np.float64).tolist(), facts, offset)
        )
    columns = list(rows.values())
    for n, item in enumerate(items):
        name = storable(item.name)
        for rule, ids, scores, facts, offset in blocks:
            count = len(ids[n])
            named = class_names(classifier, ids[n])
            for k, (class_id, class_name, score) in enumerate(zip(ids[n], named, scores[n], strict=True)):
                row = (item.index, name, rule, class_id, class_name, score, *facts, offset + n * count + k)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)


@dataclass(frozen=True)
class TrustTask:
    """A verdict on each map of each photograph.

    Args:
        pairs: of rule and estimator.
        target: a class id; None is each photograph's predicted class.
        options: seed and samples, as `undertow.trust` has them.
    """

    rules: tuple[str, ...] = ("guided",)
    estimators: tuple[str, ...] = ("gradient",)
    target: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "trust"

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the index."""
        return TRUST_COLUMNS

    def settings(self) -> dict[str, Any]:
        """Return all that the verdicts depend on."""
        return {"rules": self.rules, "estimators": self.estimators, "target": self.target, **self.options}

    @contextmanager
    def writing(self, bench: Bench, folder: Path) -> Iterator[Add]:
        """Give what judges batches, one item at a time, and writes the index."""
        rows: dict[str, list[Any]] = {column: [] for column in TRUST_COLUMNS}

        def add(number: int, items: Sequence[Item]) -> list[Failure]:
            failures = []
            for item in items:
                done, failed = in_pieces(bench, [item], lambda piece: self._judged(bench, piece[0]))
                failures += failed
                for row in (row for _, judged in done for row in judged):
                    for column, value in zip(TRUST_COLUMNS, row, strict=True):
                        rows[column].append(value)
            return failures

        yield add
        write_table(folder / INDEX, rows, TRUST_COLUMNS)

    def _judged(self, bench: Bench, item: Item) -> list[tuple[Any, ...]]:
        pairs = pairs_of(self.rules, self.estimators)
        x = bench.batch([item])
        with bench.remarking():
            verdicts = verdicts_of(bench.classifier, x, pairs, target=self.target, **self.options)
        rows = []
        for verdict in verdicts.values():
            map_of = (item.index, storable(item.name), verdict.rule, verdict.estimator, verdict.target)
            answers = [(q, a.level, float(a.value), a.sentence) for q, a in verdict.answers.items()]
            answers += [(q, "-", float("nan"), why) for q, why in verdict.unanswered.items()]
            answers.append(("verdict", "-", float("nan"), verdict.sentence))
            rows += [(*map_of, verdict.target_name, *answer) for answer in answers]
        return rows


@dataclass(frozen=True)
class RecordTask:
    """The gradients of each item at sites of the network, as `undertow.record` has them.

    Args:
        objective: "predicted", "label" or "loss", as `undertow.recording.photographs` has them.
        options: sites, measures, phase and diagnose, as `undertow.record` has them.
    """

    objective: str = "predicted"
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    name: str = "record"

    @property
    def columns(self) -> dict[str, str]:
        """A part holds a run, and no index."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return all that the run depends on."""
        return {"objective": self.objective, **self.options}

    @contextmanager
    def writing(self, bench: Bench, folder: Path) -> Iterator[Add]:
        """Give what records batches into a run in the part; a part of failures alone has none."""
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective {self.objective!r} is unknown (known: {', '.join(OBJECTIVES)})")
        classifier = bench.classifier
        recorder = capability(framework_of_model(classifier.module), "record")
        with ExitStack() as stack:
            recording: Any = None
            run_objective: Any = None

            def add(number: int, items: Sequence[Item]) -> list[Failure]:
                nonlocal recording, run_objective
                if not items:
                    return []
                if recording is None:
                    stack.enter_context(bench.remarking())
                    run_objective = stack.enter_context(recorder.objective(classifier.module, self.objective))
                    recording = stack.enter_context(self._recording(bench, folder / "run"))
                pieces = 0

                def recorded(piece: Sequence[Item]) -> None:
                    nonlocal pieces
                    labels = None if self.objective == "predicted" else [label_of(classifier, i.path) for i in piece]
                    # the second piece of a batch that memory did not suffice for has a number that no batch has
                    with recording.batch([item.name for item in piece], batch=number + pieces * bench.batches):
                        ids, scores = run_objective(bench.batch(piece), labels)
                        named = class_names(classifier, ids)
                        recording.describe({"class": ids, "class_name": named, "score": scores})
                    pieces += 1

                return in_pieces(bench, items, recorded)[1]

            yield add

    def _recording(self, bench: Bench, folder: Path) -> Any:
        recording = record(
            folder,
            bench.classifier.module,
            objective=self.objective,
            reference=bench.classifier.reference,
            source=dict(self.source),
            loss_reduction="sum",
            **self.options,
        )
        if recording.learning.parameters:
            raise InputError("the weights are frozen in a sweep; record parameters with undertow.record")
        recording.sample_columns = dict(CLASSES)
        return recording
