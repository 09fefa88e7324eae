"""Supervised losses: negative log-likelihood of the trained tokens, or of a class."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from align.losses.reduce import Count, token_mean


def nll(
    logprobs: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    num_tokens: Count,
    *,
    weights: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of the trained tokens, in nats per token.

    Args:
        logprobs: log-probability of each token, padded (B, T) or packed (N,).
        mask: True where a token is trained.
        num_tokens: denominator over all ranks and micro-batches of the optimizer step: trained
            tokens, or the sum of their weights.
        weights: factor of each token, broadcast against ``logprobs`` (rows: shape (B, 1)).

    Returns:
        This micro-batch's part of the mean.
    """
    return token_mean(-logprobs if weights is None else -logprobs * weights, mask, num_tokens)


def class_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    num_rows: Count,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy between class probabilities and labels, in nats per row.

    Args:
        logits: of each class. labels: index of the correct class, in [0, C).
        num_rows: denominator over all ranks and micro-batches of the optimizer step.
        label_smoothing: fraction of each target that is spread evenly over all C classes.

    Returns:
        This micro-batch's part of the mean.

    Reference:
        arXiv:1512.00567 section 7.
    """
    # Sum here and divide by the global count: a mean per micro-batch would weight rows unequally.
    total = cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    return total / num_rows
