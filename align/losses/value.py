"""The critic's clipped value loss, and the explained variance of its values."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
from jaxtyping import Bool, Float
from torch import Tensor, maximum

from align.losses.reduce import masked_mean


def clipped_value_loss(
    values: Float[Tensor, "*S"],
    old_values: Float[Tensor, "*S"],
    returns: Float[Tensor, "*S"],
    *,
    clip: float,
) -> Float[Tensor, "*S"]:
    """Return PPO's value loss of each token: the larger of the clipped and unclipped error.

    1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    Args:
        values: the critic's current values.
        old_values: its values when the responses were sampled.
        returns: targets of the values; no gradient flows into them.
        clip: how far a value may move in one update, in units of the reward, > 0.

    Returns:
        One loss per token, not reduced and not masked.

    Reference:
        Schulman et al., baselines ppo2; discussed in arXiv:2005.12729.
    """
    assert clip > 0.0, f"clip {clip} must be positive"
    old_values, returns = old_values.detach(), returns.detach()
    # The larger error is pessimistic, as in the policy: a value that has moved by more than clip
    # towards its target gets no gradient.
    held = values.clamp(old_values - clip, old_values + clip)
    return 0.5 * maximum((values - returns).square(), (held - returns).square())


def explained_variance(
    values: Float[Tensor, "*S"], returns: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]
) -> Float[Tensor, ""]:
    """Return the fraction of the returns' variance that the values explain.

    1 - Var(R - V) / Var(R) over the tokens where the mask is True, population variances.

    Returns:
        At most 1. 0 is no better than a constant; NaN if the returns do not vary.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    returns, errors = returns.detach().double(), (returns - values).detach().double()
    total = variance(returns)
    share = 1.0 - variance(errors) / total
    return share.masked_fill(total == 0.0, float("nan")).to(values.dtype)
