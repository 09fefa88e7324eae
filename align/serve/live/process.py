"""The process of a run: which it is, and stopping and resuming it."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from align.core.artifacts import LOCK, read_json_object
from align.core.lock import SILENT_S, started_at
from align.core.text import visible
from align.serve.errors import ServeError

RUN_LOCK = ".lock"
OUTPUT_LINES = 12


def holder(run_dir: Path) -> int | None:
    """Return the process on this machine that has locked a run's folder; None without one.

    It only looks: taking the lock to find out would make an ``align run`` that starts now fail.
    """
    lock = run_dir / RUN_LOCK
    try:
        identity = lock.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    owners = {fields[4] for line in lines if len(fields := line.split()) > 5 and "FLOCK" in fields}
    return next((int(pid) for pid in sorted(owners) if _has_open(pid, identity)), None)


def _has_open(pid: str, identity: os.stat_result) -> bool:
    try:
        places = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it has ended, or belongs to another user or container
        return False
    for place in places:
        try:
            if os.path.samestat(place.stat(), identity):
                return True
        except OSError:
            continue
    return False


def foreign_host(run_dir: Path) -> str | None:
    """Return the other machine on which a stage of the run is running; None without one."""
    for path in run_dir.glob(f"*/{LOCK}"):
        found = read_json_object(path) or {}
        try:
            silent_s = time.time() - path.stat().st_mtime
        except OSError:
            continue
        host = found.get("host")
        if isinstance(host, str) and host != socket.gethostname() and silent_s <= SILENT_S:
            return visible(host)[:100]
    return None


def stop(run_dir: Path) -> None:
    """Send SIGTERM to a run: it finishes its step, saves a checkpoint and ends.

    Raises:
        ServeError: nothing runs on this machine.
    """
    pid = holder(run_dir)
    if pid is None:
        raise ServeError(409, f"{run_dir.name}: no process of this machine is running it.")
    try:
        process = os.pidfd_open(pid)
    except OSError:
        raise ServeError(409, f"{run_dir.name}: its process has just ended.") from None
    try:
        # The number may be another process's by now; the handle cannot become another's.
        if holder(run_dir) == pid:
            signal.pidfd_send_signal(process, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise ServeError(403, f"{run_dir.name}: its process {pid} is another user's.") from None
    finally:
        os.close(process)


@dataclass(frozen=True, slots=True)
class Resumed:
    """Runs that this server has resumed.

    Attributes:
        folder: where their output is kept.
        children: their processes, by name of the run.
    """

    folder: Path
    children: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def resume(self, run_dir: Path) -> None:
        """Start a run again in a session of its own, so that it outlives the server.

        Raises:
            ServeError: it runs already.
        """
        if self.starting(run_dir.name) or holder(run_dir) or foreign_host(run_dir):
            raise ServeError(409, f"{run_dir.name}: it is running already.")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        argv = [sys.executable, "-m", "align.serve.live.resume", str(run_dir.resolve())]
        with self._output(run_dir.name).open("wb") as output:
            self.children[run_dir.name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def starting(self, name: str) -> bool:
        """Return whether a process that was started here for a run is alive."""
        child = self.children.get(name)
        # poll also collects it, so that no zombie is left.
        return child is not None and child.poll() is None and started_at(child.pid) is not None

    def problem(self, name: str) -> str | None:
        """Return the end of what a run said that was resumed and failed; None without one."""
        child = self.children.get(name)
        if child is None or child.poll() in (None, 0):
            return None
        text = self._output(name).read_text(encoding="utf-8", errors="replace")
        return visible("\n".join(text.splitlines()[-OUTPUT_LINES:]))

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.txt"
