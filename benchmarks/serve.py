"""Print the tables of docs/serve.md: conformance, faults, attacks and load of ``align serve``.

Usage: python -m benchmarks.serve [--only tests|load] [--short]
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from openai import OpenAI

from benchmarks.labels import label_load
from tests.serve.running import Running, running
from tests.serve.tiny_model import SUPERVISED, jsonl

CLIENTS, PROCESSES, EACH = 20, 2, 50
"""Clients at the same time, the processes they are spread over, and calls of each client."""
CALLS: dict[str, Callable[[OpenAI, str, str], object]] = {
    "models.list": lambda c, _file, _job: c.models.list(),
    "jobs.retrieve": lambda c, _file, job: c.fine_tuning.jobs.retrieve(job),
    "jobs.list_events": lambda c, _file, job: c.fine_tuning.jobs.list_events(job),
    "files.create": lambda c, _file, _job: c.files.create(
        file=("t", jsonl(SUPERVISED)), purpose="fine-tune"
    ),
    "jobs.create": lambda c, file, _job: c.fine_tuning.jobs.create(
        model="tiny", training_file=file
    ),
}
"""Calls that are measured."""
TESTS = {
    "calls of the openai client, and jobs from file to chat": [
        *("tests/serve/test_conformance.py", "tests/serve/test_jobs.py"),
    ],
    "1,000 creates (short: 60) with lost requests and answers": [
        *("tests/serve/test_queue.py", "-k", "injected_500s"),
    ],
    "kill -9 of the server at 50 moments (short: 3)": ["tests/serve/test_queue.py", "-k", "kill_9"],
    "kill -9 of the server while 4 annotators label, 50 moments (short: 3)": [
        *("tests/serve/test_labels_http.py", "-k", "killed"),
    ],
    "attacks on the server": [
        *("tests/serve/test_attacks.py", "tests/serve/test_webhooks.py"),
        "tests/serve/test_skeleton.py",
    ],
    "attacks by graders, in process": ["tests/unit/test_graders.py"],
}
"""Tests of each row of the table."""
SEEN = re.compile(r"(\d+) requests, (\d+ of \d+) routes")


def main() -> None:
    """Run the tests of each group, then measure the load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("tests", "load"), help="one of the two parts")
    parser.add_argument("--short", action="store_true", help="short forms: do the commands work?")
    args = parser.parse_args()
    if args.only != "load":
        run_tests(short=args.short)
    if args.only != "tests":
        write(f"\nload average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {date.today()}\n")
        write("| call | p50 ms | p95 ms | per s | CPU ms |", "|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            limits = {"requests_per_minute": 10**6, "jobs_per_token": 10**6, "devices": ()}
            with running(Path(folder), models={"tiny": "hub/tiny"}, **limits) as server:
                measure(server, each=5 if args.short else EACH)
        with tempfile.TemporaryDirectory() as folder:
            write("\n" + label_load(Path(folder), items=20 if args.short else 150, pause_s=2.0))


def run_tests(*, short: bool) -> None:
    """Print the result of the tests of each group, with the requests that they made."""
    write("| what | tests | requests | routes of /v1 | seconds |", "|---|---|---|---|---|")
    for name, words in TESTS.items():
        began = time.monotonic()
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.requests_seen", *words]
        env = os.environ | ({} if short else {"ALIGN_TEST_LONG": "1"})
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1].partition(" in ")[0]
        seen = SEEN.search(done.stdout)
        requests, routes = seen.groups() if seen else ("-", "-")
        seconds = time.monotonic() - began
        write(f"| {name} | {last} | {requests} | {routes} | {seconds:.0f} |")


def measure(server: Running, *, each: int) -> None:
    """Print the times of each call, by many clients at the same time, and the server's CPU time.

    The server is in this process, which does nothing else meanwhile; the clients are in others.
    """
    client = server.openai()
    file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
    spawn = multiprocessing.get_context("spawn")
    # The clients' Python runs beside the server's, not in between.
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        for name in CALLS:
            ask = partial(_ask, name, url=server.url, token=server.token, file=file, job=job)
            list(pool.map(ask, [1] * PROCESSES))  # imports and first connections
            began, cpu = time.monotonic(), time.process_time()
            found = list(pool.map(ask, [each] * PROCESSES))
            seconds, cpu = time.monotonic() - began, time.process_time() - cpu
            times = np.concatenate(found)  # of the calls that were answered
            p50, p95 = np.percentile(times, [50, 95])
            rate, own = len(times) / seconds, 1000 * cpu / len(times)
            write(f"| `{name}` | {p50:.0f} | {p95:.0f} | {rate:.0f} | {own:.2f} |")


def _ask(name: str, count: int, *, url: str, token: str, file: str, job: str) -> list[float]:
    """Return the times in ms of calls by the clients of one process, each in its own thread."""
    times: list[float] = []

    def work() -> None:
        with OpenAI(base_url=f"{url}/v1", api_key=token) as client:
            client.models.list()  # connect
            for _ in range(count):
                began = time.monotonic()
                CALLS[name](client, file, job)
                times.append(1000 * (time.monotonic() - began))

    threads = [threading.Thread(target=work) for _ in range(CLIENTS // PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def write(*lines: str) -> None:
    """Write lines to standard output."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
