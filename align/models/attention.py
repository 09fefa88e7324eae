"""Attention over packed rows: sequences laid end to end, each seeing only itself.

A packed row (1, N) holds whole sequences without padding. Everything but attention works on the N
real tokens; attention alone lays them out as (S, T), right-padded, where causality already keeps a
real query from every padded key: no mask is built, and the fused causal kernel is used.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "align_packed"


@dataclass(frozen=True, slots=True)
class Segments:
    """Say where the sequences of a packed row begin and how to lay them out as (S, T).

    Attributes:
        first: (N,) bool, True at the first token of each sequence.
        pad_index: (S*T,) packed position that fills each padded slot; padding repeats slot 0.
        unpad_index: (N,) padded slot of each packed token.
        num: S, the number of sequences.
        max_length: T, the longest of them, in tokens.
    """

    first: Tensor
    pad_index: Tensor
    unpad_index: Tensor
    num: int
    max_length: int


def segments_from_first(first: Tensor) -> Segments:
    """Build the layout from the (N,) mask of first tokens; the first token of the row is one."""
    assert bool(first[0]), "a packed row must begin with the first token of a sequence"
    starts = first.nonzero().squeeze(1)  # (S,)
    ends = torch.cat([starts[1:], starts.new_tensor([first.numel()])])
    num, max_length = starts.numel(), int((ends - starts).max())
    row = first.long().cumsum(0) - 1  # (N,) sequence number of each token
    column = torch.arange(first.numel(), device=first.device) - starts[row]
    unpad_index = row * max_length + column
    pad_index = torch.zeros(num * max_length, dtype=torch.long, device=first.device)
    pad_index[unpad_index] = torch.arange(first.numel(), device=first.device)
    return Segments(first, pad_index, unpad_index, num, max_length)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of a packed row.

    Args:
        module: the calling attention layer (its head grouping is read off the shapes).
        query: (1, H, N, D). key, value: (1, H_kv, N, D).
        attention_mask: must be None; packing replaces it.
        scaling: factor on the scores. dropout: share of attention weights dropped.
        sliding_window: tokens a query looks back, itself included; None is all.
        segments: the layout; None means that each row is one sequence.

    Returns:
        (1, N, H, D) and None (no attention weights), transformers' convention.
    """
    assert attention_mask is None, "packed attention takes no mask; give segments"
    num_heads = query.shape[1]
    if segments is not None:
        query, key, value = (_pad(x, segments) for x in (query, key, value))  # (S, H, T, D)
    groups = num_heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    band = _band(query.shape[2], sliding_window, query.device)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, dropout_p=dropout, scale=scaling
    ).transpose(1, 2)  # (S, T, H, D)
    if segments is not None:
        out = out.flatten(0, 1).index_select(0, segments.unpad_index).unsqueeze(0)
    return out.contiguous(), None


def _pad(x: Tensor, segments: Segments) -> Tensor:
    rows = x[0].transpose(0, 1).index_select(0, segments.pad_index)  # (S*T, H, D)
    return rows.unflatten(0, (segments.num, segments.max_length)).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or window >= length:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


AttentionInterface.register(PACKED, packed_attention)
