"""Faults that no single row shows: splits in a column, and pairs the wrong way round."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.check.run import Request, check_data
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind

ROWS: dict[Kind, dict[str, Any]] = {
    "sft": {"instruction": "Q", "output": "A"},
    "prompts": {"prompt": "Q"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "unpaired": {"prompt": "Q", "completion": "A", "label": True},
    "corpus": {"text": "Q"},
}


def load(folder: Path, rows: list[dict[str, Any]], kind: Kind, **options: Any) -> list[Example]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples([DataSpec(path=str(path), **options)], kind=kind, seed=0)


def codes_of(path: Path, kind: str) -> set[str]:
    return set(check_data(Request(str(path), kind=kind)).tally.counts)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("key", ["split", "Split", "partition"])
def test_splits_in_a_column_are_not_joined(tmp_path: Path, kind: Kind, key: str) -> None:
    rows = [{**ROWS[kind], key: name} for name in ("train", "valid", "Test", "train", None)]
    rows = [{k: f"{v} {i}" if v == "Q" else v for k, v in r.items()} for i, r in enumerate(rows)]
    for side in ("all", "train", "heldout"):  # also where a hash divides the rows
        with pytest.raises(DataError, match=f"{key}: .*splits test, train, validation, .*never"):
            load(tmp_path, rows, kind, split=side)
    assert "D013" in codes_of(tmp_path / "rows.jsonl", kind)
    # The key of the message uses all rows; so does a column with other values, or one split.
    assert len(load(tmp_path, rows, kind, rename={key: f"{key}_column"})) == 5
    assert len(load(tmp_path, [*rows, {**rows[0], key: "news"}], kind)) == 6
    assert "D013" not in codes_of(tmp_path / "rows.jsonl", kind)
    assert len(load(tmp_path, [rows[0], rows[3]], kind)) == 2
    assert "D013" not in codes_of(tmp_path / "rows.jsonl", kind)


SCORES = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("reward_chosen", "reward_rejected"),
]


def pairs(names: tuple[str, str], scores: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Q{i}", "chosen": "A", "rejected": "B", **dict(zip(names, both, strict=True))}
        for i, both in enumerate(scores)
    ]


@pytest.mark.parametrize("names", SCORES, ids="+".join)
@pytest.mark.parametrize("answers", [None, "chosen"])
def test_pairs_the_wrong_way_round_are_counted_and_refused_if_most_are(
    tmp_path: Path, caplog, names: tuple[str, str], answers: Any
) -> None:
    kind: Kind = "sft" if answers else "preference"
    some = pairs(names, [(5, 3), (4.5, 1), (2, 3), (3, 3)])
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, some, kind, answers=answers)) == 4
    assert "in 1 of 4 pairs, the rejected response has a higher score" in caplog.text
    assert "in 1 of 4 pairs, the rejected response has the same score" in caplog.text
    report = check_data(Request(str(tmp_path / "rows.jsonl"), kind="preference"))
    assert report.tally.counts["D077"] == 2
    assert "D079" not in report.tally.counts
    most = pairs(names, [(5, 3), (1, 3), (2, 3)])
    with pytest.raises(DataError, match="in 2 of 3 pairs, the rejected response has the higher"):
        load(tmp_path, most, kind, answers=answers)
    assert "D079" in codes_of(tmp_path / "rows.jsonl", "preference")
    swap = {"chosen": "rejected", "rejected": "chosen", names[0]: names[1], names[1]: names[0]}
    swapped = load(tmp_path, most, kind, answers=answers, rename=swap)
    assert {str(example.completion) for example in swapped} == {"B"}


def test_negative_margins_count_and_pairs_without_scores_do_not(tmp_path: Path) -> None:
    rows = [{**ROWS["preference"], "margin": -1.0}, ROWS["preference"]]
    assert len(load(tmp_path, rows, "preference")) == 2
    with pytest.raises(DataError, match="in 2 of 3 pairs"):
        load(tmp_path, [rows[0], *rows], "preference")


@pytest.mark.parametrize("key", ["is_safe", "solution_is_valid", "my own flag"])
@pytest.mark.parametrize("values", [(True, False), ("True", "false"), (1, 0), (1.0, 0.0)])
def test_a_column_that_may_rate_the_responses_is_counted_under_any_name(
    tmp_path: Path, caplog, key: str, values: tuple[object, object]
) -> None:
    yes, no = values
    rows = [{**ROWS["sft"], key: value} for value in (yes, no, no, None, yes)]
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, rows, "sft")) == 5
    assert f"{key}: false in 2 of 4 rows, all of which are trained" in caplog.text
    assert codes_of(tmp_path / "rows.jsonl", "sft") >= {"D084"}
    # The key of the message rates the rows.
    rated = load(tmp_path, [rows[0], rows[1]], "unpaired", rename={key: "label"})
    assert [example.label for example in rated] == [True, False]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("sft", (True, True)),
        ("sft", (1, 0, 2)),
        ("sft", (True, "unknown", False)),
        ("prompts", (True, False)),
        ("preference", (True, False)),
        ("corpus", (True, False)),
    ],
)
def test_columns_that_divide_no_responses_are_not_counted(
    tmp_path: Path, caplog, kind: Kind, values: tuple[object, ...]
) -> None:
    rows = [{**ROWS[kind], "flag": value} for value in values]
    with caplog.at_level(logging.WARNING):
        load(tmp_path, rows, kind)
    assert "flag" not in caplog.text
    assert "D084" not in codes_of(tmp_path / "rows.jsonl", kind)
