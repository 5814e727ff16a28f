"""How a source is cut: shards of consecutive indices, batches within a shard, and which process takes which."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shards:
    """`count` items cut into shards of `size`; the last may be shorter. No item is in two shards, none in no shard.

    >>> shards = Shards(count=10, size=4)
    >>> len(shards), [list(shards[n]) for n in range(len(shards))]
    (3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    """

    count: int
    size: int

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, shard: int) -> range:
        """Return the indices of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def of(self, index: int) -> int:
        """Return the shard that holds an item.

        >>> Shards(10, 4).of(8)
        2
        """
        return index // self.size

    def missing(self, done: Collection[int]) -> list[int]:
        """Return the shards that are not done, in order.

        >>> Shards(10, 4).missing({1})
        [0, 2]
        """
        return [shard for shard in range(len(self)) if shard not in done]

    def items(self, shards: Collection[int]) -> int:
        """Return how many items these shards hold."""
        return sum(len(self[shard]) for shard in shards)

    def batches(self, shard: int, batch_size: int) -> Iterator[range]:
        """Cut a shard into batches; none goes over into the next shard.

        >>> list(Shards(10, 4).batches(2, 4))
        [range(8, 10)]
        """
        indices = self[shard]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
