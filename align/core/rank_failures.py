"""End every rank when one fails, even if the others are waiting in a collective.

gloo detects that a rank has exited. NCCL does not, and neither detects a rank that is still running
but in a different collective. A rank that fails therefore leaves a note in the process group's
store, and a thread on every rank polls for it.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from align.core import distributed
from align.core.errors import EXIT_FAILED, EXIT_PREEMPTED, AlignError

log = logging.getLogger(__name__)
LOST = "another rank of this stage has ended; its own message has the reason"
"""Beginning of the message of a rank that exits because another one failed."""
GRACE_S = 20.0
"""Seconds that a rank has to exit by itself after a failure before it is terminated."""
MEET_S = 20.0
"""Seconds that a rank whose check failed waits for the others to reach the end of the check."""
POLL_S = 1.0
_NOTE = "failed"
_store: Any = None
_ending = threading.Event()


def watch_ranks() -> None:
    """Start the thread that ends this process if another rank fails; a single rank needs none."""
    global _store
    if distributed.world_size() == 1 or _store is not None:
        return
    # Separate connections: a call here must not wait behind a long one of the main thread.
    found: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore
    _store, watched = (PrefixStore("align/failures", found.clone()) for _ in range(2))
    threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def stop_watching() -> None:
    """Stop the watching thread, so that this process exits normally or reports its own error."""
    _ending.set()


@contextmanager
def announced() -> Iterator[None]:
    """Notify the other ranks of an error inside the block before any cleanup begins."""
    try:
        yield
    except Exception as error:
        announce(error)
        raise


def announce(error: Exception) -> None:
    """Record an error for the other ranks, unless there is one or the stage was asked to stop."""
    code = error.exit_code if isinstance(error, AlignError) else EXIT_FAILED
    if _store is None or code == EXIT_PREEMPTED or distributed.was_asked():
        return
    told = str(error) if isinstance(error, AlignError) else f"{type(error).__name__}: {error}"
    note = json.dumps({"rank": distributed.rank(), "code": code, "error": told[:2000]})
    try:
        _store.compare_set(_NOTE, "", note)
    except (RuntimeError, dist.DistError):  # rank 0, which has the store, is gone
        return


def _watch(store: Any) -> None:
    note: dict[str, Any] = {}
    while not _ending.is_set():
        try:
            if store.check([_NOTE]):
                note = json.loads(store.get(_NOTE))
                break
        except (RuntimeError, dist.DistError):  # rank 0 is gone
            break
        time.sleep(POLL_S)
    if _ending.wait(GRACE_S):
        return
    rank, code = note.get("rank", 0), note.get("code", EXIT_FAILED)
    if rank == distributed.rank():
        log.error("%s", note["error"])
    elif distributed.was_asked():
        code = EXIT_PREEMPTED
        log.warning("stopped by a signal. Run the same command again to resume")
    else:
        log.error("%s (rank %d: %s)", LOST, rank, note.get("error", "it has exited"))
    distributed.end_process(code)


class Meeting:
    """Counter of the points that every rank has reached, without a collective."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._passed = 0

    def arrive(self) -> None:
        """Record that this rank has reached the next point."""
        self._passed += 1
        if _store is not None:
            _store.add(f"{self._name}/{self._passed}", 1)

    def all_arrived(self) -> bool:
        """Return whether every rank reaches this rank's point within ``MEET_S`` seconds."""
        if _store is None:
            return True
        deadline, place = time.monotonic() + MEET_S, f"{self._name}/{self._passed}"
        while _store.add(place, 0) < distributed.world_size():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True
