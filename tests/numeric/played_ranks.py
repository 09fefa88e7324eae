"""Ranks played by threads of one process: what they exchange is gathered in rank order."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from align.core import distributed


def play(monkeypatch: pytest.MonkeyPatch, ranks: int, rank_of: Callable[[int], Any]) -> list[Any]:
    """Return the results of ``rank_of(rank)`` on a world of ranks, in rank order."""
    barrier, box, here = threading.Barrier(ranks), [None] * ranks, threading.local()

    def gather(value: Any) -> list[Any]:
        box[here.rank] = value
        barrier.wait(timeout=120)
        found = list(box)
        barrier.wait(timeout=120)
        return found

    def sums(values: dict[str, float]) -> dict[str, float]:
        parts = gather(values)
        return {name: sum(part[name] for part in parts) for name in values}

    monkeypatch.setattr(distributed, "rank", lambda: here.rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "gather_objects", gather)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: gather(value)[0])
    monkeypatch.setattr(distributed, "global_sums", sums)
    monkeypatch.setattr(distributed, "global_sum", lambda value: sum(gather(value)))
    monkeypatch.setattr(distributed, "global_max", lambda value: max(gather(value)))
    found: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        here.rank = rank
        try:
            found[rank] = rank_of(rank)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return found
