"""Summaries, comparisons and bands from records whose numbers are known by hand."""

import json
from typing import Any

import pytest

from align.evaluation.compare import (
    build_summary,
    check_expectations,
    compare,
    differences,
    summarise_model,
)


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


def test_summary_gives_means_and_counts_what_is_invalid():
    records = [
        _record(0, scores={"em": 1.0}, length=4),
        _record(1, scores={"em": 0.0}, length=8, finish_reason="length"),
        _record(2, scores={"em": None}, judge=None, kl=None),
        _record(3, scores={"em": 1.0}, length=10, kl=2.0),
    ]
    block = summarise_model(records)
    assert block["em"][0] == pytest.approx(2 / 3)  # (1 + 0 + 1) / 3, the None left out
    assert block["em_invalid"] == [1, 1, 1]
    assert block["judge_invalid"] == [1, 1, 1]
    assert "length_invalid" not in block
    assert block["length"][0] == 8.0  # (4 + 8 + 10 + 10) / 4
    assert block["stop_rate"][0] == 0.75
    assert block["kl"][0] == 1.0  # (0.5 + 0.5 + 2) / 3
    assert block["em"][1] <= block["em"][0] <= block["em"][2]


def test_summary_of_invalid_scores_only_is_null_and_valid_json():
    block = summarise_model([_record(0, scores={"em": None}), _record(1, scores={"em": None})])
    assert block["em"] == [None, None, None]
    assert block["em_invalid"] == [2, 2, 2]
    json.dumps(block, allow_nan=False)


def test_summary_of_one_prompt_claims_no_interval():
    block = summarise_model([_record(0, 0), _record(0, 1, scores={"em": 0.0})])
    assert block["em"] == [0.5, None, None]


def test_summary_leaves_out_kl_that_was_not_measured():
    block = summarise_model([_record(0, kl=None), _record(1, kl=None)])
    assert "kl" not in block
    assert "kl_invalid" not in block


def test_samples_of_one_prompt_are_not_independent_evidence():
    # Ten prompts, 50 identical samples each: as uncertain as ten samples.
    one = [_record(p, scores={"em": float(p % 2)}) for p in range(10)]
    many = [_record(p, s, scores={"em": float(p % 2)}) for p in range(10) for s in range(50)]
    assert summarise_model(many)["em"] == pytest.approx(summarise_model(one)["em"])


def test_comparison_pairs_by_place_whatever_the_order():
    a = [_record(p, judge=float(p), length=p) for p in range(6)]
    b = [_record(p, judge=2.0, length=2 * p) for p in reversed(range(6))]
    result = compare(a, b)
    # a's judge 0..5 against 2: 3 wins (3, 4, 5), 1 tie, 2 losses; (3 + 0.5) / 6.
    assert (result.win_rate.wins, result.win_rate.ties, result.win_rate.losses) == (3, 1, 2)
    assert result.win_rate.value == pytest.approx(3.5 / 6)
    assert result.differences["length"][0] == pytest.approx(-2.5)  # mean of -p
    assert result.differences["judge"][0] == pytest.approx(0.5)


def test_comparison_drops_an_invalid_score_with_its_partner():
    a = [_record(0, scores={"em": None}), _record(1), _record(2, judge=None)]
    b = [_record(p, scores={"em": 0.0}, judge=0.0) for p in range(3)]
    result = compare(a, b)
    # Two pairs, both 1 apart: Wilson's lower bound 2 / (2 + z^2) on [0, 1] is this on [-1, 1].
    assert result.differences["em"] == pytest.approx([1.0, 4 / (2 + 1.959964**2) - 1, 1.0])
    assert result.num_invalid == 1
    assert (result.win_rate.wins, result.win_rate.ties, result.win_rate.losses) == (2, 0, 0)


def test_comparison_without_a_judged_pair_has_no_win_rate():
    a, b = [_record(0, judge=None)], [_record(0)]
    assert compare(a, b).win_rate is None
    block = build_summary({"a": a, "b": b}, baseline="b")
    assert block["models"]["a"]["win_rate_vs_b"] == [None, None, None]
    assert block["comparisons"]["a-b"] == {"wins": 0, "ties": 0, "losses": 0, "invalid": 1}


def test_swapping_the_sides_mirrors_the_comparison():
    a = [_record(p, judge=float(p * 7 % 5), length=p * p) for p in range(20)]
    b = [_record(p, judge=float(p * 3 % 4), length=5 * p) for p in range(20)]
    ab, ba = compare(a, b), compare(b, a)
    assert ab.win_rate.value == pytest.approx(1.0 - ba.win_rate.value)
    value, low, high = ab.differences["length"]
    assert ba.differences["length"] == pytest.approx([-value, -high, -low])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([_record(0)], [_record(1)], "2 of 2"),
        ([_record(0), _record(0)], [_record(0)], "must be unique"),
        ([], [], "same prompts"),
        ([_record(0), _record(1, scores={})], [_record(0), _record(1)], "same scores"),
        ([_record(0, scores={"kl": 1.0})], [_record(0, scores={"kl": 1.0})], "taken"),
    ],
)
def test_comparison_refuses_records_that_do_not_pair(a: list, b: list, message: str):
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_summary_has_the_documented_shape():
    sft = [_record(p, scores={"em": 0.0}, judge=0.0) for p in range(4)]
    models = {"sft": sft, "grpo": [_record(p) for p in range(4)]}
    summary = build_summary(models, baseline="sft")
    assert summary["models"]["sft"]["win_rate_vs_sft"] == [0.5, 0.5, 0.5]
    won = summary["models"]["grpo"]["win_rate_vs_sft"]
    # Four wins in four: the upper bound is 1 and Wilson's lower bound n / (n + z^2) = 0.510.
    assert won == pytest.approx([1.0, 4 / (4 + 1.959964**2), 1.0])
    assert summary["differences"]["grpo-sft/em"][0] == 1.0
    assert summary["differences"] == differences(models, baseline="sft")
    assert summary["comparisons"] == {"grpo-sft": {"wins": 4, "ties": 0, "losses": 0, "invalid": 0}}
    json.dumps(summary, allow_nan=False)


def test_summary_needs_its_baseline():
    with pytest.raises(ValueError, match="baseline 'base'"):
        build_summary({"sft": [_record(0)]}, baseline="base")


SUMMARY = {
    "models": {
        "dpo": {"kl": [3.0, 2.0, 4.5], "judge_invalid": [2, 2, 2], "reward": [None, None, None]}
    },
    "differences": {"grpo-sft/exact_match": [0.2, 0.1, 0.3]},
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
