"""A network as a graph of what its gradient flows through, as plain data for a page."""

import math
from collections.abc import Mapping
from typing import Any

from ..derive.blocks import Blocks
from ..derive.graph import END
from ..recording.trace import Trace
from ..runs import Run

SHOWN = ("kind", "call", "input_shape", "output_shape", "input_gradient", "output_gradient", "formula", "note")


def of_blocks(blocks: Blocks, trace: Trace | None = None, title: str = "") -> dict[str, Any]:
    """Return a model's blocks, with the norm that each edge carries, and the trace of each block that is a layer."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for call in trace.to_dict()["calls"] if trace else []:
        rows.setdefault(call["name"], []).append({key: call[key] for key in SHOWN})
    nodes = [
        {"name": b.name, "kind": b.kind, "gradient": _finite(b.gradient), "trace": _trace_of(b.name, rows)}
        for b in blocks.blocks
    ]
    nodes.append({"name": END, "kind": "objective", "gradient": None, "trace": []})
    edges = [{"source": e.source, "target": e.target, "norm": _finite(e.norm)} for e in blocks.edges]
    of = "the ℓ2 norm of the gradient that it carries"
    return {"title": title, "run": None, "nodes": nodes, "edges": edges, "of": of}


def _trace_of(name: str, rows: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of a block, "layer" or, of several calls, "layer#1"."""
    layer, _, number = name.partition("#")
    calls = rows.get(layer, [])
    return [call for call in calls if not number or str(call["call"]) == number]


def of_run(run: Run, index: int) -> dict[str, Any] | None:
    """Return the graph of a watched run's sites: which reads which, and the mean size of the gradient at each.

    `index` is the run's place among those of the page, whose findings are marked.

    None where nothing was watched, as without `record(..., diagnose=True)`.
    """
    if "diagnosis" not in run.manifest["tables"]:
        return None
    columns = ["site", "call", "output", "phase", "step", "number", "read_by", "norm", "shape"]
    rows = [row for row in run.table("diagnosis").select(columns).to_pylist() if row["step"] == 0]
    outputs: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["number"] is not None and row["number"] >= 0:
            outputs.setdefault(row["number"], []).append(row)
    if not outputs:
        return None
    names = {number: _name(group[0]) for number, group in outputs.items()}
    sizes = {number: _mean_norm(group) for number, group in outputs.items()}
    nodes: list[dict[str, Any]] = [
        {"name": names[number], "kind": "", "gradient": sizes[number], "trace": []} for number in sorted(outputs)
    ]
    nodes.append({"name": END, "kind": "objective", "gradient": None, "trace": []})
    edges = [
        {"source": names[number], "target": names.get(reader, END), "norm": sizes[number]}
        for number in sorted(outputs)
        for reader in dict.fromkeys(outputs[number][-1]["read_by"] or [])
        if reader in names or reader < 0
    ]
    of = "the ℓ2 norm of the gradient at the output that it leaves"
    return {"title": run.folder.resolve().name, "run": index, "nodes": nodes, "edges": edges, "of": of}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['site']}#{row['call']}" if row["call"] else str(row["site"])


def _mean_norm(rows: list[dict[str, Any]]) -> float | None:
    norms = [row["norm"] for row in rows if row["norm"] is not None and math.isfinite(row["norm"])]
    return sum(norms) / len(norms) if norms else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
