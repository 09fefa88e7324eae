"""Run programs that nobody trusts, such as those of a policy, in a sandbox of the Linux kernel.

Each program has namespaces of its own (files, network, processes), limits, and few system calls;
see `isolate.py`. It is tested by another process, in another sandbox; see `run.py`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_S = 60.0
"""Seconds to start on a busy machine, not counted for the program."""
MAX_RESULT = 2**26
"""Largest result of a job, in bytes."""
ENVIRONMENT = {
    **{"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "", "PYTHONHASHSEED": "0"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}
"""All that a program sees of the environment; libraries must not start a thread per processor."""


class SandboxError(RuntimeError):
    """The sandbox could not be set up; the program did not run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a program.

    Attributes:
        timeout_s: seconds of processor time; three times that on the clock.
        memory_gib: address space of each of its processes.
        isolated: False leaves it files and processes of the machine.
    """

    timeout_s: float = 10.0
    memory_gib: float = 1.0
    isolated: bool = True

    @property
    def clock_s(self) -> float:
        """Return the limit on the clock, which also ends a program that sleeps."""
        return 3.0 * self.timeout_s


class _Job:
    """One started sandbox; closing it ends every process in it."""

    def __init__(
        self,
        mode: str,
        limits: Limits,
        work: Mapping[str, Any],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        read, write = os.pipe()
        file = os.memfd_create("job")
        try:
            told = {
                **work,
                "mode": mode,
                "status": write,
                "runner": str(HERE / "run.py"),
                "isolated": limits.isolated,
                "cpu_s": ceil(limits.timeout_s),
                "memory": int(limits.memory_gib * 2**30),
                "packages": _packages(),
                "readable": [sys.base_prefix, *_packages()],
            }
            with open(file, "wb", closefd=False) as stream:
                stream.write(json.dumps(told).encode())
            os.lseek(file, 0, os.SEEK_SET)
            self.process = subprocess.Popen(
                # Isolated from the environment and without site-packages, which take time.
                [sys.executable, "-s", "-P", "-S", str(HERE / "isolate.py"), str(file)],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.PIPE if stdout is None else stdout,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(file, write, *pass_fds),
                start_new_session=True,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(file)
            os.close(write)
        self.status = read

    def started(self) -> None:
        """Wait until the program starts; its time begins now.

        Raises:
            SandboxError: it does not; the message is the reason.
        """
        found, deadline = b"", time.monotonic() + START_S
        while not found.endswith(b"\n"):
            part = _part(self.status, deadline)
            if not part:
                raise SandboxError(found.decode(errors="replace") or "the sandbox did not start")
            found += part
        if found != b"ready\n":
            raise SandboxError(found.decode(errors="replace").strip())

    def lines(self, limit_s: float) -> list[Any]:
        """Return what the job writes until its end or the limit, one value per line."""
        assert self.process.stdout is not None
        found, deadline = bytearray(), time.monotonic() + limit_s
        while len(found) < MAX_RESULT and (part := _part(self.process.stdout.fileno(), deadline)):
            found += part
        return [json.loads(line) for line in found.split(b"\n")[:-1]]

    def close(self) -> None:
        """End every process of the job."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.status)
        if self.process.stdout is not None:
            self.process.stdout.close()


def _part(descriptor: int, deadline: float) -> bytes:
    """Return the next bytes; none at the end of the pipe and after the deadline."""
    waiting = select.poll()  # select.select refuses descriptors above 1023
    waiting.register(descriptor, select.POLLIN)
    ready = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000.0)
    return os.read(descriptor, 65536) if ready else b""


@cache
def _packages() -> list[str]:
    """Return the folders of installed packages, which programs may import."""
    return sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})


def run_program(program: str, inputs: Sequence[str], limits: Limits) -> list[tuple[int, str]]:
    """Return exit status and output of a program for each input, up to where it was ended.

    Raises:
        SandboxError: the sandbox could not be set up.
    """
    work = {"program": program, "inputs": list(inputs)}
    with closing(_Job("program", limits, work)) as job:
        job.started()
        return [(found["status"], found["output"]) for found in job.lines(limits.clock_s)]


def run_tests(
    program: str,
    tests: Sequence[str],
    limits: Limits,
    *,
    prompt: str = "",
    setup: Sequence[str] = (),
    entry_point: str | None = None,
    stop: bool = True,
) -> dict[str, Any]:
    """Run a program's functions against tests, each side in a sandbox of its own.

    Args:
        program: source of the module ``solution``, whose functions the tests call.
        tests: sources that raise if the program is wrong. One that defines ``check`` is passed
            the function ``entry_point``; functions named ``test_*`` are called.
        limits: of each side.
        prompt: run first if it is a program, for the helpers that it may define.
        setup: sources that run before the tests, such as imports.
        entry_point: name of the tested function; None if the tests call functions by name.
        stop: end at the first test that fails.

    Returns:
        ``passed`` (one bool per test that was run), ``calls`` (of the program), ``names`` (its
        functions), ``unsupported`` if a test passes something else than data, and ``setup``, why a
        source of ``setup`` failed; {} if the tests did not end.

    Raises:
        SandboxError: a sandbox could not be set up.
    """
    with ExitStack() as stack:
        (asked, requests), (said, replies) = pipes = os.pipe(), os.pipe()
        try:
            given = {"program": program}
            answer = _Job("answer", limits, given, stdin=asked, stdout=replies)
            stack.callback(answer.close)
            work = {
                **{"tests": list(tests), "prompt": prompt, "setup": list(setup)},
                **{"entry_point": entry_point, "stop": stop, "replies": said, "requests": requests},
            }
            judge = _Job("tests", limits, work, pass_fds=(said, requests))
            stack.callback(judge.close)
        finally:
            # An end that stays open here would hide that a process died.
            for pipe in pipes:
                for end in pipe:
                    os.close(end)
        for job in (answer, judge):
            job.started()
        return next(iter(judge.lines(limits.clock_s)), {})


@cache
def missing_isolation() -> str | None:
    """Return why programs cannot be isolated on this machine; None if they can."""
    if sys.platform != "linux":
        return "it needs Linux"
    try:
        found = run_program("print(6 * 7)", [""], Limits())
    except (SandboxError, OSError) as error:
        return str(error)
    return None if found == [(0, "42\n")] else f"a trial program ended with {found}"
