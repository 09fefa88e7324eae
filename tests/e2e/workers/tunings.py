"""Run on one rank and on two: every tuning method takes a few steps under each ZeRO stage.

Two of sft, under ZeRO-3 the second of them once more from a checkpoint; then of dpo and grpo with
the two methods that are the suite's own. Their reference is the policy with its adapter off;
without ZeRO it is a copy of what the policy was loaded from, to which that is compared.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
from engine_models import words
from tuned_stages import TUNINGS, tuning_spec

from align.core import distributed
from align.core.checkpoints import load_checkpoint, save_checkpoint
from align.core.types import PairRow, TokenRow
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import DpoStage, GrpoStage, SftStage
from align.stages.dpo import collate, preference_loss, reference_pairs
from align.stages.saving import save_trained_policy
from align.training import learner
from align.training.batch import pair_length
from align.training.learner import Learner
from align.training.task import OfflineTask, micro_batches
from align.tuning.loading import load_for_training
from align.tuning.reference import start_policy


def partition_everything(make: Any) -> Any:
    """Let ZeRO-3 partition small tensors too, which it else keeps whole: adapters are small."""

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = make(*args, **kwargs)
        if found["zero_optimization"]["stage"] == 3:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    return config


OWN = ("bottleneck", "loreft")


def learner_with(method: str, stage: int, source: Path) -> Learner:
    """Load the policy with what the method adds."""
    model = load_for_training(source / "model", tuning_spec(method), dtype="float32", seed=3)
    return ranks.learner_of(LogprobModel(model), stage)


def save(method: str, module: Any, source: Path, out: Path) -> None:
    """Write the artifact of an sft stage."""
    spec = SftStage(kind="sft", init="x", data=[{"path": "x"}], tuning=tuning_spec(method))
    out.mkdir(parents=True, exist_ok=True)
    save_trained_policy(spec, module, source_dir=source / "model", out=out)


def sft(method: str, stage: int, source: Path, out: Path) -> list[dict[str, float]]:
    """Take two steps; under ZeRO-3 also take the second again from a checkpoint."""
    trained = learner_with(method, stage, source)
    steps = ranks.sft_steps(trained, range(1))
    path = out / "checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    if stage == 3:
        path = save_checkpoint(path, 1, engines={"policy": trained.engine}, state={}, keep=1)
    steps += ranks.sft_steps(trained, range(1, 2))
    save(method, trained.module, source, out)
    if stage < 3:
        return steps
    again = learner_with(method, stage, source)
    again.steps, _ = load_checkpoint(path, {"policy": again.engine})
    ranks.sft_steps(again, range(1, 2))
    save(method, again.module, source, out / "resumed")
    return steps


def frozen_start(source: Path) -> LogprobModel:
    """Load the policy without what the method adds."""
    return LogprobModel(load_policy(source / "model", dtype="float32")).requires_grad_(False)


def dpo(method: str, stage: int, source: Path) -> list[dict[str, float]]:
    """Take two steps on pairs."""
    model: Any = load_for_training(source / "model", tuning_spec(method), dtype="float32", seed=3)
    module = LogprobModel(model)
    pairs = []
    for i in range(4):
        prompt = ranks.numbers(900 + i, 6)
        sides = [prompt + ranks.numbers(920 + 2 * i + k, 5 + 3 * i + k) for k in range(2)]
        rows = [TokenRow(tuple(ids), tuple(t > 5 for t in range(len(ids)))) for ids in sides]
        pairs.append(PairRow(*rows, num_prompt_tokens=6))
    reference = module if stage else frozen_start(source)
    with start_policy(model, tuning_spec(method), source / "model"):
        rows = reference_pairs(reference, pairs, micro_tokens=60)
    learner = ranks.learner_of(module, stage)
    loss = partial(preference_loss, DpoStage(kind="dpo", init="x", data=[{"path": "x"}]))
    task = OfflineTask([], [], lambda row: pair_length(row.pair), collate, loss)
    return [learner.step(micro_batches(task, rows, 60), loss) for _ in range(2)]


def grpo(method: str, stage: int, source: Path) -> list[dict[str, float]]:
    """Take two steps on answers, with a KL in the loss."""
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    spec = GrpoStage(kind="grpo", group_size=3, kl=kl, **ranks.COMMON)
    policy = learner_with(method, stage, source)
    reference = policy.module if stage else frozen_start(source)
    return ranks.online_steps(spec, policy, None, reference)


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
            found["sft", method, stage] = sft(method, stage, source, folder)
        for method in OWN:
            found["dpo", method, stage] = dpo(method, stage, source)
            found["grpo", method, stage] = grpo(method, stage, source)
    if distributed.rank() == 0:
        torch.save(found, args.out / f"steps-{world}.pt")
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
