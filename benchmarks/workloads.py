"""The work both sides do: a model with random weights, a tokenizer, and rows of known lengths.

One word of a text is one token, so that lengths are exact for whoever tokenizes.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EOS, PAD = "</s>", "<pad>"
SPECIAL = 2
"""Ids 0 and 1 are the stop and the padding token; word k is id k + 2."""
MAX_VOCAB = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Describe a Qwen2 model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 1, 128),
    "10.5M": Shape(320, 944, 8, 10, 2, 4096),
    "135M": Shape(576, 1536, 30, 9, 3, 49152),  # of SmolLM2-135M
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
}


def write_model(folder: Path, shape: Shape, *, dtype: str, stop_frac: float = 0.0) -> None:
    """Write a model with random weights and its tokenizer.

    Args:
        folder: made if missing. shape: of the model. dtype: of the saved weights.
        stop_frac: probability of the stop token at each position, so that sampled answers have
            geometric lengths; 0 leaves it to the random weights (1 / vocabulary).
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    torch.manual_seed(0)
    settings = {name: getattr(shape, name) for name in shape.__slots__}
    tied = settings.pop("tie_word_embeddings") and not stop_frac
    config = Qwen2Config(
        **settings,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if stop_frac:
        _set_stop_probability(model, stop_frac)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab_size)


def _set_stop_probability(model: Any, frac: float) -> None:
    """Set a large first channel in every hidden state, which only the stop token reads."""
    import torch

    vocab, _ = model.lm_head.weight.shape
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[0] = 0.0
        model.lm_head.weight[0, 0] = 1.0
        logits = model(torch.randint(SPECIAL, vocab, (1, 64))).logits[0]
        others = logits[:, 1:].logsumexp(-1).mean()
        wanted = others + torch.tensor(frac / (1 - frac)).log()
        model.lm_head.weight[0, 0] = wanted / logits[:, 0].mean()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of the words ``<w0><w1> ...``; id 0 stops, id 1 pads.

    The words are added tokens because transformers gives a Qwen2 model its own BPE, whatever the
    tokenizer's file says.
    """
    from transformers import Qwen2TokenizerFast

    tokens = {"eos_token": EOS, "pad_token": PAD, "unk_token": PAD}
    tokenizer = Qwen2TokenizerFast(vocab={EOS: 0, PAD: 1}, merges=[], **tokens)
    tokenizer.add_tokens([f"<w{i}>" for i in range(num_words(vocab_size))])
    tokenizer.save_pretrained(folder)


def num_words(vocab_size: int) -> int:
    """Return the number of words: a large vocabulary is not filled, but its size has its cost."""
    return min(vocab_size, MAX_VOCAB) - SPECIAL


def lengths(kind: str, num: int, *, longest: int, median: int, seed: int = 1) -> list[int]:
    """Draw row lengths in tokens: all ``longest``, or log-normal (sigma 1) cut at ``longest``.

    The skewed draw takes evenly spaced quantiles, so that a small batch has the whole tail.
    """
    if kind == "uniform":
        return [longest] * num
    from statistics import NormalDist

    quantiles = [NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
    drawn = [min(longest, max(8, round(median * 2.718281828**q))) for q in quantiles]
    random.Random(seed).shuffle(drawn)
    return drawn


class Words:
    """Draw texts of a known number of tokens."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._random, self._num = random.Random(seed), num_words(vocab_size)

    def __call__(self, num: int) -> str:
        """Return ``num`` random words."""
        return "".join(f"<w{self._random.randrange(self._num)}>" for _ in range(num))


def sft_rows(totals: list[int], vocab_size: int, *, prompt_frac: float) -> list[dict[str, str]]:
    """Make rows whose prompt, answer and stop token have ``totals`` tokens together."""
    words = Words(vocab_size, seed=2)
    found = []
    for total in totals:
        prompt = max(2, round(total * prompt_frac))
        row = {"prompt": words(prompt), "completion": words(total - prompt - 1)}
        found.append(row)
    return found


def pair_rows(totals: list[int], vocab_size: int, *, prompt_frac: float) -> list[dict[str, str]]:
    """Make pairs; the longer answer ends at ``totals`` tokens, the other is 30 to 100 % of it."""
    words, choose = Words(vocab_size, seed=3), random.Random(4)
    found = []
    for total in totals:
        prompt = max(2, round(total * prompt_frac))
        long = max(2, total - prompt - 1)
        answers = [words(long), words(max(1, round(long * choose.uniform(0.3, 1.0))))]
        choose.shuffle(answers)
        found.append({"prompt": words(prompt), "chosen": answers[0], "rejected": answers[1]})
    return found


def prompt_rows(totals: list[int], vocab_size: int) -> list[dict[str, str]]:
    """Make prompts of ``totals`` tokens."""
    words = Words(vocab_size, seed=5)
    return [{"prompt": words(total)} for total in totals]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
