"""Run a model over rows without gradients, packed by a token budget and split across ranks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from align.core import distributed
from align.data.batching import plan_micro_batches
from align.training.batch import PackedBatch

Row = TypeVar("Row")
Result = TypeVar("Result")


@torch.no_grad()
def map_rows(
    model: nn.Module,
    rows: Sequence[Row],
    fn: Callable[[nn.Module, PackedBatch], Sequence[Result]],
    *,
    length: Callable[[Row], int],
    collate: Callable[[list[Row]], PackedBatch],
    micro_tokens: int,
    padded: bool = False,
    share: bool = True,
) -> list[Result]:
    """Return the result of ``fn`` for every row, in the order of the rows; dropout is off.

    All ranks take part, and each gets the results of all rows.

    Args:
        model: passed to ``fn``. rows: the same on every rank.
        fn: (model, packed rows) -> one result per row.
        length: tokens of a row. collate: rows of a micro-batch -> packed micro-batch.
        micro_tokens: token budget of one pass.
        padded: True if rows are padded, see ``plan_micro_batches``.
        share: True splits the rows across ranks; False runs all rows on every rank.
    """
    model.eval()
    ranks, rank = (distributed.world_size(), distributed.rank()) if share else (1, 0)
    plan = plan_micro_batches(
        [length(row) for row in rows], micro_tokens=micro_tokens, ranks=ranks, padded=padded
    )
    # A rank with fewer micro-batches runs empty ones: ZeRO-3 needs equally many passes.
    mine: dict[int, Result] = {}
    for micro in plan[rank]:
        results = fn(model, collate([rows[i] for i in micro]))
        mine |= dict(zip(micro, results, strict=True))
    # Every rank receives all results, keyed by the row's position.
    parts = distributed.gather_objects(mine) if share else [mine]
    found = {i: result for part in parts for i, result in part.items()}
    return [found[i] for i in range(len(rows))]
