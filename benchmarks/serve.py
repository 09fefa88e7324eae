"""Print the tables of docs/serve.md: conformance, faults, attacks and load of ``align serve``.

Usage: python -m benchmarks.serve [--only load]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from openai import OpenAI

from tests.serve.running import Running, running
from tests.serve.tiny_model import SUPERVISED, jsonl

CLIENTS, CALLS = 20, 50
"""Clients at the same time, and calls of each."""
TESTS = {
    "calls of the openai client": ["tests/serve/test_conformance.py"],
    "jobs from file to chat": ["tests/serve/test_jobs.py"],
    "1,000 creates with lost requests and answers": ["tests/serve/test_queue.py", "-k", "1000"],
    "kill -9 of the server at 50 moments": ["tests/serve/test_queue.py", "-k", "kill_9 and 50"],
    "attacks": [
        *("tests/serve/test_attacks.py", "tests/serve/test_webhooks.py"),
        *("tests/unit/test_graders.py", "tests/serve/test_skeleton.py"),
    ],
}


def main() -> None:
    """Run the tests of each group, then measure the load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("tests", "load"), help="one of the two tables")
    only = parser.parse_args().only
    if only != "load":
        write("| what | tests | seconds |", "|---|---|---|")
        for name, words in TESTS.items():
            began = time.monotonic()
            argv = [sys.executable, "-m", "pytest", "-q", *words]
            env = os.environ | {"ALIGN_TEST_LONG": "1"}
            done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
            last = done.stdout.strip().splitlines()[-1].partition(" in ")[0]
            write(f"| {name} | {last} | {time.monotonic() - began:.0f} |")
    if only != "tests":
        write(f"\nload average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {date.today()}\n")
        write("| call | p50 ms | p95 ms | per s |", "|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            limits = {"requests_per_minute": 10**6, "jobs_per_token": 10**6, "devices": ()}
            with running(Path(folder), models={"tiny": "hub/tiny"}, **limits) as server:
                measure(server)


def measure(server: Running) -> None:
    """Print the times of each call, by many clients at the same time."""
    client = server.openai()
    content = jsonl(SUPERVISED)
    file = client.files.create(file=("t.jsonl", content), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file).id
    calls: dict[str, Callable[[OpenAI], object]] = {
        "models.list": lambda c: c.models.list(),
        "jobs.retrieve": lambda c: c.fine_tuning.jobs.retrieve(job),
        "jobs.list_events": lambda c: c.fine_tuning.jobs.list_events(job),
        "files.create": lambda c: c.files.create(file=("t", content), purpose="fine-tune"),
        "jobs.create": lambda c: c.fine_tuning.jobs.create(model="tiny", training_file=file),
    }
    for name, call in calls.items():
        times: list[float] = []

        def work(call: Callable[[OpenAI], object] = call, times: list[float] = times) -> None:
            own = server.openai()
            for _ in range(CALLS):
                began = time.monotonic()
                call(own)
                times.append(1000 * (time.monotonic() - began))

        threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(times) / (time.monotonic() - began)
        p50, p95 = np.percentile(times, [50, 95])
        write(f"| `{name}` | {p50:.0f} | {p95:.0f} | {rate:.0f} |")


def write(*lines: str) -> None:
    """Write lines to standard output."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
