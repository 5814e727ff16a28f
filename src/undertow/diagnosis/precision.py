"""Values that a number format cannot hold: where infinities and NaN first occur, and gradients that underflow."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..measures import finite
from .evidence import Evidence
from .finding import Finding, NotRecorded, called, listed, percent

SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
_MIN_SHARE = 0.01
_FEW = 0.2
_PHASES = ("forward", "backward")
_COUNTS = ("broken_data", "broken_input", "broken_weights", "broken_output")


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """Find the first batch in which a gradient or an output was infinite or NaN, and the site where it started.

    The backward pass runs from the loss to the input, so among gradients the site nearest to the loss is the first.
    """
    broken = _broken(evidence)
    if not broken:
        return
    batch = min((epoch, number) for epoch, number, _, _ in broken)
    in_first_batch = {
        (phase, site): share for (epoch, number, phase, site), share in broken.items() if (epoch, number) == batch
    }
    forward = [site for site in evidence.sites if ("forward", site) in in_first_batch]
    backward = [site for site in evidence.sites if ("backward", site) in in_first_batch]
    site, tensor = (forward[0], "output") if forward else (backward[-1], "gradient")
    share = in_first_batch["forward" if forward else "backward", site]
    n_batches = len({(epoch, number) for epoch, number, _, _ in broken})
    sites = tuple(forward or backward)
    origin, remedy, figures = _origin(evidence, batch, site, bool(forward))
    severity = "error"
    if _of_scaling(evidence, broken):
        severity, remedy = "info", "Nothing is wrong, unless it goes on."
        origin = "A GradScaler that looks for its scale leaves such steps out, and halves the scale behind each."
    yield Finding(
        "non-finite",
        severity,
        sites,
        f"In batch {batch[1]} of epoch {batch[0]} the {tensor} at {called(site)} is infinite or not a number"
        f"{'' if share is None else f' for {percent(share)} of its elements'}, before any other site; "
        f"affected: {listed(sites)}, in {n_batches} batch{'es' if n_batches > 1 else ''}. {origin}",
        {"first_site": site, "batch": list(batch), "predicted": 0.0, "observed": share, "batches": n_batches} | figures,
        remedy,
        "IEEE 754: infinity and NaN spread to everything computed from them",
    )


def _of_scaling(evidence: Evidence, broken: Iterable[tuple[int, int, str, str]]) -> bool:
    """Whether a few gradients overflowed while the loss was scaled, and later ones did not."""
    batches = sorted((row["epoch"], row["batch"]) for row in evidence.rows("batches") if row["scale"])
    at = {(epoch, number) for epoch, number, _, _ in broken}
    of_gradients = all(phase == "backward" for _, _, phase, _ in broken)
    few = len(at) <= max(_FEW * len(batches), 1)
    return bool(batches) and of_gradients and few and at.issubset(batches) and batches[-1] not in at


def _origin(evidence: Evidence, batch: tuple[int, int], site: str, forward: bool) -> tuple[str, str, dict[str, Any]]:
    """Return where the first broken tensor came from, as a sentence; a remedy; and the counts that show it."""
    if not forward:
        behind = (
            "Look at the targets, and at what follows this site: divisions, logarithms and roots near 0, "
            "exponentials, or float16's largest number, 65504."
        )
        watched = any((row["epoch"], row["batch"]) == batch and row["step"] == 0 for row in evidence.watched)
        if watched or evidence.run.manifest.get("phase") == "both":
            return "All outputs are finite, so it arises in the backward pass or the loss.", behind, {}
        look = evidence.watch.replace("diagnose=True", "diagnose=1")
        unseen = f'Whether an output was broken before was not looked at; {look}, or with phase="both".'
        return unseen, f"Look for NaN in the inputs first. {behind}", {}
    rows = [row for row in evidence.watched if (row["epoch"], row["batch"], row["site"]) == (*batch, site)]
    row = rows[0] if rows else {}
    figures = {name: row.get(name, -1) for name in _COUNTS}
    if figures["broken_data"] > 0:
        return (
            f"{figures['broken_data']} of the network's inputs in this batch are not finite already: it is the data.",
            "Look at this batch's samples: missing values, a division by a deviation of 0, logarithms of 0.",
            figures,
        )
    if figures["broken_weights"] > 0:
        return (
            "Its weights are not finite any more, so an earlier step of the optimizer has broken them.",
            "Look at the batches before: clip gradients, lower the learning rate, or go back to an earlier checkpoint.",
            figures,
        )
    if figures["broken_input"] > 0:
        return (
            "Its input is not finite already, though no site before it is broken.",
            "Look at what lies between the network's input and this layer.",
            figures,
        )
    if figures["broken_input"] == 0:
        return (
            "Its inputs are finite, and so are its weights: its result is larger than its number format holds.",
            "Look at how large its inputs are; normalise before it, or compute it in float32 or bfloat16.",
            figures,
        )
    return "", "Look at the inputs and the weights of this layer.", figures


def _broken(evidence: Evidence) -> dict[tuple[int, int, str, str], float | None]:
    """Return the fraction of nonfinite elements, if any, by (epoch, batch, phase, site); None if it is unknown."""
    shares: dict[tuple[int, int, str, str], float | None] = {}
    tables = set(evidence.run.manifest["tables"])
    if not tables & {"histogram", "moments", "channel_norm", "diagnosis"}:
        raise NotRecorded("record the measure histogram, moments or channel-norm")
    for row in evidence.rows("channel_norm"):
        if row["phase"] in _PHASES and not math.isfinite(sum(row["values"])):  # norms are not negative
            shares[_where(row)] = None
    for row in evidence.rows("moments"):
        if row["phase"] in _PHASES and not math.isfinite(row["mean"]):
            shares[_where(row)] = None
    for row in [*evidence.rows("histogram"), *(row for rows in evidence.outputs.values() for row in rows)]:
        broken = ~finite(np.asarray(row["codes"], np.int64))
        counts = np.asarray(row["counts"] if broken.any() else (), np.int64)
        nonfinite = int(counts[broken].sum()) if len(counts) else 0
        if nonfinite and row["phase"] in _PHASES:
            shares[_where(row)] = nonfinite / int(counts.sum())
    for row in evidence.watched:
        if row["step"] == 0 and row["site"] in evidence.position and row.get("broken_output", -1) > 0:
            elements = max(int(np.prod(row["shape"], dtype=np.int64)), 1)
            shares[row["epoch"], row["batch"], "forward", row["site"]] = row["broken_output"] / elements
    return shares


def _where(row: dict[str, Any]) -> tuple[int, int, str, str]:
    return row["epoch"], row["batch"], row["phase"], row["site"]


def underflow(evidence: Evidence) -> Iterator[Finding]:
    """Find sites whose gradients are below the smallest normal number of the format that they are computed in."""
    if not evidence.values:
        raise NotRecorded("record the measure histogram")
    formats = evidence.formats
    shares: dict[str, float] = {}
    for site in evidence.values:
        share = _below(evidence, site, formats[site])
        if share >= _MIN_SHARE:
            shares[site] = share
    if shares:
        yield _underflow(evidence, shares)


def _underflow(evidence: Evidence, shares: dict[str, float]) -> Finding:
    worst = max(shares, key=lambda site: shares[site])
    dtype = evidence.formats[worst]
    largest = max(float(np.abs(values).max()) for values, _ in evidence.values.values() if len(values))
    scale = 2.0 ** (15 - math.ceil(math.log2(largest))) if largest else 1.0
    figures = {
        "predicted": 0.0,
        "observed": shares[worst],
        "below_normal": shares,
        "below_float16": _below(evidence, worst, "float16"),
        "below_bfloat16": _below(evidence, worst, "bfloat16"),
        "loss_scale": evidence.scale,
    }
    sentence = (
        f"{percent(shares[worst])} of the nonzero gradient at {called(worst)} is below {dtype}'s smallest normal "
        f"number ({SMALLEST_NORMAL[dtype] / evidence.scale:.3g} before loss scaling): such values lose digits, and the "
        f"smallest become zero; affected: {listed(shares)}."
    )
    remedy = (
        f"Scale the loss by {scale:g} (torch.amp.GradScaler): the largest gradient, {largest:.3g}, then stays below "
        "32768. Or compute in bfloat16."
    )
    severity = "warning"
    if dtype == "float16":
        figures["suggested_loss_scale"] = scale
    else:  # no format in use reaches lower, and no factor helps where the largest gradients are of ordinary size
        at_scores = list(evidence.values)[-1] in shares
        reason, remedy = _far_below(evidence, at_scores)
        sentence, severity = f"{sentence} {reason}", "warning" if at_scores else "info"
    return Finding(
        "underflow",
        severity,
        tuple(shares),
        sentence,
        figures,
        remedy,
        "smallest normal numbers: 2^-14 (float16), 2^-126 (bfloat16, float32), 2^-1022 (float64); Micikevicius et al., "
        "arXiv 1710.03740",
    )


def _far_below(evidence: Evidence, at_scores: bool) -> tuple[str, str]:
    """Say why gradients are this small in a format that reaches down to 2^-126, and what to do."""
    last = list(evidence.values)[-1]
    if at_scores:
        reason = (
            f"So it is at the scores ({called(last)}) already: the softmax or sigmoid behind them is saturated, sure "
            "of these samples beyond any doubt."
        )
        remedy = (
            "Use a smaller learning rate, weight decay or label smoothing, and look at how large the scores are: they "
            "should differ by tens, not by hundreds."
        )
        return reason, remedy
    reason = f"It is not so at {called(last)}: the gradient gets lost on the way."
    return reason, "Look at the findings about depth and saturation: normalise, or add residual connections."


def _below(evidence: Evidence, site: str, dtype: str) -> float:
    """Return the fraction of a site's nonzero scaled gradient that is below a format's smallest normal number."""
    smallest = SMALLEST_NORMAL[dtype] / evidence.scale
    values, weights = evidence.values[site]
    magnitudes = np.abs(values)
    nonzero = int(weights[magnitudes > 0].sum())
    return int(weights[(magnitudes > 0) & (magnitudes < smallest)].sum()) / nonzero if nonzero else 0.0
