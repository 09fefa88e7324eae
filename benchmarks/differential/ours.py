"""Loss and gradients of align, through the functions that its stages train with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from align.models.attention import PACKED
from align.models.heads import values_of
from align.models.logprobs import LogprobModel
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.scoring import Scores, apply_scores
from align.recipe.schema import DpoStage, GrpoStage, KtoStage, OnlineStage, RewardStage
from align.sampling.rollout import Experience, gather_experience
from align.stages import dpo, kto, sft
from align.stages.reward.tasks import WeightedPair, collate_pairs, pair_loss
from align.training.batch import PackedBatch
from benchmarks.differential.cases import Case
from benchmarks.differential.world import (
    GROUP_SIZE,
    GROUPS,
    MAX_NEW_TOKENS,
    Rollout,
    Weights,
    World,
    config,
)
from reward_models.scalar import RewardModel

TEMPERATURE = 0.7
MICRO_TOKENS = 10_000
OFFLINE: dict[str, Any] = {"init": "x", "data": [{"path": "x"}]}
ONLINE: dict[str, Any] = {
    "init": "x",
    "prompts": [{"path": "x"}],
    "rewards": [{"kind": "regex", "pattern": "x"}],
    "steps": 1,
    "prompts_per_step": GROUPS,
    "group_size": GROUP_SIZE,
    "micro_tokens": MICRO_TOKENS,
    "sampling": {"temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS, "engine": "hf"},
}


@dataclass(frozen=True, slots=True)
class Side:
    """The loss of one step, and the gradient of every parameter by its name in transformers."""

    loss: float
    gradients: dict[str, Tensor]


def measure(case: Case, world: World, num_micro: int) -> Side:
    """Return the loss and the gradients of a step in ``num_micro`` micro-batches of equal rows."""
    return STAGES[case.kind](case, world, num_micro)


def policy(weights: Weights) -> LogprobModel:
    """Return a policy of align with the given weights, in float64."""
    found = config()
    found._attn_implementation = PACKED
    model = LlamaForCausalLM(found)
    _fill(model, weights)
    return LogprobModel(model)


def _fill(model: nn.Module, weights: Weights) -> None:
    # Parameters only: rotary frequencies stay in float32, as in a model that was loaded.
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].clone()


def changed(case: Case, world: World) -> Rollout:
    """Return the rollout of a case; TRL's RLOO knows no tools."""
    return world.rollout.changed(cut=case.cut, unscored=case.unscored, holes=case.kind != "rloo")


def halves(rows: Sequence[Any], num_micro: int) -> list[list[Any]]:
    """Return the rows in ``num_micro`` parts of equal size."""
    size = len(rows) // num_micro
    assert size * num_micro == len(rows), (len(rows), num_micro)
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _step(
    model: nn.Module,
    named: nn.Module,
    micro: Sequence[PackedBatch],
    loss_fn: Callable[[nn.Module, PackedBatch], tuple[Tensor, Any]],
) -> Side:
    """Return the sum of the micro-batches' losses and gradients, by the names of ``named``."""
    model.train()
    total = 0.0
    for batch in micro:
        loss, _ = loss_fn(model, batch)
        loss.backward()
        total += loss.item()
    grads = {n: p.grad for n, p in named.named_parameters() if p.grad is not None}
    return Side(total, grads)


def _sft(case: Case, world: World, num_micro: int) -> Side:
    model = policy(world.now)
    micro = [sft.collate(part, world.rows) for part in halves(world.rows, num_micro)]
    return _step(model, model.model, micro, partial(sft.sft_loss, **case.ours))


def _dpo(case: Case, world: World, num_micro: int) -> Side:
    spec = DpoStage(kind="dpo", **OFFLINE, **case.ours)
    rows = dpo.reference_pairs(
        policy(world.start), world.pairs, micro_tokens=MICRO_TOKENS, ld_alpha=spec.ld_alpha
    )
    micro = [dpo.collate(part, rows) for part in halves(rows, num_micro)]
    model = policy(world.now)
    return _step(model, model.model, micro, partial(dpo.preference_loss, spec))


def _kto(case: Case, world: World, num_micro: int) -> Side:
    spec = KtoStage(kind="kto", **OFFLINE, **case.ours)
    rows = kto.reference_rows(policy(world.start), world.judged, micro_tokens=MICRO_TOKENS)
    model = policy(world.now)
    measured = kto.mismatched_kl(spec, model, rows)
    micro = [kto.collate(part, rows) for part in halves(rows, num_micro)]
    micro = [replace(batch, counts={**batch.counts, **measured}) for batch in micro]
    return _step(model, model.model, micro, partial(kto.labeled_loss, spec))


def _reward(case: Case, world: World, num_micro: int) -> Side:
    spec = RewardStage(kind="reward", **OFFLINE, **case.ours)
    found = config()
    found._attn_implementation = PACKED
    scorer = RewardModel(LlamaModel(found), found.hidden_size)
    _fill(scorer.backbone, {n.removeprefix("model."): t for n, t in world.now.items()})
    scorer.head.weight.data = world.score_head.clone()
    rows = [WeightedPair(pair, (1.0,)) for pair in world.pairs]
    micro = [collate_pairs(part, rows) for part in halves(rows, num_micro)]
    side = _step(values_of(scorer), scorer, micro, partial(pair_loss, spec))
    names = {"head.weight": "score.weight"}
    grads = {
        names.get(n, n.replace("backbone.", "model.", 1)): g for n, g in side.gradients.items()
    }
    return Side(side.loss, grads)


def _grpo(case: Case, world: World, num_micro: int) -> Side:
    importance = {"importance": {"mode": "none"}} | dict(case.ours)
    spec = GrpoStage(kind="grpo", update_epochs=2, **ONLINE, **importance)
    algorithm = build_algorithm(spec)
    experience = algorithm.estimate(_annotated(case, world, spec), spec.kl.coef)
    rows = range(len(experience.lengths))
    mask = experience.mask
    counts = {"tokens": float(mask.sum()), "answers": float(mask.any(1).sum())}
    micro = [experience.micro(part, counts) for part in halves(rows, num_micro)]
    model = policy(world.old if case.on_policy else world.now)
    loss_fn = partial(algorithm.policy_objective, kl_coef=spec.kl.coef)
    return _step(model, model.model, micro, loss_fn)


def _annotated(case: Case, world: World, spec: OnlineStage) -> Experience:
    """Return the scored responses with the old policy's and the reference's log-probabilities."""
    given = changed(case, world)
    experience = gather_experience(given.prompts, given.groups)
    holes = experience.mask.clone()
    holes[experience.completion] = torch.tensor([t for row in given.trained for t in row])
    experience = apply_scores(
        replace(experience, mask=holes),
        Scores(list(given.scores), {}),
        truncated_score=None,
        mask_truncated=spec.truncation == "mask",
    )

    def logprobs(weights: Weights) -> Tensor:
        model: Any = policy(weights)
        found = annotate(experience, model, spec, old=True, reference=None, critic=None)
        return found.per_token["old_logprobs"]

    return experience.with_tokens(
        old_logprobs=logprobs(world.old), ref_logprobs=logprobs(world.start)
    )


STAGES: dict[str, Callable[[Case, World, int], Side]] = {
    "sft": _sft,
    "dpo": _dpo,
    "cpo": _dpo,
    "orpo": _dpo,
    "kto": _kto,
    "reward": _reward,
    "grpo": _grpo,
    "rloo": _grpo,
}
