"""Seconds from a process's start to its first step: ``python -m benchmarks.start``.

Each side is one process, and the sides alternate. ``check`` is ``align check quickstart``. ``sft``
and ``grpo`` are a stage with a tiny model, up to the moment before its first step. ``libraries``
imports what they need of torch, transformers, DeepSpeed and peft, and nothing else; with ``engine``
it imports vLLM's ``LLM`` too. Printed are medians of the processor time and of the clock.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARIES = "import torch, deepspeed, peft; from transformers import AutoModelForCausalLM"
SIDES = {
    "check": [sys.executable, "-m", "align", "check", "quickstart"],
    "libraries": [sys.executable, "-c", LIBRARIES],
    "sft": [sys.executable, "-m", "benchmarks.start", "--side", "sft"],
    "libraries, engine": [sys.executable, "-c", f"{LIBRARIES}; from vllm import LLM"],
    "grpo": [sys.executable, "-m", "benchmarks.start", "--side", "grpo"],
}


class Stop:
    """A gate in whose place the process ends when everything is built."""

    def ready(self) -> None:
        """End the process."""
        os._exit(0)


def main() -> None:
    """Time every side and print one line each, or be a side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=("sft", "grpo"), help=argparse.SUPPRESS)
    parser.add_argument("work", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        start(args.side, json.loads(args.work))
        sys.exit("the stage went on to its first step")
    with tempfile.TemporaryDirectory() as name:
        work = tiny_work(Path(name))
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in args.only}
        for side in args.only:
            timed(side, work)  # files come into memory, and bytecode is written
        for _ in range(args.rounds):
            for side, found in times.items():
                found.append(timed(side, work))
    for side, found in times.items():
        cpu, clock = (statistics.median(part) for part in zip(*found, strict=True))
        sys.stdout.write(f"{side}: {cpu:.2f} s of processor time, {clock:.2f} s\n")


def timed(side: str, work: str) -> tuple[float, float]:
    """Run a side; return its processor time and the time of the clock, in seconds."""
    command = [*SIDES[side], work] if side in ("sft", "grpo") else SIDES[side]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock


def tiny_work(folder: Path) -> str:
    """Write the tiny model and its rows into a folder; return the work of a side."""
    from benchmarks.workloads import SHAPES, write_model

    write_model(folder / "base" / "model", SHAPES["tiny"], dtype="float32")
    row = {"prompt": "w1 w2", "completion": "w3"}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    online = {"group_size": 2, "new_tokens": 4, "cache_gib": 0.1, "reward_pattern": "w"}
    work = {"folder": str(folder), "dtype": "float32", "threads": 1, "rows": 4, "settings": {}}
    return json.dumps({**work, **online, "max_length": 32, "learning_rate": 1e-4})


def start(kind: str, work: dict[str, Any]) -> None:
    """Start a stage as ``python -m align.stages`` does."""
    from align.core.extras import without_collections

    with without_collections():
        from benchmarks import align_sides
    gate: Any = Stop()
    getattr(align_sides, kind)(gate, work)


if __name__ == "__main__":
    main()
