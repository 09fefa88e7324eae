"""Start a stage as a process group, forward signals to its ranks, and leave no orphans."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from align.core.errors import DeviceError
from align.core.extras import TRAINING, require
from align.core.lock import started_at
from align.core.seats import PORTS


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


POLL_S = 0.2
STAGE_MODULE = "align.stages"
"""Module that ``python -m`` starts as a stage, with a kind and a recipe."""


def stage_argv(
    arguments: Sequence[str], *, ranks: int, on_gpu: bool, module: str = STAGE_MODULE
) -> list[str]:
    """Return the command line of a stage: plain Python for one rank, deepspeed for more."""
    if ranks == 1:
        return [sys.executable, "-u", "-m", module, *arguments]
    # Each stage uses its own port, so that several runs can share a machine.
    count = "--num_gpus" if on_gpu else "--num_accelerators"
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        *(count, str(ranks), "--master_port", str(free_port())),
        *("--module", module, *arguments),
    ]


def stage_env(*, ranks: int, threads: int | None, on_gpu: bool) -> dict[str, str]:
    """Return a stage's environment variables, with its part of the cores."""
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads or max(1, num_cores() // ranks))
    # Spinning threads starve each other when anything else runs. On 2 busy cores, a pass took 2.3
    # times as long with the default; on idle cores there was no difference.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env["TOKENIZERS_PARALLELISM"] = "false"
    # Prevent files in the working directory from shadowing modules (trl.py, datasets.py).
    env["PYTHONSAFEPATH"] = "1"
    # The log and all text files are UTF-8, also where the locale is not.
    env.setdefault("PYTHONUTF8", "1")
    # A stage exits if its 'align run' was killed (align.core.distributed.install).
    env["ALIGN_PARENT"] = f"{os.getpid()}:{started_at(os.getpid())}"
    if not on_gpu:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def free_port() -> int:
    """Return a port on which no process listens.

    It is below those that the system assigns: one of them may become another process's before the
    ranks listen on it.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise DeviceError(f"100 ports from {PORTS[0]} to {PORTS[-1]} are in use. Stop other processes")


class Signals:
    """Count SIGINT, SIGTERM and SIGHUP during a run instead of their usual effect.

    A terminal that is closed sends SIGHUP. Where it is ignored, as under nohup, it stays so.
    Outside the main thread Python accepts no handlers; signals keep their effect there.

    Attributes:
        last: the last signal, None before the first.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self._own = 0
        self._forwarded = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            stops = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                stops.append(signal.SIGHUP)
            for signum in stops:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    @property
    def count(self) -> int:
        """Return the number of signals so far.

        A launcher sends one signal to all processes of a run, and a second one kills the stage:
        those of the other processes count as one, together with the first of this process.
        """
        return max(self._own, int(self._forwarded))

    def _note(self, signum: int, _frame: object) -> None:
        self._own += 1
        self.last = signum

    def forward(self, signum: int) -> None:
        """Note a signal that reached another process of the run; any thread may call this."""
        self._forwarded = True
        self.last = self.last or signum

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


class StageProcess:
    """A running stage, whose launcher and ranks share their own session."""

    place = ""
    """Which rank has failed, for messages; all ranks are on this machine."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], log: Path, module: str = STAGE_MODULE
    ) -> None:
        self._module = module
        self._asked: set[int] = set()
        self.folder = log.parent
        self._log = log.open("ab")
        self.log_start = self._log.tell()
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; return the exit code, or None if the stage is still running."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """Send SIGTERM to every rank that did not get it yet; call again until the stage ends.

        The launcher may still start ranks. The deepspeed launcher itself gets no signal: it would
        kill its ranks after 30 s, and its exit code would replace theirs. It exits when they do.
        """
        for pid, command in self._members():
            is_rank = self._module in command and "deepspeed.launcher" not in " ".join(command)
            if is_rank and pid not in self._asked:
                self._asked.add(pid)
                _send(pid, signal.SIGTERM)

    def memory_gib(self) -> float:
        """Return the resident memory of all processes of the stage."""
        pages = 0
        for pid, _ in self._members():
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError, ValueError):  # it has ended
                continue
        return pages * resource.getpagesize() / 2**30

    def kill(self) -> None:
        """Kill all remaining processes of the stage."""
        for pid, _ in self._members():
            _send(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill stragglers after the end and close the log."""
        if self._process.poll() is None:
            self.kill()
            self._process.wait()
        self.kill()
        self._log.close()

    def _members(self) -> list[tuple[int, list[str]]]:
        """Return the live processes of the stage's session with their command lines."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                # Fields after the parenthesised name: state, ppid, pgrp, session.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if int(fields[3]) == self._process.pid and fields[0] != "Z":
                found.append((int(entry.name), command))
        return found


def _send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def ended_by_signal(code: int) -> bool:
    """Return True if an exit code, possibly forwarded by a launcher, is that of a signal."""
    return code < 0 or code > 128


def exit_reason(code: int) -> str:
    """Return a description of how a process ended."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    hint = ""
    if limit != resource.RLIM_INFINITY:
        # Libraries abort in many ways when they get no memory.
        mib = limit // 2**20
        hint = f"; its memory is limited to {mib:,} MiB (ulimit -v). Raise or remove the limit"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}{hint}"
    if name == "SIGKILL" and not hint:
        hint = "; the machine may have run out of memory"
    return f"killed by {name}{hint}"


def run_tool(name: str, arguments: Sequence[str], *, quiet: bool = False) -> int:
    """Run a module of align.stages.tools as its own process.

    Args:
        name: name of the module.
        arguments: its command line.
        quiet: discard its standard output.

    Returns:
        Its exit code.
    """
    require("this command", *TRAINING)
    argv = [sys.executable, "-P", "-m", f"align.stages.tools.{name}", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(argv, stdout=output, check=False).returncode


def become_tool(name: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process with a module of align.stages.tools, which then receives its signals."""
    require("this command", *TRAINING)
    sys.stdout.flush()
    sys.stderr.flush()
    module = f"align.stages.tools.{name}"
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
