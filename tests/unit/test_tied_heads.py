"""Heads that are the embeddings under another name than lm_head are saved once, and read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
)

from align.models.saving import save_policy
from align.tuning.export import full_weights, saved_buffers
from tests.unit.small_tokenizers import byte_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def biogpt() -> Any:
    return BioGptForCausalLM(BioGptConfig(**SIZES, intermediate_size=32))


def neox_japanese(*, tied: bool = True) -> Any:
    config = GPTNeoXJapaneseConfig(**SIZES, intermediate_multiple_size=1, tie_word_embeddings=tied)
    return GPTNeoXJapaneseForCausalLM(config)


def untied() -> Any:
    return neox_japanese(tied=False)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (biogpt, "output_projection.weight"),
        (neox_japanese, "embed_out.weight"),
        (untied, None),
        (gpt2, "lm_head.weight"),
    ],
)
def test_a_policy_is_saved_as_it_is(tmp_path: Path, make: Any, head: str | None):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer(None).save_pretrained(tmp_path / "source")
    state = dict(full_weights(model)) | dict(saved_buffers(model))
    save_policy(
        state.items(), source_dir=tmp_path / "source", directory=tmp_path / "out", dtype="float32"
    )
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert head not in saved
    assert ("embed_out.weight" in saved) == (make is untied)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(4, 20).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
