"""Faults inside a stage's process, by Python's audit events: each file operation in its folder."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
ON_FULL = ("os.mkdir", "os.link", "os.symlink")
"""Operations that need space; renaming and removing do not."""


def on_write(do: Callable[[int, str, str], None]) -> None:
    """Call ``do(number, event, path)`` before each operation that changes a file below run/."""
    inside = f"{os.getcwd()}/run/"
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in CHANGES:
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return
        path = os.path.abspath(path)
        if not path.startswith(inside):
            return
        count += 1
        do(count, event, path)

    sys.addaudithook(hook)


def count_writes(counted: Path) -> None:
    """Write one line for each operation to a file outside run/."""
    if os.environ.get("RANK", "0") != "0":
        return
    fd = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    on_write(lambda _, event, path: os.write(fd, f"{event} {path}\n".encode()) and None)


def kill_at(number: int) -> None:
    """Kill this process before an operation of that number; rank 0 only."""

    def do(count: int, _event: str, _path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("RANK", "0") == "0":
        on_write(do)


def kill_at_path(end: str) -> None:
    """Kill this process before it makes the folder or file whose path ends so."""

    def do(_count: int, _event: str, path: str) -> None:
        if path.endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)

    on_write(do)


def fail_from(number: int, code: int, *, once: bool) -> None:
    """Fail every operation from that number on which needs space, as a full disk does.

    Args:
        number: of the first operation that fails.
        code: the errno, such as ENOSPC.
        once: fail that one operation alone.
    """

    def do(count: int, event: str, path: str) -> None:
        needs_space = (
            event == "open" or event in ON_FULL or code not in (errno.ENOSPC, errno.EDQUOT)
        )
        if needs_space and (count == number if once else count >= number):
            raise OSError(code, os.strerror(code), path)

    on_write(do)
