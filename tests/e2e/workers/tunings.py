"""Run on one rank and on two: every tuning method takes two sft steps under each ZeRO stage."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
from engine_models import words
from tuned_stages import TUNINGS, tuning_spec

from align.core import distributed
from align.core.artefacts import Artefact
from align.models.logprobs import LogprobModel
from align.recipe.schema import SftStage
from align.stages.training import save_trained_policy
from align.training import learner
from align.tuning.loading import load_for_training


def partition_everything(make: Any) -> Any:
    """Let ZeRO-3 partition small tensors too, which it else keeps whole: adapters are small."""

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = make(*args, **kwargs)
        if found["zero_optimization"]["stage"] == 3:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    return config


def train(method: str, stage: int, source: Path, out: Path) -> list[dict[str, float]]:
    """Take two steps and write the artefact of an sft stage."""
    tuning = tuning_spec(method)
    model = load_for_training(source / "model", tuning, dtype="float32", seed=3)
    module = LogprobModel(model)
    steps = ranks.sft_steps(ranks.learner_of(module, stage), range(2))
    spec = SftStage(kind="sft", init="x", data=[{"path": "x"}], tuning=tuning)
    save_trained_policy(spec, module, source=Artefact(source, {}), out=out)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", type=int, required=True)
    args = parser.parse_args()
    distributed.init_process_group()
    torch.set_num_threads(1)
    learner.deepspeed_config = partition_everything(learner.deepspeed_config)
    world = distributed.world_size()
    source = args.out / f"source-{world}"
    if distributed.rank() == 0:
        ranks.policy_model().model.save_pretrained(source / "model")
        words(ranks.VOCAB).save_pretrained(source / "model")
    distributed.barrier()
    found = {}
    for stage in args.stages:
        for method in TUNINGS:
            folder = args.out / f"{method}-{stage}-{world}"
            found[method, stage] = train(method, stage, source, folder)
    if distributed.rank() == 0:
        torch.save(found, args.out / f"steps-{world}.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
