"""Policy losses of the online methods, and importance weights for the sampler's distribution."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.losses.reduce import segment_mean, segment_sum

MAX_LOG_RATIO = 20.0
"""Bound of a log-ratio in nats, so that exp stays finite in float32."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """Policy loss of each token, before any reduction.

    Attributes:
        loss: loss of each token, 0 where the mask is False.
        ratio: current over old probability, detached, 1 where the mask is False.
        clipped: True where a bound is active: the token has no gradient (cispo: a smaller one).
    """

    loss: Float[Tensor, "*S"]
    ratio: Float[Tensor, "*S"]
    clipped: Bool[Tensor, "*S"]


def policy_ratio(
    logprobs: Float[Tensor, "*S"], old_logprobs: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]
) -> Float[Tensor, "*S"]:
    """Return the probability ratio current / old of each token, 1 where the mask is False.

    The log-ratio is clamped to +-20 nats; beyond that a token has no gradient.
    """
    # Masked tokens may carry -inf or NaN; the fill comes before exp so that no NaN gradient is
    # left.
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
    """Return PPO's clipped surrogate loss of each token, not reduced.

    -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A); with ``dual_clip`` the loss of a
    token with A < 0 is at most -dual_clip * A.

    Args:
        logprobs: log-probabilities under the policy being trained.
        old_logprobs: the same tokens under the trainer's policy before the update.
        advantages: advantage of each token; no gradient flows into them.
        mask: True where a token is trained.
        clip_low: how far the ratio may fall below 1, in (0, 1]; 1 sets no lower bound.
        clip_high: how far it may rise above 1.
        dual_clip: bound c > 1 of the ratio where A < 0; None sets none.

    Returns:
        Loss, ratio and clip of each token.

    Reference:
        arXiv:1707.06347 eq. 7; separate bounds arXiv:2503.14476; dual clip arXiv:1912.09729 eq. 5.
        Deviation: the log-ratio is clamped to +-20 nats.
    """
    _check_clip(clip_low, clip_high)
    assert dual_clip is None or dual_clip > 1.0, f"dual_clip {dual_clip} must exceed 1"
    # With A = 0 and ratio = 1 a masked token has loss 0 and no gradient.
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    objective, clipped = _lower(ratio, advantages, clip_low, clip_high)
    if dual_clip is not None:
        # A bad token (A < 0) whose ratio has grown large would dominate the step: bound its loss.
        floor = dual_clip * advantages
        clipped = clipped | ((advantages < 0.0) & (objective < floor))
        objective = torch.where(advantages < 0.0, torch.maximum(objective, floor), objective)
    return PerToken(loss=-objective, ratio=ratio.detach(), clipped=clipped)


def gspo_policy_loss(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    *,
    segment_ids: Int[Tensor, " N"],
    num_segments: int,
    clip_low: float,
    clip_high: float,
) -> PerToken:
    """Return GSPO's loss, which clips one ratio per response, on each token of the response.

    s = exp(mean over the trained tokens of logprobs - old_logprobs); the loss of a response is
    -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A). Averaged over tokens, then over
    responses, it is the loss of the paper.

    Args:
        logprobs: a packed row under the policy being trained.
        old_logprobs: the same under the policy before the update.
        advantages: the same number on every trained token of a response.
        mask: True where a token is trained.
        segment_ids: which response, 0 to num_segments - 1, a token belongs to.
        num_segments: responses in the row.
        clip_low: how far the ratio may fall below 1; about 3e-4, because it is a mean.
        clip_high: how far it may rise above 1.

    Returns:
        Loss, ratio and clip of each token.

    Reference:
        arXiv:2507.18071 eq. 5 and 7. Deviation: the mean log-ratio is clamped to +-20 nats.
    """
    _check_clip(clip_low, clip_high)
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    # One ratio per response, broadcast to its tokens: (S,) -> (N,).
    means = segment_mean(logprobs - old_logprobs, segment_ids, num_segments, mask=mask)
    ratio = means.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[segment_ids]
    objective, clipped = _lower(ratio, advantages, clip_low, clip_high)
    return PerToken(
        loss=(-objective).masked_fill(~mask, 0.0),
        ratio=ratio.detach().masked_fill(~mask, 1.0),
        clipped=clipped & mask,
    )


def cispo_policy_loss(
    logprobs: Float[Tensor, "*S"],
    old_logprobs: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    clip_low: float,
    clip_high: float,
) -> PerToken:
    """Return CISPO's loss of each token: REINFORCE with a clipped weight that keeps all gradients.

    -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprobs

    Args:
        logprobs: log-probabilities under the policy being trained.
        old_logprobs: the same tokens under the trainer's policy before the update.
        advantages: advantage of each token; no gradient flows into them.
        mask: True where a token is trained.
        clip_low: how far the weight may fall below 1; 1 sets no lower bound, as in the paper.
        clip_high: how far it may rise above 1.

    Returns:
        Loss, ratio and clip of each token.

    Reference:
        arXiv:2506.13585 eq. 4 and 5.
    """
    _check_clip(clip_low, clip_high)
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    # The weight is a constant: the gradient flows only through logprobs, for every token.
    ratio = policy_ratio(logprobs.detach(), old_logprobs, mask)
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantages * logprobs.masked_fill(~mask, 0.0)
    return PerToken(loss=loss, ratio=ratio, clipped=weight != ratio)


def _check_clip(low: float, high: float) -> None:
    assert 0.0 < low <= 1.0, f"clip_low {low} not in (0, 1]"
    assert high > 0.0, f"clip_high {high} must be positive"


def _lower(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the lower of the unclipped and clipped objectives, and where clipping is active."""
    # torch.minimum is pessimistic in both directions: it ignores a ratio that has already moved too
    # far the good way, and keeps the gradient of one that has moved the bad way.
    free = ratio * advantages
    held = ratio.clamp(1.0 - low, 1.0 + high) * advantages
    return torch.minimum(free, held), held < free


def importance_weights(
    old_logprobs: Float[Tensor, "*S"],
    rollout_logprobs: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    mode: str,
    cap: float,
    floor: float | None = None,
    level: str = "token",
    segment_ids: Int[Tensor, " N"] | None = None,
    num_segments: int = 0,
) -> Float[Tensor, "*S"]:
    """Return the bounded importance weight trainer / sampler of each token, without gradient.

    Args:
        old_logprobs: log-probabilities under the trainer's policy before the update.
        rollout_logprobs: the same tokens as the rollout engine sampled them.
        mask: True where a token is trained.
        mode: none gives 1; truncate min(ratio, cap); mask gives the ratio where it lies in
            [floor, cap] and 0 elsewhere.
        cap: bound of the ratio, > 1.
        floor: lower bound of the ratio in mode ``mask``; None means 1 / cap.
        level: token; or one ratio for all tokens of a response: sequence, the product of theirs, or
            geometric, their geometric mean (biased, but its size does not grow with the length).
        segment_ids, num_segments: response of each token, and their number, for the last two.

    Returns:
        Factors of the policy loss, 0 where the mask is False.

    Reference:
        truncate: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
        training"; mask: IcePop; sequence and geometric: verl, rollout correction. Deviation: log
        ratios are clamped to +-20 nats.
    """
    assert mode in ("none", "truncate", "mask"), f"unknown importance mode {mode!r}"
    assert level in ("token", "sequence", "geometric"), f"unknown importance level {level!r}"
    assert cap > 1.0, f"cap {cap} must exceed 1"
    if mode == "none":
        return mask.to(old_logprobs.dtype)
    # Masked tokens may carry any log-probability, NaN included; 0 keeps them out of the sums.
    log_ratio = (old_logprobs.detach() - rollout_logprobs.detach()).masked_fill(~mask, 0.0)
    if level != "token":
        assert segment_ids is not None, f"level {level!r} needs segment_ids"
        log_ratio = _per_response(log_ratio, segment_ids, num_segments, mask=mask, level=level)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    # truncate keeps a biased but bounded weight; mask drops the token altogether.
    if mode == "truncate":
        return ratio.clamp(max=cap).masked_fill(~mask, 0.0)
    inside = mask & (ratio >= (1.0 / cap if floor is None else floor)) & (ratio <= cap)
    return ratio.masked_fill(~inside, 0.0)


def _per_response(
    log_ratio: Tensor, segment_ids: Tensor, num_segments: int, *, mask: Tensor, level: str
) -> Tensor:
    """Return one log ratio per response, broadcast to its tokens."""
    reduce = segment_sum if level == "sequence" else segment_mean
    flat = reduce(log_ratio.flatten(), segment_ids, num_segments, mask=mask.flatten())
    return flat[segment_ids].view_as(log_ratio)
