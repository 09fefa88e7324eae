"""A WordPiece tokenizer and a BERT of two layers, made for tests."""

import string
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

WORDS = ("user", "assistant", "good", "bad", "red", "blue", "is", "the", "which", "colour")


def wordpiece() -> BertTokenizer:
    """Make a tokenizer of a few words and of every letter and mark."""
    marks = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [f"##{mark}" for mark in (*string.ascii_lowercase, *string.digits)]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *marks, *pieces, *WORDS]
    found = list(dict.fromkeys(names))
    return BertTokenizer(vocab={name: i for i, name in enumerate(found)})


def bert_config(tokenizer: Any, *, positions: int = 64) -> BertConfig:
    """Give the sizes of the test encoder; its states are far from each other."""
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_bert(folder: Path, *, pooler: bool = True, positions: int = 64) -> str:
    """Save a random BERT with its pretraining heads, or bare without its pooler."""
    tokenizer = wordpiece()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = bert_config(tokenizer, positions=positions)
    model = BertForPreTraining(config) if pooler else BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return str(folder)
