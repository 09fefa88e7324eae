"""The supervised losses: negative log-likelihood of the trained tokens, or of a class."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
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


def class_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    num_rows: Count,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Average the cross-entropy between the classes' probabilities and the labels, in nats a row.

    Args:
        logits: of each class. labels: number of the right class, in [0, C).
        num_rows: denominator over all ranks and micro-batches of the optimiser step.
        label_smoothing: share of each target that is spread evenly over all C classes.

    Returns:
        This micro-batch's share of the mean.

    Reference:
        arXiv:1512.00567 section 7.
    """
    total = cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    return total / num_rows
