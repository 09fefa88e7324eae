"""Random models that take no time, for tests that need a real one."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    """Return a random Llama of 2 layers for a tokenizer; always the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
