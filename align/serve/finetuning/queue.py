"""The queue: it starts ``align run`` for each job, and follows the processes.

All state is in the database, so a server that was killed goes on where it was. A job whose process
still lives is followed further; one whose process is gone is started again, and ``align run``
resumes it exactly, or ends at once if everything is done.
"""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from align.core.errors import EXIT_OK, EXIT_PREEMPTED
from align.core.lock import started_at
from align.serve.finetuning.adapters import saved_steps
from align.serve.finetuning.checking import AGAIN_S, Checks, folder_of
from align.serve.finetuning.common import Api
from align.serve.finetuning.jobs import add_event, set_status, status_of
from align.serve.finetuning.members import MARK, kill, send
from align.serve.finetuning.progress import (
    add_metrics,
    error_of,
    finish,
    read_steps,
    write_results,
)
from align.serve.finetuning.recipes import RECIPE, STAGE
from align.serve.finetuning.retries import forget
from align.serve.finetuning.tables import RECIPE_JOB
from align.serve.finetuning.training_files import as_asked
from align.serve.finetuning.webhooks import Deliveries

log = logging.getLogger(__name__)
POLL_S = 0.5
SWEEP_S = 600.0
IDLE_S = 900.0
"""Seconds after which a process that generates text ends if nobody asks it."""
STOP_S = 150.0
"""Seconds after SIGTERM until a job's processes are killed: more than ``align run`` gives a stage
to save a checkpoint."""
CANCEL_S = 30.0
"""The same of a canceled job, whose checkpoints nobody needs."""
MAX_ATTEMPTS = 5
"""Starts of a job whose process is killed each time."""
OUTPUT = "output.txt"


class Queue:
    """One thread that brings every job one step further, again and again.

    Args:
        api: parts of the server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._checks = Checks(api)
        private = api.settings.private_webhooks
        self._deliveries = Deliveries(api.store, private=private)
        self._stopped = threading.Event()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._since: dict[str, float] = {}
        """When a job's process was asked to end."""
        self._sizes: dict[str, int] = {}
        self._later: dict[str, float] = {}
        self._swept = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the queue during a block; jobs that are running go on after it."""
        threads = [
            threading.Thread(target=self._loop, args=(step,), daemon=True)
            for step in (self.step, self._deliveries.step)
        ]
        for thread in threads:
            thread.start()
        with self._checks.running(), self._deliveries.running():
            try:
                yield
            finally:
                self._stopped.set()
                self._api.wake.set()
                for thread in threads:
                    thread.join()

    def _loop(self, step: Callable[[], object]) -> None:
        while not self._stopped.is_set():
            try:
                step()
            # The thread must outlive a database that cannot be read for a while.
            except Exception:
                log.exception("the queue failed; it tries again")
                self._stopped.wait(AGAIN_S)
            if step == self.step:
                self._api.wake.wait(POLL_S)
                self._api.wake.clear()
            else:
                self._stopped.wait(POLL_S)

    def step(self) -> None:
        """Have files checked, follow processes, and start jobs for which there is a device."""
        self._api.generators.close_idle(IDLE_S)
        self._checks.step(self._rows("status = 'validating_files'"))
        for row in self._rows("pid IS NOT NULL OR status = 'running'"):
            self._try(self._follow, row)
        used = {row["device"] for row in self._rows("pid IS NOT NULL OR status = 'running'")}
        waiting = self._rows("status = 'queued' AND pid IS NULL")
        free = [device for device in self._api.settings.devices if device not in used]
        for row, device in zip(waiting, free, strict=False):
            self._try(partial(self._start, device=device), row)
        if time.monotonic() - self._swept > SWEEP_S:
            self._swept = time.monotonic()
            with self._api.store.write() as db:
                self._api.files.sweep(db)
                forget(db)

    def _try(self, action: Callable[[sqlite3.Row], None], row: sqlite3.Row) -> None:
        """Advance one job; an error of one job must not delay the others."""
        if self._later.get(row["id"], 0.0) > time.monotonic():
            return
        try:
            action(row)
        # Such as a full disk. The job stays as it is, and is tried again.
        except Exception:
            log.exception("job %s: the server failed; it tries again", row["id"])
            self._later[row["id"]] = time.monotonic() + AGAIN_S

    def _rows(self, condition: str) -> list[sqlite3.Row]:
        with self._api.store.read() as db:
            return db.execute(f"SELECT * FROM jobs WHERE {condition} ORDER BY seq").fetchall()

    def _folder(self, job: str) -> Path:
        return folder_of(self._api, job)

    def _run(self, job: str) -> Path:
        return self._api.settings.runs / job

    # ---- processes

    def _start(self, row: sqlite3.Row, device: str) -> None:
        """Start ``align run`` in a session of its own, so that it outlives this server."""
        with self._api.store.write() as db:
            if status_of(db, row["id"]) != "queued":
                return
            # First the intent: a process that a killed server leaves is found by its recipe.
            columns = {"device": device, "attempts": row["attempts"] + 1}
            set_status(db, row, "running", message="Fine-tuning job started", **columns)
        self._launch(row, device)

    def _launch(self, row: sqlite3.Row, device: str) -> None:
        self._api.generators.close_idle()  # the job needs their memory
        folder, settings = self._folder(row["id"]), self._api.settings
        folder.mkdir(parents=True, exist_ok=True)
        method = json.loads(row["request"])["method"]["type"]
        argv = [sys.executable, *settings.command, str(self._recipe(row))]
        argv += ["--runs", str(settings.runs.resolve())]
        for text in settings.job_keys:
            kind, _, change = text.partition(".")
            argv += ["--set", f"{STAGE}.{change}"] if kind == method else []
        key = self._api.services.auth.delegate(row["owner"])
        env = {**os.environ, "ALIGN_GRADER_KEY": key, MARK: str(self._run(row["id"]).resolve())}
        if device:
            env["CUDA_VISIBLE_DEVICES"] = device
        with (folder / OUTPUT).open("ab") as output:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._children[row["id"]] = child
        self._record(row["id"], child.pid)

    def _record(self, job: str, pid: int) -> None:
        with self._api.store.write() as db:
            update = "UPDATE jobs SET pid = ?, started = ? WHERE id = ?"
            db.execute(update, (pid, started_at(pid), job))

    def _follow(self, row: sqlite3.Row) -> None:
        """Advance a job whose process is running, has ended, or was never started."""
        job = row["id"]
        self._tell_progress(job)
        alive = row["pid"] is not None and _is_alive(row["pid"], row["started"])
        child = self._children.get(job)
        if not alive and (child is None or child.poll() is None):
            # Its number was not recorded, for the server was killed or failed just then.
            pid = self._find(row) if child is None else child.pid
            if pid is not None:
                self._record(job, pid)
                return
        if alive:
            if row["status"] != "running":
                self._stop(row)
            return
        self._children.pop(job, None)
        code = None if child is None else child.wait()
        self._since.pop(job, None)
        kill(self._run(job))  # what a killed run has left would use its device and files
        self._ended(row, code)

    def _stop(self, row: sqlite3.Row) -> None:
        """Ask the process of a canceled or paused job to end, and kill it if it does not."""
        job, now = row["id"], time.monotonic()
        no_resume = row["status"] == "cancelled" and not _runs_recipe(row)
        if not row["asked"]:  # once, since a second signal would keep it from saving a checkpoint
            with self._api.store.write() as db:
                db.execute("UPDATE jobs SET asked = 1 WHERE id = ?", (job,))
            send(row["pid"], signal.SIGTERM)
        grace = CANCEL_S if no_resume else STOP_S
        if now - self._since.setdefault(job, now) < grace:
            return
        self._since[job] = now  # again then: one that hangs in the kernel survives for a while
        found = kill(self._run(job), root=row["pid"])
        with self._api.store.write() as db:
            told = f"The job did not end within {grace:.0f} s: its {found} processes were killed"
            add_event(db, job, told, level="warn")

    def _recipe(self, row: sqlite3.Row) -> Path:
        """Return the recipe of a job: one that exists, or the one written for it."""
        given = json.loads(row["request"]).get("recipe")
        return Path(given) if given else (self._folder(row["id"]) / RECIPE).resolve()

    def _find(self, row: sqlite3.Row) -> int | None:
        """Return the process of a job that an earlier server has started."""
        recipe = str(self._recipe(row)).encode()
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if entry.name.isdigit() and recipe in words:
                return int(entry.name) if started_at(int(entry.name)) else None
        return None

    def _ended(self, row: sqlite3.Row, code: int | None) -> None:
        """Enter the end of a job's process.

        Args:
            row: of the job.
            code: its exit code; None if it was another server's child.
        """
        job, results = row["id"], None
        if code == EXIT_OK and not _runs_recipe(row):
            saved = saved_steps(self._api.settings, job)
            results = write_results(self._run(job), self._api.files, saved=saved)
        with self._api.store.write() as db:
            status = status_of(db, job)
            db.execute("UPDATE jobs SET pid = NULL, started = NULL, asked = 0 WHERE id = ?", (job,))
            if status != "running":  # it was stopped on request
                return
            if results is not None:
                finish(db, row, results)
                return
            if code == EXIT_OK:
                set_status(db, row, "succeeded", message="The run has ended")
                return
            if code is not None and 0 < code < 128 and code != EXIT_PREEMPTED:
                message = error_of(self._run(job), self._folder(job) / OUTPUT)
                self._fail(db, row, message)
                return
            if row["attempts"] >= MAX_ATTEMPTS and code is not None:
                self._fail(db, row, f"killed {row['attempts']} times, the last time by {-code}")
                return
            add_event(db, job, "The job's process was gone; it resumes", level="warn")
            started = code is not None
            update = "UPDATE jobs SET status = 'queued', attempts = attempts + ? WHERE id = ?"
            db.execute(update, (0 if started else -1, job))

    def _fail(self, db: sqlite3.Connection, row: sqlite3.Row, message: str) -> None:
        message, param = as_asked(message, self._folder(row["id"]))
        code = "invalid_training_file" if param else "training_failed"
        problem = {"code": code, "message": message, "param": param}
        told = f"The job failed: {message}"
        set_status(db, row, "failed", message=told, error=json.dumps(problem))

    def _tell_progress(self, job: str) -> None:
        path = self._run(job) / STAGE / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == self._sizes.get(job, 0):
            return
        rows = list(read_steps(self._run(job)))
        with self._api.store.write() as db:
            add_metrics(db, job, rows)
        self._sizes[job] = size


def _runs_recipe(row: sqlite3.Row) -> bool:
    """Return whether a job runs a recipe that exists; canceled, it can be queued again."""
    return json.loads(row["request"])["method"]["type"] == RECIPE_JOB


def _is_alive(pid: int, started: str | None) -> bool:
    return started is not None and started_at(pid) == started
