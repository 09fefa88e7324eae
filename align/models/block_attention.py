"""Causal attention in blocks of queries as matrix products; faster than the fused kernel on CPU.

torch's fused CPU kernel multiplies small tiles without the processor's matrix instructions. A block
of queries against all keys up to it is one product that is large enough to use them, and only the
block itself has products above the diagonal. Measurements are in benchmarks/README.md.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Number of queries in a block."""

KEEP = 512
"""Longest sequence, in tokens, whose attention weights are kept for the backward pass. Those of
longer ones are recomputed, so that memory per token is bounded."""


def block_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Compute causal attention.

    Args:
        query: (S, H, T, D), where H is a multiple of H_kv.
        key: (S, H_kv, T, D).
        value: (S, H_kv, T, E).
        scale: factor on the scores.

    Returns:
        (S, H, T, E). Scores and weights have the dtype of the query, the softmax is in float32.
    """
    return _BlockAttention.apply(query, key, value, scale, torch.is_grad_enabled())


class _BlockAttention(torch.autograd.Function):
    """Block-wise attention; heads that share a key are rows of one product (B = S * H_kv)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, grad: bool
    ) -> Tensor:
        # Heads that share a key are more rows of the same product: (S, H, T, D) -> (B, G, T, D).
        num, heads, length, width = query.shape
        groups = heads // key.shape[1]
        q = (query * scale).reshape(-1, groups, length, width)  # (B, G, T, D)
        k = key.reshape(-1, length, width)  # (B, T, D)
        v = value.reshape(-1, length, value.shape[3])  # (B, T, E)
        out, kept = q.new_empty(*q.shape[:3], v.shape[2]), []
        # Queries begin .. end see keys 0 .. end, so nothing beyond the block is computed.
        for begin, end in _blocks(length):
            weights = _weights(q, k, begin, end)
            out[:, :, begin:end] = (weights @ v[:, :end]).unflatten(1, (groups, -1))
            if grad and length <= KEEP:
                kept.append(weights)
        if grad:
            ctx.save_for_backward(q, k, v, *kept)
            ctx.scale = scale
        return out.view(num, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, *kept = ctx.saved_tensors
        groups, length = q.shape[1:3]
        num, grad = grad.shape[0], grad.reshape(*q.shape[:3], v.shape[2])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (begin, end) in enumerate(_blocks(length)):
            # With P the weights and dO the gradient: dV = P^T dO, dS = softmax'(dO V^T), dQ = dS K,
            # dK = dS^T Q. Keys collect the gradients of all later blocks.
            weights = kept[number] if kept else _weights(q, k, begin, end)
            out = grad[:, :, begin:end].flatten(1, 2)  # (B, G*n, D)
            dv[:, :end] += weights.transpose(1, 2) @ out
            scores = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
                out @ v[:, :end].transpose(1, 2), weights, -1, weights.dtype
            )
            dq[:, :, begin:end] = (scores @ k[:, :end]).unflatten(1, (groups, -1))
            dk[:, :end] += scores.transpose(1, 2) @ q[:, :, begin:end].flatten(1, 2)
        dq, dk, dv = (x.reshape(num, -1, *x.shape[-2:]) for x in (dq * ctx.scale, dk, dv))
        return dq, dk, dv, None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]


def _weights(q: Tensor, k: Tensor, begin: int, end: int) -> Tensor:
    """Return the attention weights of the queries of one block: (B, G*n, end)."""
    scores = q[:, :, begin:end].flatten(1, 2) @ k[:, :end].transpose(1, 2)
    n = end - begin
    # Only the last n columns can be in the future of a query of this block.
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    scores.unflatten(1, (q.shape[1], n))[..., begin:].masked_fill_(future, float("-inf"))
    return scores.softmax(-1)
