"""SIGTERM and SIGINT ask a stage to save a checkpoint and stop after the step it is in."""

import signal
from types import FrameType

from align.core import distributed

_asked = False


def _ask(_signum: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True


def install() -> None:
    """Answer SIGTERM and SIGINT by a request instead of an abrupt end."""
    signal.signal(signal.SIGTERM, _ask)
    signal.signal(signal.SIGINT, _ask)


def stop_requested() -> bool:
    """Say on every rank alike whether any rank was asked to stop."""
    return distributed.global_max(float(_asked)) > 0.0
