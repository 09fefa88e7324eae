"""The lock of a stage's or run's folder: one process at a time, even on a shared file system.

The lock is a file that is created exclusively, which is atomic on network file systems too. It
names its holder. A dead holder on this machine is detected immediately. A holder on another machine
(or in another container) counts as dead if it has not touched the file for ``SILENT_S``. Such a
holder may only have been suspended, or without its file system. When it goes on, it must not write
into what belongs to another process by now: ``refuse_if_taken`` is called before it does.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.core.artifacts import LOCK, read_json_object
from align.core.errors import ArtifactError, Preempted

TOUCH_S = 20.0
SILENT_S = 300.0
SIGN_EVERY_S = 1.0
RUN_LOCK = "run.lock"
"""Lock of a run's folder."""
PROBE = f"{LOCK}.now"
"""Start of the names of files that are created to read the file system's clock."""


def started_at(pid: int) -> str | None:
    """Return the start time of a process on this machine, in clock ticks; None if there is none."""
    try:
        # The second field, the command's name, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie is dead: only its parent has not collected it yet.
    return None if fields[0] in "ZX" else fields[19]


def _here() -> str:
    """Return an id of this machine and container, within which process ids are meaningful."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        namespace = boot = ""
    return f"{boot} {namespace}"


class StageLock:
    """Lock of a folder, until ``release`` or the end of the process."""

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        """Acquire the lock.

        Args:
            folder: the folder of a stage, or of a run.
            name: its file.

        Raises:
            ArtifactError: another process has it.
        """
        self.path = folder / name
        self._pid = os.getpid()
        self._stopped = threading.Event()
        self._mine = self._take()
        _held[self.path.resolve()] = self._mine
        self._sweep()
        threading.Thread(target=self._touch, name=f"lock of {folder}", daemon=True).start()

    def _take(self) -> dict[str, Any]:
        mine = {
            "host": socket.gethostname(),
            "place": _here(),
            "pid": self._pid,
            "started": started_at(self._pid),
        }
        # A dead holder is removed and the creation retried.
        for _ in range(3):
            try:
                fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                refuse_if_held(self.path.parent, self.path.name)
                self._remove_dead()
                continue
            try:
                with os.fdopen(fd, "w", encoding="utf-8") as f:
                    json.dump(mine, f)
                    f.flush()
                    os.fsync(f.fileno())
            except OSError:  # on a full disk, a file without a holder would refuse everybody
                self.path.unlink(missing_ok=True)
                raise
            return mine
        raise ArtifactError(
            f"{self.path}: other processes acquire this lock at the same time. Try again."
        )

    def _remove_dead(self) -> None:
        """Remove the file of a dead holder, but not one that another process created since."""
        # Rename before checking again: two processes may find the same dead holder.
        moved = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{self._pid}.tmp")
        try:
            self.path.rename(moved)
        except FileNotFoundError:
            return
        # The moved file is a new holder's lock: put it back.
        if _is_alive(moved):
            moved.rename(self.path)
        else:
            moved.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what starters left that were killed while they looked for a holder."""
        for path in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            if path.name.startswith(PROBE) or not _is_alive(path):
                path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._stopped.wait(TOUCH_S):
            # The lock of another process would never become stale.
            if _taken_by(self.path, self._mine) is not None:
                return
            try:
                os.utime(self.path)
            except OSError:
                continue

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        self._stopped.set()
        _held.pop(self.path.resolve(), None)
        # A forked child, or a holder whose lock was taken over, must not remove it.
        if os.getpid() == self._pid and read_json_object(self.path) == self._mine:
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # a failing disk; the lock of a process that has ended holds nobody
                return


_held: dict[Path, dict[str, Any]] = {}
"""What the locks of this process say, by file."""


def refuse_if_taken(folder: Path) -> None:
    """Raise if this process had the lock of a stage's folder and another one has it now.

    Raises:
        ArtifactError: names the holder.
    """
    path = folder / LOCK
    mine = _held.get(path.resolve())
    holder = None if mine is None else _taken_by(path, mine)
    if holder is not None:
        raise ArtifactError(
            f"{folder}: process {holder.get('pid')} on {holder.get('host')} has taken over this "
            f"stage, because this process gave no sign of life for {SILENT_S:.0f} s (suspended, or "
            "without its file system). Nothing more is written here"
        )


def _taken_by(path: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a lock says if it is another process's; None without a file too."""
    found = read_json_object(path)
    return None if found is None or found == mine else found


def refuse_if_held(folder: Path, name: str = LOCK) -> None:
    """Raise if another process is working in the folder of a stage or run.

    Raises:
        ArtifactError: names the holder and what to do.
    """
    path = folder / name
    if not _is_alive(path):
        return
    holder = read_json_object(path) or {}
    whole = f"{folder}: process {holder.get('pid')} on {holder.get('host')} is running this "
    whole += "stage" if name == LOCK else "run"
    if holder.get("place") == _here():
        raise ArtifactError(f"{whole}. Wait for it or stop it (if it is dead, remove {path}).")
    raise ArtifactError(
        f"{whole}. That machine or container cannot be looked into from here: a process that lives "
        f"touches {path} every {TOUCH_S:.0f} s, and after {SILENT_S:.0f} s without it the folder "
        "is free. Wait for it or stop it there; if the machine is gone, remove the file."
    )


def is_held(folder: Path, name: str = LOCK, *, probe: bool = True) -> bool | None:
    """Return whether the process that locked a folder is alive; None if the folder is not locked.

    A lock outlives its process if that was killed, or if its machine went down.

    Args:
        folder: the folder of a stage, or of a run.
        name: its file.
        probe: create a file to read the file system's clock; otherwise nothing is written, and the
            age of another machine's lock is measured by this machine's clock.
    """
    path = folder / name
    if not path.is_file():
        return None
    return _is_alive(path) if probe else _is_alive(path, clock=lambda _: time.time())


def wait_for_sign(
    path: Path, tell: Callable[[str], None], stopped: Callable[[], object] = bool
) -> None:
    """Wait until it is clear whether a holder on another machine lives.

    A scheduler may start a run on the next machine as soon as the last one has failed. The wait
    ends with the holder's next touch of its lock, or when it counts as dead.

    Args:
        path: the lock.
        tell: shows a line before a wait.
        stopped: true once a signal has come; never by default.

    Raises:
        Preempted: a signal ended the wait.
    """
    before = _touched(path)
    holder = read_json_object(path) or {}
    if before is None or holder.get("place") == _here() or not _is_alive(path):
        return
    tell(
        f"{path.parent}: process {holder.get('pid')} on {holder.get('host')} has this folder; "
        f"waiting for its next sign of life, up to {SILENT_S:.0f} s"
    )
    while _touched(path) == before and _is_alive(path):
        if stopped():
            raise Preempted(f"{path.parent}: stopped by a signal before this folder was free")
        time.sleep(SIGN_EVERY_S)


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_alive(path: Path, *, clock: Callable[[Path], float] | None = None) -> bool:
    try:
        silent_s = (clock or _now)(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return False
    holder = read_json_object(path) or {}
    pid = holder.get("pid")
    if holder.get("place") == _here() and isinstance(pid, int):
        return started_at(pid) == holder.get("started")
    return silent_s <= SILENT_S


def _now(folder: Path) -> float:
    """Return the time of the file system, whose clock may differ from this machine's."""
    probe = folder / f"{PROBE}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
