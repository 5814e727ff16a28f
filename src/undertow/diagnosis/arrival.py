"""Sites that no gradient reached: unused, frozen or detached; and gradients that are zero everywhere."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .dead import inactive_layers
from .evidence import INSIDE, Evidence
from .finding import Finding, NotLookedAt, called, listed, percent

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
    "no_grad aside": (
        *("detached", "info", "run under torch.no_grad(), and no layer that learns reads the result"),
        "Nothing need be wrong: so are a target or a teacher network. Run it outside no_grad if it is to learn.",
    ),
    "off the tape": (
        *("detached", "warning", "run where no tf.GradientTape records"),
        "Run it inside `with tf.GradientTape()` if it is to learn.",
    ),
    "detached inside": (
        *("detached", "warning", "trainable, but its output is detached from its parameters"),
        "Remove .detach(), .data or no_grad inside it.",
    ),
}


_OF_KERAS = {  # the same where a GradientTape takes the gradient
    "unread": (
        "called, but the tape's gradient was asked of something that does not depend on its output by any operation "
        "that the tape saw (.numpy() is none)"
    ),
    "no backward": "called, but no gradient was asked of a tape inside the batch",
    "frozen": "needs no gradient, because nothing up to here is trainable, and the tape watches no input",
}
_REMEDIES_OF_KERAS = {
    "no backward": "Call tape.gradient inside `with recording.batch(...)`.",
    "frozen": "Set trainable=True on its layer if it is to learn.",
}


_INSTEAD = {  # what to write instead of a function that has no gradient
    "argmax": "weigh by a softmax, or use F.gumbel_softmax(..., hard=True) or a straight-through estimator, in its "
    "place",
    "a comparison": "use a sigmoid or a straight-through estimator in its place",
    ".item()": "keep tensors: torch.stack where they are joined",
    ".tolist()": "keep tensors: torch.stack where they are joined",
    "float()": "keep tensors: torch.stack where they are joined",
    "torch.tensor(...)": "use torch.stack or torch.cat, which keep the graph, in its place",
    "torch.as_tensor(...)": "use torch.stack or torch.cat, which keep the graph, in its place",
}
_UNSEEN = {
    "used unseen": "used without being called",
    "checkpointed": "inside reentrant checkpointing",
    "in a custom gradient": "inside a tf.custom_gradient, such as tf.recompute_grad",
    "passed by": "Keras's losses go on from the logits, past a last softmax or sigmoid",
}


def nothing(evidence: Evidence) -> Iterator[Finding]:
    """Find that the gradient is exactly zero at every site, in every batch: nothing learns."""
    zeros = evidence.zeros
    if not zeros or any(n < total or not total for n, total in zeros.values()):
        return
    if evidence.watched and inactive_layers(evidence):  # a dead layer explains it
        return
    sites = tuple(zeros)
    last = sites[-1]
    reason, figures = _why_zero(evidence, last)
    yield Finding(
        "no-gradient",
        "error",
        sites,
        f"The gradient is exactly zero at all {len(sites)} sites, from {called(last)} on, in every batch: nothing "
        f"learns. {reason}",
        {"predicted": None, "observed": 1.0} | figures,
        "Look at what follows the last site: labels that are all ignored, a clamp or a hinge that is satisfied, "
        "round or sign, a factor of 0.",
        "all recorded elements are zero",
    )


def _why_zero(evidence: Evidence, site: str) -> tuple[str, dict[str, Any]]:
    """Say what makes the gradient zero at the site nearest to the loss."""
    rows = evidence.outputs.get(site, [])
    if not rows:
        return f"To see why, {evidence.watch}.", {}
    ignored = min(row.get("ignored_labels", 0.0) for row in rows)
    if ignored == 1:
        return "The loss ignores every label (ignore_index).", {"predicted": 1.0, "ignored_labels": ignored}
    if flat := rows[-1].get("flat"):
        return f"The derivative of {flat} is zero everywhere.", {"predicted": 1.0, "flat": flat}
    chain = next(chain for chain in reversed(evidence.chains) if chain.site == site)
    for before, step in pairwise(chain.steps):
        if step.closed == before.elements:
            return f"The derivative of {step} is zero for all that comes in.", {"predicted": 1.0, "op": step.op}
    if chain.zero_operand:
        return f"{chain.steps[-1].readers[0]} multiplies its output by zero.", {"predicted": 1.0}
    readers = dict.fromkeys(reader for step in chain.steps for reader in step.readers)
    return f"Its output is read by {', '.join(readers) or 'what was not seen'}.", {"readers": list(readers)}


def arrival(evidence: Evidence) -> Iterator[Finding]:
    """Say why no gradient reached a site; sites with the same reason share a finding."""
    reasons = _reasons(evidence)
    sites_by_reason: dict[str, list[str]] = defaultdict(list)
    for site in evidence.sites:
        if site in reasons:
            sites_by_reason[reasons[site]].append(site)
    everywhere = len(reasons) == len(evidence.sites)
    for reason, sites in sites_by_reason.items():
        yield _finding(reason, tuple(sites), evidence, everywhere)
    learns = any(row.get("trainable", -1) == 1 for rows in evidence.outputs.values() for row in rows)
    amid = [site for site in evidence.outputs if site not in reasons and _is_frozen(evidence, site)]
    if amid and learns:  # where all is frozen, as in recording photographs, it is on purpose
        yield _frozen_amid(evidence, tuple(amid))
    unseen = {row["site"]: row["arrival"] for row in evidence.watched if row["arrival"] in _UNSEEN}
    if unseen:
        by_reason = {why: [site for site in unseen if unseen[site] == why] for why in dict.fromkeys(unseen.values())}
        raise NotLookedAt("; ".join(f"not at {listed(sites)}: {_UNSEEN[why]}" for why, sites in by_reason.items()))


def _is_frozen(evidence: Evidence, site: str) -> bool:
    return all(row.get("trainable", -1) == 0 for row in evidence.outputs[site])


def _frozen_amid(evidence: Evidence, sites: tuple[str, ...]) -> Finding:
    """Report layers that a gradient passes and that do not learn from it."""
    share = len(sites) / len(evidence.outputs)
    flag, owned = ("trainable", "weights") if evidence.framework == "keras" else ("requires_grad", "parameters")
    return Finding(
        "frozen",
        "info",
        sites,
        f"{listed(sites)}: a gradient passes, but {flag} is False for all of "
        f"{'its' if len(sites) == 1 else 'their'}"
        f" {owned}, so nothing learns there ({percent(share)} of the sites that a gradient reaches).",
        {"reason": "frozen amid others", "predicted": 0, "observed": 0, "share": share},
        f"Set {flag}=True if they are to learn; as part of fine-tuning it is ordinary.",
        f"{flag} of the {owned} in the watched batches",
    )


def _reasons(evidence: Evidence) -> dict[str, str]:
    if not evidence.watched:
        return dict(evidence.run.manifest.get("unreached", {}))
    return {
        row["site"]: row["arrival"]
        for row in evidence.watched
        if row["step"] == 0
        and row["arrival"] not in ("arrived", INSIDE, *_UNSEEN)
        and row["site"] not in evidence.outputs
        and row["site"] in evidence.position
    }


def _finding(reason: str, sites: tuple[str, ...], evidence: Evidence, everywhere: bool) -> Finding:
    watched = bool(evidence.watched)
    if reason in _CAUSES:
        cause, severity, description, remedy = _CAUSES[reason]
        if evidence.framework == "keras":
            description, remedy = _OF_KERAS.get(reason, description), _REMEDIES_OF_KERAS.get(reason, remedy)
    elif watched:
        cause, severity, description = "detached", "warning", f"called, but its gradient is cut off by {reason}"
        how = next((name for name in _INSTEAD if reason.startswith(name)), None)
        remedy = f"Remove {reason} if the layers before it are to learn."
        if how is not None:
            remedy = f"If the layers before {reason} are to learn, {_INSTEAD[how]}."
    else:
        cause, severity, description = "unreached", "warning", f"no gradient ({reason})"
        remedy = f"To see why, {evidence.watch}."
    if everywhere and severity == "warning" and reason != "never called":
        severity, description = "error", f"{description}; no gradient arrives anywhere"
    return Finding(
        cause,
        severity,
        sites,
        f"{listed(sites)}: {description}.",
        {"reason": reason, "predicted": 0, "observed": 0},
        remedy,
        "the autograd graph of the watched batches" if watched else "the sites of the run that have no rows",
    )
