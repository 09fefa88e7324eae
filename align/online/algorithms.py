"""From scores to advantages: PPO's way with a critic, and those of the algorithms without one.

An algorithm is an entry of align/recipe/algorithms.py; what is new about how it compares answers
is one short function here and one line in ``WITHOUT_CRITIC``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from align.core import distributed
from align.core.errors import TrainingError
from align.losses.kl import kl_estimate
from align.losses.reduce import masked_moments, masked_whiten
from align.online.advantages import (
    against_greedy,
    batch_scaled,
    gae,
    group_relative,
    leave_one_out,
    reward_to_go,
    shaped_rewards,
)
from align.recipe.schema import GrpoStage, OnlineStage, PpoStage
from align.sampling.experience import Experience


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Hold what distinguishes one online method from another."""

    estimate: Callable[[Experience, OnlineStage, float], Experience]
    """(experience, spec, KL coefficient) -> experience with ``advantages`` (and ``returns``)."""
    critic: bool


def ppo(experience: Experience, spec: OnlineStage, kl_coef: float) -> Experience:
    """Estimate advantages by GAE on shaped rewards, whitened over the batch of all ranks.

    After the last token comes nothing, worth 0; ``truncation: bootstrap`` gives an answer cut at
    the length limit the critic's value of where it was cut.

    Reference: arXiv:1707.06347 eq. 11, arXiv:1909.08593 section 2; bootstrap arXiv:1712.00378.
    """
    assert isinstance(spec, PpoStage)
    mask, tokens = experience.mask, experience.per_token
    rewards = _token_rewards(experience, spec, kl_coef)
    if spec.whiten_rewards:
        rewards = _whiten(rewards, mask, center=False)
    advantages, returns = gae(
        rewards,
        tokens["values"],
        mask,
        gamma=spec.gamma,
        lam=spec.lam,
        bootstrap=experience.bootstrap,
    )
    advantages = _whiten(advantages, mask, center=True)
    return experience.with_tokens(advantages=advantages, returns=returns)


def grpo(experience: Experience, spec: OnlineStage, kl_coef: float) -> Experience:
    """Estimate advantages without a critic, by the recipe's estimator.

    Answers without a valid score take no part in their group, nor in the loss.
    """
    assert isinstance(spec, GrpoStage)
    estimate = WITHOUT_CRITIC.get(spec.estimator)
    if estimate is None:
        raise TrainingError(
            f"unknown estimator '{spec.estimator}'; expected one of {', '.join(WITHOUT_CRITIC)}"
        )
    advantages = estimate(experience, spec, kl_coef)
    return experience.with_tokens(advantages=advantages)


def from_groups(experience: Experience, spec: GrpoStage, kl_coef: float) -> Tensor:
    """Give every token of an answer how much better than its group's others the answer was.

    Reference: arXiv:2402.03300 eq. 3; scale none arXiv:2503.20783; scale batch arXiv:2501.03262;
    leave_one_out arXiv:2402.14740.
    """
    scores = _penalised(experience, spec, kl_coef)
    valid = experience.mask.any(1)
    per_answer = torch.zeros_like(scores)
    if bool(valid.any()):
        groups = experience.group_ids[valid]
        if spec.estimator == "leave_one_out":
            per_answer[valid] = leave_one_out(scores[valid], groups)
        elif spec.estimator == "group_relative":
            scale = "none" if spec.scale == "batch" else spec.scale
            per_answer[valid] = group_relative(scores[valid], groups, scale=scale)
        else:
            raise TrainingError(
                f"estimator '{spec.estimator}' does not compare the answers of a group; expected "
                "group_relative or leave_one_out"
            )
    if spec.scale == "batch":
        moments = {
            "count": float(valid.sum()),
            "total_sq": float(per_answer.double().square().sum()),
        }
        per_answer = batch_scaled(per_answer, **distributed.global_sums(moments))
    return per_answer.unsqueeze(1) * experience.mask


def from_rewards_to_go(experience: Experience, spec: GrpoStage, kl_coef: float) -> Tensor:
    """Give each token what is still to come, whitened over the tokens of all ranks.

    Reference: arXiv:2501.03262 (REINFORCE++).
    """
    rewards = _token_rewards(experience, spec, kl_coef)
    return _whiten(reward_to_go(rewards, experience.mask), experience.mask, center=True)


def from_greedy(experience: Experience, spec: GrpoStage, kl_coef: float) -> Tensor:
    """Give every token of an answer how much better than the greedy answer it was.

    Reference: arXiv:2310.10505 (ReMax).
    """
    assert experience.greedy_scores is not None
    advantages = against_greedy(_penalised(experience, spec, kl_coef), experience.greedy_scores)
    return advantages.nan_to_num(0.0).unsqueeze(1) * experience.mask


ALGORITHMS = {"ppo": Algorithm(ppo, critic=True), "grpo": Algorithm(grpo, critic=False)}
WITHOUT_CRITIC: dict[str, Callable[[Experience, GrpoStage, float], Tensor]] = {
    "group_relative": from_groups,
    "leave_one_out": from_groups,
    "reward_to_go": from_rewards_to_go,
    "greedy": from_greedy,
}


def _kl_in_reward(experience: Experience, spec: OnlineStage, kl_coef: float) -> Tensor | None:
    """Give the KL estimate of each token where the recipe takes it off the reward."""
    if spec.kl.place != "reward" or kl_coef == 0.0:
        return None
    tokens = experience.per_token
    return kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], spec.kl.estimator)


def _token_rewards(experience: Experience, spec: OnlineStage, kl_coef: float) -> Tensor:
    kl = _kl_in_reward(experience, spec, kl_coef)
    kl = torch.zeros_like(experience.per_token["rollout_logprobs"]) if kl is None else kl
    scores = experience.scores.nan_to_num(0.0)
    steps = experience.per_token.get("step_rewards")
    if steps is None:
        return shaped_rewards(scores, kl, experience.mask, kl_coef=kl_coef)
    # What the steps do not explain stands at the last token, so that the sum stays the score.
    steps = steps.masked_fill(~experience.mask, 0.0)
    rest = scores - steps.sum(1)
    return shaped_rewards(rest, kl, experience.mask, kl_coef=kl_coef) + steps


def _penalised(experience: Experience, spec: OnlineStage, kl_coef: float) -> Tensor:
    """Give scores minus the KL of the whole answer, where the recipe takes it off the reward."""
    kl = _kl_in_reward(experience, spec, kl_coef)
    if kl is None:
        return experience.scores
    return experience.scores - kl_coef * (kl * experience.completion).sum(1)


def _whiten(x: Tensor, mask: Tensor, *, center: bool) -> Tensor:
    count, total, total_sq = masked_moments(x, mask).tolist()
    sums = distributed.global_sums({"count": count, "total": total, "total_sq": total_sq})
    return masked_whiten(
        x,
        mask,
        center=center,
        count=sums["count"],
        total=sums["total"],
        total_sq=sums["total_sq"],
    )
