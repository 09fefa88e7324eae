"""Gradients of packed rows that two ranks share, and of the same rows on one rank; ``OUT``."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3]))

from align.core import distributed, groups
from align.core.types import PairRow, TokenRow
from align.models.attention import PACKED
from align.models.logprobs import LogprobModel
from align.training.batch import PackedBatch, pack, pack_pairs

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    # Windows shorter than the rows, and sinks: a number for each head.
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gpt_oss": {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": 5},
}


def main() -> None:
    out = Path(sys.argv[1])
    distributed.init_process_group()
    found = {}
    for name, options in MODELS.items():
        for what, batch in batches().items():
            for size in (2, 1):
                groups.share_rows(size)
                found[name, what, size] = gradients(name, options, batch, size)
    torch.save(found, out / f"rank{distributed.rank()}.pt")


def batches() -> dict[str, PackedBatch]:
    """Give rows, pairs with one prompt for both, and a row of two tokens that trains nothing."""
    torch.manual_seed(1)

    def row(length: int, prompt: int = 2) -> TokenRow:
        ids = tuple(torch.randint(0, 61, (length,)).tolist())
        return TokenRow(ids, tuple(i >= prompt for i in range(length)))

    def pair(prompt: int, chosen: int, rejected: int) -> PairRow:
        start = row(prompt).input_ids
        one, two = (
            TokenRow(start + row(n).input_ids, (False,) * prompt + (True,) * n)
            for n in (chosen, rejected)
        )
        return PairRow(one, two, num_prompt_tokens=prompt)

    return {
        "rows": pack([row(n) for n in (11, 3, 20, 7)]),  # 41 tokens: an odd number
        "pairs": pack_pairs([pair(9, 4, 8), pair(5, 3, 2)]),
        "placeholder": pack([]),
    }


def gradients(name: str, options: dict[str, Any], batch: PackedBatch, size: int) -> dict[str, Any]:
    """Return loss, values and summed gradients, and the tokens that the layers of a rank get."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **options, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=PACKED,
        experts_implementation="eager",  # the fast kernel of experts takes no float64
    )
    module = LogprobModel(model.double()).train()
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *x: seen.append(x[2].shape[1]))
    values = module(batch.input_ids, batch.position_ids, mask=batch.mask, entropy=True)
    weights = torch.linspace(0.5, 2.0, values.logprobs.numel(), dtype=torch.float64)
    # Each of the ranks that share a row contributes its part of the loss, as with its counts.
    loss = (values.logprobs[0] * weights).square().sum() / size
    loss.backward()
    summed: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        summed[key] = distributed.sum_in_place(grad) if size > 1 else grad
    logprobs, entropy = values.logprobs.detach(), values.entropy
    return {"logprobs": logprobs, "entropy": entropy, "gradients": summed, "tokens": seen[-1]}


if __name__ == "__main__":
    main()
    distributed.shutdown()
    distributed.end_process(0)
