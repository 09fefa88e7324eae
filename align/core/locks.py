"""Wait for other processes by locks on files, which the system frees when their holder ends."""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
_POLL_S = 0.2


@contextmanager
def held(path: Path, *, waiting: str) -> Iterator[None]:
    """Lock a file inside the block; its folder is made.

    On a file system without locks the block runs at once, so it must also be right then.

    Args:
        path: of the lock, which stays: removing it would let two processes in.
        waiting: what is logged when another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        told = False
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    log.info("%s", waiting)
                    told = True
                time.sleep(_POLL_S)
            except OSError as error:
                log.info("%s: no locks on this file system: %s", path.parent, error.strerror)
                break
        yield
