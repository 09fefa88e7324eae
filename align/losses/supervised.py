"""The supervised loss: negative log-likelihood of the trained tokens."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
from jaxtyping import Bool, Float
from torch import Tensor

from align.losses.reduce import Count, token_mean


def nll(
    logprobs: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    num_tokens: Count,
    *,
    weights: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Average the negative log-likelihood of the trained tokens, in nats per token.

    Args:
        logprobs: log-probability of each token, padded (B, T) or packed (N,).
        mask: True where a token is trained.
        num_tokens: denominator over all ranks and micro-batches of the optimiser step: trained
            tokens, or the sum of their weights.
        weights: factor of each token, broadcast against ``logprobs`` (rows: shape (B, 1)).

    Returns:
        This micro-batch's share of the mean.
    """
    return token_mean(-logprobs if weights is None else -logprobs * weights, mask, num_tokens)
