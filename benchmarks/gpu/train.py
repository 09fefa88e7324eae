"""Measure tokens per second, MFU and peak memory of the stages sft and dpo.

python -m benchmarks.gpu.train sft 0.5B --micro-tokens 16384 --rows 64
"""

import argparse
import statistics
from typing import Any

from align.recipe.schema import DpoStage, SftStage
from benchmarks.gpu.common import (
    SMOKE,
    make_run,
    model_utilization,
    result,
    run_stage,
    training_flops,
)
from benchmarks.workloads import SHAPES, lengths, pair_rows, sft_rows, write_rows


def words(text: str) -> int:
    """Return the number of tokens of a generated text."""
    return text.count("<")


def sft_work(rows: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the length of every sequence and the number of trained tokens."""
    trained = [words(row["completion"]) + 1 for row in rows]
    prompts = [words(row["prompt"]) for row in rows]
    return [p + t for p, t in zip(prompts, trained, strict=True)], sum(trained)


def dpo_work(rows: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the same for both responses of every pair, as if no prompt were shared."""
    sides = ("chosen", "rejected")
    found = [words(row["prompt"]) + words(row[side]) + 1 for row in rows for side in sides]
    return found, sum(words(row[side]) + 1 for row in rows for side in sides)


def main() -> None:
    """Train for a few steps and print the median of the later ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("sft", "dpo"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last step")
    args = parser.parse_args()
    if SMOKE:
        args.shape, args.longest, args.micro_tokens, args.rows = "tiny", 128, 512, 8
    run_dir = make_run(args.shape)
    totals = lengths("skewed", args.rows, longest=args.longest, median=args.longest // 4)
    make, form = (
        (sft_rows, "prompt_completion") if args.kind == "sft" else (pair_rows, "preference")
    )
    rows = make(totals, SHAPES[args.shape].vocab_size, prompt_frac=0.4)
    write_rows(run_dir / f"{args.kind}.jsonl", rows)
    settings: dict[str, Any] = {
        "kind": args.kind,
        "init": "base",
        "data": [{"path": str(run_dir / f"{args.kind}.jsonl"), "format": form}],
        "dtype": "bfloat16",
        "max_length": args.longest,
        "micro_tokens": args.micro_tokens,
        "batch_size": args.rows,
        "steps": 1000,
        "gradient_checkpointing": args.checkpointing,
        "max_lost_frac": 0.0,
        "optim": {"learning_rate": 1e-5},
    }
    spec = SftStage(**settings) if args.kind == "sft" else DpoStage(**settings)
    timer, gib = run_stage(
        args.kind, spec, run_dir, rounds=5 if SMOKE else 7, profiled=args.profile
    )
    seconds = statistics.median(timer.seconds[2:])
    sequences, trained = (sft_work if args.kind == "sft" else dpo_work)(rows)
    flops = training_flops(args.shape, sequences, trained)
    if args.kind == "dpo":
        # The reference policy's forward pass is a third of forward and backward.
        flops *= 4 / 3
    result(
        kind=args.kind,
        shape=args.shape,
        micro_tokens=args.micro_tokens,
        checkpointing=args.checkpointing,
        s_step=seconds,
        tokens_s=sum(sequences) / seconds,
        mfu=model_utilization(flops / seconds),
        peak_gib=gib,
        loss=timer.rows[-1].get("train/loss", float("nan")),
    )


if __name__ == "__main__":
    main()
