"""Select rows as a pure function of (seed, step), so that resuming needs no saved state."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from align.data.augment import AugmentedRows

Row = TypeVar("Row")


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the rows in an epoch; steps of one epoch share it."""
    digest = hashlib.sha256(f"sampler/epoch/{seed}/{epoch}".encode()).digest()
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return stream.permutation(num_rows)


def batch_places(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[tuple[int, int]]:
    """Return (row, epoch) for each row of one step, from an endless stream of concatenated epochs.

    Step s covers positions ``s * batch_size`` to ``(s + 1) * batch_size``. Every row is used once
    per epoch. A batch may span the boundary of two epochs and can then contain a row twice.

    Args:
        num_rows: number of rows in the dataset, at least 1.
        batch_size: number of rows per step.
        seed: random seed of the order.
        step: number of the step, from 0.
    """
    assert min(num_rows, batch_size) >= 1, (num_rows, batch_size)
    assert step >= 0, step
    position, end = step * batch_size, (step + 1) * batch_size
    places: list[tuple[int, int]] = []
    while position < end:
        # The position in the endless stream tells the epoch and the place in its order.
        epoch, offset = divmod(position, num_rows)
        part = _order(num_rows, seed, epoch)[offset : offset + end - position].tolist()
        places += [(row, epoch) for row in part]
        position += len(part)
    return places


def batch_indices(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """Return the rows of one step; see ``batch_places``."""
    return [row for row, _ in batch_places(num_rows, batch_size, seed=seed, step=step)]


def pick(rows: Sequence[Row], batch_size: int, *, seed: int, step: int) -> list[Row]:
    """Return the rows of one step themselves; see ``batch_places``."""
    places = batch_places(len(rows), batch_size, seed=seed, step=step)
    # Augmented rows differ between epochs, so the epoch belongs to the place.
    if isinstance(rows, AugmentedRows):
        return [cast("Row", rows.in_epoch(i, epoch)) for i, epoch in places]
    return [rows[i] for i, _ in places]
