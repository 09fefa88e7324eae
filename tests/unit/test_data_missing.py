"""Missing values that a table or a program wrote as text are not trained as text."""

import logging
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.check.run import Request, check_data
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind

U, A = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A")))
NEVER = ["nan", "NaN", " NAN\n", "<NA>", "#N/A", "#VALUE!", r"\N", "[object Object]"]
PERHAPS = ["None", "NA", "n/a", "null", "undefined"]
INVISIBLE = ["\u200b", "\ufeff", "\u00ad\u2060", "\x07", " \u200d\n"]
ROWS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "prompt": ("sft", {"prompt": "@", "completion": "A"}),
    "completion": ("sft", {"prompt": "Q", "completion": "@"}),
    "question": ("prompts", {"question": "@", "answer": "4"}),
    "chosen": ("preference", {"prompt": "Q", "chosen": "@", "rejected": "B"}),
    "rejected": ("preference", {"prompt": "Q", "chosen": "A", "rejected": "@"}),
    "rated": ("unpaired", {"prompt": "Q", "completion": "@", "label": True}),
    "user": ("sft", {"messages": [{**U, "content": "@"}, A]}),
    "assistant": ("sft", {"messages": [U, {**A, "content": "@"}]}),
    "input": ("sft", {"instruction": "Q", "input": "@", "output": "A"}),
    "instruction": ("sft", {"instruction": "@", "input": "I", "output": "A"}),
    "system": ("sft", {"system": "@", "messages": [U, A]}),
    "text": ("corpus", {"text": "@"}),
}
QUESTIONS = ("prompt", "question", "user", "input", "instruction", "system")


def filled(value: Any, word: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, word) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, word) for item in value]
    return word if value == "@" else value


def read(name: str, word: str) -> Example:
    kind, row = ROWS[name]
    (example,) = to_examples(filled(row, word), kind=kind, format="auto", source="a:7")
    return example


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("word", NEVER)
def test_missing_values_written_as_text_are_refused_in_every_field(name: str, word: str) -> None:
    with pytest.raises(DataError, match=r"a:7: .*missing value written as text") as refused:
        read(name, word)
    assert refused.value.code == "D054"
    read(name, f"What does {word} mean?")  # a text that contains the word says something


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("word", PERHAPS)
def test_words_that_may_be_meant_are_refused_as_questions_and_kept_as_responses(
    name: str, word: str
) -> None:
    if name in QUESTIONS:
        with pytest.raises(DataError, match=f"a:7: .*{word!r}, a missing value"):
            read(name, word)
    else:
        assert word in str(read(name, word))


@pytest.mark.parametrize("word", INVISIBLE)
@pytest.mark.parametrize("name", ["prompt", "completion", "user", "assistant", "chosen", "text"])
def test_text_without_a_visible_character_is_empty(name: str, word: str) -> None:
    with pytest.raises(DataError, match=r"a:7: .* is empty") as refused:
        read(name, word)
    assert refused.value.code == "D054"
    read(name, word + "\u4f60")


def test_a_later_turn_and_a_tool_may_say_such_a_word() -> None:
    turns = [U, A, {**U, "content": "None"}, A]
    (example,) = to_examples({"messages": turns}, kind="sft", format="auto", source="a:7")
    assert example.completion == turns
    called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    turns = [U, called, {"role": "tool", "content": "nan"}, A]
    (example,) = to_examples({"messages": turns}, kind="sft", format="auto", source="a:7")
    assert example.completion is not None


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_a_table_of_pandas_is_refused_at_its_lines(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "rows.csv"
    rows = ["instruction|input|output", "Q1||A1", "Q2|nan|A2", "nan||A3", "Q4||nan"]
    path.write_text("\n".join(rows).replace("|", separator))
    with pytest.raises(DataError) as refused:
        load_examples([DataSpec(path=str(path))], kind="sft", seed=0)
    places = [line.removeprefix(str(path))[:3] for line in str(refused.value).splitlines()]
    assert places == [":3:", ":4:", ":5:"]


def test_responses_that_may_be_missing_are_counted(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nQ1,A1\nQ2,None\nQ3,NA\nQ4,None\n")
    with caplog.at_level(logging.WARNING):
        assert len(load_examples([DataSpec(path=str(path))], kind="sft", seed=0)) == 4
    assert "responses that are only 'None' (2), 'NA' (1) are trained as such" in caplog.text
    assert check_data(Request(str(path), kind="sft")).tally.counts["D123"] == 3
