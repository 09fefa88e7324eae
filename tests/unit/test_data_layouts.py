"""Layouts that users bring: what the row means is what is trained, or one line says why not."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.recipe.schema import DataSpec

SYSTEM = {"role": "system", "content": "S"}
U, A, B = (
    {"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Look outside.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


def one(row: dict[str, Any], kind: Any) -> Example:
    (example,) = to_examples(row, kind=kind, format="auto", source="f:1")
    return example


@pytest.mark.parametrize(
    "schema",
    [
        TOOL,
        FUNCTION,
        {"type": "function", **FUNCTION},
        {"name": "weather", "description": "Look outside.", "input_schema": PARAMETERS},
        json.dumps(TOOL),
    ],
    ids=["chat completions", "bare", "responses", "anthropic", "json"],
)
def test_schema_of_a_tool_in_every_layout_is_the_one_that_templates_expect(schema: Any) -> None:
    assert list(one({"messages": [U, A], "tools": [schema]}, "sft").tools) == [TOOL]


def test_tools_in_the_input_of_openai_pairs_are_kept() -> None:
    given = {"messages": [U], "tools": [TOOL], "parallel_tool_calls": True}
    row = {"input": given, "preferred_output": [A], "non_preferred_output": [B]}
    pair = one(row, "preference")
    assert list(pair.tools) == [TOOL]
    assert (pair.prompt, pair.completion, pair.rejected) == ([U], [A], [B])
    row["input"] = {**given, "instructions": "Be brief."}
    with pytest.raises(DataError, match=r"f:1: input.instructions: 'Be brief.' would be dropped"):
        one(row, "preference")


PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("instruction", "output"),
]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (0, False), (1.0, True), ("1", True), ("False", False)],
)
def test_rated_answer_is_never_trained_as_if_it_were_good(names, label, good) -> None:
    row = {names[0]: "Q", names[1]: "A", "label": label}
    rated = one(row, "unpaired")
    assert rated.label is good
    texts = [part if isinstance(part, str) else part[0]["content"] for part in (rated.prompt,)]
    assert texts == ["Q"]
    with pytest.raises(DataError, match="unpaired data, but the stage needs sft"):
        one(row, "sft")
    assert one(row, "prompts").columns["label"] == label


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", None])
def test_label_that_is_no_rating_is_a_column_or_refused(label: object) -> None:
    if label is not None:
        assert one({"question": "Q", "answer": "A", "label": label}, "sft").label is None
    with pytest.raises(DataError, match="label: expected true or false"):
        one({"prompt": "Q", "completion": "A", "label": label}, "unpaired")


@pytest.mark.parametrize("names", [("question", "answer"), ("problem", "answer")])
@pytest.mark.parametrize("answer", [72, 7.5, True, ["Paris", "paris"], {"value": 3}, None])
def test_answer_for_a_reward_may_be_of_any_type(names: tuple[str, str], answer: object) -> None:
    example = one({names[0]: "Q", names[1]: answer}, "prompts")
    assert example.prompt == [U]
    assert example.columns[names[1]] == answer


def test_text_answers_still_give_the_final_answer_and_the_reference() -> None:
    example = one({"problem": "Q", "answer": "2 + 2 = 4\n#### 4"}, "prompts")
    assert example.columns["answer"] == "4"
    assert example.columns["reference"] == "2 + 2 = 4\n#### 4"


@pytest.mark.parametrize("label", [1, True, "true"])
@pytest.mark.parametrize("answer", ["2 + 2 = 4\n#### 4", 4])
def test_answer_that_is_rated_good_is_the_column_that_it_is_without_a_rating(label, answer) -> None:
    row = {"problem": "Q", "answer": answer}
    plain, rated = one(row, "prompts"), one({**row, "label": label}, "prompts")
    assert rated.prompt == plain.prompt == [U]
    assert rated.columns == {**plain.columns, "label": label}
    assert str(rated.columns["answer"]) == "4"


@pytest.mark.parametrize("answer", ["2 + 2 = 5\n#### 5", 5])
def test_answer_that_is_rated_bad_is_no_answer_for_a_reward(answer: object) -> None:
    example = one({"problem": "Q", "answer": answer, "label": 0}, "prompts")
    assert (example.prompt, example.columns) == ([U], {"label": 0})


def test_prompt_beside_whole_conversations_keeps_the_turns_before_it() -> None:
    row = {"prompt": "Q", "chosen": [SYSTEM, U, A], "rejected": [SYSTEM, U, B]}
    pair = one(row, "preference")
    assert (pair.prompt, pair.completion, pair.rejected) == ([SYSTEM, U], [A], [B])
    earlier = {"role": "user", "content": "Before"}
    row = {"prompt": [U], "chosen": [earlier, B, U, A], "rejected": [earlier, B, U, B]}
    assert one(row, "preference").prompt == [earlier, B, U]
    for other in ([SYSTEM, earlier, A], [{**SYSTEM, "content": "T"}, U, A]):
        with pytest.raises(DataError, match="begin neither with the prompt nor a response"):
            one({"prompt": "Q", "chosen": other, "rejected": [SYSTEM, U, B]}, "preference")


def test_dialogues_of_windows_files_are_dialogues() -> None:
    unix = {
        s: f"\n\nHuman: Q\n\nAssistant: {t}\nB" for s, t in (("chosen", "A"), ("rejected", "C"))
    }
    windows = {side: text.replace("\n", "\r\n") for side, text in unix.items()}
    assert one(windows, "preference") == one(unix, "preference")
    assert one(unix, "preference").prompt == [U]


@pytest.mark.parametrize("key", ["cot", "rationale", "thoughts"])
def test_thoughts_beside_an_answer_are_not_dropped(key: str) -> None:
    row = {"question": "Q", key: "because", "answer": "A"}
    with pytest.raises(DataError, match=rf"rename: {{{key}: reasoning_content}}"):
        one(row, "sft")
    assert one(row, "prompts").columns[key] == "because"


def test_labels_of_steps_may_be_numbers() -> None:
    row = {"prompt": "Q", "completions": ["a", "b"], "labels": [1, 0]}
    assert one(row, "steps").columns["step_labels"] == [True, False]


def test_rating_that_makes_0_neutral_ends_the_file_that_has_it_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "prm.jsonl"
    ratings = [[1, 0]] * 8 + [[1, -1]]
    rows = [
        {"prompt": f"Q{i}", "completions": ["a", "b"], "labels": r} for i, r in enumerate(ratings)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(path=str(path), rows=1)
    with pytest.raises(DataError, match=r"prm.jsonl:9: steps\[1\]: .*found -1.*0 is not false"):
        load_examples([spec], kind="steps", seed=0)


def row_of(text: str) -> str:
    return json.dumps({"messages": [{**U, "content": text}, A]}) + "\n"


def prompts_in(path: Path, **options: Any) -> list[str]:
    specs = [DataSpec(path=str(path), **options)]
    return [
        example.completion[0]["content"] for example in load_examples(specs, kind="sft", seed=0)
    ]


def test_card_that_names_folders_gives_the_rows_of_the_chosen_one(tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(row_of(name))
    (tmp_path / "de" / "test.jsonl").write_text(row_of("held out"))
    configs = "configs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: de\n"
    configs += "- config_name: one\n  data_dir: de\n  data_files: test.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{configs}---\n")
    with pytest.raises(DataError, match="it has the configurations en, de, one; choose one"):
        prompts_in(tmp_path)
    assert prompts_in(tmp_path, config="en") == ["en"]
    with pytest.raises(DataError, match="has the splits test, train, which are never joined"):
        prompts_in(tmp_path, config="de")
    assert prompts_in(tmp_path, config="de", split="train") == ["de"]
    assert prompts_in(tmp_path, config="one") == ["held out"]


@pytest.mark.parametrize("suffix", ["zst", "bz2", "xz"])
def test_packed_shard_is_named_and_not_left_out(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(row_of("a"))
    packed = tmp_path / f"b.jsonl.{suffix}"
    packed.write_bytes(b"x")
    for path in (tmp_path, packed):
        with pytest.raises(DataError, match=rf"b.jsonl.{suffix}: a packed file. Decompress it"):
            prompts_in(path)
    packed.with_suffix("").write_text(row_of("b"))
    assert prompts_in(tmp_path) == ["a", "b"]


def test_rows_in_a_txt_file_are_not_trained_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(row_of("a") + row_of("b"))
    with pytest.raises(DataError, match=r"rows.txt:1: rows of JSON Lines.*Rename the file to"):
        prompts_in(path)
    path.write_text('{"level": "info"}\n{"level": "debug"}\n')
    assert len(load_examples([DataSpec(path=str(path))], kind="corpus", seed=0)) == 1
