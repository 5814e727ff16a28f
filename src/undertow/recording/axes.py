"""The axes of sites' outputs: as a user gives them, and as the manifest of a run says them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..frameworks.base import NamedModule
from ..frameworks.results import Observation
from ..sites import selection


def given_axes(axes: str | Mapping[str, str] | None, modules: Sequence[NamedModule]) -> dict[str, str]:
    """Return the letters that a user gave for the outputs of modules, by the modules' names.

    Raises:
        InputError: letters that say nothing, or a selection that names no module.
    """
    by_selection: list[tuple[str | None, Any]] = [(None, axes)] if axes else []
    if isinstance(axes, Mapping):
        by_selection = [*axes.items()]
    given: dict[str, str] = {}
    for what, letters in by_selection:
        if not isinstance(letters, str) or sorted({letters.count(letter) for letter in "bc"}) not in ([1], [0, 1]):
            raise InputError(f"axes {letters!r} are not understood; write a letter for each, as in 'tbc' or 'bhwc'")
        names = [named.name for named in modules] if what is None else selection(what).candidates(modules)
        given |= dict.fromkeys(names, letters)
    return given


class SiteAxes:
    """The axes of each site's outputs that were seen, and which of them are not sure.

    Args:
        given: the letters that a user gave for some of them in particular.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._axes: dict[str, dict[str, str]] = {}
        self._unsure: dict[str, str] = {}

    def note(self, observations: Sequence[Observation]) -> None:
        """Note those of observations.

        Raises:
            InputError: letters were given for a site none of whose outputs has as many axes.
        """
        lengths: dict[str, set[int]] = defaultdict(set)
        for o in observations:
            lengths[o.key.site].add(len(o.axes))
        for site, letters in self._given.items():
            if site in lengths and len(letters) not in lengths[site]:
                raise InputError(f"axes {letters!r} were given for {site}, whose output has {max(lengths[site])} axes")
        for o in observations:
            self._axes.setdefault(o.key.site, {}).setdefault(o.key.output, o.axes)
            hides_channels = len(o.axes) > 2 and "c" not in o.axes
            unsure = ["samples"] * (not o.sampled) + ["channels (the second is taken)"] * hides_channels
            if unsure:
                self._unsure.setdefault(o.key.site, f"which axis holds the {' and the '.join(unsure)}")

    def to_dict(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the manifest says: a letter for each axis, and the sites at which some are not sure.

        `before` is what it said, as of the part of the run that was recorded earlier.
        """
        return {"axes": before.get("axes", {}) | self._axes, "unsure": before.get("unsure", {}) | self._unsure}
