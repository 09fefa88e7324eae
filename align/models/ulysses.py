"""Sequence parallelism: a group of ranks shares the tokens of a packed row.

Each rank runs the layers on its part of the tokens. For attention, the ranks exchange: each then
has all tokens of its part of the heads, and no rank ever has all activations of a layer.

Reference: arXiv:2309.14509 (DeepSpeed Ulysses), section 3.1.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.core.groups import RankGroup


def to_heads(x: Tensor, group: RankGroup) -> Tensor:
    """Exchange this rank's tokens of all heads, (1, H, n, D), for all tokens of its heads.

    Returns:
        (1, H / k, k * n, D) for k ranks.
    """
    parts = x[0].unflatten(0, (group.size, -1))  # (k, H/k, n, D): part j is for rank j
    mine = _AllToAll.apply(parts, group)  # (k, H/k, n, D): part i are the tokens of rank i
    return mine.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def to_tokens(x: Tensor, group: RankGroup) -> Tensor:
    """Exchange all tokens of this rank's heads, (1, k * n, H / k, D), for its tokens of all heads.

    Returns:
        (1, n, H, D) for k ranks.
    """
    parts = x[0].unflatten(0, (group.size, -1))  # (k, n, H/k, D): part j is for rank j
    mine = _AllToAll.apply(parts, group)  # (k, n, H/k, D): part i are the heads of rank i
    return mine.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def summed(x: Tensor, group: RankGroup) -> Tensor:
    """Return the sum of a tensor over the ranks of a group; gradients are summed as well."""
    return _Sum.apply(x, group)


def part_of(num_tokens: int, group: RankGroup) -> slice:
    """Return this rank's part of the tokens of a row, whose number the group divides."""
    size = num_tokens // group.size
    return slice(group.index * size, (group.index + 1) * size)


def lengthened(positions: Tensor, group: RankGroup) -> Tensor:
    """Return the positions (N,) of a row with as many more tokens as the group needs to divide it.

    They continue the last sequence, so no real token attends to them.
    """
    missing = -positions.numel() % group.size
    if not missing:
        return positions
    more = torch.arange(1, missing + 1, device=positions.device)
    return torch.cat([positions, positions[-1] + more])


class _AllToAll(torch.autograd.Function):
    """Send part j of the first dimension to rank j of the group; the inverse is the same."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _exchanged(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the ranks of a group, each of which uses the sum in a loss of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _all_reduced(grad, ctx.group), None


def _exchanged(parts: Tensor, group: RankGroup) -> Tensor:
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group.channel)
    return out


def _all_reduced(x: Tensor, group: RankGroup) -> Tensor:
    out = x.clone()
    dist.all_reduce(out, group=group.channel)
    return out
