"""A task's block: values, differences and verdicts from records whose numbers are known by hand."""

import json
import math
from typing import Any

import pytest

from align.evaluation.stats import Interval
from align.evaluation.verdict import (
    Judged,
    Responses,
    RowLoss,
    preferences_by_score,
    task_block,
    verdict,
    win_matrix,
)
from align.report.tables import detect_lines, task_tables, verdict_lines


def record(prompt: int, sample: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_index": prompt,
        "sample_index": sample,
        "prompt": "?",
        "completion": "!",
        "scores": {"em": 1.0},
        "judge": 1.0,
        "length": 10,
        "repeats": 0.0,
        "kl": None,
        "finish_reason": "stop",
        "group": None,
        **changes,
    }


def scored(values: list[float], **changes: Any) -> list[dict[str, Any]]:
    return [record(i, scores={"em": v}, judge=v, **changes) for i, v in enumerate(values)]


def block_of(models: dict[str, list], metrics: list[str], **losses: list[RowLoss]) -> dict:
    answered = {name: Responses(rows, losses.get(name, ())) for name, rows in models.items()}
    judged = {
        n: Judged(preferences_by_score(r, models["sft"])) for n, r in models.items() if n != "sft"
    }
    return task_block(answered, baseline="sft", metrics=metrics, judged=judged)


@pytest.mark.parametrize(
    ("interval", "lower", "said"),
    [
        (Interval(0.2, 0.1, 0.3), False, "better"),
        (Interval(0.2, 0.1, 0.3), True, "worse"),
        (Interval(-0.2, -0.3, -0.1), False, "worse"),
        (Interval(0.2, 0.0, 0.3), False, "no significant difference"),
        (Interval(0.2, math.nan, math.nan), False, "no significant difference"),
        (None, False, "no significant difference"),
    ],
)
def test_verdict_follows_the_interval(interval: Interval | None, lower: bool, said: str):
    assert verdict(interval, lower_is_better=lower) == said


def test_block_compares_each_model_with_the_baseline():
    # 20 prompts: dpo is right on 16 where sft is right on 4 of them.
    sft, dpo = [1.0] * 4 + [0.0] * 16, [1.0] * 16 + [0.0] * 4
    block = block_of({"sft": scored(sft), "dpo": scored(dpo)}, ["em", "win_rate"])
    assert block["models"]["dpo"]["em"][0] == pytest.approx(0.8)
    told = block["contrasts"]["dpo"]
    assert told["em"]["difference"][0] == pytest.approx(0.6)
    assert told["em"]["verdict"] == told["win_rate"]["verdict"] == "better"
    # 12 wins, 8 ties: (12 + 4) / 20.
    assert block["models"]["dpo"]["win_rate"][0] == pytest.approx(0.8)
    assert block["comparisons"]["dpo"] == {
        "wins": 12,
        "ties": 8,
        "losses": 0,
        "invalid": 0,
        "sequential": False,
    }
    assert block["models"]["sft"]["win_rate"] == [None, None, None]
    json.dumps(block, allow_nan=False)


def test_block_says_how_many_prompts_a_difference_needs():
    sft, dpo = [1.0, 0.0] * 10, [1.0] + [1.0, 0.0] * 9 + [1.0]
    found = block_of({"sft": scored(sft), "dpo": scored(dpo)}, ["em"])["contrasts"]["dpo"]["em"]
    # Differences: one more right on 10 prompts, one less on 9: mean 0.05, squares 19 / 20.
    assert found["verdict"] == "no significant difference"
    deviation = math.sqrt((19 - 20 * 0.05**2) / 19)
    assert found["needed"] == math.ceil((2.801585 * deviation / 0.05) ** 2)
    assert found["detectable"] == pytest.approx(2.801585 * deviation / math.sqrt(20), rel=1e-5)


def test_pass_at_k_is_paired_by_prompt():
    def answers(right: list[int]) -> list[dict[str, Any]]:
        return [
            record(p, s, scores={"em": float(s < n)}) for p, n in enumerate(right) for s in range(4)
        ]

    block = block_of({"sft": answers([0, 1, 4]), "dpo": answers([4, 1, 4])}, ["pass@2", "em"])
    # pass@2 of c right among 4: 1 - C(4 - c, 2) / 6 is 0, 1/2, 1 for c = 0, 1, 4.
    assert block["models"]["sft"]["pass@2"][0] == pytest.approx(1.5 / 3)
    assert block["contrasts"]["dpo"]["pass@2"]["difference"][0] == pytest.approx(1 / 3)
    assert (block["prompts"], block["samples"]) == (3, 4)


def test_perplexity_weighs_tokens_and_a_lower_one_is_better():
    sft = [RowLoss(20.0, 10), RowLoss(6.0, 2), RowLoss(24.0, 12)]
    dpo = [RowLoss(18.0, 10), RowLoss(5.6, 2), RowLoss(21.5, 12)]
    rows = scored([1.0] * 3)
    block = block_of({"sft": rows, "dpo": rows}, ["perplexity"], sft=sft, dpo=dpo)
    assert block["models"]["sft"]["perplexity"][0] == pytest.approx(math.exp(50 / 24))
    told = block["contrasts"]["dpo"]["perplexity"]
    assert told["difference"][0] == pytest.approx((18 + 5.6 + 21.5 - 50) / 24)
    assert told["verdict"] == "better"


def test_perplexity_counts_rows_with_one_prompt_as_one_piece_of_evidence():
    """Copies of every row change nothing: neither a value, nor an interval, nor its power."""
    nats = [20.0, 6.0, 24.0, 9.0, 30.0, 3.0, 11.0, 19.0]
    rows = scored([1.0] * 3)

    def told(copies: int) -> dict[str, Any]:
        sft, dpo = (
            [RowLoss(x + move * i, 10, f"p{i}") for i, x in enumerate(nats)] * copies
            for move in (0.0, -0.3)
        )
        block = block_of({"sft": rows, "dpo": rows}, ["perplexity"], sft=sft, dpo=dpo)
        return block["contrasts"]["dpo"]["perplexity"] | {"value": block["models"]["dpo"]}

    one, five = told(1), told(5)
    assert one["value"]["perplexity"] == pytest.approx(five["value"]["perplexity"])
    assert one["difference"] == pytest.approx(five["difference"])
    assert one["difference"][1] < one["difference"][2]
    assert (one["prompts"], five["prompts"]) == (8, 8)
    assert one["detectable"] == pytest.approx(five["detectable"])


def test_metrics_without_a_better_direction_have_no_verdict():
    rows = {"sft": scored([1.0] * 9, length=5), "dpo": scored([1.0] * 9, length=9)}
    told = block_of(rows, ["length"])["contrasts"]["dpo"]["length"]
    assert told["difference"] == [4.0, 4.0, 4.0]
    assert "verdict" not in told


def test_sequential_judging_keeps_its_own_interval():
    rows = scored([1.0] * 12)
    answered = {"sft": Responses(rows), "dpo": Responses(rows)}
    pairs = Judged({(i, 0): float(i % 3 > 0) for i in range(12)}, Interval(0.66, 0.4, 0.9))
    metrics = ["win_rate", "length_controlled_win_rate"]
    block = task_block(answered, baseline="sft", metrics=metrics, judged={"dpo": pairs})
    assert block["models"]["dpo"]["win_rate"] == [0.66, 0.4, 0.9]
    # A value, but no bounds: those would be of a sample whose size was fixed beforehand.
    assert block["models"]["dpo"]["length_controlled_win_rate"][1:] == [None, None]
    assert block["contrasts"]["dpo"]["win_rate"]["verdict"] == "no significant difference"


def test_groups_break_the_graded_metric_down():
    rows = [record(i, scores={"em": float(i < 3)}, group="ab"[i % 2]) for i in range(6)]
    groups = block_of({"sft": rows, "dpo": rows}, ["em", "length"])["groups"]
    assert groups["a"]["sft"][0] == pytest.approx(2 / 3)  # prompts 0, 2, 4
    assert groups["b"]["dpo"][0] == pytest.approx(1 / 3)


def test_win_matrix_is_its_own_mirror():
    models = {"a": scored([1.0, 0.0, 1.0]), "b": scored([0.0, 0.0, 1.0]), "c": scored([0.0] * 3)}
    matrix = win_matrix(models)
    assert matrix["a"]["b"][0] == pytest.approx(2 / 3)  # one win, two ties
    assert matrix["c"]["a"][0] == pytest.approx(1 - matrix["a"]["c"][0])
    assert "a" not in matrix["a"]


def test_tables_and_lines_show_the_block():
    from rich.console import Console

    models = {"sft": scored([0.0] * 30), "dpo": scored([1.0] * 30), "ppo": scored([0.0] * 30)}
    block = block_of(models, ["em", "win_rate"]) | {"win_matrix": win_matrix(models)}
    summary = {"tasks": {"quiz": block}}
    console = Console(width=100, record=True)
    for table in task_tables(summary):
        console.print(table)
    shown = console.export_text()
    assert "quiz: 30 prompts, baseline sft" in shown
    assert "better" in shown
    assert list(verdict_lines(summary)) == [
        "quiz: dpo better than sft by em",
        "quiz: ppo: no significant difference from sft by em",
    ]
    half = {"sft": scored([1.0, 0.0] * 8), "dpo": scored([1.0, 0.0, 0.0, 1.0] * 4)}
    block = block_of(half, ["em"])
    (line,) = detect_lines({"tasks": {"quiz": block}}, 0.1)
    # Differences 0, 0, -1, 1 in turn: variance 8 / 15; (2.8016^2) * 8 / 15 / 0.01 = 418.6.
    assert line == "quiz: prompts to detect a difference of 0.1 in em: dpo 419"


def test_report_shows_values_verdicts_and_the_matrix():
    from types import SimpleNamespace

    from align.report.tasks import tasks

    models = {"sft": scored([0.0] * 30), "dpo": scored([1.0] * 30), "p<o": scored([0.0] * 30)}
    block = block_of(models, ["em", "win_rate"]) | {"win_matrix": win_matrix(models)}
    recipe = SimpleNamespace(stages=models)
    run: Any = SimpleNamespace(summary={"tasks": {"quiz": block}}, recipe=recipe)
    html = str(tasks(run))
    assert '<small class="ok">better</small>' in html
    assert html.count("no significant difference</small>") == 2  # p<o by both metrics
    assert "p&lt;o" in html
    assert "p<o" not in html
    assert "over the column model" in html
    run.summary = {}
    assert tasks(run) is None


def test_rows_with_one_prompt_are_one_piece_of_evidence():
    """Copies of a prompt count as further responses to it would, in every interval."""
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    other = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]

    def rows(scores: list[float], *, copied: bool) -> list[dict[str, Any]]:
        found = []
        for i, value in enumerate(scores):
            given = {"scores": {"em": value}, "judge": value, "group": "g"}
            # Row i is about prompt i % 4: as rows of its own, or as samples of one row.
            one = (
                record(i, **given, cluster=f"c{i % 4}")
                if copied
                else record(i % 4, i // 4, **given)
            )
            found.append(one)
        return found

    copies, samples = (
        block_of({"sft": rows(other, copied=c), "dpo": rows(values, copied=c)}, ["em", "win_rate"])
        for c in (True, False)
    )
    for key in ("models", "contrasts", "groups"):
        assert copies[key] == samples[key], key
    both = ({"a": rows(values, copied=c), "b": rows(other, copied=c)} for c in (True, False))
    assert win_matrix(next(both)) == win_matrix(next(both))
    # Without the clusters, the twelve rows would make a narrower interval.
    plain = [{k: v for k, v in r.items() if k != "cluster"} for r in rows(values, copied=True)]
    alone = block_of({"sft": plain}, ["em"])["models"]["sft"]["em"]
    assert alone[0] == copies["models"]["dpo"]["em"][0]
    assert alone[1:] != copies["models"]["dpo"]["em"][1:]
