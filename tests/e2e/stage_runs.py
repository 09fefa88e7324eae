"""Run the stages of a tiny recipe as real processes, and compare what they leave behind."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from align.core.metrics import described
from align.pipeline.processes import free_port, stage_argv
from tests.e2e.warm import Fork, Fresh, Program
from tests.moments import signal_at

LIMIT_S = 1800.0

BASE = """\
  base:
    kind: base
    build: {vocab_size: 320, hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 1,
            intermediate_size: 128, max_positions: 128}
    tokenizer: {chat_template: plain}
    data: [{world: corpus, rows: 200}]
    steps: 4
    batch_size: 8
    max_length: 256
"""
"""The stage of a recipe that makes and trains a tiny model."""
RECIPE = f"""\
name: tiny
seed: 3
stages:
{BASE}"""
RECIPE += """\
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 64, split: train}]
    heldout: [{world: sft, rows: 16, split: heldout}]
    steps: 24
    batch_size: 8
    micro_tokens: 256
    eval_every: 5
    checkpoint_every: 3
    optim: {learning_rate: 1.0e-3}
  dpo:
    kind: dpo
    init: base
    data: [{world: preference, rows: 32, split: train}]
    steps: 4
    batch_size: 8
    micro_tokens: 256
    tuning: {method: lora, rank: 4, alpha: 8}
    optim: {learning_rate: 1.0e-3}
  reward:
    kind: reward
    init: base
    data: [{world: preference, rows: 32, split: train}]
    steps: 3
    batch_size: 8
    micro_tokens: 256
    norm_prompts: 8
    optim: {learning_rate: 1.0e-3}
  ppo:
    kind: ppo
    init: base
    prompts: [{world: prompts, rows: 32, split: train}]
    rewards: [{kind: length, target: 2, limit: 12}]
    steps: 20
    prompts_per_step: 4
    micro_tokens: 128
    max_length: 128
    checkpoint_every: 3
    sampling: {max_new_tokens: 16, engine: hf}
    kl: {coef: 0.05, target: 1.0, horizon: 40}
    optim: {learning_rate: 1.0e-3}
    critic: {optim: {learning_rate: 1.0e-3}}
  grpo:
    kind: grpo
    init: base
    prompts: [{world: prompts, rows: 32, split: train}]
    rewards: [{kind: length, target: 2, limit: 12}]
    steps: 4
    prompts_per_step: 4
    group_size: 4
    micro_tokens: 128
    max_length: 128
    sampling: {max_new_tokens: 16, engine: hf}
    kl: {coef: 0.05, place: loss, estimator: k3}
    tuning: {method: lora, rank: 4, alpha: 8}
    optim: {learning_rate: 1.0e-3}
"""


def write_recipe(folder: Path) -> Path:
    """Write the recipe into ``folder``."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """Give one thread to each process, and no trace of a process group of the test's own."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names}
    return env | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "DS_ACCELERATOR": "cpu",
    }


def run(
    recipe: Path,
    stage: str,
    run_dir: Path,
    *,
    ranks: int = 1,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
    kind: str | None = None,
    fresh: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run a stage to its end; give its exit code and everything it said.

    Args:
        recipe: of the stage. stage: its name. run_dir: where its folder is.
        ranks: number of processes. overrides: settings. flags: other arguments.
        kind: of the stage, where it is not its name.
        fresh: start Python afresh, with these variables in its environment.
    """
    arguments = [kind or stage, "--recipe", str(recipe), "--stage", stage]
    arguments += ["--run-dir", str(run_dir)]
    arguments += [word for o in overrides for word in ("--set", o)] + list(flags)
    # Without the interpreter and its -u.
    argv = stage_argv(arguments, ranks=ranks, on_gpu=False)[2:]
    kept = fresh is None and ranks == 1
    program = Fork(argv, environment()) if kept else Fresh(argv, environment() | dict(fresh or {}))
    return program.wait(LIMIT_S), program.said()


def finish(recipe: Path, stage: str, run_dir: Path, **options) -> str:
    """Run a stage that must succeed; give everything it said."""
    code, said = run(recipe, stage, run_dir, **options)
    assert code == 0, said[-4000:]
    return said


def half_of(step: int) -> str:
    """Give the path in a stage's folder that is made in the middle of saving that checkpoint."""
    return f"checkpoints/step-{step:08d}.tmp/"


def interrupt(
    recipe: Path, stage: str, run_dir: Path, signum: int, at: str, **options
) -> tuple[int, str]:
    """Run a stage that gets a signal as it makes the path ``at``; give its exit code and words."""
    mark = run_dir / f"{stage}-signaled"
    found = run(recipe, stage, run_dir, fresh=signal_at(f"{stage}/{at}", signum, mark), **options)
    assert mark.exists(), found[1][-4000:]
    return found


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process group that ``start`` made."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=LIMIT_S)


def finish_ranks(
    command: Sequence[str], ranks: int, *, start: Callable[..., Program] = Fork
) -> None:
    """Run a worker as ``ranks`` processes of one group; all must end well.

    Args:
        command: the worker's file and its arguments.
        ranks: number of processes.
        start: ``Fresh`` where the environment has to be there when Python starts.
    """
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    programs = [
        start(command, environment() | world | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]
    codes = [program.wait(LIMIT_S) for program in programs]
    for program, code in zip(programs, codes, strict=True):
        assert code == 0, program.said()[-3000:]


def weights(run_dir: Path, stage: str) -> bytes:
    """Give the bytes of a stage's final weights."""
    return (run_dir / stage / "model" / "model.safetensors").read_bytes()


def numbers(run_dir: Path, stage: str) -> list[dict[str, float]]:
    """Give the stage's metrics without the times."""
    lines = (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def is_time(name: str) -> bool:
        return name.startswith("time") or name == "tokens/per_s"

    logged = [json.loads(x) for x in lines]
    unknown = {k for row in logged for k in row if described(k) is None}
    assert not unknown, f"not described in align/core/metrics.py: {unknown}"
    return [{k: v for k, v in row.items() if not is_time(k)} for row in logged]


def samples(run_dir: Path, stage: str) -> str:
    """Give the stage's samples."""
    return (run_dir / stage / "samples.jsonl").read_text(encoding="utf-8")


def manifest(run_dir: Path, stage: str) -> dict:
    """Give the stage's manifest."""
    return json.loads((run_dir / stage / "manifest.json").read_text(encoding="utf-8"))


def two_ranks_equal_one(
    template: str, folder: Path, out: Path, *, stages: Sequence[str], metrics: Sequence[str]
) -> None:
    """Hold ZeRO-2 and ZeRO-3 on two ranks to one process: saved weights and last metrics.

    Args:
        template: recipe with ``{zero}``, ``{ranks}`` and ``{folder}``, of stages ``NAME_{zero}``.
        folder: of the models and data. out: the run's folder. stages: their NAMEs.
        metrics: those to compare.
    """
    worker = str(Path(__file__).parent / "workers" / "stages.py")
    for ranks, zero in ((1, 0), (2, 2), (2, 3)):
        recipe = out / f"{zero}.yaml"
        recipe.write_text(template.format(folder=folder, zero=zero, ranks=ranks), encoding="utf-8")
        command = [worker, "--recipe", str(recipe), "--run-dir", str(out)]
        finish_ranks([*command, "--stages", *(f"{name}_{zero}" for name in stages)], ranks)
    for name in stages:
        one, *two = (load(weights(out, f"{name}_{zero}")) for zero in (0, 2, 3))
        expected = manifest(out, f"{name}_0")["metrics"]
        for zero, found in zip((2, 3), two, strict=True):
            assert found.keys() == one.keys()
            for key, tensor in one.items():
                torch.testing.assert_close(found[key], tensor, rtol=0.0, atol=2e-5, msg=key)
            said = manifest(out, f"{name}_{zero}")["metrics"]
            for key in metrics:
                assert said[key] == pytest.approx(expected[key], rel=1e-4), key
