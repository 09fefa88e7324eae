"""Run eight stages end to end as processes of their own, and one twice for bit identity."""

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
LEVELS = (("sft",), ("lora", "reward", "dpo", "grpo"), ("ppo", "evaluate"))
"""Stages of one level need only those of the levels before; they run side by side."""


def run(stage: str, run_dir: Path, *overrides: str) -> str:
    """Run a stage in a process of its own; return its exit code and seconds as text."""
    kind = "sft" if stage == "lora" else stage
    argv = [sys.executable, "-m", "align.stages", kind, "--recipe", str(WORK / "p.yaml")]
    began = time.monotonic()
    done = subprocess.run(
        [
            *argv,
            "--stage",
            stage,
            "--run-dir",
            str(run_dir),
            *(w for o in overrides for w in ("--set", o)),
        ],
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
    first, again = WORK / "p", WORK / "again"
    fixed = [WORK / f"fixed{i}" for i in range(2)]
    with ThreadPoolExecutor() as pool:
        result(base=run("base", first))
        for folder in (again, *fixed):
            shutil.copytree(first / "base", folder / "base", dirs_exist_ok=True)
        repeated = [pool.submit(run, "sft", again)]
        repeated += [pool.submit(run, "sft", folder, "deterministic=true") for folder in fixed]
        for level in LEVELS:
            found = pool.map(run, level, [first] * len(level))
            result(**dict(zip(level, found, strict=True)))
            if level == ("sft",):
                result(repeated="+".join(r.result() for r in repeated))
                result(bit_identical=weights_hash(first) == weights_hash(again))
                same = weights_hash(fixed[0]) == weights_hash(fixed[1])
                result(bit_identical_with_deterministic=same)


if __name__ == "__main__":
    main()
