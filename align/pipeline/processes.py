"""Start one stage as a process group, pass signals on to its ranks, leave no orphans behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from align.core.lock import started_at


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


STAGE_MODULE = "align.stages"
"""``python -m`` of it with a kind and a recipe is a stage."""


def stage_argv(
    arguments: Sequence[str], *, ranks: int, on_gpu: bool, module: str = STAGE_MODULE
) -> list[str]:
    """Return the command line of a stage: plain Python for one rank, deepspeed for more."""
    if ranks == 1:
        return [sys.executable, "-u", "-m", module, *arguments]
    count = "--num_gpus" if on_gpu else "--num_accelerators"
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.runner"),
        *(count, str(ranks), "--master_port", str(free_port())),
        *("--module", module, *arguments),
    ]


def stage_env(*, ranks: int, threads: int | None, on_gpu: bool) -> dict[str, str]:
    """Give a stage's environment: its share of the cores, no fights over them."""
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads or max(1, num_cores() // ranks))
    # Spinning threads starve each other as soon as anything else runs: on 2 busy cores a pass took
    # 2.3 times as long with the default, and no longer on idle ones.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env["TOKENIZERS_PARALLELISM"] = "false"
    # No file of the working directory may stand in for a module (trl.py, datasets.py).
    env["PYTHONSAFEPATH"] = "1"
    # A stage whose 'align run' was killed ends by itself (align.core.distributed.install).
    env["ALIGN_PARENT"] = f"{os.getpid()}:{started_at(os.getpid())}"
    if not on_gpu:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def free_port() -> int:
    """Ask the system for a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class StageProcess:
    """Hold a running stage: its launcher and ranks share one session of their own."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], log: Path, module: str = STAGE_MODULE
    ) -> None:
        self._module = module
        self._asked: set[int] = set()
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
        """Wait a while for the end; give the exit code, or None when it still runs."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """Send SIGTERM to every rank that was not asked yet; call it again until the stage ends.

        Ranks may still be started by the launcher. The deepspeed launcher itself is left out: it
        kills its ranks 30 s after a signal of its own, and its exit code would hide that of the
        ranks. It ends by itself when they do.
        """
        for pid, command in self._members():
            is_rank = self._module in command and "deepspeed.launcher" not in " ".join(command)
            if is_rank and pid not in self._asked:
                self._asked.add(pid)
                _send(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill whatever is left of the stage."""
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
        """List the live processes of the stage's session with their command lines."""
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
    """Return True if an exit code, also one that a launcher passed on, is that of a signal."""
    return code < 0 or code > 128


def exit_reason(code: int) -> str:
    """Say in words how a process ended."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if not number:
        return f"exit code {code}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def run_tool(name: str, arguments: Sequence[str], *, quiet: bool = False) -> int:
    """Run a module of align.stages.tools as a process of its own.

    Args:
        name: of the module. arguments: its command line. quiet: its standard output is dropped.

    Returns:
        Its exit code.
    """
    argv = [sys.executable, "-P", "-m", f"align.stages.tools.{name}", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(argv, stdout=output, check=False).returncode


def become_tool(name: str, arguments: Sequence[str]) -> NoReturn:
    """Turn this process into a module of align.stages.tools, so that signals to it arrive there."""
    sys.stdout.flush()
    sys.stderr.flush()
    module = f"align.stages.tools.{name}"
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
