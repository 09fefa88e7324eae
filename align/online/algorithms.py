"""Algorithms as bundles: how scores become advantages, and whether a critic is needed.

A new algorithm is one short function and one line in ``ALGORITHMS``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from align.core import distributed
from align.losses.kl import kl_estimate
from align.losses.reduce import masked_moments, masked_whiten
from align.online.advantages import gae, group_relative, leave_one_out, shaped_rewards
from align.online.experience import Experience
from align.recipe.schema import GrpoStage, OnlineStage, PpoStage


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Hold what distinguishes one online method from another."""

    estimate: Callable[[Experience, OnlineStage, float], Experience]
    """(experience, spec, KL coefficient) -> experience with ``advantages`` (and ``returns``)."""
    critic: bool


def ppo(experience: Experience, spec: OnlineStage, kl_coef: float) -> Experience:
    """Estimate advantages by GAE on shaped rewards, whitened over the batch of all ranks.

    An answer cut at the length limit is treated as terminated (V after it is 0).

    Reference: arXiv:1707.06347 eq. 11, arXiv:1909.08593 section 2.
    """
    assert isinstance(spec, PpoStage)
    mask, tokens = experience.mask, experience.per_token
    kl = torch.zeros_like(tokens["old_logprobs"])
    if "ref_logprobs" in tokens and spec.kl.place == "reward":
        kl = kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], spec.kl.estimator)
    rewards = shaped_rewards(experience.scores.nan_to_num(0.0), kl, mask, kl_coef=kl_coef)
    if spec.whiten_rewards:
        rewards = _whiten(rewards, mask, center=False)
    advantages, returns = gae(rewards, tokens["values"], mask, gamma=spec.gamma, lam=spec.lam)
    advantages = _whiten(advantages, mask, center=True)
    return experience.with_tokens(advantages=advantages, returns=returns)


def grpo(experience: Experience, spec: OnlineStage, kl_coef: float) -> Experience:
    """Estimate one advantage per answer from its group; every token of the answer gets it.

    With ``kl.place: reward`` the answer's KL is subtracted from its score first. Answers without a
    valid score take no part in their group.

    Reference: arXiv:2402.03300 eq. 3; arXiv:2503.20783; leave_one_out arXiv:2402.14740.
    """
    assert isinstance(spec, GrpoStage)
    scores = experience.scores
    if spec.kl.place == "reward" and kl_coef > 0.0:
        tokens = experience.per_token
        kl = kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], spec.kl.estimator)
        scores = scores - kl_coef * (kl * experience.completion).sum(1)
    valid = experience.mask.any(1)
    per_answer = torch.zeros_like(scores)
    if bool(valid.any()):
        groups = experience.group_ids[valid]
        if spec.estimator == "leave_one_out":
            per_answer[valid] = leave_one_out(scores[valid], groups)
        else:
            per_answer[valid] = group_relative(scores[valid], groups, scale=spec.scale)
    return experience.with_tokens(advantages=per_answer.unsqueeze(1) * experience.mask)


ALGORITHMS = {"ppo": Algorithm(ppo, critic=True), "grpo": Algorithm(grpo, critic=False)}


def _whiten(x: torch.Tensor, mask: torch.Tensor, *, center: bool) -> torch.Tensor:
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
