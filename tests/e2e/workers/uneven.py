"""Run on one to three ranks: the updates of ranks.py, and some in which a rank has little to do.

A rank may have no rows, one row of a few tokens beside long ones on the others, or no prompts. With
dynamic sampling the ranks together choose what to learn from.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

import torch
from transformers import Qwen2Model

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import ranks
from engine_models import words
from ranks import COMMON, HIDDEN, VOCAB, Found, learner_of, numbers, policy_model, row, weights_of

from align.core import distributed
from align.core.types import PairRow, PromptRow, TokenRow
from align.losses.kl import FixedKL
from align.models.heads import values_of
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import OnlineRun, sample, score, update
from align.recipe.schema import DpoStage, GrpoStage, KtoStage, RewardStage
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.stages import dpo, kto
from align.stages.reward.tasks import WeightedPair, collate_pairs, pair_loss
from align.stages.sft import collate, length_of, sft_loss
from align.training.batch import pair_length
from align.training.task import OfflineTask, measured
from reward_models import build_reward
from reward_models.scalar import RewardModel


def pairs(number: int, *, first: int) -> list[PairRow]:
    """Return pairs of answers of very unequal lengths to prompts of two tokens."""
    found = []
    for i in range(first, first + number):
        chosen, rejected = row(600 + i, 4 + 7 * i), row(700 + i, 24 - 3 * i)
        prompt = chosen.input_ids[:2]
        rejected = TokenRow(prompt + rejected.input_ids[2:], rejected.trained)
        found.append(PairRow(chosen, rejected, 2))
    return found


def uneven_tasks() -> dict[str, tuple[OfflineTask, torch.nn.Module, Callable]]:
    """Return the task of each offline stage, its model, and its rows of some pairs."""
    data = {"init": "x", "data": [{"path": "x"}]}
    kto_spec = KtoStage(kind="kto", **data)
    scorer = RewardModel(Qwen2Model(ranks.config()), HIDDEN)

    # References near log(1 / VOCAB) a token: no answer is decided before the first step, and the
    # KL of the mismatched answers is above its lower bound of 0.
    def judged(found: list[PairRow]) -> list[kto.KtoRow]:
        rows = []
        for i, p in enumerate(found):
            other = replace(p.rejected, input_ids=p.rejected.input_ids[::-1])
            rows.append(
                kto.KtoRow(
                    p.chosen.input_ids,
                    p.chosen.trained,
                    good=i % 2 == 0,
                    mismatched=other,
                    ref=-7.3 * sum(p.chosen.trained),
                    ref_mismatched=-7.9 * sum(other.trained),
                )
            )
        return rows

    return {
        "sft": (
            OfflineTask([], [], length_of, collate, sft_loss),
            policy_model(),
            lambda found: [p.chosen for p in found],
        ),
        "dpo": (
            OfflineTask(
                *([], []),
                lambda r: pair_length(r.pair),
                dpo.collate,
                partial(dpo.preference_loss, DpoStage(kind="dpo", **data)),
            ),
            policy_model(),
            lambda found: [
                dpo.ReferencePair(p, -7.3 * sum(p.chosen.trained), -7.5 * sum(p.rejected.trained))
                for p in found
            ],
        ),
        "kto": (
            OfflineTask(
                *([], [], length_of, kto.collate),
                partial(kto.labeled_loss, kto_spec),
                measure=partial(kto.mismatched_kl, kto_spec),
            ),
            policy_model(),
            judged,
        ),
        "reward": (
            OfflineTask(
                *([], []),
                lambda r: pair_length(r.pair),
                collate_pairs,
                partial(pair_loss, RewardStage(kind="reward", **data)),
            ),
            values_of(scorer),
            lambda found: [WeightedPair(p, (1.0,)) for p in found],
        ),
    }


def uneven(stage: int, out: Path) -> Found:
    """Train on one row, on two, and on seven of very unequal lengths: some ranks have no rows."""
    torch.manual_seed(3)
    found: Found = {}
    for name, (task, module, rows_of) in uneven_tasks().items():
        learner = learner_of(module, stage)
        stats = []
        for number, first in ((1, 0), (2, 1), (7, 0)):
            micro = measured(
                learner.engine, task, rows_of(pairs(number, first=first)), micro_tokens=40
            )
            stats.append(learner.step(micro, task.loss_fn))
        found[f"{name} stats"] = stats
        found[f"{name} weights"] = weights_of(learner.module)
    return found


def dynamic(stage: int, out: Path) -> Found:
    """Sample until every group is live, and learn from that in two mini-batches and two epochs.

    Prompts and answers vary in length.
    """
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    given = {
        **COMMON,
        "prompts_per_step": 6,
        "minibatches": 2,
        "steps": 2,
        "sampling": {"max_new_tokens": 12, "engine": "hf"},
    }
    spec = GrpoStage(kind="grpo", algorithm="dapo", group_size=2, max_draws=6, kl=kl, **given)
    folder = out / f"sampler-{distributed.world_size()}-{stage}"
    if distributed.rank() == 0:
        policy_model().model.save_pretrained(folder)
        words(VOCAB).save_pretrained(folder)
    distributed.barrier()
    stop = tuple(range(1, 200))
    policy = learner_of(policy_model(), stage)
    run = OnlineRun(
        spec=spec,
        algorithm=build_algorithm(spec),
        seed=5,
        prompts=[PromptRow(tuple(numbers(800 + i, 2 + i % 5)), "", {}) for i in range(40)],
        rewards=[build_reward({"kind": "regex", "pattern": "w15"})],
        engine=build_engine("hf", EngineOptions(folder, max_model_len=64, stop_token_ids=stop)),
        stop_token_ids=stop,
        push=None,
        policy=policy,
        critic=None,
        reference=None,
        kl=FixedKL(0.1),
    )
    stats, kept, live = [], [], []
    for step in range(2):
        experience, _ = score(run, sample(run, step))
        groups = experience.scores.view(-1, 2)
        live += distributed.gather_objects((groups[:, 0] != groups[:, 1]).tolist())
        ids = [c.token_ids for c in experience.completions]
        parts = distributed.gather_objects(
            list(zip(experience.group_ids.tolist(), ids, strict=True))
        )
        # Each rank has every n-th prompt of the batch.
        kept += [ids for _, ids in sorted(chain(*parts), key=itemgetter(0))]
        experience = annotate(
            experience,
            policy,
            spec,
            old=True,
            reference=policy_model().requires_grad_(False),
            critic=None,
        )
        experience = build_algorithm(spec).estimate(experience, 0.1)
        stats.append(update(run, experience, step=step, kl_coef=0.1))
    return {
        "weights": weights_of(policy.module.model),
        "stats": stats,
        "kept": kept,
        "live": [x for rank in live for x in rank],
    }


def no_prompts(stage: int, out: Path) -> Found:
    """Learn from two prompts: with three ranks, one has none."""
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    spec = GrpoStage(kind="grpo", group_size=3, kl=kl, **COMMON)
    policy = learner_of(policy_model(), stage)
    reference = policy_model().requires_grad_(False)
    stats = ranks.online_steps(spec, policy, None, reference, num_prompts=2)
    return {"weights": weights_of(policy.module.model), "stats": stats}


ranks.SCENARIOS |= {
    "uneven": (uneven, (0, 3)),
    "no_prompts": (no_prompts, (0, 3)),
    "dynamic": (dynamic, (0,)),
}

if __name__ == "__main__":
    ranks.main()
