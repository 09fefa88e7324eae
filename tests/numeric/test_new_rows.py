"""Rows of new tokens: found in the weights, trained beside an adapter, and saved with it."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import words
from tuned_stages import tuning_spec

from align.core.errors import RecipeError, TrainingError
from align.core.types import TokenRow
from align.models.attention import PACKED
from align.models.loading import add_embeddings
from align.models.logprobs import LogprobModel
from align.sampling.push import pushed_weights
from align.training.stops import never_stops, stop_probabilities
from align.tuning.export import full_weights
from align.tuning.files import adapter_state, save_adapter
from align.tuning.loading import tokens_to_train
from align.tuning.rows import trained_rows, untrained_tokens
from align.tuning.wrap import add_tuner

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
NEW = [30, 31]
IDS = torch.tensor([[30, 2, 3, 31, 30, 5, 9, 31]])


def small(tied: bool, *, vocab: int = 32, **extra: object) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation=PACKED,
        **extra,
    )
    return Qwen2ForCausalLM(config).eval()


def marked(folder: Path, *, stop: str = "<|im_end|>") -> Path:
    """Save a tokenizer of 30 words, and of two markers that its template puts around turns."""
    tokenizer: PreTrainedTokenizerFast = words(30)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = stop, CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
def test_rows_train_with_the_adapter_and_are_merged_and_saved_with_it(tmp_path, tied, method):
    start = small(tied)
    model = LogprobModel(add_tuner(small(tied), tuning_spec(method), tokens=NEW))
    at_start = model(IDS).logprobs.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        (-model(IDS).logprobs.sum()).backward()
        optimizer.step()
    trained = model(IDS).logprobs.detach()
    assert trained.sum() > at_start.sum() + 0.1
    # Merged: a plain model, in which exactly the new rows of the tables have changed.
    merged = small(tied)
    weights = {name: x.clone() for name, x in full_weights(model.model)}
    merged.load_state_dict(weights, strict=not tied)
    merged.tie_weights()
    torch.testing.assert_close(LogprobModel(merged)(IDS).logprobs, trained, atol=2e-6, rtol=0.0)
    tables = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in tables:
        changed = (weights[name] != start.get_parameter(name)).any(1)
        assert changed.nonzero().flatten().tolist() == NEW
    # Saved: peft alone reads the rows with the adapter.
    save_adapter(*adapter_state(model.model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(small(tied), str(tmp_path))
    torch.testing.assert_close(LogprobModel(loaded)(IDS).logprobs, trained, atol=2e-6, rtol=0.0)
    # Switched off, which is how the reference is computed.
    if method != "pissa":
        with model.model.disable_adapter():
            off = model(IDS).logprobs
        torch.testing.assert_close(off, LogprobModel(start)(IDS).logprobs, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_a_row_is_that_of_training_the_whole_table(tied):
    model = LogprobModel(add_tuner(small(tied), tuning_spec("lora"), tokens=NEW))
    (-model(IDS).logprobs.sum()).backward()
    whole = small(tied)
    logprobs = whole(IDS, use_cache=False).logits[0, :-1].log_softmax(-1)
    (-logprobs.gather(-1, IDS[0, 1:, None]).sum()).backward()
    rows = {n: p.grad for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    places = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    assert len(rows) == len(places)
    for place, (name, found) in zip(places, rows.items(), strict=True):
        assert place in name
        table = next(p for n, p in whole.named_parameters() if place in n)
        torch.testing.assert_close(found, table.grad[NEW], atol=1e-5, rtol=1e-5)


def tables_of(model: nn.Module) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]


def zero(table: torch.Tensor, token: int) -> None:
    table[token] = 1e-9


def resized(table: torch.Tensor, token: int) -> None:
    """What transformers' resize_token_embeddings writes: the mean, with noise of 1e-9."""
    table[token] = table[:30].mean(0) + 1e-9 * torch.randn(table.shape[1])


def copied(table: torch.Tensor, token: int) -> None:
    table[token] = table[7]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("left", [zero, resized, copied])
@pytest.mark.parametrize(
    ("token", "side", "named"),
    [
        (31, "both", True),  # the stop token
        (30, "both", True),  # a marker that is only read
        (31, "head", True),
        (30, "head", False),  # never predicted, so nothing trains its row of the head
        (29, "both", False),  # a word, which is no marker
    ],
)
def test_untrained_markers_are_found(tmp_path, tied, left, token, side, named):
    model = small(tied)
    for table in tables_of(model)[1 if side == "head" and not tied else 0 :]:
        left(table, token)
    # In a tied model there is one table, so the row of the head is the marker's own.
    expected = [token] if named or (tied and token == 30) else []
    assert list(untrained_tokens(model, marked(tmp_path))) == expected


def test_trained_markers_and_models_without_a_template_have_no_findings(tmp_path):
    assert untrained_tokens(small(True), marked(tmp_path / "a")) == {}
    plain = words(32)
    plain.save_pretrained(tmp_path / "b")
    model = small(True)
    zero(tables_of(model)[0], 30)
    assert untrained_tokens(model, tmp_path / "b") == {}


@pytest.mark.parametrize("method", ["ia3", "oft", "vera", "bottleneck", "prefix", "loreft"])
def test_methods_without_rows_refuse_new_markers(tmp_path, method):
    model = small(True, vocab=30)
    add_embeddings(model, 32, NEW)
    folder = marked(tmp_path)
    with pytest.raises(RecipeError, match=r"<\|im_start\|>.*<\|im_end\|>.*method lora or full"):
        tokens_to_train(model, folder, tuning_spec(method))
    assert tokens_to_train(model, folder, tuning_spec("lora")) == NEW
    assert tokens_to_train(model, folder, tuning_spec("full")) == []


def test_head_with_a_bias_is_refused(tmp_path):
    model = small(False)
    model.lm_head.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(RecipeError, match=r"the head of Qwen2ForCausalLM.*method full"):
        add_tuner(model, tuning_spec("lora"), tokens=NEW)


def test_adapter_with_rows_is_not_served_alone():
    model = add_tuner(small(True), tuning_spec("lora"), tokens=NEW)
    assert trained_rows(model) == NEW
    with pytest.raises(TrainingError, match="push: adapter"):
        next(pushed_weights(model, adapter_alone=True))
    assert trained_rows(add_tuner(small(True), tuning_spec("lora"))) == []


def test_stop_probability_is_that_of_the_models_own_logits():
    model = small(True)
    ids = IDS[0].tolist()
    trained = (False,) * 4 + (True,) * 4
    rows = [TokenRow(tuple(ids), trained, "a"), TokenRow(tuple(ids[:7]), trained[:7], "b")]
    found = stop_probabilities(LogprobModel(model), rows, [31, 8])
    # The second row ends without a stop token, and the first one's prompt has one.
    expected = model(IDS, use_cache=False).logits[0, -2].softmax(-1)[31].item()
    assert found == pytest.approx([expected], rel=1e-5)


def test_policy_that_never_stops_raises_an_alarm():
    assert never_stops([0.5, 1e-5, 0.5]) is None
    assert never_stops([]) is None
    alarm = never_stops([1e-5, 0.9, 1e-6])
    assert alarm is not None
    assert "1e-05 (median)" in alarm.reason
