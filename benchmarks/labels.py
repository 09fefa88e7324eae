"""Labeling with many annotators: seconds per request, and kill -9 at many moments.

python -m benchmarks.labels load --annotators 20 --items 500
python -m benchmarks.labels kills --kills 50
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from align.pipeline.processes import free_port
from align.serve.app import make_services
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.tables import Project, create_project
from align.serve.settings import Settings
from align.serve.store import Store

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 120


class Killable:
    """``align serve`` in a process of its own, which can be killed at any moment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process; it answers after some seconds."""
        code = (
            "import sys, pathlib, uvicorn; from align.serve.app import create_app\n"
            "from align.serve.settings import Settings\n"
            "runs, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
            "uvicorn.run(create_app(Settings(runs=runs, port=port)), port=port, log_level='error')"
        )
        argv = [sys.executable, "-c", code, str(self.folder / "runs"), str(self.port)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(argv, cwd=self.folder, env=env)

    def kill(self) -> None:
        """End the process as ``kill -9`` does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(WAIT_S) == -signal.SIGKILL


class Annotator(threading.Thread):
    """A client that labels until nothing is left, and sends again what got no answer."""

    def __init__(self, server: Killable, token: str, *, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.server, self.token = server, token
        self.client = httpx.Client(timeout=WAIT_S)
        self.pause_s = pause_s
        self.acknowledged: dict[str, str] = {}
        self.seconds: list[float] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        """Label until nothing is left."""
        while not self.stopped.is_set():
            task = self.send("next", {})["task"]
            if task is None:
                return
            # People do not answer in step.
            self.stopped.wait(self.pause_s * random.uniform(0.5, 1.5))
            best = max(range(2), key=lambda i: task["responses"][i][0]["content"])
            choice = ("left", "right")[best]
            done = self.send(f"tasks/{task['id']}", {"choice": choice})
            if "error" not in done:
                self.acknowledged[task["prompt"][0]["content"]] = choice

    def send(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer to a request, which is sent again until there is one."""
        headers = {"authorization": f"Bearer {self.token}"}
        while not self.stopped.is_set():
            try:
                began = time.monotonic()
                url = f"{self.server.url}/labels/p/{path}"
                found = self.client.post(url, json=body, headers=headers).json()
                self.seconds.append(time.monotonic() - began)
                return found
            except (httpx.TransportError, ValueError):
                self.stopped.wait(0.02)
        return {"task": None, "error": "stopped"}


def prepare(folder: Path, *, items: int, annotators: int) -> tuple[Killable, list[Annotator]]:
    """Return a server with a project of pairs, not started, and its annotators."""
    services = make_services(Settings(runs=folder / "runs"))
    with services.store.write() as db:
        project = create_project(db, Project("p", wanted=2))
        add_items(db, project, [Candidate(f"q{i}", (f"a{i}", f"b{i}")) for i in range(items)])
    server = Killable(folder)
    tokens = [services.auth.new_token(f"annotator {i}") for i in range(annotators)]
    return server, [Annotator(server, token) for token in tokens]


def run_with_kills(folder: Path, *, items: int, annotators: int, kills: int) -> int:
    """Label a project while its server is killed; return the number of labels.

    Raises:
        AssertionError: a label is lost, doubled or not what was acknowledged.
    """
    server, people = prepare(folder, items=items, annotators=annotators)
    server.start()
    try:
        for annotator in people:
            annotator.start()
        total = 2 * items
        for k in range(kills):
            # Kill at a moment that progress determines, whatever the speed of the machine.
            target = (k + 1) * total // (kills + 1)
            while sum(len(a.acknowledged) for a in people) < target:
                assert any(a.is_alive() for a in people)
                people[0].join(0.005)
            server.kill()
            server.start()
        for annotator in people:
            annotator.join(WAIT_S)
            assert not annotator.is_alive()
    finally:
        for annotator in people:
            annotator.stopped.set()
        server.kill()
    with Store(folder / "runs" / ".serve").read() as db:
        found = db.execute(
            "SELECT a.name, i.prompt, t.choice, t.flipped FROM label_tasks t "
            "JOIN label_items i ON i.id = t.item_id JOIN label_annotators a "
            "ON a.id = t.annotator_id WHERE t.state = 'done'"
        ).fetchall()
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    recorded = {(row["name"], json.loads(row["prompt"])): row["choice"] for row in found}
    assert len(found) == len(recorded) == total, "no label is lost or doubled"
    assert {prompt for _, prompt in recorded} == {f"q{i}" for i in range(items)}
    for i, annotator in enumerate(people):
        for prompt, choice in annotator.acknowledged.items():
            assert recorded[f"annotator {i}", prompt] == choice, "what was acknowledged is recorded"
    assert all((row["choice"] == "right") == (row["flipped"] == 0) for row in found), "b > a"
    return len(found)


def run_load(folder: Path, *, items: int, annotators: int, pause_s: float) -> list[float]:
    """Return the seconds of every request while annotators label all items twice."""
    server, people = prepare(folder, items=items, annotators=annotators)
    server.start()
    try:
        people[0].send("undo", {})  # the server is up once it answers
        people[0].seconds.clear()
        for annotator in people:
            annotator.pause_s = pause_s
            annotator.start()
        for annotator in people:
            annotator.join()
    finally:
        server.kill()
    return [seconds for annotator in people for seconds in annotator.seconds]


def label_load(folder: Path, *, items: int, pause_s: float, annotators: int = 20) -> str:
    """Return one line about the times of requests while annotators label all items twice."""
    seconds = run_load(folder, items=items, annotators=annotators, pause_s=pause_s)
    quantiles = statistics.quantiles(seconds, n=100)
    return (
        f"{annotators} annotators, {len(seconds)} requests: median {1000 * quantiles[49]:.1f} ms, "
        f"p95 {1000 * quantiles[94]:.1f} ms, longest {1000 * max(seconds):.1f} ms"
    )


def main() -> None:
    """Print the result of one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["load", "kills"])
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--items", type=int, default=500, help="each gets two labels")
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds before each answer")
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "kills":
            count = run_with_kills(
                Path(folder), items=args.items, annotators=args.annotators, kills=args.kills
            )
            sys.stdout.write(f"{args.kills} kills, {count} labels, none lost or doubled\n")
            return
        told = label_load(
            Path(folder), items=args.items, pause_s=args.pause, annotators=args.annotators
        )
    sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main()
