"""Measure push, rollout and update of a GRPO step.

python -m benchmarks.gpu.grpo 0.5B hf
"""

import argparse
import statistics

from align.recipe.schema import GrpoStage
from benchmarks.gpu.common import SMOKE, make_run, result, run_stage
from benchmarks.workloads import SHAPES, prompt_rows, write_rows


def main() -> None:
    """Run a few steps of 16 prompts with 8 responses of up to 256 tokens each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("engine", choices=("hf", "vllm"))
    args = parser.parse_args()
    shape, new_tokens = ("tiny", 16) if SMOKE else (args.shape, 256)
    run_dir = make_run(shape)
    prompts = run_dir / "prompts.jsonl"
    write_rows(prompts, prompt_rows([128] * 64, SHAPES[shape].vocab_size))
    spec = GrpoStage(
        kind="grpo",
        init="base",
        dtype="bfloat16",
        max_length=128 + new_tokens,
        micro_tokens=16384,
        prompts=[{"path": str(prompts), "format": "prompt"}],
        prompts_per_step=16,
        group_size=8,
        steps=1000,
        max_lost_frac=0.0,
        rewards=[{"kind": "regex", "pattern": r"<w[1-5]\d>"}],
        sampling={"engine": args.engine, "max_new_tokens": new_tokens},
        optim={"learning_rate": 1e-6},
    )
    timer, gib = run_stage("grpo", spec, run_dir, rounds=4)
    row = timer.rows[-1]
    times = ("time/push_s", "time/rollout_s", "time/score_s", "time/update_s")
    result(
        engine=args.engine,
        shape=shape,
        responses=128,
        s_step=statistics.median(timer.seconds[1:]),
        peak_gib=gib,
        **{name.split("/")[1]: row[name] for name in times if name in row},
        tokens=row.get("tokens/sampled", float("nan")),
        logprob_gap=row.get("sampler/logprob_gap", float("nan")),
    )


if __name__ == "__main__":
    main()
