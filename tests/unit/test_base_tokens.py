"""Tokens that a recipe adds to a model: their rows, ties, stops, and what the artifact keeps."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.card import Card
from align.core.errors import ArtifactError, DataError
from align.data.render.chat import ChatFormat
from align.models.loading import bringing_in
from align.recipe.schema import BaseStage, Recipe, TokenizerSpec
from align.stages.base import StageContext, chat_format, prepare_and_train
from tests.sixteen_faults import NO_STOP


def saved_model(folder: Path, *, tied: bool, rows: int | None = None) -> Path:
    """Save a random model that has neither a chat template nor ChatML's markers."""
    # transformers chooses the tokenizer's class by the configuration beside it, and that class
    # adds a token of its own; so it is the loaded tokenizer that the model is made for.
    Qwen2Config().save_pretrained(folder)
    byte_tokenizer(None, markers=()).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=rows or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def bring_in(path: Path, out: Path, tokenizer: TokenizerSpec) -> tuple[Path, Card]:
    """Run the base stage; give the model it leaves and the stage's card."""
    spec = BaseStage(kind="base", path=str(path), tokenizer=tokenizer)
    recipe = Recipe(name="r", stages={"base": spec})
    (out / "base").mkdir(parents=True)
    prepare_and_train(spec, StageContext(recipe, "base", out, 0))
    card = json.loads((out / "base" / "preflight.json").read_text())
    return out / "base" / "model", card


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_begin_as_the_mean_of_the_others(tmp_path: Path, tied: bool) -> None:
    source = saved_model(tmp_path / "in", tied=tied)
    old = AutoModelForCausalLM.from_pretrained(source)
    model_dir, card = bring_in(source, tmp_path, TokenizerSpec(chat_template="chatml"))
    new = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    number = old.config.vocab_size
    assert sorted(ids) == [number, number + 1]
    assert new.config.vocab_size == len(tokenizer) == number + 2
    pairs = [
        (old.get_input_embeddings().weight, new.get_input_embeddings().weight),
        (old.lm_head.weight, new.lm_head.weight),
    ]
    for before, after in pairs:
        assert torch.equal(after[:number], before)
        expected = before.double().mean(0)
        assert torch.allclose(after[number:].double(), expected.expand(2, -1), atol=1e-7)
    assert (new.lm_head.weight is new.get_input_embeddings().weight) is tied
    # Generation stops at the marker first, and where the model used to stop.
    stops = json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [ids[1], old.config.eos_token_id]
    assert chat_format(model_dir).stop_token_ids == tuple(stops)
    assert {line["verdict"] for line in card["lines"]} == {"ok"}


def test_reserved_rows_of_a_padded_table_begin_as_the_mean_too(tmp_path: Path) -> None:
    # The table has more rows than the tokenizer has tokens: it does not grow, but the next rows
    # have never been trained.
    source = saved_model(tmp_path / "in", tied=False, rows=320)
    old = AutoModelForCausalLM.from_pretrained(source)
    first = len(AutoTokenizer.from_pretrained(source))
    model_dir, _ = bring_in(source, tmp_path, TokenizerSpec(chat_template="chatml"))
    new = AutoModelForCausalLM.from_pretrained(model_dir)
    assert new.config.vocab_size == 320
    before, after = old.lm_head.weight, new.lm_head.weight
    assert torch.allclose(after[first], before[:first].mean(0), atol=1e-6)
    assert torch.equal(after[first + 2 :], before[first + 2 :])


def test_family_template_and_pad_token_are_kept_with_the_model(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "in", tied=True)
    wish = TokenizerSpec(chat_template="llama3", pad_token="<none>")
    model_dir, _ = bring_in(source, tmp_path, wish)
    chat = chat_format(model_dir)
    assert chat.tokenizer.pad_token == "<none>"
    assert chat.tokenizer.eos_token == "<|eot_id|>"
    assert chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "hi"}])) == (
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "stories260K-hd32"])
def test_real_llama_takes_a_new_template_and_says_the_same(
    real_data: Path, tmp_path: Path, name: str
) -> None:
    source = real_data / "models" / name
    wish = TokenizerSpec(pad_token="<unk>", chat_template="llama3")
    model_dir, card = bring_in(source, tmp_path, wish)
    assert not [line for line in card["lines"] if line["verdict"] == "fail"], card
    old = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    new = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    assert new.config.vocab_size == old.config.vocab_size + 3
    is_tied = old.config.tie_word_embeddings
    assert (new.lm_head.weight is new.get_input_embeddings().weight) is is_tied
    ids = torch.tensor([ChatFormat(AutoTokenizer.from_pretrained(source)).prompt_ids("Once upon")])
    with torch.no_grad():
        before, after = old(ids).logits, new(ids).logits
    # What it knew it still says: the logits of the old tokens are untouched.
    assert torch.allclose(after[..., : old.config.vocab_size], before, atol=1e-5)
    shutil.rmtree(model_dir)


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    # conftest.py has set the hub's own switches to offline.
    with pytest.raises(ArtifactError, match=r"someone/a-model: no such folder.*use its folder"):
        bring_in(Path("someone/a-model"), tmp_path, TokenizerSpec())


def test_base_stage_stops_at_a_template_without_a_stop_and_keeps_the_appended_one(
    tmp_path: Path,
) -> None:
    source = saved_model(tmp_path / "in", tied=True)
    template = tmp_path / "own.jinja"
    template.write_text(NO_STOP)
    wish = TokenizerSpec(pad_token="<pad>", chat_template=str(template))
    with pytest.raises(DataError, match=r"without a stop token.*append_stop: true"):
        bring_in(source, tmp_path / "without", wish)
    wish = wish.model_copy(update={"append_stop": True})
    model_dir, card = bring_in(source, tmp_path / "with", wish)
    assert {line["verdict"] for line in card["lines"]} == {"ok"}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.apply_chat_template(said, tokenize=False) == "user: q\nassistant: a</s>\n"


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../nowhere", "runs/x/base/model"])
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(path: str):
    asked = False
    with (
        pytest.raises(ArtifactError, match=r"no such folder\. Correct the path"),
        bringing_in(path),
    ):
        asked = True
    assert not asked


@pytest.mark.parametrize(("tied", "lacking"), [(True, 1), (False, 40)])
def test_a_tokenizer_with_more_words_than_the_model_is_refused(
    tmp_path: Path, tied: bool, lacking: int
) -> None:
    byte_tokenizer(None, markers=()).save_pretrained(tmp_path / "sized")
    words = AutoTokenizer.from_pretrained(tmp_path / "sized")
    number = len(words.get_vocab().keys() - words.get_added_vocab().keys())
    last = 1 + max(i for t, i in words.get_vocab().items() if t not in words.get_added_vocab())
    assert lacking < number
    source = saved_model(tmp_path / "in", tied=tied, rows=last - lacking)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (source / "generation_config.json").unlink()
    with pytest.raises(ArtifactError, match=f"has {lacking} tokens without an embedding"):
        bring_in(source, tmp_path, TokenizerSpec(chat_template="chatml"))


def test_added_tokens_without_an_embedding_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = saved_model(tmp_path / "in", tied=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    number = len(tokenizer)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(source)
    bring_in(source, tmp_path, TokenizerSpec(chat_template="chatml"))
    (said,) = [r.getMessage() for r in caplog.records if "new ones begin as the mean" in r.message]
    assert f"none for <call> ({number})" in said
    assert "im_start" not in said
