"""Build a store: read examples in this process, render and tokenize them in several others.

The result depends on the examples alone: chunks are written in their order, whoever made them.
"""

import hashlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from align.core.errors import AlignError, DataError
from align.core.types import Example
from align.data.split import split_key
from align.data.store.columns import Column, ColumnWriter, record
from align.data.store.layout import COLUMNS, Done, Job
from align.data.store.worker import needs_torch, tokenized

log = logging.getLogger(__name__)
CHUNK = 512
"""Number of examples that a process gets at a time."""
DIGEST = 16
"""Bytes of the hash of an example's split key."""
Render = Callable[[Example], Any]


def digest_of(key: str) -> bytes:
    """Return the hash of a split key."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def build_store(
    folder: Path, examples: Iterable[Example], *, render: Render, processes: int
) -> dict[str, Any]:
    """Write the store of some examples into an empty folder and return its description.

    Args:
        folder: of the store. examples: read once; an error of theirs is raised.
        render: makes a row of an example; it is pickled.
        processes: number of processes that tokenize; 0 does it in this one.

    Raises:
        AlignError: the first example that cannot be rendered, after all of them were read.
    """
    names = ("examples", "example_sizes", "keys", *COLUMNS)
    columns = {name: ColumnWriter(folder / name) for name in names}
    rows = _Rows(columns)
    fields: set[frozenset[str]] = set()
    # Other processes tokenize, if there are any; only this one writes.
    kind = _Pool if processes else _Here
    with closing(kind(render, folder / "examples", processes)) as pool:
        for job in _jobs(examples, columns, fields):
            if rows.error is None:
                pool.put(job)
            for done in pool.finished(wait=False):
                rows.add(done)
        for done in pool.finished(wait=True):
            rows.add(done)
    if rows.error is not None:
        raise rows.error
    marks = {name: column.close() for name, column in columns.items()}
    num = marks["plain"].size
    return {
        "rows": num,
        "sides": marks["lengths"].size // 4 // num if num else 1,
        "is_plain": rows.is_plain,
        "fields": sorted(*fields) if len(fields) == 1 else None,
        "columns": marks,
    }


def _jobs(
    examples: Iterable[Example], columns: dict[str, ColumnWriter], fields: set[frozenset[str]]
) -> Iterable[Job]:
    """Write examples and yield a job for each chunk of them.

    Args:
        examples: read once. columns: to write to.
        fields: gets the names of the columns that an example has; two such sets say that they vary.
    """
    data: list[bytes] = []
    keys: list[bytes] = []

    def written() -> Job:
        start, sizes = columns["examples"].size, [len(entry) for entry in data]
        columns["examples"].write(b"".join(data))
        columns["example_sizes"].write(array("I", sizes).tobytes())
        columns["keys"].write(b"".join(keys))
        data.clear()
        keys.clear()
        return Job(start, sizes)

    for example in examples:
        data.append(record(example))
        keys.append(digest_of(split_key(example)))
        if len(fields) < 2:
            fields.add(frozenset(example.columns))
        # A worker reads a chunk from the file of examples by its start and sizes.
        if len(data) == CHUNK:
            yield written()
    if data:
        yield written()


class _Rows:
    """The columns of the rows, which chunks are added to in order."""

    def __init__(self, columns: dict[str, ColumnWriter]) -> None:
        self._columns = columns
        self._told: set[str] = set()
        self.error: AlignError | None = None
        self.is_plain = True

    def add(self, done: Done) -> None:
        """Write a chunk; the first error stays."""
        for level, line in done.logged:
            if line not in self._told:  # several processes may say the same
                self._told.add(line)
                log.log(level, "%s", line)
        self.error = self.error or done.error
        if self.error is None and done.rows is not None:
            for name in COLUMNS:
                self._columns[name].write(done.rows[name])
            self.is_plain &= b"\0" not in done.rows["plain"]


def _ended(error: Exception, code: int) -> DataError:
    """Return the error for a process that gives no answer."""
    told = "it ended" if isinstance(error, EOFError | BrokenPipeError) else repr(error)
    return DataError(
        f"a process that tokenizes rows failed: {told} (exit code {code}). Its own message is "
        "above; if there is none, the machine may have too little memory"
    )


class _Here:
    """Makes rows in this process, with the methods of ``_Pool``."""

    def __init__(self, render: Render, examples: Path, _processes: int) -> None:
        self._render, self._examples = render, Column(examples)
        self._done: list[Done] = []

    def put(self, job: Job) -> None:
        """Do a job."""
        self._done.append(tokenized(job, self._examples, self._render))

    def finished(self, *, wait: bool) -> Iterable[Done]:
        """Yield what is done since the last call."""
        done, self._done = self._done, []
        yield from done

    def close(self) -> None:
        """Do nothing."""


class _Pool:
    """Processes that make rows, each with a thread that passes jobs to it."""

    def __init__(self, render: Render, examples: Path, processes: int) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
        env["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # "PyTorch was not found"
        command = [sys.executable, "-m", "align.data.store.worker"]
        pipe = subprocess.PIPE
        self._jobs: queue.Queue[tuple[int, Job] | None] = queue.Queue(maxsize=2 * processes)
        self._done: dict[int, Done] = {}
        self._changed = threading.Condition()
        self._put = self._taken = 0
        self._workers: list[subprocess.Popen[bytes]] = []
        # Pickled once: every worker gets the same renderer before its first job.
        first = b"".join(map(pickle.dumps, (needs_torch(render), (render, str(examples)))))
        for _ in range(processes):
            worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env)
            self._workers.append(worker)
            threading.Thread(target=self._serve, args=(worker, first), daemon=True).start()

    def _serve(self, worker: "subprocess.Popen[bytes]", first: bytes) -> None:
        to, back = worker.stdin, worker.stdout
        assert to is not None
        assert back is not None
        message = first
        while (entry := self._jobs.get()) is not None:
            number, job = entry
            try:
                to.write(message + pickle.dumps(job, protocol=5))
                to.flush()
                found = pickle.load(back)
            # Whatever happens here must reach the thread that waits.
            except Exception as error:
                worker.kill()
                found = Done(None, _ended(error, worker.wait()), [])
            message = b""
            with self._changed:
                self._done[number] = found
                self._changed.notify()

    def put(self, job: Job) -> None:
        """Pass on a job; wait while the processes have enough of them."""
        self._jobs.put((self._put, job))
        self._put += 1

    def finished(self, *, wait: bool) -> Iterable[Done]:
        """Yield what is done, in the order of the jobs; ``wait`` yields all of it."""
        while self._taken < self._put:
            with self._changed:
                while self._taken not in self._done:
                    if not wait:
                        return
                    self._changed.wait()
                done = self._done.pop(self._taken)
            self._taken += 1
            yield done

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for _ in self._workers:  # what is left fails at once, and then each thread ends
            self._jobs.put(None)
