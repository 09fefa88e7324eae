"""A tokenizer that transformers reads as another class and without a vocabulary is refused."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import ArtifactError
from align.models.bringing import check_encodes
from align.models.loading import load_tokenizer


def test_a_tokenizer_without_a_vocabulary_is_refused_in_one_line(tmp_path: Path) -> None:
    """A byte-level tokenizer has no files, and the type of the model names another class."""
    ByT5Tokenizer().save_pretrained(tmp_path)
    Qwen2Config(vocab_size=400).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Hello", add_special_tokens=False)["input_ids"] == []
    with pytest.raises(ArtifactError, match="makes no tokens of the text 'Hello'") as error:
        check_encodes(str(tmp_path), tokenizer)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_tokenizer_without_merges_encodes(tmp_path: Path) -> None:
    byte_tokenizer(None).save_pretrained(tmp_path)
    Qwen2Config(vocab_size=400).save_pretrained(tmp_path)
    check_encodes(str(tmp_path), load_tokenizer(tmp_path))


def test_a_tokenizer_of_other_words_is_accepted() -> None:
    """Without an unknown token it refuses the words that it does not know."""
    core = Tokenizer(models.WordLevel({"red": 0, "blue": 1}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(Exception, match="UNK"):
        tokenizer("Hello")
    check_encodes("here", tokenizer)


@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_a_tokenizer_that_merges_at_random_is_refused(dropout: float) -> None:
    vocab = {"a": 0, "b": 1, "ab": 2}
    core = Tokenizer(models.BPE(vocab, [("a", "b")], dropout=dropout))
    with pytest.raises(
        ArtifactError, match=rf"here: .*model.dropout {dropout:g}.*set dropout to null"
    ):
        check_encodes("here", PreTrainedTokenizerFast(tokenizer_object=core))
    for none in (None, 0.0):
        core = Tokenizer(models.BPE(vocab, [("a", "b")], dropout=none))
        check_encodes("here", PreTrainedTokenizerFast(tokenizer_object=core))
