"""The row that a watched batch leaves of a point, whatever the framework: a line of the table `diagnosis`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..measures import ChannelSums, Histogram

AT_SITES = (Histogram(), ChannelSums())
"""What is measured of the gradient at a site's own output."""
_COUNTS = (
    *("zeros", "expected_zeros", "closed", "saturated"),
    *("broken_data", "broken_input", "broken_weights", "broken_output"),
)
_AMOUNTS = (
    *("absolute", "expected_absolute", "slope", "rms_slope", "norm", "operand", "gain"),
    *("weight_std", "ignored_labels"),
)


def has_arrived(state: Mapping[str, Any]) -> bool:
    """Whether a gradient was measured."""
    return "zeros" in state


def row_of(
    facts: Mapping[str, Any], state: dict[str, Any], readers: Sequence[str], read_by: Sequence[int]
) -> dict[str, Any]:
    """Return a point's row; what was not measured is NaN, -1 or an empty list.

    Args:
        facts: columns that are known of the forward pass.
        state: what was measured, on the host.
        readers: names of what reads the point and lets a gradient through.
        read_by: the numbers of the site outputs that read a site's output first.
    """
    columns: dict[str, Any] = {"readers": json.dumps(list(readers)), "active": [state.get("active", ())]}
    columns |= {"read_by": [list(read_by)]}
    measured = has_arrived(state) and facts["step"] == 0
    for measure in AT_SITES:
        columns |= measure.finish(state) if measured else {column: [()] for column in measure.columns}
    columns |= {key: int(state.get(key, -1)) for key in _COUNTS}
    columns |= {key: float(state.get(key, math.nan)) for key in _AMOUNTS}
    return {**facts, **columns, "shape": [facts["shape"]]}
