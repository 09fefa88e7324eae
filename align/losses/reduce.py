"""Sums and means over masked tokens; global denominators are passed in, not computed here."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Count = int | float | Tensor
"""A global number of tokens, sequences or pairs: a Python number or a 0-d tensor."""


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with 0 where the mask is False; a NaN there reaches neither value nor gradient."""
    # Not x * mask: NaN * 0 is NaN, in the value and in the gradient.
    return x.masked_fill(~mask, 0.0)


def _divide(total: Tensor, count: Count) -> Tensor:
    """Return total / count; for a count of 0 the sum itself, which is 0 and keeps its graph."""
    if isinstance(count, Tensor):
        # Divide by 1 instead of branching on a tensor, which would wait for the GPU.
        return total / torch.where(count == 0, torch.ones_like(count), count).to(total.dtype)
    return total / (count or 1)


def masked_moments(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, " 3"]:
    """Return count, sum and sum of squares where the mask is True, in float64.

    Sum them over ranks to make `masked_whiten` independent of the number of ranks.
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
    """Return x scaled to unit variance where the mask is True, with mean 0 or its own mean.

    The variance is that of the population (divided by the count, not count - 1). Values that
    agree to one part in a million count as constant: their spread is rounding error, and dividing
    by it would amplify noise.

    Args:
        x: values.
        mask: True where a value counts.
        center: True gives mean 0 (advantages); False keeps the mean (rewards).
        count: number of values over all ranks. Pass it together with the next two, or pass none
            of the three: the moments are those of ``x`` then.
        total: sum of the values over all ranks.
        total_sq: sum of the squared values over all ranks.

    Returns:
        Whitened values in the dtype of x, 0 where the mask is False. Constant values become 0
        (centered) or stay as they are.
    """
    given = [moment is not None for moment in (count, total, total_sq)]
    assert all(given) or not any(given), f"give all of count, total, total_sq or none: {given}"
    if count is None or total is None or total_sq is None:
        count, total, total_sq = masked_moments(x, mask)
    n, first, second = (
        torch.as_tensor(m, dtype=torch.float64, device=x.device) for m in (count, total, total_sq)
    )
    # Population moments in float64: the difference of squares cancels in float32.
    mean = first / n.clamp(min=1.0)
    variance = second / n.clamp(min=1.0) - mean.square()
    # (1e-6)^2: a relative spread of one part in a million, see above.
    constant = variance <= 1e-12 * mean.square()
    scale = torch.where(constant, torch.ones_like(variance), variance).rsqrt()
    centered = torch.where(constant, torch.zeros_like(mean), (x.double() - mean) * scale)
    return _kept((centered if center else centered + mean).to(x.dtype), mask)


def token_mean(
    x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], num_tokens: Count
) -> Float[Tensor, ""]:
    """Return the sum of x where the mask is True, divided by a global number of tokens.

    Args:
        x: per-token values, padded (B, T) or packed (N,).
        mask: True where a token counts.
        num_tokens: tokens that count, over all ranks and micro-batches of the optimizer step.

    Returns:
        This micro-batch's part of the mean: the parts of all ranks and micro-batches add up to
        it. A fully masked micro-batch gives a 0 that is still connected to the graph.
    """
    return _divide(_kept(x, mask).sum(), num_tokens)


def segment_sum(
    x: Float[Tensor, " N"],
    segment_ids: Int[Tensor, " N"],
    num_segments: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " S"]:
    """Return the sum over the tokens of each sequence of a packed row.

    Args:
        x: per-token values of one packed row.
        segment_ids: which sequence, 0 to num_segments - 1, a token belongs to.
        num_segments: sequences in the row.
        mask: True where a token counts; None counts all. The id of a token that does not count is
            ignored.

    Returns:
        One sum per sequence; 0 for a sequence without counting tokens.
    """
    if mask is not None:
        # Ids of masked tokens may be out of range; their value is 0, so segment 0 is not changed.
        x, segment_ids = _kept(x, mask), segment_ids.masked_fill(~mask, 0)
    return x.new_zeros(num_segments).index_add(0, segment_ids, x)


def segment_mean(
    x: Float[Tensor, " N"],
    segment_ids: Int[Tensor, " N"],
    num_segments: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " S"]:
    """Return the mean over the tokens of each sequence of a packed row.

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
