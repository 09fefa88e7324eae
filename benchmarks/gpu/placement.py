"""Run eight stages end to end through their launch scripts, and one twice for bit identity."""

import hashlib
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.common import WORK, result

RECIPE = """
name: p
stages:
  base:
    kind: base
    build:
      vocab_size: 640
      hidden_size: 128
      num_layers: 2
      num_heads: 4
      num_kv_heads: 2
      intermediate_size: 256
    tokenizer: {chat_template: plain}
    data: [{world: corpus, rows: 1200, split: train}]
    steps: 60
    batch_size: 16
    max_length: 256
    optim: {learning_rate: 3.0e-3}
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 1200, split: train}]
    heldout: [{world: sft, rows: 60, split: heldout}]
    steps: 60
    batch_size: 16
    max_length: 128
    checkpoint_every: 20
    optim: {learning_rate: 3.0e-3}
  lora:
    kind: sft
    init: sft
    data: [{world: sft, rows: 300, split: train}]
    steps: 4
    batch_size: 16
    max_length: 128
    tuning: {method: lora, rank: 4}
  reward:
    kind: reward
    init: sft
    data: [{world: preference, rows: 600, split: train}]
    heldout: [{world: preference, rows: 60, split: heldout}]
    steps: 6
    batch_size: 16
    max_length: 128
    optim: {learning_rate: 5.0e-4}
  dpo:
    kind: dpo
    init: sft
    data: [{world: preference, rows: 600, split: train}]
    heldout: [{world: preference, rows: 60, split: heldout}]
    steps: 6
    batch_size: 16
    max_length: 128
    optim: {learning_rate: 3.0e-4}
  ppo:
    kind: ppo
    init: sft
    prompts: [{world: prompts, rows: 400, split: train}]
    rewards: [{kind: scalar, model: reward}]
    steps: 3
    prompts_per_step: 16
    minibatches: 2
    max_length: 128
    sampling: {max_new_tokens: 24, engine: hf}
    truncation: bootstrap
    kl: {coef: 0.05}
    critic: {init: reward}
  grpo:
    kind: grpo
    init: sft
    prompts: [{world: prompts, rows: 400, split: train}]
    rewards: [{kind: exact_match, pattern: 'answer is ([a-z0-9]+(?: [a-z0-9]+)*)'}]
    steps: 3
    prompts_per_step: 8
    group_size: 8
    max_length: 128
    sampling: {max_new_tokens: 24, engine: hf}
    optim: {learning_rate: 1.0e-3}
  evaluate:
    kind: evaluate
    models: [sft, dpo]
    baseline: sft
    prompts: [{world: prompts, rows: 24, split: heldout}]
    scores: [{kind: exact_match, pattern: 'answer is ([a-z0-9]+)'}]
    judge: [{kind: exact_match, pattern: 'answer is ([a-z0-9]+)'}]
    max_length: 128
    sampling: {max_new_tokens: 24, engine: hf}
"""
LEVELS = (("base",), ("sft",), ("lora", "reward", "dpo", "grpo"), ("ppo", "evaluate"))
"""Stages of one level need only those of the levels before; they run side by side."""


def run(stage: str, run_dir: Path) -> str:
    """Run a stage in a process of its own; return its exit code and seconds as text."""
    script = "launch/sft.py" if stage == "lora" else f"launch/{stage}.py"
    argv = [sys.executable, script, "--recipe", str(WORK / "p.yaml"), "--stage", stage]
    began = time.monotonic()
    done = subprocess.run(
        [*argv, "--run-dir", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stdout.write(f"---- {stage}\n{done.stdout[-4000:]}\n")
    return f"{done.returncode}/{time.monotonic() - began:.0f}s"


def weights_hash(run_dir: Path) -> str:
    """Return a hash of the weights that the stage sft has written."""
    data = (run_dir / "sft" / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:12]


def main() -> None:
    """Print exit code and seconds of every stage, and whether two runs give the same weights."""
    (WORK / "p.yaml").write_text(RECIPE, encoding="utf-8")
    first, second = WORK / "p", WORK / "p2"
    with ThreadPoolExecutor() as pool:
        for level in LEVELS:
            again = None
            if level == ("sft",):
                shutil.copytree(first / "base", second / "base", dirs_exist_ok=True)
                again = pool.submit(run, "sft", second)
            found = pool.map(run, level, [first] * len(level))
            result(**dict(zip(level, found, strict=True)))
            if again is not None:
                result(second_sft=again.result())
                result(two_runs_bit_identical=weights_hash(first) == weights_hash(second))


if __name__ == "__main__":
    main()
