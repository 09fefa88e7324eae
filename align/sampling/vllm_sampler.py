"""Faster token sampling in vLLM on CPU, from the same distribution.

vLLM divides the probabilities by exponential noise. This needs a random number for every word of
the vocabulary, and twice as many on CPU if requests have their own seeds: a fifth of a rollout's
time. Inverting the cumulative distribution needs only one random number per sampled token.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor


def rank_without_compiler() -> None:
    """Patch how vLLM counts the rank of a sampled token.

    Compiling its count with the C++ compiler would delay the first call on a new machine by 14 s
    (2 s with a warm cache) and require a compiler.
    """
    sampler: Any = importlib.import_module("vllm.v1.sample.sampler")
    sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


def cheapen_sampling() -> None:
    """Patch vLLM's sampler; call this before an engine is built, on CPU, for logprobs of tokens."""
    rank_without_compiler()
    ops: Any = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")

    def forward_cpu(
        self: Any,
        logits: Tensor,
        generators: Mapping[int, Generator],
        k: Tensor | None,
        p: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = ops.apply_top_k_top_p(logits, k, p)
        assert self.logprobs_mode == "processed_logprobs", self.logprobs_mode
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        return draw_tokens(logprobs.exp(), generators), logprobs

    ops.TopKTopPSampler.forward_cpu = forward_cpu


def draw_tokens(probs: Tensor, generators: Mapping[int, Generator]) -> Tensor:
    """Draw one token from each row by inverting its cumulative distribution.

    Args:
        probs: (B, V) float32; rows need not sum to exactly 1.
        generators: random generators of some rows, by row number; the others use torch's own.

    Returns:
        (B,) token ids; a token of probability 0 is never drawn.
    """
    points = torch.rand(len(probs), 1, dtype=torch.float64)  # in [0, 1)
    for row, generator in generators.items():
        points[row] = torch.rand(1, dtype=torch.float64, generator=generator)
    # Scaling by the total instead of 1 makes up for rows that do not sum to exactly 1.
    below = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(below, points * below[:, -1:], right=True).squeeze(1)
