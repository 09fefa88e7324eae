"""Groups of consecutive ranks that share one model: the workers of an engine."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from align.core.distributed import TIMEOUT, rank, world_size


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks that share a model with this rank, which is one of them.

    Attributes:
        ranks: their numbers.
        index: the place of this rank among them.
        channel: group of processes that exchanges objects; None for a rank alone.
    """

    ranks: range
    index: int
    channel: Any = None

    def gather(self, value: object) -> list[Any]:
        """Return the picklable ``value`` of every rank of the group, in rank order, on each."""
        if self.channel is None:
            return [value]
        out: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(out, value, group=self.channel)
        return out


def rank_group(size: int) -> RankGroup:
    """Return this rank's group of ``size`` consecutive ranks; all ranks must call this.

    Args:
        size: ranks of a group, a divisor of the number of ranks.
    """
    assert world_size() % size == 0, (world_size(), size)
    first = rank() // size * size
    mine = range(first, first + size)
    if size == 1:
        return RankGroup(mine, 0)
    channel = None
    # Every rank takes part in the creation of every group, in the same order.
    for start in range(0, world_size(), size):
        made = dist.new_group([*range(start, start + size)], backend="gloo", timeout=TIMEOUT)
        channel = made if start == first else channel
    return RankGroup(mine, rank() - first, channel)
