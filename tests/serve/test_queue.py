"""The queue under pressure: killed servers and processes, and clients that send again.

The jobs run a stand-in for ``align run``; tests/serve/test_jobs.py has the real one.
"""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from rich.console import Console

from align.core.lock import started_at
from align.pipeline.processes import free_port
from align.pipeline.terminal import Terminal
from align.serve.app import make_services
from align.serve.finetuning import checking
from align.serve.finetuning import queue as queue_module
from align.serve.finetuning.progress import error_of
from align.serve.settings import Settings
from tests.serve.fake_run import HOLD, STUBBORN
from tests.serve.killed_server import FAKE
from tests.serve.running import WAIT_S, Running, running
from tests.serve.tiny_model import SUPERVISED, jsonl

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    runs = tmp_path_factory.mktemp("runs")
    with running(runs, models={"tiny": "hub/tiny"}, command=(FAKE,)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def file(client: OpenAI) -> str:
    return client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id


def create(client: OpenAI, file: str, steps: int, **more: Any) -> str:
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=steps, **more)
    return made.id


def ended(client: OpenAI, job: str) -> Any:
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        time.sleep(POLL_S)


@pytest.fixture
def hold(server: Running) -> Iterator[Path]:
    """Return the file with the number of steps after which jobs wait; without it, none does."""
    file = server.services.settings.runs / HOLD
    yield file
    file.unlink(missing_ok=True)


def allow(hold: Path, steps: int) -> None:
    new = hold.with_suffix(".new")
    new.write_text(str(steps))
    new.replace(hold)


def process(server: Running, job: str) -> int:
    """Return the process of a job that does not end by itself, once there is one."""
    while True:
        with server.services.store.read() as db:
            (pid,) = db.execute("SELECT pid FROM jobs WHERE id = ?", (job,)).fetchone()
        if pid is not None:
            return pid
        time.sleep(POLL_S)


def held(server: Running, job: str, steps: int) -> int:
    """Return the process of a job, which does not end by itself, once it has taken the steps."""
    metrics = server.services.settings.runs / job / "train" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        time.sleep(POLL_S)
    return process(server, job)


def check_whole(client: OpenAI, job: str, steps: int) -> None:
    """The job has succeeded, and each of its steps stands once in events and results."""
    done = ended(client, job)
    assert done.status == "succeeded", done.error
    assert done.trained_tokens == 7 * steps
    events = list(client.fine_tuning.jobs.list_events(job, limit=100))
    found = [e.data["step"] for e in events if e.type == "metrics"]  # type: ignore[index]
    assert found == list(range(steps, 0, -1))
    assert sum(e.message == "The job has successfully completed" for e in events) == 1
    table = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert [float(row["train_loss"]) for row in table] == [1 / s for s in range(1, steps + 1)]
    assert len(client.fine_tuning.jobs.checkpoints.list(job).data) == 1


# ---- one job


def test_a_job_fails_with_the_last_message_of_its_run(client: OpenAI, file: str):
    done = ended(client, create(client, file, 1000))
    assert done.status == "failed"
    assert (done.error.code, done.error.message) == (
        "training_failed",
        "train: no row is left of 12",
    )


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (["12:00:00 step 1", "12:00:01 error: 2 rows repeat", "  a:1 repeats b:2"], "2 rows"),
        (["12:00:00 step 1", "terminate called after throwing std::bad_alloc", ""], "terminate"),
    ],
)
def test_the_error_is_what_align_run_says_and_not_its_last_line(
    tmp_path: Path, tail: list[str], expected: str
):
    with (tmp_path / "output.txt").open("w") as f:
        terminal = Terminal(Console(file=f, width=400))
        terminal.failed("dpo", "exit code 2", log=tmp_path / "log.txt", tail=tail, code=2)
    found = error_of(tmp_path, tmp_path / "output.txt")
    assert found.startswith(expected)
    assert "in all" not in found
    assert found.endswith("a:1 repeats b:2") == (expected == "2 rows")


def test_an_error_in_a_jobs_recipe_is_told_without_the_servers_path(tmp_path: Path):
    (tmp_path / "output.txt").write_text(
        f"{tmp_path}/recipe.yaml:10:14: stages.train: max_length must leave room for a prompt\n"
        '        "train": {\n                 ^\n'
    )
    found = error_of(tmp_path, tmp_path / "output.txt")
    assert found == "stages.train: max_length must leave room for a prompt"


def test_a_cancelled_job_ends_its_process_and_frees_the_device(
    server: Running, client: OpenAI, file: str, hold: Path
):
    allow(hold, 3)
    job = create(client, file, 9)
    pid = held(server, job, 3)
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    while started_at(pid) is not None:
        time.sleep(POLL_S)
    check_whole(client, create(client, file, 2), 2)
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"


def stubborn(server: Running, job: str, *, start: int = 1) -> list[int]:
    """Return the processes of a job that ignores SIGTERM, once it has begun so many times."""
    path = server.services.settings.runs / job / "stubborn"
    while not path.exists() or path.read_text().count("\n") < start:
        time.sleep(POLL_S)
    return [int(word) for word in path.read_text().splitlines()[-1].split()]


def wait_for_end(pids: list[int]) -> None:
    while any(started_at(pid) is not None for pid in pids):
        time.sleep(POLL_S)


@pytest.mark.parametrize("how", ["cancel", "pause"])
def test_a_job_that_ignores_sigterm_is_killed_with_its_stages(
    server: Running, client: OpenAI, file: str, how: str, monkeypatch: pytest.MonkeyPatch
):
    graces = {"cancel": "CANCEL_S", "pause": "STOP_S"}
    for name in graces.values():
        monkeypatch.setattr(queue_module, name, 3600.0)
    jobs, job = client.fine_tuning.jobs, create(client, file, STUBBORN)
    pids, waiting = stubborn(server, job), create(client, file, 2)
    getattr(jobs, how)(job)
    while not asked(server, job):
        time.sleep(POLL_S)
    # Both have had their signal, and go on: the device is taken.
    assert all(started_at(pid) is not None for pid in pids)
    assert jobs.retrieve(waiting).status != "running"
    monkeypatch.setattr(queue_module, graces[how], 0.0)
    wait_for_end(pids)
    check_whole(client, waiting, 2)
    told = [e for e in jobs.list_events(job).data if "did not end" in e.message]
    assert [(e.level, e.message) for e in told] == [
        ("warn", "The job did not end within 0 s: its 2 processes were killed")
    ]
    assert jobs.retrieve(job).status == {"cancel": "cancelled", "pause": "paused"}[how]
    jobs.cancel(job)


def asked(server: Running, job: str) -> bool:
    """Return whether the process of a job was asked to end."""
    with server.services.store.read() as db:
        return bool(db.execute("SELECT asked FROM jobs WHERE id = ?", (job,)).fetchone()[0])


def test_a_stage_that_outlives_its_killed_run_is_ended_before_the_run_begins_again(
    server: Running, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
):
    job = create(client, file, STUBBORN)
    first = stubborn(server, job)
    os.kill(first[0], signal.SIGKILL)
    second = stubborn(server, job, start=2)
    assert started_at(first[1]) is None
    monkeypatch.setattr(queue_module, "CANCEL_S", 0.0)
    client.fine_tuning.jobs.cancel(job)
    wait_for_end(second)


def test_a_job_is_paused_while_its_files_are_checked_and_checked_when_it_resumes(
    server: Running, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
):
    begun, go_on = threading.Event(), threading.Event()
    right = checking.check_files

    def check_files(*args: Any, **named: Any) -> dict[str, int]:
        begun.set()
        assert go_on.wait(WAIT_S)
        return right(*args, **named)

    monkeypatch.setattr(checking, "check_files", check_files)
    jobs, job = client.fine_tuning.jobs, create(client, file, 3)
    assert begun.wait(WAIT_S)
    assert jobs.pause(job).status == "paused"
    assert jobs.pause(job).status == "paused"  # a retry
    go_on.set()
    check_whole(client, create(client, file, 2), 2)
    assert jobs.retrieve(job).status == "paused"
    assert "Files validated" not in str(jobs.list_events(job).data)
    assert jobs.resume(job).status == "validating_files"
    assert jobs.resume(job).status in ("validating_files", "queued", "running")  # a retry
    check_whole(client, job, 3)


def test_events_of_other_jobs_appear_while_a_large_file_is_checked(
    server: Running, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
):
    big = client.files.create(file=("b.jsonl", jsonl(SUPERVISED) * 9), purpose="fine-tune").id
    ends, right = threading.Event(), checking.check_files

    def check_files(sources: Any, *args: Any, **named: Any) -> dict[str, int]:
        assert big not in str(sources) or ends.wait(WAIT_S)
        return right(sources, *args, **named)

    monkeypatch.setattr(checking, "check_files", check_files)
    monkeypatch.setattr(checking, "LARGE", len(jsonl(SUPERVISED)))
    running, large = create(client, file, 40), create(client, big, 2)
    # Another job's file is checked meanwhile, and both of the others run to their ends.
    check_whole(client, create(client, file, 3), 3)
    check_whole(client, running, 40)
    assert client.fine_tuning.jobs.retrieve(large).status == "validating_files"
    ends.set()
    check_whole(client, large, 2)


def test_the_check_of_a_canceled_job_ends_early(
    server: Running, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
):
    begun, ended = threading.Event(), threading.Event()

    def check_files(*_: Any, tick: Any) -> dict[str, int]:
        begun.set()
        try:
            while True:  # a file without end
                tick()
        finally:
            ended.set()

    monkeypatch.setattr(checking, "check_files", check_files)
    job = create(client, file, 3)
    assert begun.wait(WAIT_S)
    client.fine_tuning.jobs.cancel(job)
    assert ended.wait(WAIT_S)
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"


def test_a_paused_job_resumes_and_has_each_step_once(
    server: Running, client: OpenAI, file: str, hold: Path
):
    allow(hold, 2)
    job = create(client, file, 12)
    for steps in (2, 5, 9):
        allow(hold, steps)
        held(server, job, steps)
        assert client.fine_tuning.jobs.pause(job).status == "paused"
        assert client.fine_tuning.jobs.resume(job).status in ("queued", "running")
    hold.unlink()
    check_whole(client, job, 12)


def test_a_job_whose_process_is_killed_resumes_but_not_for_ever(
    server: Running, client: OpenAI, file: str, hold: Path
):
    allow(hold, 10)
    job = create(client, file, 20)
    os.kill(held(server, job, 10), signal.SIGKILL)
    hold.unlink()
    check_whole(client, job, 20)
    allow(hold, 0)
    hopeless, killed = create(client, file, 21), set()
    while client.fine_tuning.jobs.retrieve(hopeless).status != "failed":
        with server.services.store.read() as db:
            query = "SELECT pid FROM jobs WHERE id = ?"
            (pid,) = db.execute(query, (hopeless,)).fetchone()
        if pid is not None and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    assert len(killed) == 5


def test_one_device_runs_one_job_at_a_time_in_order(server: Running, client: OpenAI, file: str):
    jobs = [create(client, file, 5) for _ in range(4)]
    for job in jobs:
        check_whole(client, job, 5)
    done = [client.fine_tuning.jobs.retrieve(job).finished_at for job in jobs]
    assert done == sorted(done)  # type: ignore[type-var]


def test_a_deleted_training_file_does_not_stop_a_job(client: OpenAI):
    own = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
    job = create(client, own, 3)
    while client.fine_tuning.jobs.retrieve(job).status == "validating_files":
        time.sleep(POLL_S)
    client.files.delete(own)
    check_whole(client, job, 3)


def test_a_job_that_the_server_fails_at_holds_up_no_other(
    server: Running, client: OpenAI, file: str, monkeypatch: pytest.MonkeyPatch
):
    spoiled = []
    right = checking.prepare

    def prepare(api: Any, row: Any, **named: Any) -> Any:
        if row["seed"] == 4 and len(spoiled) < 2:
            spoiled.append(row["id"])
            raise OSError(28, "No space left on device")
        return right(api, row, **named)

    monkeypatch.setattr(checking, "prepare", prepare)
    monkeypatch.setattr(checking, "AGAIN_S", 0.2)
    first, second = create(client, file, 4), create(client, file, 3)
    check_whole(client, second, 3)
    check_whole(client, first, 4)
    assert spoiled == [first] * 2


def test_a_content_that_waits_for_its_row_is_not_swept_away(tmp_path: Path):
    with running(tmp_path, devices=()) as own:
        folder = own.services.settings.data / "files"
        new, old = folder / "file-new.jsonl", folder / "file-old.jsonl"
        for path in (new, old):
            path.write_bytes(b"x")
        os.utime(old, (0, 0))
        file = own.openai().files.create(file=("a", b"b"), purpose="batch").id
        os.utime(folder / f"{file}.jsonl", (0, 0))
        with own.services.store.write() as db:
            own.services.parts["finetuning"].files.sweep(db)
        assert {path.name for path in folder.iterdir()} == {"file-new.jsonl", f"{file}.jsonl"}


# ---- a client that sends again


class Faults:
    """An application that loses some requests or answers, as a network does."""

    def __init__(self, app: Any, seed: int) -> None:
        self.app, self.random, self.seen = app, random.Random(seed), 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        fate = self.random.random()
        self.seen += fate < 0.6
        if fate < 0.3:  # lost on the way here
            await _fail(send)
        elif fate < 0.6:  # lost on the way back

            async def nowhere(message: Any) -> None:
                return None

            await self.app(scope, receive, nowhere)
            await _fail(send)
        else:
            await self.app(scope, receive, send)


async def _fail(send: Any) -> None:
    headers = [(b"retry-after-ms", b"1")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_creates_with_injected_500s_make_no_job_twice(tmp_path: Path, count: int):
    settings = {"devices": (), "jobs_per_token": 10**6, "requests_per_minute": 10**6}
    with running(
        tmp_path, wrap=lambda app: Faults(app, seed=count), models={"tiny": "hub/t"}, **settings
    ) as own:
        client = own.openai(max_retries=40)
        file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
        # Half of the requests differ; the others are equal but for their keys, and all meant.
        made = [
            create(client, file, 1, metadata={"n": str(i)})
            if i % 2
            else create(client, file, 1, extra_headers={"Idempotency-Key": str(i)})
            for i in range(count)
        ]
        assert len(set(made)) == count
        with own.services.store.read() as db:
            assert {row["id"] for row in db.execute("SELECT id FROM jobs")} == set(made)
            assert db.execute("SELECT count(*) FROM files").fetchone()[0] == 1
        assert own.app.seen > count  # more than one of two requests was lost


# ---- kill -9 of the server


def serve(runs: Path, port: int) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-m", "tests.serve.killed_server", str(runs), str(port), "hub/tiny"]
    return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def patient(client: OpenAI, call: Any) -> Any:
    """Repeat a call until a server answers it."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return call()
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < end, "no server answers"
            time.sleep(POLL_S)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_kill_9_of_the_server_loses_and_doubles_nothing(tmp_path: Path, kills: int):
    port, chance = free_port(), random.Random(kills)
    token = make_services(Settings(runs=tmp_path, port=port)).auth.new_token("tester")
    client = OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=token, timeout=WAIT_S, max_retries=0
    )
    server, jobs = serve(tmp_path, port), {}
    try:
        upload = ("t.jsonl", jsonl(SUPERVISED))
        file = patient(client, lambda: client.files.create(file=upload, purpose="fine-tune")).id
        for i in range(kills):
            steps = chance.randint(5, 60)
            key = {"Idempotency-Key": f"job {i}"}
            job = patient(client, lambda: create(client, file, steps, extra_headers=key))  # noqa: B023
            assert job not in jobs
            jobs[job] = steps
            time.sleep(chance.uniform(0, 2))  # the random moment of the kill
            server.kill()
            server.wait()
            server = serve(tmp_path, port)
        for job, steps in jobs.items():
            patient(client, lambda: client.fine_tuning.jobs.retrieve(job))  # noqa: B023
            check_whole(client, job, steps)
        assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == set(jobs)
    finally:
        server.kill()
        server.wait()
    # The processes themselves ran one after the other: never two on one run, and none is left.
    for job in jobs:
        starts = (tmp_path / job / "starts").read_text().split()
        assert all(started_at(int(pid)) is None for pid in starts)
        assert len(set(starts)) == len(starts)
        output = (tmp_path / ".serve" / "jobs" / job / "output.txt").read_text()
        assert "another run" not in output
