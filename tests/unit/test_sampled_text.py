"""The text of an answer, as rewards see it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.sampling.engine import load_decoder, make_completion

WORDS = ["<pad>", "<eos>", "<think>", "</think>", "two", "four"]


def test_special_tokens_that_were_sampled_stand_in_the_text(tmp_path: Path):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<think>", "</think>"],
    ).save_pretrained(tmp_path)
    decode = load_decoder(tmp_path)
    said = make_completion(
        (2, 4, 0, 3, 5, 1), (0.0,) * 6, stop=frozenset({1}), decode=decode, version=0
    )
    assert said.text == "<think> two </think> four"
    assert said.finish_reason == "stop"
