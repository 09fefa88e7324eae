"""An error of one rank ends both, with its message, without a launcher that would end the other."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from align.core.rank_failures import LOST
from align.pipeline.processes import free_port
from tests.e2e.stage_runs import BASE, environment, finish

LIMIT_S = 1800
RECIPE = f"""\
name: tiny
stages:
{BASE.replace("num_kv_heads: 1", "num_kv_heads: 2")}"""
RECIPE += """\
  tokens:
    {kind: sft, init: base, ranks: 2, steps: 2, batch_size: 4, max_length: 128,
     data: [{world: sft, rows: 40}], loss: "own.py:no_tensor", parallel: {sequence: 2}}
  shards:
    {kind: sft, init: base, ranks: 2, steps: 2, batch_size: 4, max_length: 128,
     data: [{world: sft, rows: 40}], loss: "own.py:no_tensor", zero: {stage: 3}}
  memory:
    {kind: sft, init: base, ranks: 2, steps: 2, batch_size: 4, max_length: 128,
     data: [{world: sft, rows: 40}], loss: "own.py:no_memory", zero: {stage: 3}}
  online:
    {kind: grpo, init: base, ranks: 2, steps: 2, prompts_per_step: 2, group_size: 2,
     max_length: 128, prompts: [{world: prompts, rows: 8}],
     sampling: {max_new_tokens: 8, engine: hf}, rewards: [{kind: length, target: 2, limit: 12}],
     estimator: "own.py:advantages", scale: none}
"""
OWN = """\
import os

import torch

FAILS = os.environ["RANK"] == os.environ["FAILING_RANK"]


def no_tensor(logprobs, *rest):
    return 3 if FAILS else -logprobs


def no_memory(logprobs, *rest):
    if FAILS and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return -logprobs


def advantages(scores, group_ids):
    if FAILS:
        raise ValueError("these scores are not mine")
    return scores
"""
STUCK = """\
import os, sys, threading

from align.core import distributed, rank_failures
from align.core.errors import DataError
from align.core.log import setup_logging

rank_failures.GRACE_S = 2.0
distributed.init_process_group()
setup_logging(distributed.rank())
rank_failures.watch_ranks()
distributed.barrier()
if os.environ["RANK"] == os.environ["FAILING_RANK"]:
    try:
        with rank_failures.announced():
            raise DataError("rows.jsonl:3: no response, expected text")
    except DataError:
        if "leaves" in sys.argv:
            os._exit(2)
threading.Event().wait()
"""
"""A rank fails and leaves, or never comes to its end; the other waits for something else."""


def run_ranks(
    command: Sequence[str], *, failing: int, folder: Path | None = None
) -> list[tuple[int, str]]:
    """Run a command as two ranks of one group; give the exit code and the output of each."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"FAILING_RANK": str(failing), "PYTHONPATH": os.getcwd()}
    # Files, since a pipe that nobody reads could stop a rank.
    said = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            command,
            stdout=said[r],
            stderr=subprocess.STDOUT,
            env=environment() | world | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=folder,
            start_new_session=True,
        )
        for r in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=LIMIT_S)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = []
    for process, file in zip(processes, said, strict=True):
        with file:
            file.seek(0)
            found.append((process.returncode, file.read()))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the recipe, the user's functions and a finished base."""
    place = tmp_path_factory.mktemp("one-failed-rank")
    (place / "own.py").write_text(OWN)
    (place / "my.yaml").write_text(RECIPE)
    finish(place / "my.yaml", "base", place / "run")
    return place


NO_TENSOR = "own.py:no_tensor' returned int; expected a tensor with one loss"
CASES = {
    "tokens": (1, 2, NO_TENSOR),
    "shards": (0, 2, NO_TENSOR),
    "memory": (1, 1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    "online": (0, 1, "these scores are not mine"),
}


@pytest.mark.parametrize("stage", CASES)
def test_an_error_of_one_rank_ends_both(folder: Path, stage: str) -> None:
    failing, code, told = CASES[stage]
    kind = "grpo" if stage == "online" else "sft"
    command = [sys.executable, "-m", "align.stages", kind, "--recipe", "my.yaml"]
    command += ["--stage", stage, "--run-dir", str(folder / "run")]
    ended = run_ranks(command, failing=failing, folder=folder)
    assert ended[failing][0] == code, ended[failing][1]
    assert told in ended[failing][1]
    other, said = ended[1 - failing]
    assert other not in (0, 75), said
    assert LOST in said or told in said, said
    assert not (folder / "run" / stage / "manifest.json").exists()
    # What align run shows: the message of the rank that has failed, with the check it failed in.
    if told == NO_TENSOR:
        assert (
            "the preflight failed, nothing was trained\n  packing: stopped: " in ended[failing][1]
        )


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("way", ["leaves", "stays"])
def test_a_rank_that_waits_elsewhere_ends_too(failing: int, way: str) -> None:
    ended = run_ranks([sys.executable, "-c", STUCK, way], failing=failing)
    told = "rows.jsonl:3: no response, expected text"
    code, said = ended[failing]
    assert code == 2, said
    assert (told in said) == (way == "stays")
    code, said = ended[1 - failing]
    # Rank 0 takes the store of the notes with it.
    is_known = way == "stays" or failing == 1
    assert code == (2 if is_known else 1), said
    assert LOST in said
    assert (f"(rank {failing}: {told})" in said) == is_known
