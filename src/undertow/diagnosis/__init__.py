"""From a run to findings: what is wrong, why, and the evidence for it. One file per family of causes; no framework."""

import os
from collections.abc import Callable, Iterator

from ..errors import RunError, UndertowError, one_line, printable
from ..runs import Run
from .arrival import arrival, nothing
from .channels import batch_norm
from .contrast import coincidences as coincidences
from .contrast import contrast as contrast
from .course import jump, noise
from .dead import dead
from .depth import depth
from .depth import fit as fit
from .evidence import Evidence
from .finding import CAUSES as CAUSES
from .finding import SEVERITIES as SEVERITIES
from .finding import Finding as Finding
from .finding import Findings as Findings
from .finding import NotLookedAt, NotRecorded
from .learning import clipping, learning_rate, optimizer, weight_decay
from .live import Live as Live
from .precision import nonfinite, underflow
from .routing import activation, pooling
from .saturation import saturated

RULES: dict[str, Callable[[Evidence], Iterator[Finding]]] = {
    "nothing": nothing,
    "non-finite": nonfinite,
    "dead": dead,
    "saturated": saturated,
    "arrival": arrival,
    "depth": depth,
    "underflow": underflow,
    "batch-norm": batch_norm,
    "optimizer": optimizer,
    "learning-rate": learning_rate,
    "clipping": clipping,
    "weight-decay": weight_decay,
    "jump": jump,
    "noise": noise,
    "pooling": pooling,
    "activation": activation,
}
"""The rules, in the order in which their findings are listed. A new cause is one function and one row."""


def sizes(run: Run) -> dict[str, float]:
    """Return the size of the gradient at each site whose gradient is not all zero, in order of execution.

    The size is the median of |g| over its nonzero elements, or, without histograms, the root mean square of all.
    """
    return Evidence(run).sizes


def diagnose(run: Run | str | os.PathLike[str]) -> Findings:
    """Find what is wrong or remarkable in a run, and why.

    Each finding names its cause, the sites, predicted and observed values, a remedy, and its source. Without
    `record(..., diagnose=True)` some causes cannot be checked; `.checked` says which.

    Args:
        run: a run with gradients, finished or not, or its folder's path.

    Returns:
        Findings: a list of `Finding`, the most severe first.

    Raises:
        RunError: a file of the run is damaged, or holds rows that cannot be.

    >>> import tempfile, torch, undertow as ut
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten())
    >>> with ut.record(folder := tempfile.mkdtemp(), net, sites="conv", diagnose=True) as recording:
    ...     with recording.batch():
    ...         net(torch.arange(100.0).sin().view(1, 1, 10, 10)).sum().backward()
    >>> [(f.cause, f.evidence["predicted"], f.evidence["observed"]) for f in ut.diagnose(ut.Run(folder))]
    [('pooling', 0.75, 0.75)]
    """
    return diagnosed(Evidence(Run.of(run)))


def diagnosed(evidence: Evidence) -> Findings:
    """Let every rule look at the evidence."""
    findings: list[Finding] = []
    checked = {}
    for name, rule in RULES.items():
        try:
            for finding in rule(evidence):
                findings.append(finding)
            checked[name] = "checked"
        except NotRecorded as error:
            checked[name] = f"not checked: {error}"
        except NotLookedAt as error:
            checked[name] = f"checked, but {error}"
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, UndertowError):
                raise
            reason = f"{name}: {type(error).__name__}: {one_line(error)[:120]}"
            raise RunError(
                f"{printable(evidence.run.folder)} cannot be diagnosed ({reason}); if undertow check says that it is "
                "whole and nobody has written into it, report that"
            ) from error
    return Findings(findings, checked)
