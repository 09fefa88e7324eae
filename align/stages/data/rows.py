"""Shared parts of the data stages: reading and writing rows, scores, and the ledger."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.convert import extra_fields
from align.data.formats.questions import prompt_of
from align.data.split import split_key
from align.recipe.schema import RewardSpec
from align.stages.base import DATA_FILE, LEDGER_FILE, StageContext
from align.stages.rollouts import build_rewards
from reward_models.base import MissingColumnError, completion_text


class Ledger:
    """Record of every dropped row, with the reason."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, source: str, reason: str, **details: object) -> None:
        """Record one dropped row."""
        self.entries.append({"source": source, "reason": reason, **details})

    def counts(self) -> dict[str, int]:
        """Return the number of dropped rows by reason."""
        return dict(Counter(entry["reason"] for entry in self.entries))


def question(example: Example) -> str:
    """Return the first user message of a row."""
    return split_key(example)


def num_questions(example: Example) -> int:
    """Return the number of user turns of a row; a plain text prompt counts as one."""
    parts = [part for part in (example.prompt, example.completion) if not isinstance(part, str)]
    found = sum(turn["role"] == "user" for part in parts for turn in part or ())
    return found + isinstance(example.prompt, str)


def answer_text(example: Example) -> str:
    """Return the (chosen) response of a row as text; of a conversation, the last assistant turn."""
    assert example.completion is not None, example.source
    return completion_text(example.completion)


def texts_of(example: Example) -> list[str]:
    """Return the question of a row and its response or, of a pair, both."""
    rejected = [] if example.rejected is None else [completion_text(example.rejected)]
    return [question(example), answer_text(example), *rejected]


def to_row(example: Example) -> dict[str, Any]:
    """Return an example as a row in a format that every stage reads."""
    row = dict(example.columns)
    if example.rejected is not None:
        row |= {"prompt": example.prompt, "chosen": example.completion}
        row |= {"rejected": example.rejected}
        row |= {"margin": example.margin} if example.margin is not None else {}
    elif example.prompt:
        row |= {"prompt": example.prompt, "completion": example.completion}
    else:
        # Rows without a prompt are whole conversations or plain text.
        row["messages" if not isinstance(example.completion, str) else "text"] = example.completion
    row |= extra_fields(example)
    return {**row, "from": example.source}


def write_data(context: StageContext, rows: Iterable[Mapping[str, Any]], ledger: Ledger) -> int:
    """Write data.jsonl and ledger.jsonl, and return the number of rows.

    Raises:
        DataError: no row is left.
    """
    counted = _write_lines(context.out / DATA_FILE, rows)
    _write_lines(context.out / LEDGER_FILE, ledger.entries)
    if not counted:
        raise DataError(
            f"{context.name}: no row was kept (dropped: {ledger.counts() or 'none, no input'}). "
            f"See {context.out / LEDGER_FILE} for the reason of each row"
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
    *,
    specs: Sequence[RewardSpec],
    context: StageContext,
) -> dict[str, list[float | None]]:
    """Return the scores of responses to the examples' prompts: {reward name: one score per row}.

    Raises:
        DataError: the rows lack a column that a reward reads.
    """
    names = sorted({name for example in examples for name in example.columns})
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    prompts = [prompt_of(example) for example in examples]
    rewards = build_rewards(list(specs), context)
    try:
        return {r.name: r(prompts=prompts, completions=answers, **columns) for r in rewards}
    except MissingColumnError as error:
        raise DataError(f"{context.name}: {error}") from error
