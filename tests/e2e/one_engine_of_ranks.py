"""Run on two ranks: an engine of both, and then one of each; ``MODEL OUT``."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "workers"))
from engine_models import tiny_decoder
from waits import group_limits

from align.core import distributed
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import push
from align.tuning.export import full_weights

LONG = [3, 9, 27, 17, 51, 25, 11, 33] * 6
"""More than one block of the cache."""
PROMPTS = [[[5, 6], [7], LONG], [[8, 9, 10]]]
"""Prompts of each rank: the ranks have different numbers of them."""


def main() -> None:
    family, model, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group()
    found: dict[str, Any] = {str(ranks): asked(family, model, ranks) for ranks in (2, 1)}
    # The trainer's process group outlives both engines.
    found["sum_after_close"] = distributed.global_sum(float(distributed.rank()))
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


def asked(family: str, model: Path, ranks: int) -> dict:
    """Return what an engine says with the weights of seed 1, and after a push of those of 2."""
    engine = build_engine(
        "vllm", EngineOptions(model, max_model_len=96, cache_gib=0.02, tensor_parallel=ranks)
    )
    prompts = PROMPTS[distributed.rank()]
    result: dict = {"parts": sorted(engine.shares), "limits": group_limits()}
    for seed in (1, 2):
        proof = push(engine, full_weights(tiny_decoder(family, seed)), version=seed)
        greedy = engine.generate(prompts, n=1, max_new_tokens=12, temperature=0.0)
        seeds = [100 * distributed.rank() + i for i in range(len(prompts))]
        drawn = engine.generate(prompts, n=2, max_new_tokens=8, temperature=1.0, seeds=seeds)
        result[str(seed)] = {
            "same": proof.same,
            "unplaced": proof.unplaced,
            "greedy": [group[0].token_ids for group in greedy],
            "drawn": [[answer.token_ids for answer in group] for group in drawn],
            "logprobs": [[answer.logprobs for answer in group] for group in drawn],
            "given": engine.token_logprobs(prompts[0] * 2),
        }
    # A rank may have no prompts at all.
    result["none"] = len(engine.generate(prompts[1:2], n=1, max_new_tokens=2, temperature=0.0))
    engine.close()
    return result


if __name__ == "__main__":
    main()
