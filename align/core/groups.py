"""Groups of consecutive ranks: workers of one engine, or ranks that share the tokens of rows."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from align.core.distributed import new_group, rank, world_size


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Consecutive ranks, of which this one is the member ``index``.

    Attributes:
        size: number of ranks.
        index: place of this rank among them.
        channel: torch's process group; None for a rank alone.
    """

    size: int = 1
    index: int = 0
    channel: Any = None

    def gather(self, value: object) -> list[Any]:
        """Return the picklable ``value`` of every rank of the group, in rank order, on each."""
        if self.channel is None:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.channel)
        return out


ALONE = RankGroup()
"""The group of a rank that shares nothing."""


def rank_group(size: int, *, backend: str | None = "gloo") -> RankGroup:
    """Return this rank's group of ``size`` consecutive ranks; all ranks must call this.

    Args:
        size: ranks of a group, a divisor of the number of ranks.
        backend: of the group; None for that of the stage's ranks, which exchanges tensors.
    """
    assert world_size() % size == 0, (world_size(), size)
    if size == 1:
        return ALONE
    channel = None
    # Every rank takes part in the creation of every group, in the same order.
    for start in range(0, world_size(), size):
        made = new_group(range(start, start + size), backend=backend)
        channel = made if start == rank() // size * size else channel
    return RankGroup(size, rank() % size, channel)


_sharing = ALONE


def share_rows(size: int) -> None:
    """Make groups of ``size`` ranks share the tokens of each row; all ranks must call this.

    The ranks of a group then have the same rows, and make the same passes of a model.
    """
    global _sharing
    if size != _sharing.size:
        _sharing = rank_group(size, backend=None)


def sharing() -> RankGroup:
    """Return the ranks with which this one shares the tokens of each row."""
    return _sharing


def row_ranks() -> tuple[int, int]:
    """Return the number of groups that have rows of their own, and the number of this rank's."""
    return world_size() // _sharing.size, rank() // _sharing.size
