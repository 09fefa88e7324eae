"""The critic's clipped value loss."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
from jaxtyping import Float
from torch import Tensor, maximum


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
