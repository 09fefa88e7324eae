"""What the stages that make data share: rows in and out, scores of rows, and the ledger."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.convert import extra_fields
from align.data.split import split_key
from align.recipe.schema import RewardSpec
from align.stages.base import DATA_FILE, LEDGER_FILE, StageContext
from align.stages.rollouts import build_rewards
from reward_models.base import MissingColumnError, completion_text


class Ledger:
    """Note each row that leaves, with the reason."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, source: str, reason: str, **details: Any) -> None:
        """Note one row."""
        self.entries.append({"source": source, "reason": reason, **details})

    def counts(self) -> dict[str, int]:
        """Count the rows that left, by reason."""
        return dict(Counter(entry["reason"] for entry in self.entries))


def question(example: Example) -> str:
    """Give the first user message of a row."""
    return split_key(example)


def num_questions(example: Example) -> int:
    """Count the user's turns of a row; plain text is one."""
    parts = [part for part in (example.prompt, example.completion) if not isinstance(part, str)]
    found = sum(turn["role"] == "user" for part in parts for turn in part or ())
    return found + isinstance(example.prompt, str)


def answer_text(example: Example) -> str:
    """Give the (chosen) answer of a row: plain text or its last assistant turn."""
    assert example.completion is not None, example.source
    return completion_text(example.completion)


def to_row(example: Example) -> dict[str, Any]:
    """Write an example as a row of the formats that every stage reads."""
    row = dict(example.columns)
    if example.rejected is not None:
        row |= {"prompt": example.prompt, "chosen": example.completion}
        row |= {"rejected": example.rejected}
        row |= {"margin": example.margin} if example.margin is not None else {}
    elif example.prompt:
        row |= {"prompt": example.prompt, "completion": example.completion}
    else:
        row["messages" if not isinstance(example.completion, str) else "text"] = example.completion
    if example.label_prob != 1.0:
        row["label_prob"] = example.label_prob
    row |= extra_fields(example)
    return {**row, "from": example.source}


def write_data(context: StageContext, rows: Iterable[Mapping[str, Any]], ledger: Ledger) -> int:
    """Write data.jsonl and ledger.jsonl; give the number of rows.

    Raises:
        DataError: no row is left.
    """
    counted = _write_lines(context.out / DATA_FILE, rows)
    _write_lines(context.out / LEDGER_FILE, ledger.entries)
    if not counted:
        raise DataError(
            f"{context.name}: no row is left, {ledger.counts() or 'none came in'}; "
            f"{context.out / LEDGER_FILE} says why each one went"
        )
    return counted


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            count += 1
    return count


def score_rows(
    examples: Sequence[Example],
    answers: Sequence[Text],
    specs: Sequence[RewardSpec],
    context: StageContext,
) -> dict[str, list[float | None]]:
    """Score given answers to the examples' prompts: name of each reward to one score a row.

    Raises:
        DataError: the rows lack a column that a reward reads.
    """
    names = sorted({name for example in examples for name in example.columns})
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    prompts = [_asked(example) for example in examples]
    rewards = build_rewards(list(specs), context)
    try:
        return {r.name: r(prompts=prompts, completions=answers, **columns) for r in rewards}
    except MissingColumnError as error:
        raise DataError(f"{context.name}: {error}") from error


def _asked(example: Example) -> Text:
    if example.prompt or example.completion is None or isinstance(example.completion, str):
        return example.prompt
    turns = list(example.completion)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns
