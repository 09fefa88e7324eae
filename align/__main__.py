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


def open_missing_streams() -> None:
    """Open /dev/null for each standard stream that the caller closed.

    Otherwise the next file that is opened would take its place, and get what is written to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def main() -> None:
    """Run the command line; until a run has its own handlers, a signal to stop ends it with 75."""
    open_missing_streams()
    if sys.argv[1:2] == ["run"]:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup has set SIGHUP to be ignored.
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, _stop)
    from align.cli import app

    app()


if __name__ == "__main__":
    main()
