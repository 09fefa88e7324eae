"""A file that cannot be trained on is refused before its job, with its line and the API's names."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.serve.finetuning.training_files import (
    InvalidFileError,
    as_asked,
    check_apart,
    check_file,
    check_rows,
    write_prompts,
)
from tests.serve.tiny_model import DPO, REINFORCEMENT, SUPERVISED, jsonl, reply, user

ROWS = {"supervised": SUPERVISED, "dpo": DPO, "reinforcement": REINFORCEMENT}


def checked(folder: Path, method: str, content: bytes) -> int:
    """Check a file as the queue does; return the number of its rows."""
    source, target = folder / "source.jsonl", folder / "training.jsonl"
    source.write_bytes(content)
    count = check_file(source, method, minimum=10)
    if method == "reinforcement":
        write_prompts(source, target)
        source = target
    check_rows(source, method)
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
    assert str(error.value).startswith("line 8: ")
    assert told in str(error.value)


@pytest.mark.parametrize("method", ROWS)
def test_a_question_of_the_training_file_does_not_validate(tmp_path: Path, method: str):
    training, validation = tmp_path / "training.jsonl", tmp_path / "validation.jsonl"
    for path, rows in ((training, ROWS[method][:10]), (validation, ROWS[method][9:])):
        source = tmp_path / "source.jsonl"
        source.write_bytes(jsonl(rows))
        if method == "reinforcement":
            write_prompts(source, path)
        else:
            source.rename(path)
    with pytest.raises(InvalidFileError, match=r"line 1: .* line 10 of training_file") as error:
        check_apart(training, validation, method)
    assert error.value.param == "validation_file"
    lines = validation.read_text().splitlines(keepends=True)
    validation.write_text("".join(lines[1:]))
    check_apart(training, validation, method)


def test_what_a_run_says_about_a_file_is_told_with_the_name_of_the_api(tmp_path: Path):
    place = f"{tmp_path.resolve()}/"
    told = f"{place}validation.jsonl:7: no role\n{place}training.jsonl: 2 rows"
    assert as_asked(told, tmp_path) == (
        "validation_file: line 7: no role\ntraining_file: 2 rows",
        "validation_file",
    )
    assert as_asked("grpo: out of memory", tmp_path) == ("grpo: out of memory", None)
