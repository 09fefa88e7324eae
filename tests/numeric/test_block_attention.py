"""Attention in blocks against the definition of attention, in float64."""

import pytest
import torch
from torch import Tensor

from align.models.block_attention import BLOCK, KEEP, block_attention


def defined(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax over all keys up to the query's own place, one query at a time."""
    groups, out = query.shape[1] // key.shape[1], torch.empty_like(query)
    for head in range(query.shape[1]):
        for t in range(query.shape[2]):
            keys, values = (x[:, head // groups, : t + 1] for x in (key, value))
            scores = (query[:, head, t, None] * keys).sum(-1) * scale
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[:, head, t] = (weights[..., None] * values).sum(1)
    return out


def drawn(num: int, heads: int, kv_heads: int, length: int) -> list[Tensor]:
    shapes = [(num, h, length, 4) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    ("num", "heads", "kv_heads", "length"),
    [(2, 4, 2, 1), (2, 6, 2, BLOCK + 7), (1, 2, 2, 2 * BLOCK), (1, 2, 1, KEEP + 3)],
)
def test_block_attention_equals_the_definition_with_gradients(num, heads, kv_heads, length):
    torch.manual_seed(0)
    parts = drawn(num, heads, kv_heads, length)
    found, expected = block_attention(*parts, scale=0.3), defined(*parts, 0.3)
    weight = torch.randn_like(found)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for mine, slow in zip(
        torch.autograd.grad((found * weight).sum(), parts),
        torch.autograd.grad((expected * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(mine, slow, rtol=1e-9, atol=1e-11)


def test_block_attention_in_bfloat16_is_as_near_to_float64_as_the_fused_kernel():
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 200, 32, dtype=torch.float64).bfloat16() for _ in range(3)]
    expected = defined(*(x.double() for x in exact), 32**-0.5)
    mine = block_attention(*exact, scale=32**-0.5).double()
    fused = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True).double()
    assert (mine - expected).abs().mean() < 3 * (fused - expected).abs().mean()
