"""A file that cannot be trained on is refused before its job, with its line and the API's names."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.load import read_examples
from align.recipe.schema import DataSpec
from align.serve.finetuning.training_files import (
    READ_AS,
    InvalidFileError,
    as_asked,
    check_files,
)
from tests.serve.tiny_model import DPO, REINFORCEMENT, SUPERVISED, jsonl, reply, user

ROWS = {"supervised": SUPERVISED, "dpo": DPO, "reinforcement": REINFORCEMENT}


def checked(folder: Path, method: str, content: bytes) -> int:
    """Check a file as the queue does; return the number of its rows, which its stage can read."""
    source, target = folder / "source.jsonl", folder / "training.jsonl"
    source.write_bytes(content)
    count = check_files({"training": source}, folder, method)["training"]
    read = read_examples(DataSpec(path=str(target)), kind=READ_AS[method][0], seed=0)
    assert [example.source.rpartition(":")[2] for example in read] == [
        str(line) for line, text in enumerate(content.split(b"\n"), start=1) if text.strip()
    ]
    return count


@pytest.mark.parametrize("method", ROWS)
def test_blank_lines_a_byte_order_mark_and_other_line_ends_are_no_mistakes(
    tmp_path: Path, method: str
):
    lines = jsonl(ROWS[method]).replace(b"\n", b"\r\n\r\n")
    assert checked(tmp_path, method, b"\xef\xbb\xbf" + lines) == 12


NUL, HALF = "a\0b", "\ud83d"


def said(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def pair(chosen: Any, rejected: Any, *asked: Any) -> dict[str, Any]:
    return {
        "input": {"messages": list(asked) or [user("q")]},
        "preferred_output": [chosen],
        "non_preferred_output": [rejected],
    }


@pytest.mark.parametrize(
    ("method", "row", "told"),
    [
        ("supervised", said(user(NUL), reply("x")), "messages[0]: a NUL character at 1"),
        ("supervised", said(user("q"), reply("  ")), "messages[1]: the content of the assistant"),
        ("supervised", said(user("q"), reply(HALF)), "messages[1]: half of a surrogate pair"),
        ("supervised", said(reply("x")), "an assistant turn before any user turn"),
        ("dpo", pair(reply("a"), reply(NUL)), "non_preferred_output[0]: a NUL character"),
        ("dpo", pair(reply(""), reply("a")), "preferred_output[0]: the content"),
        ("dpo", pair(reply("b"), reply("a"), user(NUL)), "input.messages[0]: a NUL"),
        ("reinforcement", said(user(NUL)), "messages[0]: a NUL character"),
        ("reinforcement", said(user("")), "messages[0]: the content of the user is empty"),
    ],
)
def test_what_the_stage_would_refuse_is_named_by_its_line_and_key(
    tmp_path: Path, method: str, row: dict[str, Any], told: str
):
    rows: list[Any] = [*ROWS[method]]
    rows[6] = row
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, "")  # a blank line counts, so that editors find the row
    with pytest.raises(InvalidFileError) as error:
        checked(tmp_path, method, "\n".join(lines).encode())
    assert str(error.value).startswith("training_file: line 8: ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"messages": [', "truncated JSON: Expecting value. Write one JSON object per line"),
        (b"[1]", "expected an object with named fields"),
        (b'{"messages": "\xff"}', "byte 0xff is not UTF-8"),
        (b'{"messages": [], "messages": []}', "key 'messages' appears twice"),
        (b"[" * 10**5, "lists and objects nested more than 100 deep"),
        (b'"' + b"a" * 2**22 + b'"', "longer than 4194304 bytes"),
        (b'{"prompt": "a", "completion": "b"}', "'messages'"),
    ],
)
@pytest.mark.parametrize("method", ["supervised", "reinforcement"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, method: str, text: bytes, told: str):
    lines = jsonl(ROWS[method]).splitlines()
    with pytest.raises(InvalidFileError) as error:
        checked(tmp_path, method, b"\n".join([*lines[:3], b"", text, *lines[4:]]))
    assert str(error.value).startswith("training_file: line 5: ")
    assert told in str(error.value)


def test_the_first_wrong_line_counts_whichever_rule_it_breaks(tmp_path: Path):
    # Line 3 breaks a rule of the stage and line 5 one of the API.
    rows: list[Any] = [*SUPERVISED]
    rows[2], rows[4] = said(user(NUL), reply("x")), {"text": "no messages"}
    with pytest.raises(InvalidFileError, match="line 3: messages"):
        checked(tmp_path, "supervised", jsonl(rows))
    rows[1], rows[2] = rows[4], rows[1]
    with pytest.raises(InvalidFileError, match="line 2: 'messages' is missing"):
        checked(tmp_path, "supervised", jsonl(rows))


def test_half_of_a_surrogate_pair_in_an_item_is_refused(tmp_path: Path):
    rows = [{**row} for row in REINFORCEMENT]
    rows[3]["reference_answer"] = HALF
    with pytest.raises(InvalidFileError, match="line 4: half of a surrogate pair"):
        checked(tmp_path, "reinforcement", "\n".join(map(json.dumps, rows)).encode())


def test_rows_of_no_weight_are_not_counted(tmp_path: Path):
    rows = [{**row, "weight": 0.0} for row in SUPERVISED]
    with pytest.raises(InvalidFileError, match="found 0 examples, expected at least 10"):
        checked(tmp_path, "supervised", jsonl(rows))


@pytest.mark.parametrize("method", ROWS)
def test_a_question_of_the_training_file_does_not_validate(tmp_path: Path, method: str):
    sources = {part: tmp_path / f"{part}-source.jsonl" for part in ("training", "validation")}
    sources["training"].write_bytes(jsonl(ROWS[method][:10]))
    sources["validation"].write_bytes(jsonl(ROWS[method][9:]))
    with pytest.raises(InvalidFileError, match=r"line 1: .* line 10 of training_file") as error:
        check_files(sources, tmp_path, method)
    assert error.value.param == "validation_file"
    assert str(error.value).startswith("validation_file: line 1: ")
    sources["validation"].write_bytes(jsonl(ROWS[method][10:]))
    (tmp_path / "job").mkdir()
    assert check_files(sources, tmp_path / "job", method) == {"training": 10, "validation": 2}


def test_a_wrong_validation_file_is_named_before_the_training_file(tmp_path: Path):
    sources = {part: tmp_path / f"{part}-source.jsonl" for part in ("training", "validation")}
    for path in sources.values():
        path.write_bytes(b"no JSON\n")
    with pytest.raises(InvalidFileError, match=r"^validation_file: line 1: ") as error:
        check_files(sources, tmp_path, "dpo")
    assert error.value.param == "validation_file"


def test_what_a_run_says_about_a_file_is_told_with_the_name_of_the_api(tmp_path: Path):
    place = f"{tmp_path.resolve()}/"
    told = f"{place}validation.jsonl:7: no role\n{place}training.jsonl: 2 rows"
    assert as_asked(told, tmp_path) == (
        "validation_file: line 7: no role\ntraining_file: 2 rows",
        "validation_file",
    )
    assert as_asked("grpo: out of memory", tmp_path) == ("grpo: out of memory", None)
