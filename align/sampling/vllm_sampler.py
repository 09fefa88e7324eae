"""Cheaper drawing of tokens in vLLM on CPU, from the same distribution.

vLLM divides the probabilities by exponential noise: a random number for every word of the
vocabulary, and on CPU twice where requests have their own seeds, a fifth of a rollout's time. The
inverse of the cumulative distribution needs one random number for each token that is drawn.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor


def cheapen_sampling() -> None:
    """Change vLLM's sampler; call it before an engine is built, on CPU, for logprobs of tokens.

    Nobody reads the rank of a sampled token here either, and the compilation of its count with the
    C++ compiler makes the first call of a fresh machine 14 s slower (2 s with a warm cache) and
    needs a compiler at all.
    """
    sampler: Any = importlib.import_module("vllm.v1.sample.sampler")
    sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)
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
    """Draw one token from each row by the inverse of its cumulative distribution.

    Args:
        probs: (B, V) float32; rows need not add up to exactly 1.
        generators: for some rows, by number, where their random number comes from; the others
            draw from torch's own.

    Returns:
        (B,) token ids; a token of probability 0 is never drawn.
    """
    points = torch.rand(len(probs), 1, dtype=torch.float64)  # in [0, 1)
    for row, generator in generators.items():
        points[row] = torch.rand(1, dtype=torch.float64, generator=generator)
    below = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(below, points * below[:, -1:], right=True).squeeze(1)
