"""A separate process for code that can hang, exhaust memory or die, with requests as lines of JSON.

The worker is ``python -m MODULE``. `Worker` starts it, sends requests under a time limit and kills
it; `serve` is its loop. If the parent dies, the worker's input ends, and so does the worker.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_PRINTED = 2**22
"""Bytes of a worker's own output that are passed on to standard error."""
MAX_REPLY = 2**26
"""Largest reply, in bytes."""


class WorkerError(RuntimeError):
    """A worker gave no reply; the message is the reason."""


class Worker:
    """A process that is started on the first request, and again after it was killed."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        start_timeout_s: float,
        name: str = "worker",
    ) -> None:
        self.module, self.arguments, self.name = module, arguments, name
        self.start_timeout_s = start_timeout_s
        self.process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Worker] | None = None
        self._printable = [MAX_PRINTED]

    def start(self) -> Any:
        """Start the process unless one is running; return its first message, or None.

        Raises:
            WorkerError: it does not start in time, or dies.
        """
        if self.process is not None and self.process.poll() is None:
            return None
        self.close()
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
            process_group=0,
        )
        assert self.process.stdin is not None
        # A worker that does not read must not block the writer, which has a time limit.
        os.set_blocking(self.process.stdin.fileno(), False)
        self._end = weakref.finalize(self, _kill, self.process)
        assert self.process.stderr is not None
        printed = os.dup(self.process.stderr.fileno())
        threading.Thread(
            target=_pass_on, args=(printed, self._printable, self.name), daemon=True
        ).start()
        return self._exchange(b"", self.start_timeout_s, "did not start")

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Any:
        """Return the reply to a request.

        Raises:
            WorkerError: the worker timed out or died; it is killed, and the next request starts
                another.
        """
        self.start()
        return self._exchange(json.dumps(request, default=str).encode() + b"\n", timeout_s, "died")

    def close(self) -> None:
        """Kill the process and all its children."""
        if self._end is not None:
            # Once only: later, its process id may be that of another process.
            self._end()
        self.process = self._end = None

    def _exchange(self, request: bytes, timeout_s: float, failed: str) -> Any:
        """Write a request and read one line, within the time limit."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        writer, reader = process.stdin.fileno(), process.stdout.fileno()
        deadline, line, left = time.monotonic() + timeout_s, bytearray(), memoryview(request)
        # Write and read in turn, so that neither pipe can block the other.
        try:
            while not line.endswith(b"\n"):
                wait_s = max(0.0, deadline - time.monotonic())
                ready, free = _ready(reader, writer if left else None, wait_s)
                if not ready and not free:
                    raise WorkerError(f"{self.name} timed out")
                if free:
                    left = left[os.write(writer, left[:65536]) :]
                if ready:
                    part = os.read(reader, 65536)
                    if not part:
                        raise WorkerError(f"{self.name} {failed}")
                    line += part
                    if len(line) > MAX_REPLY:
                        raise WorkerError(f"{self.name} sent a reply without an end")
            return json.loads(line)
        except (BrokenPipeError, ValueError):
            self.close()
            raise WorkerError(f"{self.name} {failed}") from None
        except WorkerError:
            self.close()
            raise


def _ready(reader: int, writer: int | None, wait_s: float) -> tuple[bool, bool]:
    """Wait until one of two pipes can be used; return whether each of them can."""
    waiting = select.poll()  # select.select refuses descriptors above 1023
    waiting.register(reader, select.POLLIN)
    if writer is not None:
        waiting.register(writer, select.POLLOUT)
    found = dict(waiting.poll(wait_s * 1000.0))
    return reader in found, writer in found


def _pass_on(printed: int, left: list[int], name: str) -> None:
    """Write what a worker prints to standard error, up to ``left[0]`` bytes over its restarts.

    The worker itself is not an argument: it must be collected, and its process killed, when unused.
    """
    with os.fdopen(printed, "rb", buffering=0) as stream:
        while part := stream.read(65536):
            if left[0] > 0:
                os.write(2, part[: left[0]])
                left[0] -= len(part)
                if left[0] <= 0:
                    told = (
                        f"\n{name} printed more than {MAX_PRINTED:,} bytes; the rest is left out\n"
                    )
                    os.write(2, told.encode())


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has already exited
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # unsent bytes for a dead process
            continue


def serve(
    answer: Callable[[], tuple[Any, Callable[[Mapping[str, Any]], Any]]],
    *,
    limit: tuple[int, int],
) -> None:
    """Answer requests until stdin ends; printed output goes to standard error.

    Args:
        answer: prepares (imports, loads) and returns the first reply and the request function.
        limit: resource of ``resource.setrlimit`` and bytes, set after preparation.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    requests = os.fdopen(os.dup(sys.stdin.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with open(os.devnull) as nothing:  # user code must not read the requests
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    first, function = answer()
    kind, size = limit
    resource.setrlimit(kind, (size, size))
    replies.write(json.dumps(first) + "\n")
    replies.flush()
    for line in requests:
        replies.write(json.dumps(function(json.loads(line))) + "\n")
        replies.flush()
