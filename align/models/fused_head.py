"""Language-model head and log-probability of one label per position, fused into one function.

The logits are computed and consumed in chunks of rows, in both directions, so that at most
``CHUNK_ELEMENTS`` of them are in memory in float32, regardless of the vocabulary. Products use the
dtype of the weights; the gradient of the weight is accumulated over chunks in float32.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21
"""Number of logits in a chunk on CPU: 8 MiB in float32, which fits the processor's cache."""

CHUNK_ELEMENTS_GPU = 2**28
"""Number of logits in a chunk on a GPU: 1 GiB. On an H200, 2**26 takes 1.2 to 1.3 times as long."""

KEPT_ELEMENTS = 2**24
"""Up to this number, logits are kept for the backward pass, in the dtype of the weights. More
logits are recomputed: this trades one product in four for memory."""


def head_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Return log p(label | hidden state) and, if requested, the entropy of each distribution.

    Args:
        hidden: (N, H).
        weight: (V, H), the weight of the head.
        labels: (N,) token ids.
        temperature: divides the logits.
        entropy: False returns zeros instead; the entropy has no gradient.

    Returns:
        (N,) twice, in nats: float32, or float64 for float64 weights.
    """
    return _HeadLogprobs.apply(
        hidden, weight, labels, temperature, entropy, torch.is_grad_enabled()
    )


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        entropy: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(weight.dtype, torch.float32)
        # (N,) results; only one chunk of logits (n, V) exists at a time.
        values = hidden.new_empty(len(hidden), dtype=kind)
        entropies = torch.zeros_like(values)
        kept = []
        for rows in _chunks(hidden, weight):
            logits = hidden[rows] @ weight.T  # (n, V)
            logprobs = torch.log_softmax(_divided(logits, temperature), -1, dtype=kind)
            values[rows] = logprobs.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
            # H = -sum p log p, in place on a copy of the probabilities.
            if entropy:
                entropies[rows] = -(logprobs.exp().mul_(logprobs)).sum(-1)
            # Few logits: keep them rather than computing the product twice.
            if grad and len(hidden) * len(weight) <= KEPT_ELEMENTS:
                kept.append(logits)
        if grad:
            ctx.save_for_backward(hidden, weight, labels, *kept)
            ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, *kept = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        trains = ctx.needs_input_grad[1]
        kind = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=kind) if trains else None
        for number, rows in enumerate(_chunks(hidden, weight)):
            logits = kept[number] if kept else hidden[rows] @ weight.T
            logits = _divided(logits, ctx.temperature)
            # d log p(label) / d logits = onehot(label) - p
            share = (grad[rows] / ctx.temperature).unsqueeze(-1)
            slope = torch.softmax(logits, -1, dtype=kind).mul_(-share)
            slope.scatter_add_(-1, labels[rows].unsqueeze(-1), share)
            slope = slope.to(weight.dtype)
            dhidden[rows] = slope @ weight
            if dweight is not None:
                dweight += slope.T @ hidden[rows]
        # Rounded to the dtype of the weight once, after the sum over all chunks.
        whole = None if dweight is None else dweight.to(weight.dtype)
        return dhidden, whole, None, None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    elements = CHUNK_ELEMENTS if hidden.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    # Rows per chunk, such that rows x vocabulary stays within the limit.
    size = max(1, elements // len(weight))
    return [slice(begin, begin + size) for begin in range(0, len(hidden), size)]


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """Divide in float32, since bfloat16 would round once more."""
    if temperature == 1.0:
        return logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
