"""Means, comparisons and bands from records whose numbers are known by hand."""

import json
from typing import Any

import pytest

from align.evaluation.compare import check_expectations
from align.evaluation.verdict import Judged, Responses, preferences_by_score, task_block


def _record(prompt: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "prompt_index": prompt,
        "sample_index": sample,
        "prompt": "?",
        "completion": "!",
        "scores": {"em": 1.0},
        "judge": 1.0,
        "length": 10,
        "repeats": 0.0,
        "kl": 0.5,
        "finish_reason": "stop",
        "group": None,
    }
    return {**record, **changes}


METRICS = ["win_rate", "em", "judge", "kl", "length", "stop_rate"]


def block_of(**models: list) -> dict[str, Any]:
    """Return the block of a task whose baseline is the last model."""
    baseline = list(models)[-1]
    judged = {
        name: Judged(preferences_by_score(rows, models[baseline]))
        for name, rows in models.items()
        if name != baseline
    }
    answered = {name: Responses(rows) for name, rows in models.items()}
    return task_block(answered, baseline=baseline, metrics=METRICS, judged=judged)


def test_block_gives_means_and_counts_what_is_invalid():
    records = [
        _record(0, scores={"em": 1.0}, length=4),
        _record(1, scores={"em": 0.0}, length=8, finish_reason="length"),
        _record(2, scores={"em": None}, judge=None, kl=None),
        _record(3, scores={"em": 1.0}, length=10, kl=2.0),
    ]
    block = block_of(m=records)
    found = block["models"]["m"]
    assert found["em"][0] == pytest.approx(2 / 3)  # (1 + 0 + 1) / 3, the None left out
    assert block["invalid"] == {"m": {"em": 1, "judge": 1, "kl": 1}}
    assert found["length"][0] == 8.0  # (4 + 8 + 10 + 10) / 4
    assert found["stop_rate"][0] == 0.75
    assert found["kl"][0] == 1.0  # (0.5 + 0.5 + 2) / 3
    assert found["em"][1] <= found["em"][0] <= found["em"][2]


def test_block_of_invalid_scores_only_is_null_and_valid_json():
    block = block_of(m=[_record(0, scores={"em": None}), _record(1, scores={"em": None})])
    assert block["models"]["m"]["em"] == [None, None, None]
    assert block["invalid"]["m"]["em"] == 2
    json.dumps(block, allow_nan=False)


def test_block_of_one_prompt_claims_no_interval():
    block = block_of(m=[_record(0, 0), _record(0, 1, scores={"em": 0.0})])
    assert block["models"]["m"]["em"] == [0.5, None, None]


def test_kl_that_was_not_measured_has_no_value_and_is_not_invalid():
    block = block_of(m=[_record(0, kl=None), _record(1, kl=None)])
    assert block["models"]["m"]["kl"] == [None, None, None]
    assert "invalid" not in block


def test_samples_of_one_prompt_are_not_independent_evidence():
    # Ten prompts, 50 identical samples each: as uncertain as ten samples.
    one = [_record(p, scores={"em": float(p % 2)}) for p in range(10)]
    many = [_record(p, s, scores={"em": float(p % 2)}) for p in range(10) for s in range(50)]
    found = [block_of(m=rows)["models"]["m"]["em"] for rows in (one, many)]
    assert found[1] == pytest.approx(found[0])


def test_comparison_pairs_by_place_whatever_the_order():
    a = [_record(p, judge=float(p), length=p) for p in range(6)]
    b = [_record(p, judge=2.0, length=2 * p) for p in reversed(range(6))]
    block = block_of(a=a, b=b)
    # a's judge 0..5 against 2: 3 wins (3, 4, 5), 1 tie, 2 losses; (3 + 0.5) / 6.
    counts = block["comparisons"]["a"]
    assert (counts["wins"], counts["ties"], counts["losses"]) == (3, 1, 2)
    assert block["models"]["a"]["win_rate"][0] == pytest.approx(3.5 / 6)
    assert block["contrasts"]["a"]["length"]["difference"][0] == pytest.approx(-2.5)  # mean of -p
    assert block["contrasts"]["a"]["judge"]["difference"][0] == pytest.approx(0.5)


def test_comparison_drops_an_invalid_score_with_its_partner():
    a = [_record(0, scores={"em": None}), _record(1), _record(2, judge=None)]
    b = [_record(p, scores={"em": 0.0}, judge=0.0) for p in range(3)]
    block = block_of(a=a, b=b)
    # Two pairs, both 1 apart: Wilson's lower bound 2 / (2 + z^2) on [0, 1] is this on [-1, 1].
    expected = [1.0, 4 / (2 + 1.959964**2) - 1, 1.0]
    assert block["contrasts"]["a"]["em"]["difference"] == pytest.approx(expected)
    counts = block["comparisons"]["a"]
    assert [counts[k] for k in ("wins", "ties", "losses", "invalid")] == [2, 0, 0, 1]


def test_comparison_without_a_judged_pair_has_no_win_rate():
    block = block_of(a=[_record(0, judge=None)], b=[_record(0)])
    assert block["models"]["a"]["win_rate"] == [None, None, None]
    counts = block["comparisons"]["a"]
    assert [counts[k] for k in ("wins", "ties", "losses", "invalid")] == [0, 0, 0, 1]


def test_swapping_the_sides_mirrors_the_comparison():
    a = [_record(p, judge=float(p * 7 % 5), length=p * p) for p in range(20)]
    b = [_record(p, judge=float(p * 3 % 4), length=5 * p) for p in range(20)]
    ab, ba = block_of(a=a, b=b), block_of(b=b, a=a)
    won = ab["models"]["a"]["win_rate"][0]
    assert won == pytest.approx(1.0 - ba["models"]["b"]["win_rate"][0])
    value, low, high = ab["contrasts"]["a"]["length"]["difference"]
    mirrored = ba["contrasts"]["b"]["length"]["difference"]
    assert mirrored == pytest.approx([-value, -high, -low])


def test_four_wins_in_four_have_wilsons_interval():
    sft = [_record(p, scores={"em": 0.0}, judge=0.0) for p in range(4)]
    block = block_of(grpo=[_record(p) for p in range(4)], sft=sft)
    # The upper bound is 1 and Wilson's lower bound n / (n + z^2) = 0.510.
    won = block["models"]["grpo"]["win_rate"]
    assert won == pytest.approx([1.0, 4 / (4 + 1.959964**2), 1.0])
    assert block["contrasts"]["grpo"]["em"]["difference"][0] == 1.0
    json.dumps(block, allow_nan=False)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([_record(0)], [_record(1)], "2 of 2"),
        ([_record(0), _record(0)], [_record(0)], "must be unique"),
        ([_record(0), _record(1, scores={})], [_record(0), _record(1)], "same scores"),
        (
            [_record(0, scores={"kl": 1.0})],
            [_record(0, scores={"kl": 1.0})],
            "score kl: the name of a metric",
        ),
    ],
)
def test_comparison_refuses_records_that_do_not_pair(a: list, b: list, message: str):
    with pytest.raises(ValueError, match=message):
        block_of(a=a, b=b)


SUMMARY = {
    "tasks": {
        "heldout": {
            "baseline": "sft",
            "models": {
                "dpo": {
                    "kl": [3.0, 2.0, 4.5],
                    "judge": [0.5, 0.4, 0.6],
                    "reward": [None, None, None],
                    "win_rate": [0.7, 0.6, 0.8],
                }
            },
            "contrasts": {"grpo": {"exact_match": {"difference": [0.2, 0.1, 0.3]}}},
            "invalid": {"dpo": {"judge": 2}},
        },
        "own/task": {"models": {"dpo": {"math": [0.4, 0.3, 0.5]}}},
    },
    "reward_models": {"reward": {"pair_accuracy": [0.9, 0.85, 0.95]}},
    "seconds": 100.0,
}


@pytest.mark.parametrize(
    ("key", "band", "value", "holds"),
    [
        ("models/dpo/kl", (0, 3), 3.0, True),
        ("models/dpo/kl", (None, 2.9), 3.0, False),
        ("models/dpo/kl:low", (2.0, None), 2.0, True),
        ("models/dpo/kl:high", (0, 4), 4.5, False),
        ("models/dpo/judge_invalid", (0, 1), 2, False),
        ("models/dpo/kl_invalid", (0, 0), 0, True),
        ("models/dpo/em_invalid", (0, 0), None, False),
        ("differences/grpo-sft/exact_match:low", (0.0, None), 0.1, True),
        ("models/dpo/win_rate:low", (0.55, None), 0.6, True),
        ("models/dpo/win_rate_vs_sft:low", (0.55, None), 0.6, True),
        ("models/dpo/win_rate_vs_base", (0.55, None), None, False),
        ("differences/grpo-base/exact_match", (0.0, None), None, False),
        ("reward_models/reward/pair_accuracy", (0.85, None), 0.9, True),
        ("tasks/own/task/models/dpo/math", (0.3, None), 0.4, True),
        ("seconds", (None, 420), 100.0, True),
        ("models/dpo/reward", (None, None), None, False),
        ("models/dop/kl", (None, None), None, False),
        ("models/dpo", (None, None), None, False),
        ("models/dpo/kl:lo", (None, None), None, False),
        ("seconds:low", (None, None), None, False),
    ],
)
def test_expectation(key: str, band: tuple, value: float | None, holds: bool):
    (check,) = check_expectations(SUMMARY, {key: band})
    assert (check["key"], check["band"]) == (key, list(band))
    assert (check["value"], check["holds"]) == (value, holds)
    assert ("problem" in check) == (value is None)
