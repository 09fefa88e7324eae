"""The clipped policy loss of PPO and GRPO, and the correction for the sampler's distribution."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio in nats, so that exp stays finite in float32."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """Hold the policy loss before any reduction.

    Attributes:
        loss: loss of each token, 0 where the mask is False.
        ratio: current over old probability, detached, 1 where the mask is False.
        clipped: True where the clip holds, so that the token has no gradient.
    """

    loss: Float[Tensor, "*S"]
    ratio: Float[Tensor, "*S"]
    clipped: Bool[Tensor, "*S"]


def policy_ratio(
    logprobs: Float[Tensor, "*S"], old_logprobs: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]
) -> Float[Tensor, "*S"]:
    """Give current over old probability of each token, with gradient; 1 where the mask is False.

    The log-ratio is held within +-20 nats; beyond that a token has no gradient.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    logprobs: Float[Tensor, "*S"],
    old_logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PerToken:
    """Give the clipped surrogate loss of each token, not reduced.

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A); with ``dual_clip`` the loss of a
    token with A < 0 is at most -dual_clip * A.

    Args:
        logprobs: log-probabilities under the policy being trained.
        old_logprobs: the same tokens under the trainer's policy before the update.
        advantages: how much better than expected each token was; no gradient flows into them.
        mask: True where a token is trained.
        clip_low: how far the ratio may fall below 1, in (0, 1).
        clip_high: how far it may rise above 1.
        dual_clip: bound c > 1 of the ratio where A < 0; None sets none.

    Returns:
        Loss, ratio and clip of each token.

    Reference:
        arXiv:1707.06347 eq. 7; separate bounds arXiv:2503.14476; dual clip arXiv:1912.09729 eq. 5.
        Deviation: the log-ratio is held within +-20 nats.
    """
    assert 0.0 < clip_low < 1.0, f"clip_low {clip_low} not in (0, 1)"
    assert clip_high > 0.0, f"clip_high {clip_high} must be positive"
    assert dual_clip is None or dual_clip > 1.0, f"dual_clip {dual_clip} must exceed 1"
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    free = ratio * advantages
    held = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(free, held)
    clipped = held < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        clipped = clipped | ((advantages < 0.0) & (objective < floor))
        objective = torch.where(advantages < 0.0, torch.maximum(objective, floor), objective)
    return PerToken(loss=-objective, ratio=ratio.detach(), clipped=clipped)


def importance_weights(
    old_logprobs: Float[Tensor, "*S"],
    rollout_logprobs: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    mode: str,
    cap: float,
) -> Float[Tensor, "*S"]:
    """Weigh each token by trainer over sampler probability, bounded; without gradient.

    Args:
        old_logprobs: log-probabilities under the trainer's policy before the update.
        rollout_logprobs: the same tokens as the rollout engine sampled them.
        mask: True where a token is trained.
        mode: none gives 1; truncate min(ratio, cap); mask gives the ratio where it lies in
            [1 / cap, cap] and 0 elsewhere.
        cap: bound of the ratio, > 1.

    Returns:
        Factors of the policy loss, 0 where the mask is False.

    Reference:
        truncate: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
        training"; mask: IcePop, with bounds that mirror each other.
    """
    assert mode in ("none", "truncate", "mask"), f"unknown importance mode {mode!r}"
    assert cap > 1.0, f"cap {cap} must exceed 1"
    if mode == "none":
        return mask.to(old_logprobs.dtype)
    ratio = policy_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask)
    if mode == "truncate":
        return ratio.clamp(max=cap).masked_fill(~mask, 0.0)
    inside = mask & (ratio >= 1.0 / cap) & (ratio <= cap)
    return ratio.masked_fill(~inside, 0.0)
