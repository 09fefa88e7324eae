"""How a step scales over ranks: ``python -m benchmarks.ranks`` alternates 1 and 2 processes.

Strong scaling: the rows of the skewed SFT row of the table, one thread a rank, ZeRO stage 0. The
measured step begins and ends together on all ranks; the wall time of rank 0 counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, spread
from benchmarks.run import RESULTS, device_name, today
from benchmarks.workloads import SHAPES, lengths, write_model

RANKS = (1, 2)
LAUNCHES, STEPS = 3, 3
MICRO_TOKENS = 2048


def main() -> None:
    """Measure, print and keep the seconds of each number of ranks."""
    device, shape = device_name()
    seconds: dict[int, list[float]] = {num: [] for num in RANKS}
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch) / "model", SHAPES[shape], dtype="float32")
        for _ in range(LAUNCHES):
            for num in RANKS:
                seconds[num].append(_launch(num, Path(scratch), shape))
    one, two = (seconds[num] for num in RANKS)
    found = {
        "device": device,
        "date": today(),
        "rows": "32 of 8 to 1024 tokens, log-normal",
        "seconds": {str(num): spread(values) for num, values in seconds.items()},
        "speed_up": spread([a / b for a, b in zip(one, two, strict=True)]),
    }
    path = RESULTS / device["folder"] / "ranks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))  # noqa: T201 - what the command is for


def _launch(num: int, folder: Path, shape: str) -> float:
    """Train in ``num`` fresh processes; give the fastest step, in seconds."""
    out = folder / "seconds.json"
    out.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    work = ["-m", "benchmarks.ranks", "step", str(folder), shape]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *work], env=env, cwd=ROOT, check=True)
    return min(json.loads(out.read_text(encoding="utf-8")))


def step(folder: Path, shape: str) -> None:
    """Be one rank: take steps on the same global batch and write down how long they took."""
    import torch

    from align.core import distributed
    from align.models.loading import load_policy
    from align.models.logprobs import LogprobModel
    from align.recipe.schema import OptimSpec, ZeroSpec
    from align.stages.sft import collate, length_of, sft_loss
    from align.training.learner import Learner
    from align.training.task import OfflineTask, micro_batches
    from benchmarks.curves import random_row

    torch.set_num_threads(1)
    distributed.init_process_group()
    learner: Any = Learner(
        LogprobModel(load_policy(folder / "model", dtype="bfloat16")),
        optim=OptimSpec(learning_rate=1e-5, schedule="constant"),
        zero=ZeroSpec(),
        dtype="bfloat16",
        total_steps=10_000,
    )
    torch.manual_seed(0)
    totals = lengths("skewed", 32, longest=1024, median=120)
    rows = [random_row(n, SHAPES[shape].vocab_size) for n in totals]
    task: Any = OfflineTask(rows, [], length_of, collate, sft_loss)
    seconds = []
    for _ in range(1 + STEPS):
        distributed.barrier()
        began = time.perf_counter()
        learner.step(micro_batches(task, rows, MICRO_TOKENS), sft_loss)
        distributed.barrier()
        seconds.append(time.perf_counter() - began)
    if distributed.rank() == 0:
        (folder / "seconds.json").write_text(json.dumps(seconds[1:]), encoding="utf-8")


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else step(Path(sys.argv[2]), sys.argv[3])
