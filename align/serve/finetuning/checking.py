"""Check the files of jobs and write their recipes, beside the queue: a large file takes a while."""

import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.common import Api
from align.serve.finetuning.jobs import set_status, status_of
from align.serve.finetuning.models import find_whole
from align.serve.finetuning.recipes import RECIPE, job_recipe, resolved, write_recipe
from align.serve.finetuning.training_files import InvalidFileError, check_files
from align.serve.settings import own_address

log = logging.getLogger(__name__)
LARGE = 2**24
"""Bytes of a job's files that take a thread of their own: 16 MiB are checked in about a second."""
PAUSE_S = 0.0002
"""Sleep between parts of a file, in which the server's other threads run."""
LOOK_S = 1.0
"""Seconds until a check notices that its job is no longer to be checked."""
AGAIN_S = 5.0
"""Seconds until a job is tried again for which the server itself failed."""


class NotWantedError(Exception):
    """The job was canceled or paused, or the server ends."""


class Checks:
    """Threads that check the files of the jobs which are to be validated.

    Args:
        api: parts of the server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="check of files")
        self._running: dict[bool, Future[None]] = {}  # of large files, and of small ones
        self._later: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """End the threads after a block; what they were checking is checked again later."""
        try:
            yield
        finally:
            self._stopped.set()
            self._pool.shutdown(cancel_futures=True)

    def step(self, rows: list[sqlite3.Row]) -> None:
        """Begin the checks for which there is a thread.

        Args:
            rows: jobs that are to be validated, the oldest first.
        """
        now = time.monotonic()
        for row in rows:
            large = self._size(row) > LARGE
            # One thread for each of the two, so that jobs of small files are not held up by a
            # large one, and are checked, and so queued, in their order.
            if large in self._running and not self._running[large].done():
                continue
            if self._later.get(row["id"], 0.0) <= now:
                self._running[large] = self._pool.submit(self._check, row)

    def _size(self, row: sqlite3.Row) -> int:
        """Return the bytes of a job's files, as far as they exist."""
        request = json.loads(row["request"])
        names = (request["training_file"], request["validation_file"])
        paths = [self._api.files.path(name) for name in names if name]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def _check(self, row: sqlite3.Row) -> None:
        """Check a job's files and write its recipe, or fail the job."""
        job = row["id"]
        with self._api.store.read() as db:
            if status_of(db, job) != "validating_files":
                return  # since the row was read
        try:
            request = prepare(self._api, row, tick=partial(self._tick, job, [time.monotonic()]))
        except NotWantedError:
            return
        except (InvalidFileError, ServeError, AlignError) as error:
            code = "invalid_model"
            if isinstance(error, InvalidFileError):
                code = "invalid_training_file"
            param = getattr(error, "param", None) or "training_file"
            problem = json.dumps({"code": code, "message": str(error), "param": param})
            self._enter(row, "failed", f"The job failed: {error}", error=problem)
        # Such as a full disk. The job stays as it is, and is tried again.
        except Exception:
            log.exception("job %s: the server failed; it tries again", job)
            self._later[job] = time.monotonic() + AGAIN_S
        else:
            told = "Files validated, moving job to queued state"
            self._enter(row, "queued", told, request=json.dumps(request))
        self._api.wake.set()

    def _enter(self, row: sqlite3.Row, status: str, message: str, **more: object) -> None:
        with self._api.store.write() as db:
            if status_of(db, row["id"]) == "validating_files":
                set_status(db, row, status, message=message, **more)

    def _tick(self, job: str, looked: list[float]) -> None:
        """Sleep for other threads; raise ``NotWantedError`` if the job is no longer checked."""
        time.sleep(PAUSE_S)
        if self._stopped.is_set():
            raise NotWantedError
        if time.monotonic() - looked[0] > LOOK_S:
            looked[0] = time.monotonic()
            with self._api.store.read() as db:
                if status_of(db, job) != "validating_files":
                    raise NotWantedError


def prepare(
    api: Api, row: sqlite3.Row, *, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write a job's files and recipe; return its request with numbers for ``auto``.

    Raises:
        InvalidFileError: a file cannot be trained on.
        ServeError: the model is gone.
    """
    request = json.loads(row["request"])
    method, folder = request["method"], folder_of(api, row["id"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The files, as rows of this suite.
    parts = [part for part in ("training", "validation") if request[f"{part}_file"]]
    sources = {part: api.files.path(request[f"{part}_file"]) for part in parts}
    for part, path in sources.items():
        if not path.is_file():
            param = f"{part}_file"
            raise InvalidFileError(f"{param}: {request[param]} was deleted", param=param)
    counts = check_files(sources, folder, method["type"], tick=tick)
    with api.store.read() as db:
        query = "SELECT name FROM tokens WHERE id = ?"
        (name,) = db.execute(query, (row["owner"],)).fetchone()
        base = find_whole(db, api.settings, Person(row["owner"], name), name=row["model"])
    # The recipe: what is ``auto`` depends on the number of rows.
    settings = method[method["type"]]
    settings["hyperparameters"] = resolved(
        method["type"], settings["hyperparameters"], rows=counts["training"]
    )
    recipe = job_recipe(
        name=row["id"],
        description=_described(row["model"], method["type"], request["suffix"], owner=name),
        base=base,
        seed=row["seed"],
        method=method,
        files={part: (folder / f"{part}.jsonl").resolve() for part in sources},
        rows=counts["training"],
        integrations=request["integrations"] or [],
        url=f"{own_address(api.settings)}/v1",
    )
    write_recipe(recipe, folder / RECIPE)
    return request


def _described(model: str, method: str, suffix: str | None, *, owner: str) -> str:
    named = f" ({suffix})" if suffix else ""
    return f"Fine-tuning job of {owner}{named}: {method}, from {model}."


def folder_of(api: Api, job: str) -> Path:
    """Return the folder with the files, the recipe and the output of a job."""
    return api.settings.data / "jobs" / job
