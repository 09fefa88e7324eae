"""A world of one rank inside the test process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from align.core import distributed
from align.pipeline.processes import free_port


@contextmanager
def world_of_one() -> Iterator[None]:
    """Make this process a world of its own; the environment is as before afterwards.

    Processes that a later test starts would take the launcher's variables for theirs. The process
    group stays: DeepSpeed does not make a second one.
    """
    import deepspeed

    before = dict(os.environ)
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    distributed.init_process_group()
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
