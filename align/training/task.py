"""What an offline method trains on: rows, their collation and the loss of a micro-batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import nn

from align.core.groups import row_ranks, sharing
from align.data.batching import plan_micro_batches
from align.training.batch import PackedBatch
from align.training.learner import LossFunction

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class OfflineTask(Generic[Row]):
    """Data, collation and loss of an offline method.

    Attributes:
        rows: training rows. heldout: rows for held-out evaluation during training.
        length: tokens of a row.
        collate: (rows of a micro-batch, rows of the whole batch) -> packed micro-batch with counts.
            The whole batch is for the counts alone.
        loss_fn: loss and statistics of a micro-batch.
        measure: (model, rows of the whole batch) -> numbers added to the counts of each of its
            micro-batches before the step; None measures nothing.
        padded: True if the rows of a micro-batch are padded to its longest row; the token budget
            then counts the padding.
    """

    rows: Sequence[Row]
    heldout: Sequence[Row]
    length: Callable[[Row], int]
    collate: Callable[[Sequence[Row], Sequence[Row]], PackedBatch]
    loss_fn: LossFunction
    measure: Callable[[nn.Module, Sequence[Row]], Mapping[str, float]] | None = None
    padded: bool = False


def micro_batches(
    task: OfflineTask[Any],
    batch: Sequence[Any],
    micro_tokens: int,
    *,
    counts: Mapping[str, float] | None = None,
) -> list[PackedBatch]:
    """Split a batch and return this rank's micro-batches.

    Args:
        task: lengths and collation. batch: rows. micro_tokens: token budget of one pass.
        counts: by which the loss divides; None for those of the batch.

    Ranks that share rows have the same micro-batches. Each of k of them contributes its k-th part
    of the loss and of the statistics, which are summed over all ranks.
    """
    given = counts_of(task, batch) if counts is None else counts
    given = {name: value * sharing().size for name, value in given.items()}
    ranks, rank = row_ranks()
    plan = plan_micro_batches(
        [task.length(row) for row in batch],
        micro_tokens=micro_tokens,
        ranks=ranks,
        padded=task.padded,
    )
    mine = [[batch[i] for i in micro] for micro in plan[rank]]
    return [replace(task.collate(rows, rows or batch[:1]), counts=given) for rows in mine]


def counts_of(task: OfflineTask[Any], batch: Sequence[Any]) -> Mapping[str, float]:
    """Return the counts of a batch.

    They are counted once: counting all held-out rows for each micro-batch took longer than the
    passes.
    """
    return task.collate(batch[:1], batch).counts


def measured(
    model: nn.Module, task: OfflineTask[Any], batch: Sequence[Any], *, micro_tokens: int
) -> list[PackedBatch]:
    """Return this rank's micro-batches with what the task measures on the batch in their counts."""
    micro = micro_batches(task, batch, micro_tokens)
    if task.measure is None:
        return micro
    found = task.measure(model, batch)
    return [replace(m, counts={**m.counts, **found}) for m in micro]
