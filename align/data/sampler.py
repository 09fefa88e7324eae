"""Choose rows as a pure function of (seed, step), so that a resumed run needs no saved state."""

import hashlib

import numpy as np


def epoch_indices(num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """Give the order of the rows in an epoch: a permutation of ``range(num_rows)``."""
    digest = hashlib.sha256(f"sampler/epoch/{seed}/{epoch}".encode()).digest()
    stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return stream.permutation(num_rows).tolist()


def batch_places(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[tuple[int, int]]:
    """Give (row, epoch) of each row of one step from the endless stream of epochs laid end to end.

    Step s covers positions ``s * batch_size`` up to ``(s + 1) * batch_size``: every row is used
    once per epoch, and a batch may reach over the border of two epochs (then a row can stand in
    it twice).

    Args:
        num_rows: rows of the data set, at least 1.
        batch_size: rows of a step.
        seed: seed of the order.
        step: number of the step, from 0.
    """
    assert min(num_rows, batch_size) >= 1, (num_rows, batch_size)
    assert step >= 0, step
    position, end = step * batch_size, (step + 1) * batch_size
    places: list[tuple[int, int]] = []
    while position < end:
        epoch, offset = divmod(position, num_rows)
        part = epoch_indices(num_rows, seed=seed, epoch=epoch)[offset : offset + end - position]
        places += [(row, epoch) for row in part]
        position += len(part)
    return places


def batch_indices(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """Give the rows of one step; see ``batch_places``."""
    return [row for row, _ in batch_places(num_rows, batch_size, seed=seed, step=step)]
