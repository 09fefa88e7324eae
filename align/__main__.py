"""The command ``align``, also as ``python -m align``.

Nothing is imported before signals have an effect: a scheduler may stop a run in its first second.
"""

import os
import signal
import sys
from types import FrameType

EXIT_PREEMPTED = 75


def _stop(_signum: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_PREEMPTED)


def main() -> None:
    """Run the command line; until a run has its own handlers, SIGTERM ends it with 75."""
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
    from align.cli import app

    app()


if __name__ == "__main__":
    main()
