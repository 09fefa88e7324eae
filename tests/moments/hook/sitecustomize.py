"""Python imports this module at its start, where PYTHONPATH names its folder (tests.moments)."""

import os
import signal
import sys
import time

AT, ACTION = os.environ["ALIGN_TEST_AT"], os.environ["ALIGN_TEST_ACTION"]
MARK = os.environ["ALIGN_TEST_MARK"]


def _act(event: str, args: tuple) -> None:
    makes = event == "os.mkdir" or (event == "open" and _writes(args[2]))
    if makes and AT in os.fsdecode(_path(args[0])) and not os.path.exists(MARK):
        os.close(os.open(MARK, os.O_CREAT))
        if ACTION == "wait":
            _wait_for_sigterm()
        else:
            os.killpg(0, getattr(signal, ACTION))


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _path(path: object) -> str | bytes:
    return os.fspath(path) if isinstance(path, str | bytes | os.PathLike) else ""


def _wait_for_sigterm() -> None:
    seen: list[int] = []
    own = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda signum, _frame: seen.append(signum))
    while not seen:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, own)
    signal.raise_signal(signal.SIGTERM)


if os.environ.get("RANK", "0") == "0":
    sys.addaudithook(_act)
