"""Text of the question or the answer in a column is refused unless the example has it too."""

import json
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind

U, A = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A")))


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [
        ("sft", {"messages": [U, A], "prompt": "Another."}, "prompt"),
        ("sft", {"messages": [U, A], "response": "Another."}, "response"),
        ("sft", {"prompt": "Q", "completion": "A", "response": "Another."}, "response"),
        (
            "sft",
            {
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
                "instruction": "Another.",
            },
            "instruction",
        ),
        (
            "preference",
            {"prompt": "Q", "question": "Another.", "chosen": "A", "rejected": "B"},
            "question",
        ),
        (
            "unpaired",
            {"messages": [U, A], "label": True, "prompt": [{**U, "content": "Other"}]},
            "prompt",
        ),
    ],
)
def test_a_second_question_or_answer_is_refused_unless_it_repeats_the_first(
    kind: Any, row: dict, key: str
) -> None:
    with pytest.raises(DataError, match=f"a:7: {key}: .* would be dropped"):
        to_examples(row, kind=kind, format="auto", source="a:7")
    repeated = {**row, key: "A" if key == "response" else " Q\n"}
    (example,) = to_examples(repeated, kind=kind, format="auto", source="a:7")
    assert example.columns[key] == repeated[key]
    (example,) = to_examples(
        {**{k: v for k, v in row.items() if k != key}, f"{key}_column": "Another."},
        kind=kind,
        format="auto",
        source="a:7",
    )
    assert example.columns[f"{key}_column"] == "Another."


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": [U, A]}),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("unpaired", {"prompt": "Q", "completion": "A", "label": True}),
    ],
)
@pytest.mark.parametrize("key", ["passage", "Article", "sys", "instruction-system", "Persona"])
def test_a_part_of_the_question_in_a_column_is_refused_unless_it_repeats_the_text(
    kind: Any, row: dict, key: str
) -> None:
    for lost in ("qzxtext", ["Q", "qzxtext"], [{"content": "qzxtext"}]):
        with pytest.raises(DataError, match=f"a:7: {key}: 'qzxtext' would be dropped"):
            to_examples({**row, key: lost}, kind=kind, format="auto", source="a:7")
    for kept in ("Q", ["Q", "A"], 7):
        (example,) = to_examples({**row, key: kept}, kind=kind, format="auto", source="a:7")
        assert example.columns[key] == kept


def read(row: dict[str, Any], kind: Kind) -> Example:
    (example,) = to_examples(row, kind=kind, format="auto", source="a:7")
    return example


CHOICES = {"choices": ["Rome", "Oslo"]}
LETTERS = {"A": "Rome", "B": "Oslo"}
BENCHMARKS: dict[str, tuple[dict[str, Any], str]] = {
    "SQuAD": ({"question": "Who?", "context": "Ann did it.", "answer": "Ann"}, "context"),
    "BoolQ": ({"question": "Is it?", "passage": "It is so.", "answer": True}, "passage"),
    "MMLU": ({"question": "Where?", "subject": "geography", **CHOICES, "answer": 1}, "choices"),
    "MMLU, table": ({"question": "Where?", **LETTERS, "answer": "B"}, "A, B"),
    "numbers": ({"question": "How many?", "choices": [3, 4], "answer": 4}, "choices"),
    "ARC": (
        {"question": "Where?", "choices": {"text": ["Rome"], "label": ["A"]}, "answer": "A"},
        "choices",
    ),
    "MedQA": ({"question": "Where?", "options": LETTERS, "answer": "B"}, "options"),
    "SciQ": (
        {"question": "What?", "distractor1": "Ice", "support": "Water is.", "answer": "Water"},
        "distractor1, support",
    ),
    "RACE": (
        {"article": "Long.", "question": "Why?", "options": ["x1", "x2"], "answer": "A"},
        "article, options",
    ),
    "HotpotQA": (
        {"question": "Who?", "context": {"title": ["T"], "sentences": [["S"]]}, "answer": "yes"},
        "context",
    ),
    "SQL": ({"prompt": "Count.", "sql_context": "CREATE TABLE t", "answer": "SELECT 1"}, "sql_con"),
    "demonstrations": (
        {"prompt": "ox:", "demonstrations": [{"input": "cat", "output": "tac"}], "answer": "xo"},
        "demonstrations",
    ),
    "few-shot": ({"prompt": "ox:", "few_shot": ["cat: tac"], "answer": "xo"}, "few_shot"),
    "code": ({"prompt": "Solve.", "starter_code": "class S:", "tests": "x"}, "starter_code"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_question_that_needs_a_column_is_not_asked_without_it(name: str) -> None:
    row, lost = BENCHMARKS[name]
    with pytest.raises(DataError, match=f"a:7: {lost}.* would be dropped") as refused:
        read(row, "prompts")
    for key in lost.split(", "):
        if key in row:
            assert f"{key}: {key}_column" in str(refused.value)
    # The keys of the message keep the columns, on request.
    named = {f"{key}_column" if key in lost.split(", ") else key: row[key] for key in row}
    if lost in row or ", " in lost:
        assert read(named, "prompts").columns[f"{lost.split(', ')[0]}_column"] is not None


@pytest.mark.parametrize("key", ["privileged_context", "gold_passage", "Judge-Context"])
def test_columns_that_the_model_is_not_to_see_stay_columns(key: str) -> None:
    assert read({"prompt": "Where?", key: "Oslo"}, "prompts").columns[key] == "Oslo"
    with pytest.raises(DataError, match="wiki_context: 'Oslo' would be dropped"):
        read({"prompt": "Where?", "wiki_context": "Oslo"}, "prompts")


@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_passage_is_read_below_the_question_by_the_key_of_the_message(kind: Kind, tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Who?", "context": "Ann did.", "answer": "Ann"}))
    with pytest.raises(DataError, match=r"rename: \{context: input\}"):
        load_examples([DataSpec(path=str(path))], kind=kind, seed=0)
    spec = DataSpec(path=str(path), rename={"context": "input"})
    (example,) = load_examples([spec], kind=kind, seed=0)
    assert example.prompt == [{"role": "user", "content": "Who?\n\nAnn did."}]


def test_choices_that_the_prompt_says_stay_columns_for_the_rewards() -> None:
    prompt = "Where?\nA. Rome\nB. Oslo\nAnswer with a letter."
    for key, value in (("choices", ["Rome", "Oslo"]), ("options", LETTERS), ("A", "Rome")):
        row = {"prompt": prompt, key: value, "answer": "B"}
        assert read(row, "prompts").columns[key] == value
    # "no" is in "not", but is no choice that this prompt says; and the answer is not shown.
    row = {"prompt": "Is it not so? yes", "choices": ["yes", "no"], "answer": "no"}
    with pytest.raises(DataError, match="choices: 'no' would be dropped"):
        read(row, "prompts")
    with pytest.raises(DataError, match="context: 'Oslo' would be dropped"):
        read({"messages": [U, {**A, "content": "Oslo"}], "context": "Oslo"}, "prompts")


@pytest.mark.parametrize("value", [4, 0.5, True, None, "", [], "4"])
def test_columns_without_text_of_the_question_stay_columns(value: object) -> None:
    row = {"prompt": "Q", "num_documents": value, "context": value, "topic": value}
    assert read(row, "prompts").columns["topic"] == value


@pytest.mark.parametrize("key", ["label", "code"])
def test_text_is_not_trained_without_the_class_or_code_beside_it(key: str) -> None:
    row = {"text": "A good film.", key: "positive"}
    with pytest.raises(DataError, match=rf"rename: \{{text: prompt, {key}: completion\}}"):
        read(row, "sft")
    # A class number is no text, and plain text for pretraining may have any column.
    assert read({"text": "A good film.", "label": 1}, "sft").columns["label"] == 1
    assert read(row, "corpus").columns[key] == "positive"


def test_two_inputs_of_one_instruction_are_refused() -> None:
    row = {"instruction": "I", "input": "one", "context": "two", "response": "A"}
    with pytest.raises(DataError, match="a:7: input and context: one of the two would be dropped"):
        read(row, "sft")
    for key in ("input", "context"):
        (turn,) = read({**row, key: ""}, "sft").prompt
        assert not isinstance(turn, str)
        assert turn["content"] == f"I\n\n{row['context' if key == 'input' else 'input']}"
