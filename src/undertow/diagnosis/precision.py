"""Values that a number format cannot hold: where infinities and NaN first occur, and gradients that underflow."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..measures import finite
from .evidence import Evidence
from .finding import Finding, NotRecorded, called, listed, percent

SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
_MIN_SHARE = 0.01


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
    yield Finding(
        "non-finite",
        "error",
        sites,
        f"In batch {batch[1]} of epoch {batch[0]} the {tensor} at {called(site)} is infinite or not a number"
        f"{'' if share is None else f' for {percent(share)} of its elements'}, before any other site; "
        f"affected: {listed(sites)}, in {n_batches} batch{'es' if n_batches > 1 else ''}.",
        {"first_site": site, "batch": list(batch), "predicted": 0.0, "observed": share, "batches": n_batches},
        "Look at what follows this site: divisions, logarithms and roots near 0, exponentials, or float16's largest "
        "number, 65504."
        if tensor == "gradient"
        else "Look at the inputs and the weights of this layer.",
        "IEEE 754: infinity and NaN spread to everything computed from them",
    )


def _broken(evidence: Evidence) -> dict[tuple[int, int, str, str], float | None]:
    """Return the fraction of nonfinite elements, if any, by (epoch, batch, phase, site); None if it is unknown."""
    shares: dict[tuple[int, int, str, str], float | None] = {}
    tables = set(evidence.run.manifest["tables"])
    if not tables & {"histogram", "moments", "channel_norm", "diagnosis"}:
        raise NotRecorded("record the measure histogram, moments or channel-norm")
    for row in evidence.rows("channel_norm"):
        if not np.isfinite(row["values"]).all():
            shares[_where(row)] = None
    for row in evidence.rows("moments"):
        if not math.isfinite(row["mean"]):
            shares[_where(row)] = None
    for row in [*evidence.rows("histogram"), *(row for rows in evidence.outputs.values() for row in rows)]:
        counts = np.asarray(row["counts"], np.int64)
        nonfinite = int(counts[~finite(np.asarray(row["codes"], np.int64))].sum())
        if nonfinite:
            shares[_where(row)] = nonfinite / int(counts.sum())
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
    return Finding(
        "underflow",
        "warning",
        tuple(shares),
        f"{percent(shares[worst])} of the nonzero gradient at {called(worst)} is below {dtype}'s smallest normal "
        f"number ({SMALLEST_NORMAL[dtype] / evidence.scale:.3g} before loss scaling): such values lose digits, and the "
        f"smallest become zero; affected: {listed(shares)}.",
        {
            "predicted": 0.0,
            "observed": shares[worst],
            "below_normal": shares,
            "below_float16": _below(evidence, worst, "float16"),
            "below_bfloat16": _below(evidence, worst, "bfloat16"),
            "loss_scale": evidence.scale,
            "suggested_loss_scale": scale,
        },
        f"Scale the loss by {scale:g} (torch.amp.GradScaler): the largest gradient, {largest:.3g}, then stays below "
        "32768. Or compute in bfloat16.",
        "smallest normal numbers: 2^-14 (float16), 2^-126 (bfloat16, float32); Micikevicius et al., arXiv 1710.03740",
    )


def _below(evidence: Evidence, site: str, dtype: str) -> float:
    """Return the fraction of a site's nonzero scaled gradient that is below a format's smallest normal number."""
    smallest = SMALLEST_NORMAL[dtype] / evidence.scale
    values, weights = evidence.values[site]
    magnitudes = np.abs(values)
    nonzero = int(weights[magnitudes > 0].sum())
    return int(weights[(magnitudes > 0) & (magnitudes < smallest)].sum()) / nonzero if nonzero else 0.0
