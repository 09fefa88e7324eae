"""Measure what share of a GRPO step the proof of the weight push takes, in one process.

    python -m benchmarks.push_share DIR                       # 8 prompts x 8 responses x 64 tokens
    python -m benchmarks.push_share DIR --engine hf --dtype float32 --steps 2

The proof is all checksums, of what is sent and of what the engine holds, with the checks of vLLM's
packed copies and prefix cache, and the comparison of log-probabilities. CPU seconds are those of
the whole process, so that other work does not count.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}

import torch

from align.core import distributed
from align.core.types import PromptRow
from align.losses.kl import FixedKL
from align.models.loading import load_policy, load_tokenizer, stop_token_ids
from align.models.logprobs import LogprobModel
from align.online.algorithms import build_algorithm
from align.online.loop import OnlineRun, online_step
from align.recipe.schema import GrpoStage
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.stages import rollouts
from align.training.learner import Learner
from reward_models import build_reward

FORGET = "_forget_prefixes"
"""The method that clears the prefix cache and proves it by one request."""


class Clock:
    """CPU and wall seconds spent in functions, without counting a nested call twice."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to the clock."""

        def call(*args: Any, **options: Any) -> Any:
            began = time.process_time(), time.perf_counter()
            self._depth += 1
            try:
                return function(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.cpu += time.process_time() - began[0]
                    self.wall += time.perf_counter() - began[1]

        return call


def build_run(args: argparse.Namespace) -> OnlineRun:
    """Return a GRPO stage on the model, with random prompts and a length reward."""
    spec = GrpoStage.model_validate(
        {
            "kind": "grpo",
            "init": "x",
            "prompts": [{"path": "x"}],
            "rewards": [{"kind": "length", "target": 20, "limit": 60}],
            "steps": args.steps + 1,
            "prompts_per_step": args.prompts,
            "group_size": args.responses,
            "dtype": args.dtype,
            "micro_tokens": 2048,
            "optim": {"learning_rate": 1e-6, "schedule": "constant", "warmup_frac": 0.0},
            "sampling": {"max_new_tokens": args.tokens, "engine": args.engine},
        }
    )
    draw, stops = random.Random(0), stop_token_ids(args.model)
    ids = range(100, len(load_tokenizer(args.model)) - 100)
    prompts = [PromptRow(tuple(draw.choices(ids, k=64)), "", {}) for _ in range(args.prompts)]
    engine = build_engine(
        args.engine,
        EngineOptions(
            args.model,
            dtype=args.dtype,
            max_model_len=64 + args.tokens,
            cache_gib=0.5,
            stop_token_ids=stops,
        ),
    )
    policy = Learner(
        LogprobModel(load_policy(args.model, dtype=args.dtype)),
        optim=spec.optim,
        zero=spec.zero,
        dtype=args.dtype,
        total_steps=spec.steps,
    )
    return OnlineRun(
        spec=spec,
        algorithm=build_algorithm(spec),
        seed=0,
        prompts=prompts,
        rewards=[build_reward(spec.rewards[0].model_dump())],
        engine=engine,
        stop_token_ids=stops,
        push=rollouts.Push(engine, policy, prompts[0].input_ids),
        policy=policy,
        critic=None,
        reference=None,
        kl=FixedKL(0.0),
    )


def measure(args: argparse.Namespace) -> list[str]:
    """Return the lines of the table: seconds of the parts and of the step, and their share."""
    run = build_run(args)
    sums, answers, whole = Clock(), Clock(), Clock()
    checksum = sums.timed(sys.modules["align.sampling.checksums"].checksum)
    holders = ("checksums", "hf", "vllm_push")
    patches = [
        mock.patch(f"align.sampling.{name}.checksum", checksum)
        for name in holders
        if f"align.sampling.{name}" in sys.modules
    ]
    if args.engine == "vllm":
        from align.sampling.vllm import VllmEngine
        from align.sampling.vllm_push import _Packing

        for owner, name in ((_Packing, "note"), (_Packing, "renewed"), (VllmEngine, FORGET)):
            patches.append(mock.patch.object(owner, name, sums.timed(getattr(owner, name))))
    for name in ("probe_logprobs", "check_answers"):
        patches.append(mock.patch.object(rollouts, name, answers.timed(getattr(rollouts, name))))
    online_step(run, 0)  # the rounding is measured in the first step, once in a run
    for patch in patches:
        patch.start()
    for step in range(args.steps):
        whole.timed(online_step)(run, step + 1)
    title = f"{args.engine} {args.dtype}, {args.prompts} x {args.responses} x {args.tokens}"
    steps = args.steps
    share = (sums.cpu + answers.cpu) / whole.cpu
    lines = [
        "| step | checksums s | log-probs s | step s | share of the step |",
        "|---|---|---|---|---|",
    ]
    cells = [f"{x / steps:.2f}" for x in (sums.cpu, answers.cpu, whole.cpu)]
    return [*lines, f"| {title} | {' | '.join(cells)} | {100 * share:.2f} % |"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "hf"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, help="measured steps, after the first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group()
    sys.stdout.write("\n".join(measure(args)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end takes seconds


if __name__ == "__main__":
    main()
