"""The physical limit: a matrix product of the dtype, timed in turn with the sides."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gate import Gate


def matmul(gate: Gate, work: Mapping[str, Any]) -> None:
    """Multiply square matrices; a round reports the best GFLOP/s of a few products."""
    torch.set_num_threads(work["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, repeats = (8192, 20) if device == "cuda" else (2048, 4)
    a = torch.randn(n, n, device=device).to(getattr(torch, work["dtype"]))
    gate.ready()
    while True:
        best = 0.0
        for _ in range(repeats):
            began = time.perf_counter()
            product = a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - began) / 1e9)
        del product
        gate.done(gflops=best)


def training_flops(shape: Any, lengths: list[int], num_trained: int) -> float:
    """Count the useful operations of one forward and backward over rows.

    Twice per weight and token forward, twice that backward; causal attention's two products over
    half of the square; the head on the trained positions only.

    Args:
        shape: of the model. lengths: of the rows, in tokens. num_trained: tokens in the loss.
    """
    head_dim = shape.hidden_size // shape.num_attention_heads
    kv = head_dim * shape.num_key_value_heads
    layer = shape.hidden_size * (2 * shape.hidden_size + 2 * kv + 3 * shape.intermediate_size)
    dense = shape.num_hidden_layers * layer * sum(lengths)
    head = shape.hidden_size * shape.vocab_size * num_trained
    attention = shape.num_hidden_layers * shape.hidden_size * sum(n * n for n in lengths)
    return 6.0 * (dense + head) + 6.0 * attention
