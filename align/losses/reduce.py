"""Sums and means over masked tokens; every denominator that ranks share is passed in."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Count = int | float | Tensor
"""A global number of tokens, sequences or pairs: a Python number or a 0-d tensor."""


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """Give x with 0 where the mask is False; a NaN there reaches neither value nor gradient."""
    return x.masked_fill(~mask, 0.0)


def _divide(total: Tensor, count: Count) -> Tensor:
    """Divide by a count; a count of 0 gives the (graph-connected) sum itself, which is then 0."""
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, torch.ones_like(count), count).to(total.dtype)
    return total / (count or 1)


def masked_mean(
    x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Average x where the mask is True, over everything or along one dimension.

    Args:
        x: values.
        mask: True where a value counts.
        dim: dimension to average away; None averages over all.

    Returns:
        The mean; 0 where nothing counts. Local to this rank: for numbers of several ranks sum
        first and divide by the global count (`token_mean`).
    """
    if dim is None:
        return _divide(_kept(x, mask).sum(), mask.sum())
    return _divide(_kept(x, mask).sum(dim), mask.sum(dim))


def masked_moments(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, " 3"]:
    """Give count, sum and sum of squares where the mask is True, in float64.

    Summed over ranks, the three numbers make `masked_whiten` independent of the number of ranks.
    """
    kept = _kept(x.detach().double(), mask)
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def masked_whiten(
    x: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    *,
    center: bool = True,
    count: Count | None = None,
    total: Count | None = None,
    total_sq: Count | None = None,
) -> Float[Tensor, "*S"]:
    """Scale x to unit variance where the mask is True, with mean 0 or with its own mean.

    The variance is that of the population (divided by the count, not count - 1). Values that
    agree to one part in a million count as constant: their spread is rounding, and dividing by it
    would make signal out of noise.

    Args:
        x: values.
        mask: True where a value counts.
        center: True gives mean 0 (advantages); False keeps the mean (rewards).
        count: number of values over all ranks. Given together with the next two, or not at all:
            then the moments are those of ``x`` alone.
        total: sum of the values over all ranks.
        total_sq: sum of the squared values over all ranks.

    Returns:
        Whitened values in the dtype of x, 0 where the mask is False. Constant values become 0
        (centred) or stay as they are.
    """
    given = [moment is not None for moment in (count, total, total_sq)]
    assert all(given) or not any(given), f"give all of count, total, total_sq or none: {given}"
    if count is None or total is None or total_sq is None:
        count, total, total_sq = masked_moments(x, mask)
    n, first, second = (
        torch.as_tensor(m, dtype=torch.float64, device=x.device) for m in (count, total, total_sq)
    )
    mean = first / n.clamp(min=1.0)
    variance = second / n.clamp(min=1.0) - mean.square()
    constant = variance <= 1e-12 * mean.square()
    scale = torch.where(constant, torch.ones_like(variance), variance).rsqrt()
    centred = torch.where(constant, torch.zeros_like(mean), (x.double() - mean) * scale)
    return _kept((centred if center else centred + mean).to(x.dtype), mask)


def token_mean(
    x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], num_tokens: Count
) -> Float[Tensor, ""]:
    """Sum x where the mask is True and divide by a global number of tokens.

    Args:
        x: per-token values, padded (B, T) or packed (N,).
        mask: True where a token counts.
        num_tokens: tokens that count, over all ranks and micro-batches of the optimiser step.

    Returns:
        This micro-batch's share of the mean: the shares of all ranks and micro-batches add up to
        it. A masked-out micro-batch gives a 0 that still hangs on the graph.
    """
    return _divide(_kept(x, mask).sum(), num_tokens)


def sequence_mean(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], num_sequences: Count
) -> Float[Tensor, ""]:
    """Average x over the tokens of each sequence, add up, divide by a global number of sequences.

    Args:
        x: per-token values.
        mask: True where a token counts; a sequence without such a token contributes 0.
        num_sequences: sequences with at least one counting token, over all ranks and micro-batches
            of the optimiser step.

    Returns:
        This micro-batch's share of the mean. For packed rows sum `segment_mean` and divide.
    """
    return _divide(masked_mean(x, mask, dim=1).sum(), num_sequences)


def segment_sum(
    x: Float[Tensor, " N"],
    segment_ids: Int[Tensor, " N"],
    num_segments: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " S"]:
    """Sum the tokens of each sequence of a packed row.

    Args:
        x: per-token values of one packed row.
        segment_ids: which sequence, 0 to num_segments - 1, a token belongs to.
        num_segments: sequences in the row.
        mask: True where a token counts; None counts all. The id of a token that does not count is
            not looked at.

    Returns:
        One sum per sequence; 0 for a sequence without counting tokens.
    """
    if mask is not None:
        x, segment_ids = _kept(x, mask), segment_ids.masked_fill(~mask, 0)
    return x.new_zeros(num_segments).index_add(0, segment_ids, x)


def segment_mean(
    x: Float[Tensor, " N"],
    segment_ids: Int[Tensor, " N"],
    num_segments: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " S"]:
    """Average the tokens of each sequence of a packed row.

    Args:
        x: per-token values of one packed row.
        segment_ids: which sequence, 0 to num_segments - 1, a token belongs to.
        num_segments: sequences in the row.
        mask: True where a token counts; None counts all.

    Returns:
        One mean per sequence; 0 for a sequence without counting tokens.
    """
    lengths = segment_sum(torch.ones_like(x), segment_ids, num_segments, mask=mask)
    return _divide(segment_sum(x, segment_ids, num_segments, mask=mask), lengths)
