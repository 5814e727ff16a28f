"""Sites at which no gradient arrived: unused, frozen, or cut off, told apart."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .evidence import WATCH, Evidence
from .finding import Finding, listed

_TRAINABLE = "set requires_grad=True on its parameters, if it is to learn"
_CAUSES: dict[str, tuple[str, str, str, str]] = {
    "never called": ("unreached", "warning", "never called in the pass", "call it, or leave it out"),
    "unread": (
        *("unreached", "warning", "called, but what .backward() ran on does not depend on its output"),
        "use its output in the loss, or leave it out",
    ),
    "no backward": (
        *("unreached", "warning", "called, but no backward pass ran inside the batch"),
        "call .backward() inside `with recording.batch(...)`",
    ),
    "frozen": ("frozen", "info", "needs no gradient, since requires_grad is False from the input up to it", _TRAINABLE),
    "no_grad": ("detached", "warning", "run under torch.no_grad()", "run it outside no_grad, if it is to learn"),
    "detached inside": (
        *("detached", "warning", "trainable, but what it returns is detached from its parameters"),
        "remove .detach(), .data or no_grad inside it",
    ),
}


def arrival(evidence: Evidence) -> Iterator[Finding]:
    """Say of each site that no gradient ever reached why not."""
    reasons = _reasons(evidence)
    sites_by_reason: dict[str, list[str]] = defaultdict(list)
    for site in evidence.sites:
        if site in reasons:
            sites_by_reason[reasons[site]].append(site)
    for reason, sites in sites_by_reason.items():
        yield _finding(reason, tuple(sites), bool(evidence.watched))


def _reasons(evidence: Evidence) -> dict[str, str]:
    if not evidence.watched:
        return dict(evidence.run.manifest.get("unreached", {}))
    reasons: dict[str, Any] = {}
    for row in evidence.watched:
        if row["step"] == 0 and row["arrival"] not in ("arrived", "used unseen"):
            reasons[row["site"]] = row["arrival"]
    with_gradient = set(evidence.outputs)
    return {site: reason for site, reason in reasons.items() if site not in with_gradient}


def _finding(reason: str, sites: tuple[str, ...], watched: bool) -> Finding:
    if reason in _CAUSES:
        cause, severity, description, remedy = _CAUSES[reason]
    elif watched:
        cause, severity, description = "detached", "warning", f"called, and its gradient is cut off by {reason}"
        remedy = f"remove {reason}, if the layers before it are to learn"
    else:
        cause, severity, description, remedy = (
            "unreached",
            "warning",
            f"no gradient ({reason})",
            f"To see why, {WATCH}.",
        )
    return Finding(
        cause,
        severity,
        sites,
        f"{listed(sites)}: {description}.",
        {"reason": reason, "predicted": 0, "observed": 0},
        remedy[0].upper() + remedy[1:] + ("" if remedy.endswith(".") else "."),
        "the autograd graph of the watched batches" if watched else "the sites of the run that have no row",
    )
