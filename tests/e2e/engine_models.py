"""Tiny models with a tokenizer, and slow float64 log-probabilities, for the engine tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 64


def tiny_model(seed: int, *, tied: bool) -> nn.Module:
    """Make a random Qwen2 with heads of 32 whose answers are far from uniform.

    Models of two seeds differ in direction, not in scale.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_decoder(family: str, seed: int) -> nn.Module:
    """Make a random decoder that two ranks can divide: ``llama``, or ``qwen2`` with shared heads.

    Llama has a key-value head for each of its 4 heads, and a head of its own. Qwen2 has biases, 2
    key-value heads and a head tied to the embedding. The vocabulary of 70 fills no rank's part.
    """
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 70,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
    }
    if family == "llama":
        config = LlamaConfig(num_key_value_heads=4, tie_word_embeddings=False, **shape)
        return LlamaForCausalLM(config).eval()
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **shape))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at the start
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def save_tiny(model: Any, directory: Path) -> Path:
    """Save a model with a tokenizer of the words w0, w1 ..., one for each token."""
    model.save_pretrained(directory)
    words(model.config.vocab_size).save_pretrained(directory)
    return directory


def words(number: int) -> PreTrainedTokenizerFast:
    """Give a tokenizer of the words w0, w1 ..., of which w1 ends a text."""
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(number)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w1")


def exact_logprobs(
    model: nn.Module, prompt: Sequence[int], answer: Sequence[int], *, temperature: float = 1.0
) -> list[float]:
    """Score an answer by one full float64 forward pass without cache or batching."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logprobs = (double(input_ids=ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
    return [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(answer)]
