"""Attention over packed rows: concatenated sequences, each attending only to itself and its prompt.

A packed row (1, N) contains whole sequences without padding, described completely by its positions.
A position of 0 starts a sequence. A jump back to p > 0 starts a response that continues the first p
tokens of the last sequence that started at 0. The prompt of a pair or group is thus stored once.

All layers but attention work on the N tokens. Attention lays them out as (S, T), right-padded, with
each response after its prompt. Causality then keeps every real query from the padded keys, so no
mask is needed and the fused causal kernel can be used (on CPU, products of blocks). Sequences of
similar length share a layout, so that a long one does not pad the short ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from align.core.errors import TrainingError
from align.core.groups import ALONE, RankGroup
from align.models.block_attention import block_attention
from align.models.ulysses import to_heads, to_tokens

PACKED = "align_packed"
ALIKE = 0.7
"""Sequences of one layout have at least this fraction of the longest one's length."""
_HANDED_ON = """
position_ids cache_position use_cache output_attentions output_hidden_states return_dict
output_router_logits num_items_in_batch past_key_values position_embeddings
"""
HARMLESS = frozenset(_HANDED_ON.split())
"""Options that layers pass on and that do not affect which tokens attend to each other."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sequences of similar length laid out as (S, T).

    Attributes:
        index: (S*T,) packed position of each slot; padding repeats position 0.
        num: S, the number of sequences.
        max_length: T, the length of the longest sequence in tokens, including its prompt.
        mask: (S, T), 1 on real tokens.
    """

    index: Tensor
    num: int
    max_length: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """The sequences of a packed row, and how attention lays them out.

    Attributes:
        positions: (N,) position of each token in its sequence.
        previous: (N,) packed position of the preceding token; a first token refers to itself.
        layouts: together they contain every sequence once.
        unpad_index: (N,) slot of each packed token, counted through all layouts.
        answers: (N,) bool, the tokens that are trained or scored, if the caller knows them.
        group: the ranks that share these tokens, each with a part of them.
    """

    positions: Tensor
    previous: Tensor
    layouts: tuple[Layout, ...]
    unpad_index: Tensor
    answers: Tensor | None = None
    group: RankGroup = ALONE


def segments_from_positions(positions: Tensor) -> Segments:
    """Return the sequences of a packed row from its positions (N,), as the module describes."""
    # Sequences begin wherever the position is not the previous one plus 1.
    starts = _starts(positions)
    shared = positions[starts]  # (S,) leading tokens that the row already contains
    own = torch.diff(starts, append=starts.new_tensor([positions.numel()]))
    # Start of the sequence that a response branches from: the last one that began at 0.
    root = torch.where(shared == 0, starts, 0).cummax(0).values  # (S,)
    lengths = shared + own
    assert bool((shared == 0)[0]), "a packed row must begin with the first token of a sequence"
    layouts: list[Layout] = []
    base = torch.zeros_like(starts)
    offset = 0
    # Lay out each group of similar lengths as (S, T) and remember where its slots begin.
    for members in _alike(lengths.tolist()):
        rows = torch.tensor(members, device=positions.device)
        width = int(lengths[rows[0]])
        column = torch.arange(width, device=positions.device)
        # (S, T) packed positions: shared columns come from the prompt, later ones from the
        # sequence.
        behind = (starts - shared)[rows].unsqueeze(1) + column
        index = torch.where(
            column < shared[rows].unsqueeze(1), root[rows].unsqueeze(1) + column, behind
        )
        # Padding points at position 0: any valid index, since causality keeps real queries from it.
        real = column < lengths[rows].unsqueeze(1)
        index = index.masked_fill(~real, 0)
        layouts.append(Layout(index.flatten(), len(members), width, real.long()))
        base[rows] = offset + width * torch.arange(len(members), device=positions.device)
        offset += width * len(members)
    # Packed positions of preceding tokens; a branch continues from the end of its prompt.
    at = torch.arange(positions.numel(), device=positions.device)
    previous = (at - 1).index_copy(0, starts, torch.where(shared == 0, starts, root + shared - 1))
    # Slot of each packed token: first slot of its sequence plus its position, (N,).
    unpad_index = torch.repeat_interleave(base, own) + positions
    return Segments(positions, previous, tuple(layouts), unpad_index)


def _starts(positions: Tensor) -> Tensor:
    # The first token always starts a sequence.
    jumps = torch.ones_like(positions, dtype=torch.bool)
    jumps[1:] = positions[1:] != positions[:-1] + 1
    return jumps.nonzero().squeeze(1)


def _alike(lengths: list[int]) -> list[list[int]]:
    """Group sequences, longest first, so that none is padded much beyond its own length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of a packed row.

    Args:
        module: the calling attention layer (its head grouping follows from the shapes).
        query: (1, H, N, D).
        key, value: (1, H_kv, V + N, D); the first V are virtual tokens before every sequence.
        attention_mask: must be None; packing replaces it.
        scaling: factor on the scores. dropout: fraction of attention weights that are dropped.
        sliding_window: tokens that a query looks back, including itself; None means all.
        softcap: bound c on the scores: c tanh(scores / c) (Gemma 2).
        s_aux: (H,) score of a sink that takes weight and contributes no value (gpt-oss).
        segments: the layout; None: each row is one sequence. others: options without effect here.

    Returns:
        (1, N, H, D) and None (no attention weights), as transformers expects.

    Raises:
        TrainingError: the model needs an attention option that is not supported here.
    """
    _check_options(others)
    assert attention_mask is None, "packed attention accepts no mask; pass segments"
    if segments is not None and s_aux is not None:  # those of the heads that this rank has
        s_aux = s_aux.chunk(segments.group.size)[segments.group.index]
    attend = partial(
        _attend,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    # Without segments each row is one sequence and needs no layout.
    if segments is None:
        return attend(query, key, value).contiguous(), None
    return _attend_by_layout(attend, (query, key, value), segments), None


def _check_options(others: Mapping[str, Any]) -> None:
    """Raise if a further option of the call could change who attends to whom."""
    for name, option in others.items():
        if option is not None and name not in HARMLESS and (name, option) != ("is_causal", True):
            raise TrainingError(f"its attention needs {name}, which packed rows do not support")


def _attend_by_layout(
    attend: Callable[..., Tensor], packed: tuple[Tensor, Tensor, Tensor], segments: Segments
) -> Tensor:
    """Attend per layout, then return the tokens to their packed order, (1, N, H, D)."""
    group = segments.group
    # Ranks that share the row exchange their tokens of all heads for all tokens of their heads.
    query, key, value = (to_heads(x, group) for x in packed) if group.size > 1 else packed
    virtual = key.shape[2] - query.shape[2]
    text = query, key[:, :, virtual:], value[:, :, virtual:]
    parts = []
    for layout in segments.layouts:
        q, k, v = (_lay_out(x, layout) for x in text)
        if virtual:
            k, v = (_before(x[:, :, :virtual], y) for x, y in ((key, k), (value, v)))
        parts.append(attend(q, k, v).flatten(0, 1))
    out = torch.cat(parts).index_select(0, segments.unpad_index).unsqueeze(0)  # (1, N, H, D)
    return to_tokens(out, group) if group.size > 1 else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend causally within each row, (S, T, H, D); virtual tokens of the keys come first."""
    # A zero query for each virtual token keeps the attention square and causal.
    virtual = k.shape[2] - q.shape[2]
    q = torch.nn.functional.pad(q, (0, 0, virtual, 0)) if virtual else q
    band = _band(q.shape[2], window, q.device)
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    # Choose the kernel: by definition, in blocks on the CPU, or torch's fused one.
    if softcap is not None or sinks is not None:
        out = _plain_attention(q * scale, k, v, band, softcap, sinks, dropout)
    elif q.device.type == "cpu" and band is None and dropout == 0.0:
        out = block_attention(q, k, v, scale=scale)
    else:
        # Grouped-query attention: repeat keys and values for the heads that share them.
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, dropout_p=dropout, scale=scaling
        )
    return out[:, :, virtual:].transpose(1, 2)


def _plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Compute causal attention by its definition, with scores (S, H, T, T) in memory."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3)  # (S, H, T, T)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if band is None:
        band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~band, float("-inf"))
    # The sink is one more column of scores; it takes weight and is cut off after the softmax.
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    # The softmax of 16-bit scores is computed in float32, as in transformers.
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=kind)[..., :length].to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v


def _before(virtual: Tensor, text: Tensor) -> Tensor:
    return torch.cat([virtual.expand(text.shape[0], -1, -1, -1), text], dim=2)


def _lay_out(x: Tensor, layout: Layout) -> Tensor:
    # (1, H, N, D) -> (N, H, D) -> (S*T, H, D) -> (S, H, T, D)
    rows = x[0].transpose(0, 1).index_select(0, layout.index)  # (S*T, H, D)
    return rows.unflatten(0, (layout.num, layout.max_length)).transpose(1, 2)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or window >= length:
        return None
    at = torch.arange(length, device=device)
    # (T, T): how far a query looks back; negative is the future.
    back = at[:, None] - at[None, :]
    return (back >= 0) & (back < window)


AttentionInterface.register(PACKED, packed_attention)
