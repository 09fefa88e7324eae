"""Rows of public data sets whose layout would lose text: read as they are meant, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind


def read(row: dict[str, Any], kind: Kind = "sft") -> Example:
    (example,) = to_examples(row, kind=kind, format="auto", source="f.jsonl:1")
    return example


def load(folder: Path, text: str, kind: Kind = "sft", name: str = "d.csv") -> list[Example]:
    (folder / name).write_text(text)
    return load_examples([DataSpec(path=str(folder / name))], kind=kind, seed=0)


@pytest.mark.parametrize(
    "row",
    [
        {"message_id": "2", "parent_id": "1", "text": "Yo", "role": "assistant"},
        {"conversation_id": 7, "turn": 0, "role": "User", "content": "Hi"},
        {"role": "prompter", "text": "Hi", "lang": "en"},
        {"from": "gpt", "value": "Yo"},
        {"from": "human", "text": "Hi", "id": 3},
    ],
)
@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_a_row_of_one_turn_is_refused_and_never_trained_as_text(
    row: dict[str, Any], kind: Kind
) -> None:
    with pytest.raises(DataError, match="the row is one turn") as error:
        read(row, kind)
    assert "messages" in str(error.value)


@pytest.mark.parametrize("role", ["doctor", 3, None])
def test_a_role_that_names_no_speaker_is_a_column_of_plain_text(role: object) -> None:
    assert read({"text": "A paragraph.", "role": role}).completion == "A paragraph."


@pytest.mark.parametrize(
    "key",
    ["summary", "highlights", "target", "translation", "Reply", "answer", "answers", "solution"],
)
def test_plain_text_with_its_answer_beside_it_is_refused_with_the_way_to_train_it(key: str) -> None:
    row = {"text": "A long article.", key: "Short."}
    with pytest.raises(DataError, match=rf"rename: \{{text: prompt, {key}: completion\}}"):
        read(row)
    renamed = read({"prompt": row["text"], "completion": row[key]})
    assert (renamed.prompt, renamed.completion) == ("A long article.", "Short.")


@pytest.mark.parametrize("more", [{"title": "T", "url": "u"}, {"summary": ""}, {"target": None}])
def test_plain_text_keeps_columns_that_answer_nothing(more: dict[str, Any]) -> None:
    assert read({"text": "A paragraph."} | more).completion == "A paragraph."


def test_an_answer_beside_a_conversation_stays_the_column_of_a_reward() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert read({"messages": turns, "answer": "7", "target": "x"}).columns["answer"] == "7"


def test_the_end_of_a_text_with_a_gap_is_not_dropped() -> None:
    with pytest.raises(DataError, match="suffix: 'return x' would be dropped"):
        read({"prompt": "def f(x):", "completion": "x += 1", "suffix": "return x"})


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("", ["0", "1"]),
        ("Unnamed: 0", ["0", "1"]),
        ("Unnamed: 0.1,Unnamed: 0", ["0,0", "1,1"]),
        ("__index_level_0__", ["10.0", "11.0"]),
        ("Unnamed: 2", ["", ""]),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_row_numbers_of_pandas_are_no_column(
    header: str, cells: list[str], kind: Kind, tmp_path: Path
) -> None:
    lines = "".join(f"{cell},q{i},a{i}\n" for i, cell in enumerate(cells))
    found = load(tmp_path, f"{header},prompt,completion\n{lines}", kind)
    assert [e.prompt for e in found] == ["q0", "q1"]
    expected = {} if kind == "sft" else {"reference": "a0"}
    assert dict(found[0].columns) == expected


def test_an_empty_cell_after_the_last_comma_is_no_column(tmp_path: Path) -> None:
    (found,) = load(tmp_path, "prompt,completion,\nq,a,\n")
    assert dict(found.columns) == {}


def test_text_in_a_column_without_a_name_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.csv:3: a column without a name.*'More text'"):
        load(tmp_path, "prompt,completion,\nq,a,\nr,b,More text\n")


@pytest.mark.parametrize(
    ("field", "columns"),
    [
        ("messages", {"role": ["user", "assistant"], "content": ["Q", "A"]}),
        ("messages", {"role": ["user", "assistant"], "content": ["Q", "A"], "name": None}),
        ("conversations", {"from": ["human", "gpt"], "value": ["Q", "A"]}),
        ("messages", {"content": ["Q", "A"], "role": ["user", "assistant"], "weight": [0, 1]}),
    ],
)
def test_turns_as_columns_are_read_as_turns(field: str, columns: dict[str, Any]) -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert read({field: columns}).completion == said
    text = json.dumps({field: columns})
    assert read(json.loads(text)).completion == said


@pytest.mark.parametrize("content", [["Q"], ["Q", "A", "More"], "Q"])
def test_turns_as_columns_of_different_lengths_are_refused(content: object) -> None:
    with pytest.raises(DataError, match=r"objects as columns .* differ in length"):
        read({"messages": {"role": ["user", "assistant"], "content": content}})


@pytest.mark.parametrize(
    ("row", "near"),
    [
        (
            {"INSTRUCTION": "I", "RESPONSE": "Y"},
            "rename: {INSTRUCTION: instruction, RESPONSE: response}",
        ),
        ({"Instructions": "I", "Outputs": "Y"}, "did you mean 'output'"),
    ],
)
def test_names_in_other_letters_are_recognized_in_the_error(row: dict[str, Any], near: str) -> None:
    with pytest.raises(DataError, match=near):
        read(row)
