"""Programs as forks of one process that has imported the libraries of every stage.

A stage of a tiny model takes a second or two, and its imports take longer. Forks also have one seed
of Python's hashes: what has to hold for any seed is run in processes that start afresh.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol
from unittest import mock

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.e2e.warm_imports"])


class Program(Protocol):
    """A running Python program in a session of its own, and what it writes."""

    def wait(self, limit_s: float) -> int:
        """Return the exit code, negative for a signal; what is over the limit is killed."""
        ...

    def said(self) -> str:
        """Return everything that it wrote."""
        ...


class Fork:
    """A program as a fork; ``argv`` is what would follow ``python``."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._said = _file()
        given = (list(argv), dict(environment), self._said.name)
        self._process = FORKS.Process(target=_become, args=given)
        # The first start also starts the process that all are forks of, and one that would warn of
        # the semaphores of stages, which leave by os._exit.
        quiet = {"PYTHONWARNINGS": "ignore:resource_tracker"}
        with mock.patch.dict(os.environ, {**environment, **quiet}):
            self._process.start()

    def wait(self, limit_s: float) -> int:
        self._process.join(limit_s)
        _kill(self._process.pid or 0)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def said(self) -> str:
        return _read(self._said)


class Fresh:
    """A program in a Python of its own; ``argv`` is what follows ``python``."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._said = _file()
        self._process = subprocess.Popen(
            [sys.executable, "-u", *argv],
            env=dict(environment),
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, limit_s: float) -> int:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)
        _kill(self._process.pid)
        return self._process.wait()

    def said(self) -> str:
        return _read(self._said)


def _file() -> IO[str]:
    # A file, not a pipe: a rank that fills its pipe unread waits for ever, as do the others.
    return tempfile.NamedTemporaryFile("a+", encoding="utf-8", errors="replace")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _kill(session: int) -> None:
    """Kill what is left of a session."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _become(argv: list[str], environment: dict[str, str], said: str) -> None:
    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
