"""A tiny Llama, and its log-probabilities one sequence at a time by definition."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.models.attention import PACKED


def tiny_llama(attention: str = PACKED) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double()


def one_by_one(model: LlamaForCausalLM, ids: list[int], temperature: float) -> tuple[list, list]:
    """Run one sequence alone through transformers' own attention; log-softmax by definition."""
    plain = tiny_llama("eager")
    plain.load_state_dict(model.state_dict())
    logits = plain(torch.tensor([ids])).logits[0].double() / temperature
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    logprobs = [0.0] + [p[t - 1, ids[t]].log().item() for t in range(1, len(ids))]
    entropies = [0.0] + [-(p[t - 1] * p[t - 1].log()).sum().item() for t in range(1, len(ids))]
    return logprobs, entropies
