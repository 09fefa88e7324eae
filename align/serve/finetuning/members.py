"""All processes of a job: ``align run``, the stages, their ranks, and what these have started.

Stages and ranks have sessions of their own, and one whose parent has died has another parent. They
are therefore found by a mark in their environment, which is inherited, as well as by descent.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "ALIGN_SERVE_RUN"
"""Environment variable with the folder of the run for which a process works."""


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    is_marked: bool


def kill(run: Path, *, root: int | None = None) -> int:
    """Kill every process of a run; return their number.

    Args:
        run: folder of the run, which the processes have as ``MARK``.
        root: a process whose descendants belong to the run, too.
    """
    killed: set[int] = set()
    own = {root} if root else set[int]()
    # Again, because one of them may have started another meanwhile.
    while found := _members(run, own | killed) - killed:
        for pid in found:
            send(pid, signal.SIGKILL)
        killed |= found
    return len(killed)


def send(pid: int, signum: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def _members(run: Path, known: set[int]) -> set[int]:
    """Return the living processes that are marked, known, or descend from one of these."""
    alive = list(_processes(f"{MARK}={run.resolve()}".encode()))
    found = {p.pid for p in alive if p.is_marked or p.pid in known}
    while True:
        # A session counts if its leader does: the one of a terminal is not the run's.
        more = {p.pid for p in alive if {p.parent, p.session} & (found | known)} - found
        if not more:
            return found
        found |= more


def _processes(mark: bytes) -> Iterator[_Process]:
    """Yield the processes of this machine that have not ended."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # Fields after the name in parentheses: state, parent, group, session.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            marked = mark in _environment(entry)
        except OSError:  # it has ended
            continue
        if fields[0] not in "ZX":
            yield _Process(int(entry.name), int(fields[1]), int(fields[3]), marked)


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except PermissionError:  # another user's
        return []
