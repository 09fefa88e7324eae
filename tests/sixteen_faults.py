"""The 16 data faults that a trainer was once given: half of them trained without a word.

Each is one file of rows for a stage; the row at fault, or the first of them, stands at ``line``.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.fault_corpus import Row, clean_rows

NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A chat template that ends no turn in a stop token."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Hold one fault: rows, the stage that reads them, and where it must be found."""

    kind: str
    rows: list[Row]
    line: int = 5
    stage: str = "sft"
    template: str | None = None
    max_length: int = 512
    in_rows: bool = True
    """Whether the row itself is at fault, and not what a model makes of it."""


def _at(line: int, kind: str, change: Callable[[Row], Any]) -> list[Row]:
    rows = copy.deepcopy(clean_rows(kind))
    change(rows[line - 1])
    return rows


def _sft(change: Callable[[Row], Any]) -> Fault:
    return Fault("sft", _at(5, "sft", change))


def _answer(**turn: object) -> Fault:
    return _sft(lambda row: row["messages"][1].update(turn))


def _pair(change: Callable[[Row], Any]) -> Fault:
    return Fault("preference", _at(5, "preference", change), stage="dpo")


def _misspelt(row: Row) -> None:
    turn = row["messages"][1]
    turn["contents"] = turn.pop("content")


LONG = [{"prompt": f"q{i}", "completion": "a b c " * (100 if i else 1)} for i in range(8)]

SIXTEEN: dict[str, Fault] = {
    # These eight trained silently.
    "key contents": _sft(_misspelt),
    "role bot": _answer(role="bot"),
    "no assistant turn": _sft(lambda row: row["messages"].pop()),
    "empty assistant": _answer(content=""),
    "content None": _answer(content=None),
    "template without a stop": Fault(
        "sft", clean_rows("sft"), line=1, template=NO_STOP, in_rows=False
    ),
    "chosen equal to rejected": _pair(lambda row: row.update(rejected=row["chosen"])),
    "7 of 8 rows lost": Fault("sft", LONG, line=2, max_length=50, in_rows=False),
    # These eight ended in an error that named no row.
    "content a number": _answer(content=3),
    "an image part": _answer(content=[{"type": "image"}]),
    "messages a text": _sft(lambda row: row.update(messages="hello")),
    "messages missing": _sft(lambda row: row.pop("messages")),
    "answer before question": _sft(lambda row: row["messages"].reverse()),
    "half a surrogate pair": _answer(content="\ud83d"),
    "chosen misspelt": _pair(lambda row: row.update(choosen=row.pop("chosen"))),
    "rejected null": _pair(lambda row: row.update(rejected=None)),
}
