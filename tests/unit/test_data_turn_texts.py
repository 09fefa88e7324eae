"""Turns written as text, as CSV files have them, are turns and never the text of a response."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.load import load_examples
from align.recipe.schema import DataSpec

ASKED = [{"role": "user", "content": 'Say "hi" — it\'s ok'}]
SAID = [{"role": "assistant", "content": "Hi, [it's] {ok}\n"}]
OTHER = [{"role": "assistant", "content": "no"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("sft", {"messages": ASKED + SAID}),
    "sharegpt": ("sft", {"conversations": SHAREGPT}),
    "prompt and completion": ("sft", {"prompt": ASKED, "completion": SAID}),
    "pairs": ("preference", {"prompt": ASKED, "chosen": SAID, "rejected": OTHER}),
    "implicit prompt": ("preference", {"chosen": ASKED + SAID, "rejected": ASKED + OTHER}),
    "prompts": ("prompts", {"prompt": ASKED, "answer": "hi"}),
}


def loaded(path: Path, kind: Any) -> list[Example]:
    return load_examples([DataSpec(path=str(path))], kind=kind, seed=0)


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "literal"])
@pytest.mark.parametrize("name", ROWS)
def test_turns_in_a_csv_file_are_those_of_a_json_file(name: str, write: Any, tmp_path: Path):
    kind, row = ROWS[name]
    plain, texts = tmp_path / "a.jsonl", tmp_path / "a.csv"
    plain.write_text(json.dumps(row) + "\n")
    with texts.open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(row)
        table.writerow([write(v) if isinstance(v, list) else v for v in row.values()])
    (one,), (two,) = loaded(plain, kind), loaded(texts, kind)
    assert (one.prompt, one.completion, one.rejected) == (two.prompt, two.completion, two.rejected)
    assert isinstance(two.completion or two.prompt, list)


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",  # numpy
        '[{"role": "user", "content": "cut',
        "[{'role': open('x').read(), 'content': 'b'}]",
    ],
)
@pytest.mark.parametrize("field", ["chosen", "messages"])
def test_turns_that_cannot_be_parsed_are_refused(text: str, field: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "q", "chosen": text, "rejected": "r"} if field == "chosen" else {field: text}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"jsonl:1: {field}: .*neither JSON nor a Python literal"):
        loaded(path, "preference" if field == "chosen" else "sft")


@pytest.mark.parametrize("text", ["[1, 2]", '["role", "content"]', "{'role': 'x'}", "[{...}]"])
def test_other_texts_with_brackets_stay_texts(text: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": text}) + "\n")
    assert loaded(path, "sft")[0].completion == text
