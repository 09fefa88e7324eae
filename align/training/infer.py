"""Run a model over rows without gradients, packed by a token budget and split across ranks."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from align.core import distributed
from align.core.groups import row_ranks
from align.data.batching import plan_micro_batches
from align.models.sharding import is_sharded
from align.training.batch import PackedBatch
from align.training.results import ResultFile

log = logging.getLogger(__name__)
PROGRESS_S = 30.0
"""Seconds between two lines of progress."""
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
    store: ResultFile | None = None,
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
        store: keeps this rank's results while they are computed and reports the progress. What it
            already has is not computed again; of a sharded model, what all ranks have.
    """
    model.eval()
    ranks, rank = row_ranks() if share else (1, 0)
    plan = plan_micro_batches(
        [length(row) for row in rows], micro_tokens=micro_tokens, ranks=ranks, padded=padded
    )
    # A rank with fewer micro-batches runs empty ones: ZeRO-3 needs equally many passes.
    mine: dict[int, Result] = {}
    progress, sharded = Progress(sum(map(len, plan[rank]))), is_sharded(model)
    for number, micro in enumerate(plan[rank]):
        results = None if store is None else store.read(number, micro)
        if sharded and store is not None and distributed.global_max(float(results is None)):
            results = None
        if results is None:
            results = fn(model, collate([rows[i] for i in micro]))
            if store is not None:
                store.write(number, micro, results)
                progress.report(store.what, len(mine) + len(micro), computed=len(micro))
        mine |= dict(zip(micro, results, strict=True))
    # Every rank receives all results, keyed by the row's position.
    parts = distributed.gather_objects(mine) if share else [mine]
    found = {i: result for part in parts for i, result in part.items()}
    return [found[i] for i in range(len(rows))]


class Progress:
    """Lines about a pass over rows, at most one every ``PROGRESS_S`` seconds."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._computed = 0
        self._began = self._said = time.monotonic()

    def report(self, what: str, done: int, *, computed: int) -> None:
        """Log how many rows are done, and the time left at the speed of this process."""
        self._computed += computed
        now = time.monotonic()
        if now - self._said < PROGRESS_S or not self._computed:
            return
        self._said = now
        # At the speed of this process: results read from disk took no time and are not counted.
        left = (self._total - done) * (now - self._began) / self._computed
        minutes, seconds = divmod(round(left), 60)
        log.info(
            "%s: %s of %s rows, eta %d:%02d",
            what,
            f"{done:,}",
            f"{self._total:,}",
            minutes,
            seconds,
        )
