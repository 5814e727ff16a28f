"""Which batches are recorded."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ..display import ShownFields
from ..errors import InputError


@dataclass(frozen=True, repr=False)
class Schedule(ShownFields):
    """Which batches are recorded: of which epochs, how many from the first on, and every how many.

    Args:
        epoch: one epoch or several, from 0; negative ones count from the end of `epochs`. None is every epoch.
        first: how many batches of such an epoch; None is all.
        epochs: how many epochs there are; needed for a negative epoch.
        every: 1 is every batch, 10 the batches 0, 10, 20, ...

    Raises:
        InputError: a value that cannot be used.

    >>> last = Schedule(epoch=-1, first=50, epochs=10)
    >>> last.wants(9, 49), last.wants(9, 50), last.wants(8, 0)
    (True, False, False)
    """

    epoch: int | Collection[int] | None = None
    first: int | None = None
    epochs: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("epochs", self.epochs), ("every", self.every)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name}={value!r} of a schedule must be a whole number above 0")
        for epoch in self._asked() or ():
            if not isinstance(epoch, int) or isinstance(epoch, bool):
                raise InputError(f"epoch={epoch!r} of a schedule must be a whole number, several of them, or None")
            if epoch < 0 and self.epochs is None:
                raise InputError(f"epoch={epoch} counts from the end: say how many there are, as in epochs=10")
            if self.epochs is not None and not -self.epochs <= epoch < self.epochs:
                raise InputError(f"epoch={epoch} is beyond the {self.epochs} epochs, 0 to {self.epochs - 1}")

    def wants(self, epoch: int, batch: int) -> bool:
        """Whether a batch is recorded; both are counted from 0, `batch` within its epoch."""
        asked = self._asked()
        if asked is not None and epoch not in {one if one >= 0 else one + (self.epochs or 0) for one in asked}:
            return False
        return batch % self.every == 0 and (self.first is None or batch // self.every < self.first)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        asked = self._asked()
        return {**asdict(self), "epoch": None if asked is None else sorted(asked)}

    def _asked(self) -> Collection[int] | None:
        return (self.epoch,) if isinstance(self.epoch, int) else self.epoch
