"""Advantage estimators: how much better a token or a response was than expected."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_EPS = 1e-4
"""Added to a group's standard deviation, so that rounding errors of scores are not amplified."""


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return generalized advantage estimates (GAE) and returns over the trained tokens.

    delta_t = r_t + gamma V_next(t) - V_t, A_t = delta_t + gamma lam A_next(t), R_t = A_t + V_t,
    where next(t) is the next TRAINED token: tokens in between (prompt, tool output, padding) are
    not time steps, and their values are ignored.

    Args:
        rewards: per-token rewards; must be 0 where the mask is False, or they would be lost.
        values: the critic's values.
        mask: True where a token was sampled by the policy and is trained.
        gamma: discount, in [0, 1].
        lam: lambda in [0, 1]; 0 uses the critic, 1 the sampled return.
        bootstrap: value of what follows the last trained token of each row; None is 0, which
            treats every response, also one cut at the length limit, as finished.

    Returns:
        Advantages and returns, detached, 0 where the mask is False.

    Reference:
        arXiv:1506.02438 eq. 16.
    """
    assert not (rewards.detach().masked_fill(mask, 0.0) != 0.0).any(), "a masked token has a reward"
    # Advantages are constants of the policy loss, and returns constants of the value loss.
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap.detach()
    carried = torch.zeros_like(next_value)
    # Backwards over time, all rows (B,) at once.
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Masked tokens pass the carried advantage and the next value on unchanged.
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, carried)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = carried.masked_fill(~mask[:, t], 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def dead_groups(scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return for each response whether all scores of its group are exactly equal.

    Nothing can be learned from such a group, or from a single response. Equality is exact: a
    threshold on the standard deviation would confuse rounding errors and small differences.
    """
    _, group = group_ids.unique(return_inverse=True)
    # Highest and lowest score of each group; at most B groups, so (B,) is large enough.
    size = scores.numel()
    high = scores.new_full((size,), -torch.inf).scatter_reduce(0, group, scores, "amax")
    low = scores.new_full((size,), torch.inf).scatter_reduce(0, group, scores, "amin")
    return (high == low)[group]


def _centered(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centered scores in float64, each response's group size, and its group number."""
    assert torch.isfinite(scores).all(), f"scores must be finite, got {scores.tolist()}"
    _, group = group_ids.unique(return_inverse=True)
    # float64: a group's mean of equal scores must be that score, or advantages would be noise.
    exact = scores.detach().double()
    # Sums of each group by its number, gathered back to its responses: (B,) -> (groups,) -> (B,).
    zeros = torch.zeros_like(exact)
    sizes = zeros.index_add(0, group, torch.ones_like(exact))[group]
    return exact - zeros.index_add(0, group, exact)[group] / sizes, sizes, group


def group_relative(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, scale: str
) -> Float[Tensor, " B"]:
    """Return each score minus the mean score of the responses to the same prompt (GRPO).

    Args:
        scores: one finite number per response, without invalid responses.
        group_ids: prompt number of each response; any integers, in any order.
        scale: std divides by the group's standard deviation + 1e-4; none does not.

    Returns:
        One advantage per response. A group of equal scores, or of one response, gets exactly 0; its
        tokens still count in the loss's denominator unless the caller masks them out.

    Reference:
        arXiv:2402.03300 section 4.1; scale none arXiv:2503.20783. The standard deviation is that
        of a sample (divided by group size - 1), which the paper leaves open.
    """
    assert scale in ("std", "none"), f"unknown scale {scale!r}"
    centered, sizes, group = _centered(scores, group_ids)
    if scale == "std":
        # Sample variance; a group of one response divides by 1 and stays 0.
        squares = torch.zeros_like(centered).index_add(0, group, centered.square())[group]
        centered = centered / ((squares / (sizes - 1.0).clamp(min=1.0)).sqrt() + STD_EPS)
    return centered.to(scores.dtype).masked_fill(dead_groups(scores, group_ids), 0.0)


def leave_one_out(scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each score minus the mean score of the OTHER responses to the same prompt (RLOO).

    Args:
        scores: one finite number per response, without invalid responses.
        group_ids: prompt number of each response; any integers, in any order.

    Returns:
        One advantage per response; exactly 0 in a group of equal scores or of one response.

    Reference:
        arXiv:2402.14740 section 2.2 (RLOO). Computed as G / (G - 1) times the distance to the
        group's mean, which is the same number.
    """
    centered, sizes, _ = _centered(scores, group_ids)
    # s - (sum - s) / (G - 1) = G / (G - 1) * (s - mean)
    advantages = centered * sizes / (sizes - 1.0).clamp(min=1.0)
    return advantages.to(scores.dtype).masked_fill(dead_groups(scores, group_ids), 0.0)


def reward_to_go(rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return the undiscounted sum of the rewards from each trained token to the end.

    Args:
        rewards: per-token rewards; must be 0 where the mask is False.
        mask: True where a token is trained.

    Returns:
        Per-token sums, detached, 0 where the mask is False.

    Reference:
        arXiv:2501.03262 (REINFORCE++): GAE without a critic at gamma = lambda = 1.
    """
    # With V = 0 every delta is the reward itself, and GAE is its undiscounted sum.
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)[0]


def _against_greedy(
    scores: Float[Tensor, " B"], greedy_scores: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Return each score minus the score of the greedy response to the same prompt (ReMax).

    Reference:
        arXiv:2310.10505 (ReMax) eq. 6.
    """
    return (scores - greedy_scores).detach()


def batch_scaled(
    advantages: Float[Tensor, " B"], *, count: float, total_sq: float
) -> Float[Tensor, " B"]:
    """Return group-centered advantages divided by the batch's standard deviation.

    Args:
        advantages: scores minus their group's mean; they add up to 0, so their variance is the
            mean of their squares.
        count: responses of the batch over all ranks.
        total_sq: sum of the squares over all ranks.

    Returns:
        Scaled advantages; zeros stay 0, even if every score equals its group's mean.

    Reference:
        arXiv:2501.03262, REINFORCE++ with baseline.
    """
    if total_sq == 0.0:
        return advantages
    return (advantages.double() / math.sqrt(total_sq / count)).to(advantages.dtype)


def overlong_penalty(
    lengths: Int[Tensor, " B"], *, limit: int, buffer: float
) -> Float[Tensor, " B"]:
    """Return a length penalty: 0 up to limit - buffer tokens, then linear down to -1 at the limit.

    Args:
        lengths: tokens of each response.
        limit: length at which responses are truncated, in tokens.
        buffer: length of the linear part, in tokens, > 0.

    Reference:
        arXiv:2503.14476 eq. 13.
    """
    assert buffer > 0.0, f"buffer {buffer} must be positive"
    # 0 at limit - buffer tokens, -1 at the limit, linear between.
    return ((limit - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def shaped_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """Return per-token rewards: the score at the last trained token, minus the KL penalty.

    Args:
        scores: one number per response, added at its last trained token.
        kl: estimated KL to the reference at each token, in nats.
        mask: True where a token is trained. A row without such a token gets no reward at all.
        kl_coef: penalty per nat, in units of the score.

    Returns:
        Per-token rewards, detached, 0 where the mask is False.

    Reference:
        arXiv:1909.08593 eq. 2, with the score at the last trained token itself, never behind it.
    """
    # The KL penalty is part of the reward at every token, (B, T).
    rewards = (-kl_coef * kl.detach()).masked_fill(~mask, 0.0)
    # Rows without a trained token get last = -1, which matches no position.
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions.masked_fill(~mask, -1).amax(dim=1, keepdim=True)  # (B, 1)
    return rewards + torch.where(positions == last, scores.detach()[:, None], 0.0)


ESTIMATORS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "reward_to_go": reward_to_go,
    "greedy": _against_greedy,
}
"""Advantage estimators by their names in a recipe."""
