"""Time align data check on a million rows, and measure its memory.

    python -m benchmarks.data_check [--rows 1000000]

Makes rows of about 300 bytes (a question from a template, an answer of random words; 1 % copies,
1 % near copies, 0.1 % faulty), checks them by the command line and writes
benchmarks/results/data_check.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

RESULT = Path(__file__).parent / "results" / "data_check.json"
ASKED = (
    "Explain how {} and {} work together.",
    "Write a short note about {} for {}.",
    "What is the difference between {} and {}?",
    "Give three reasons to prefer {} to {}.",
)


def write_rows(path: Path, count: int) -> None:
    """Write the rows, the same for every call."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    last: list[str] = []
    with path.open("w", encoding="utf-8") as f:
        for i in range(count):
            draw = rng.random()
            question = rng.choice(ASKED).format(*rng.choices(words, k=2)) + f" Case {i}."
            answer = rng.choices(words, k=26)
            if draw < 0.01 and last:
                question, answer = last[0], last[1:]
            elif draw < 0.02 and last:
                question, answer = last[0], [*last[1:-1], "other"]
            role = "bot" if draw > 0.999 else "assistant"
            last = [question, *answer]
            turns = [
                {"role": "user", "content": question},
                {"role": role, "content": " ".join(answer)},
            ]
            f.write(json.dumps({"messages": turns, "id": i}) + "\n")


def measure(path: Path) -> tuple[float, float, dict]:
    """Check a file; give seconds, the peak of its processes' memory in GiB, and the report."""
    command = [sys.executable, "-m", "align.cli", "data", "check", str(path), "--json"]
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, _memory(watched))
            time.sleep(0.1)
        seconds = time.monotonic() - began
        out.seek(0)
        return seconds, peak / 2**30, json.load(out)


def _memory(process: psutil.Process) -> int:
    """Sum the memory of a process and its children; shared pages count once (PSS)."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.NoSuchProcess:
        return total
    return total


def main() -> None:
    """Make the rows, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, count)
        seconds, peak, report = measure(path)
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, shared",
            "rows": count,
            "bytes": path.stat().st_size,
            "seconds": round(seconds, 1),
            "peak_memory_gib": round(peak, 2),
            "counts": report["counts"],
            "notes": report["notes"],
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
