"""Which of a batch's names each row of an observation bears: names fit, or are spread over passes, or are refused."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from ..errors import InputError
from ..frameworks.results import Observation


def give_names(
    names: Sequence[str] | None, observations: Sequence[Observation], inputs: Collection[int]
) -> dict[str, str]:
    """Set each observation's `first`, and return the sites that bear no name, each with the reason.

    All rows of an observation bear all names, where their numbers agree. Where they agree nowhere, the names are those
    of several passes of the network, one after another, or of several calls of each site.

    Args:
        names: of the batch's samples; None where it has none.
        observations: those of modules.
        inputs: how many samples the network may have been called with, where that is known.

    Raises:
        InputError: there are more or fewer names than samples.
    """
    sampled = [o for o in observations if o.sampled]
    for o in observations:
        o.first = 0 if o.sampled and (names is None or o.size == len(names)) else -1
    if names is None or not observations:
        return {}
    if sampled and all(o.first < 0 for o in sampled):
        _spread(len(names), sampled)
    if sampled and all(o.first < 0 for o in sampled) and not _is_folded(len(names), sampled, inputs):
        raise InputError(_mismatch(len(names), sampled))
    return {o.key.site: _why_none(o, len(names)) for o in observations if o.first < 0}


def n_samples(names: Sequence[str] | None, observations: Iterable[Observation], told: int | None) -> int:
    """Return how many samples a batch has: as many as names, else as its sites say; 0 where that is not sure."""
    if names is not None:
        return len(names)
    sampled = [o for o in observations if o.sampled]
    certain = [o.size for o in sampled if o.certain]
    return max(certain or ([told] if told else [o.size for o in sampled]), default=0)


def _spread(n_names: int, sampled: Sequence[Observation]) -> None:
    """Give each pass of the network its own stretch of the names, or each call of a site, where these add up."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for o in sampled:
        sizes[o.run].add(o.size)
    if len(sizes) > 1 and all(len(of_run) == 1 for of_run in sizes.values()):
        lengths = {run: next(iter(of_run)) for run, of_run in sizes.items()}
        if sum(lengths.values()) == n_names:
            starts = _starts(lengths)
            for o in sampled:
                o.first = starts[o.run]
            return
    by_site: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for o in sampled:
        by_site[o.key.site, o.key.output][o.key.call] = o.size
    for o in sampled:
        lengths = by_site[o.key.site, o.key.output]
        if len(lengths) > 1 and sum(lengths.values()) == n_names:
            o.first = _starts(lengths)[o.key.call]


def _starts(lengths: dict[int, int]) -> dict[int, int]:
    starts, total = {}, 0
    for key in sorted(lengths):
        starts[key] = total
        total += lengths[key]
    return starts


def _is_folded(n_names: int, sampled: Sequence[Observation], inputs: Collection[int]) -> bool:
    """Whether the names fit the batch, though no site has its samples in an axis of their own, as tokens may lie."""
    if any(o.certain for o in sampled):
        return False
    if inputs:
        return n_names in inputs
    return n_names > 1 and all(o.size % n_names == 0 for o in sampled)


def _mismatch(n_names: int, sampled: Sequence[Observation]) -> str:
    first = next((o for o in sampled if o.certain), sampled[0])
    calls = {(o.run, o.key.call): o.size for o in sampled if o.key.site == first.key.site}
    there = f"{first.size} samples" if len(calls) == 1 else f"passes of {', '.join(map(str, calls.values()))} samples"
    return (
        f"{n_names} names were given, and the batch has {there} at {first.key.site or 'the model'}; pass one name for "
        "each sample, of all passes inside the batch in turn"
    )


def _why_none(o: Observation, n_names: int) -> str:
    if not o.sampled:
        return "it is not sure which axis holds the samples"
    return f"its first axis is {o.size} long, and there are {n_names} names"
