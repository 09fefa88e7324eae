"""Templates of model families: masks of real conversations, stops, and what the stock ones do."""

import json
import re
import sys
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import DataError, RecipeError
from align.core.types import Example
from align.data.render import templates
from align.data.render.chat import ChatFormat, apply_tokenizer_spec
from align.recipe.schema import TokenizerSpec

STOCK = Path(trl.__file__).parent / "chat_templates"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [turn("user", "What is 6 x 7?"), turn("assistant", "42")],
    [
        turn("system", "Answer in one line."),
        turn("user", "What rhymes with 'day'?"),
        turn("assistant", "'say', and \"may\"."),
        turn("user", "One more?\nPlease."),
        turn("assistant", "  'naïve' does not;\n\n'play' does. 漢"),
        turn("user", "ok"),
        turn("assistant", "Good bye"),
    ],
]
# What a family writes between the header and the words of an answer; it is sampled, so trained.
BEFORE = {"qwen3": "<think>\n\n</think>\n\n", "gpt_oss": "<|channel|>final<|message|>"}
TRIMS = ("llama3", "gemma3")


def family_tokenizer(name: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer that has a BOS and an eos, but nothing of the family yet."""
    tokenizer = byte_tokenizer(None, bos=bos, markers=())
    added = apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template=name))
    assert set(added) == set(templates.FAMILIES[name].markers)
    return tokenizer


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one turn", "three turns"])
@pytest.mark.parametrize("name", templates.FAMILIES)
def test_family_trains_each_answer_with_its_stop_and_nothing_else(name: str, turns: list) -> None:
    tokenizer = family_tokenizer(name, bos=name in ("llama3", "gemma3"))
    chat = ChatFormat(tokenizer)
    row = chat.sft_row(Example(prompt=[], completion=turns))
    said = [t["content"] for t in turns if t["role"] == "assistant"]
    clean = (lambda x: x.strip()) if name in TRIMS else (lambda x: x)
    clean = (lambda x: x.lstrip("\n")) if name == "qwen3" else clean
    stop = templates.FAMILIES[name].stop or tokenizer.eos_token
    expected = "".join(BEFORE.get(name, "") + clean(text) + stop for text in said)
    trained = [i for i, t in zip(row.input_ids, row.trained, strict=True) if t]
    assert tokenizer.decode(trained) == expected
    # Turn by turn gives the text of the whole conversation.
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert list(row.input_ids).count(tokenizer.bos_token_id) <= 1
    # Generation starts from exactly the ids that training saw before the last answer.
    head = chat.prompt_ids(turns[:-1])
    assert tuple(head) == row.input_ids[: len(head)]
    assert row.trained[len(head)]


@pytest.mark.parametrize(
    "name", [n for n, f in templates.FAMILIES.items() if f.file and n != "gpt_oss"]
)
def test_mask_agrees_with_trls_generation_markers(name: str) -> None:
    # TRL's markers also take in the line break after the stop, which is not sampled.
    tokenizer = family_tokenizer(name, bos=name in ("llama3", "gemma3"))
    for turns in CONVERSATIONS:
        row = ChatFormat(tokenizer).sft_row(Example(prompt=[], completion=turns))
        theirs = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
        )
        assert list(row.input_ids) == theirs["input_ids"]
        line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
        different = [
            i
            for i, own, other in zip(
                row.input_ids, row.trained, theirs["assistant_masks"], strict=True
            )
            if bool(other) != own
        ]
        assert set(different) <= set(line_break)


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_stock_template_that_rewrites_names_those_that_do_not(name: str) -> None:
    text = (STOCK / f"{name}.jinja").read_text()
    markers = sorted(set(re.findall(r"<\|[a-z_]+\|>", text)))
    stop = "<|im_end|>" if name == "qwen3" else "<|return|>"
    chat = ChatFormat(byte_tokenizer(text, eos=stop, markers=markers))
    chat.sft_row(Example(prompt=[], completion=CONVERSATIONS[0]))
    with pytest.raises(DataError, match=r"rewrites earlier turns.*chat_template: plain, .*qwen3"):
        chat.sft_row(Example(prompt=[], completion=CONVERSATIONS[1]))


def test_no_family_writes_the_date() -> None:
    assert not [n for n in templates.FAMILIES if "strftime" in templates.template_text(n)]


def test_stop_token_beside_a_family_is_refused() -> None:
    spec = TokenizerSpec(chat_template="gemma3", stop_token="</s>")
    with pytest.raises(RecipeError, match="gemma3, whose turns end in '<end_of_turn>'"):
        apply_tokenizer_spec(byte_tokenizer(None), spec)


def test_template_of_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_trl_text", lambda file: "{{ messages }}")
    with pytest.raises(RecipeError, match=r"gpt_oss was written for trl 1\.16"):
        templates.template_text("gpt_oss")


def test_family_survives_saving(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("qwen3_instruct", bos=False)
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    example = Example(prompt=[], completion=CONVERSATIONS[1])
    assert ChatFormat(again).sft_row(example) == ChatFormat(tokenizer).sft_row(example)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
