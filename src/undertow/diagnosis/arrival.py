"""Sites that no gradient reached: unused, frozen or detached."""

from collections import defaultdict
from collections.abc import Iterator

from .evidence import WATCH, Evidence
from .finding import Finding, listed

_CAUSES = {  # reason in the table `diagnosis`: cause, severity, description, remedy
    "never called": ("unreached", "warning", "never called in the forward pass", "Call it, or remove it."),
    "unread": (
        *("unreached", "warning", "called, but .backward() ran on something that does not depend on its output"),
        "Use its output in the loss, or remove it.",
    ),
    "no backward": (
        *("unreached", "warning", "called, but no backward pass ran inside the batch"),
        "Call .backward() inside `with recording.batch(...)`.",
    ),
    "frozen": (
        *("frozen", "info", "needs no gradient, because requires_grad is False from the input up to here"),
        "Set requires_grad=True on its parameters if it is to learn.",
    ),
    "no_grad": ("detached", "warning", "run under torch.no_grad()", "Run it outside no_grad if it is to learn."),
    "detached inside": (
        *("detached", "warning", "trainable, but its output is detached from its parameters"),
        "Remove .detach(), .data or no_grad inside it.",
    ),
}


def arrival(evidence: Evidence) -> Iterator[Finding]:
    """Say why no gradient reached a site; sites with the same reason share a finding."""
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
    return {
        row["site"]: row["arrival"]
        for row in evidence.watched
        if row["step"] == 0 and row["arrival"] not in ("arrived", "used unseen") and row["site"] not in evidence.outputs
    }


def _finding(reason: str, sites: tuple[str, ...], watched: bool) -> Finding:
    if reason in _CAUSES:
        cause, severity, description, remedy = _CAUSES[reason]
    elif watched:
        cause, severity, description = "detached", "warning", f"called, but its gradient is cut off by {reason}"
        remedy = f"Remove {reason} if the layers before it are to learn."
    else:
        cause, severity, description = "unreached", "warning", f"no gradient ({reason})"
        remedy = f"To see why, {WATCH}."
    return Finding(
        cause,
        severity,
        sites,
        f"{listed(sites)}: {description}.",
        {"reason": reason, "predicted": 0, "observed": 0},
        remedy,
        "the autograd graph of the watched batches" if watched else "the sites of the run that have no rows",
    )
