"""launch/slurm.sbatch on a real Slurm of two nodes: preempted, requeued, the bytes of one machine.

Needs root and Debian's slurm-wlm and munge.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import slurm
from stage_runs import BASE

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launch/slurm.sbatch"
LIMIT_S = 1800.0
RECIPE = f"""\
name: queued
seed: 3
stages:
{BASE}"""
RECIPE += """\
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 32, split: train}]
    steps: 60
    batch_size: 8
    micro_tokens: 256
    ranks: 2
    threads: 1
    zero: {stage: 1}
    optim: {learning_rate: 1.0e-3}
  grpo:
    kind: grpo
    init: sft
    prompts: [{world: prompts, rows: 32, split: train}]
    rewards: [{kind: length, target: 2, limit: 12}]
    steps: 12
    prompts_per_step: 4
    group_size: 4
    micro_tokens: 128
    max_length: 128
    ranks: 2
    threads: 1
    sampling: {max_new_tokens: 16, engine: hf}
    optim: {learning_rate: 1.0e-3}
"""
pytestmark = [pytest.mark.long, pytest.mark.slow]


def hashes(run: Path) -> dict[str, str]:
    files = {name: run / name / "model/model.safetensors" for name in ("sft", "grpo")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def rows(run: Path, stage: str) -> int:
    path = run / stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(is_so: object, cluster: slurm.Cluster, output: Path, job: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():  # type: ignore[operator]
        said = output.read_text() if output.exists() else ""
        assert time.monotonic() < deadline, said
        assert cluster.call("squeue", "-h", "-j", job), said
        time.sleep(0.1)


def test_a_job_that_is_preempted_twice_ends_with_the_bytes_of_one_machine(
    alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = tmp_path / "align"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m align "$@"\n')
    command.chmod(0o755)
    output, run = tmp_path / "job.txt", tmp_path / "runs/queued"
    shutil.copytree(alone / "base", run / "base")
    with slurm.Cluster(tmp_path / "cluster") as cluster:
        resources = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=0"]
        words = ["sbatch", *resources, "--gpus-per-node=0", f"--output={output}"]
        words += [str(TEMPLATE), str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs")]
        # The nodes' names are not in any DNS, as those of a cluster are.
        environment = {"PYTHONPATH": str(ROOT), "ALIGN": str(command), "MASTER_ADDR": "127.0.0.1"}
        said = subprocess.run(
            words, env=cluster.environment | environment, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        job = said.stdout.split()[-1]
        for stage in ("sft", "grpo"):
            wait_until(lambda stage=stage: rows(run, stage) >= 3, cluster, output, job)
            # As Slurm itself does before the time limit (--signal=B:TERM).
            cluster.call("scancel", "--batch", "--signal=TERM", job)
            ended = f"{stage}: stopped, a checkpoint was saved"
            wait_until(lambda ended=ended: ended in output.read_text(), cluster, output, job)
        deadline = time.monotonic() + LIMIT_S
        while cluster.call("squeue", "-h", "-j", job):
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
        state = cluster.call("scontrol", "show", "job", job)
    text = output.read_text()
    assert "JobState=COMPLETED" in state, state + text
    assert re.search(r"Restarts=2\b", state), state
    assert text.count("2 ranks on 1 machine, started by srun") == 3
    assert hashes(run) == hashes(alone)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of the same recipe with two ranks on this machine, never interrupted."""
    if (reason := slurm.missing()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("alone")
    (folder / "r.yaml").write_text(RECIPE)
    words = ["run", str(folder / "r.yaml"), "--runs", str(folder / "runs")]
    done = subprocess.run(
        [sys.executable, "-m", "align", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/queued"
