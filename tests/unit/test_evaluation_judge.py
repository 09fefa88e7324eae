"""Pairwise judging: both orders, early stopping, calibration against people."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai", reason="the judge's client is the package openai")
sys.path.insert(0, str(Path(__file__).parent))
from judge_server import Server, running

from align.evaluation.calibrate import calibration, kappa_interval, scored_orders
from align.evaluation.judge import Bench, BothOrders, EndpointJudge, Pair, judge_model, position
from reward_models.judge import JudgeClient


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as served:
        yield served


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """Give the two answers in the order in which the judge sees them."""
    text = request["messages"][-1]["content"]
    first, second = text.split("[First answer]\n")[1].split("\n\n[Second answer]\n")
    return first, second


def says(winner: str) -> tuple[int, dict[str, Any]]:
    return 200, {"content": json.dumps({"winner": winner})}


def likes_good(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    first, second = shown(request)
    if ("good" in first) == ("good" in second):
        return says("tie")
    return says("first" if "good" in first else "second")


def records(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt_index": i, "sample_index": 0, "prompt": f"question {i}", "completion": text}
        for i, text in enumerate(texts)
    ]


def test_both_orders_make_one_result(server: Server):
    server.reply = likes_good
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    found = bench.judge([Pair("q", "good", "bad"), Pair("p", "bad", "good"), Pair("q", "x", "x")])
    assert [said.result for said in found] == [1.0, 0.0, 0.5]
    assert len(server.seen) == 4  # two pairs in two orders; equal answers are not asked about


def test_a_judge_that_takes_the_first_answer_decides_nothing(server: Server):
    server.reply = lambda request: says("first")
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    found = bench.judge([Pair(f"q{i}", "a", "b") for i in range(5)])
    assert [said.result for said in found] == [0.5] * 5
    report = bench.report()
    assert report["first_share"][0] == 1.0
    assert report["consistent"][0] == 0.0


def test_an_invalid_verdict_is_no_tie(server: Server):
    def half(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return says("first") if shown(request)[0] == "a" else (200, {"refusal": "no"})

    server.reply = half
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    (said,) = bench.judge([Pair("q", "a", "b")])
    assert (said.ours_first, said.theirs_first, said.result) == (1.0, None, None)
    assert bench.report()["invalid"] == {"refusal": 1}
    assert bench.report()["first_share"] == [None, None, None]


def test_judging_stops_when_the_verdict_is_clear(server: Server):
    server.reply = likes_good
    mine, theirs = records(["good"] * 200), records(["bad"] * 200)
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    judged = judge_model(bench, mine, theirs, sequential=True, batch=8, seed=0)
    assert judged.sequence is not None
    assert judged.sequence.low > 0.5
    assert len(judged.results) < 40
    assert len(server.seen) == 2 * len(judged.results)
    assert bench.report()["pairs"] == 200
    whole = judge_model(bench, mine, theirs, sequential=False, batch=50, seed=0)
    assert (len(whole.results), whole.sequence) == (200, None)


def test_copies_of_a_prompt_do_not_make_a_verdict_clear(server: Server):
    """200 rows with the same prompt are one value: 1 win in 1 is no proof."""
    server.reply = likes_good
    mine, theirs = (
        [row | {"prompt": "q", "cluster": "q"} for row in records([text] * 200)]
        for text in ("good", "bad")
    )
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    judged = judge_model(bench, mine, theirs, sequential=True, batch=8, seed=0)
    assert len(judged.results) == 200
    assert judged.sequence is not None
    assert judged.sequence.low < 0.5
    # The bias of the judge is measured on one prompt too, whose spread is unknown.
    assert bench.report()["consistent"] == [1.0, None, None]


def test_position_bias_of_copies_is_that_of_one_each():
    said = [BothOrders(1.0, 0.0), BothOrders(1.0, 1.0), BothOrders(0.5, 0.0), BothOrders(0.0, 1.0)]
    one, three = (position(said * n, [*"abcd"] * n) for n in (1, 3))
    for name, found in one.items():
        assert found == pytest.approx(three[name])
        assert found[1] < found[0] < found[2]


def test_open_verdict_takes_all_pairs(server: Server):
    server.reply = likes_good
    mine, theirs = records(["good", "bad"] * 20), records(["bad", "good"] * 20)
    bench = Bench(EndpointJudge(JudgeClient(server.endpoint()), "Judge."))
    judged = judge_model(bench, mine, theirs, sequential=True, batch=10, seed=0)
    assert len(judged.results) == 40
    assert judged.sequence.low < 0.5 < judged.sequence.high


def test_kappa_by_hand():
    # Ten pairs, 20 observations. Right in both orders: 6; wrong in both: 1; "first" in both: 2;
    # ties: 1. Agreements 12 + 2 = 14; said first 6 + 1 + 4 = 11, second 7, tie 2.
    said = [BothOrders(1.0, 0.0)] * 6 + [BothOrders(0.0, 1.0)]
    said += [BothOrders(1.0, 1.0)] * 2 + [BothOrders(0.5, 0.5)]
    chance = 0.5 * 11 / 20 + 0.5 * 7 / 20
    value, low, high = kappa_interval(said, list(range(10)))
    assert value == pytest.approx((14 / 20 - chance) / (1 - chance))
    assert low < value < high


def test_kappa_of_guesses_covers_zero_and_of_people_themselves_is_one():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        flips = rng.integers(0, 2, (60, 2)).astype(float)
        _, low, high = kappa_interval([BothOrders(*row) for row in flips], list(range(60)))
        covered += low <= 0.0 <= high
    assert covered / 200 >= 0.9
    assert kappa_interval([BothOrders(1.0, 0.0)] * 9, list(range(9)))[0] == 1.0


def test_calibration_counts_what_people_and_judge_prefer():
    pairs = [Pair("q", "long answer", "short")] * 6 + [Pair("q", "brief", "much longer")] * 2
    said = [BothOrders(1.0, 0.0)] * 5 + [BothOrders(None, 0.0)] + [BothOrders(0.0, 1.0)] * 2
    found = calibration(pairs, said, clusters=list(range(8)))
    assert (found["pairs"], found["invalid"]) == (8, 1)
    assert found["agreement"][0] == pytest.approx(5 / 7)
    assert found["longer_share"][0] == 1.0
    assert found["human_longer_share"][0] == pytest.approx(6 / 8)
    assert found["consistent"][0] == 1.0


def test_scorer_of_single_answers_knows_no_order():
    pairs = [Pair("q", "aaa", "a"), Pair("q", "a", "aa"), Pair("q", "b", "b")]
    said = scored_orders(pairs, lambda prompts, answers: [float(len(a)) for a in answers])
    assert [s.result for s in said] == [1.0, 0.0, 0.5]


def test_longer_is_a_judge_and_held_out_pairs_are_those_of_the_split(tmp_path: Path):
    from align.recipe.schema import DataSpec
    from align.stages.evaluate.judge import LONGER, calibrate

    def row(i: int, chosen: str, rejected: str) -> dict[str, str]:
        return {"prompt": f"question {i}", "chosen": chosen, "rejected": rejected}

    pairs = [row(0, "long", "no"), row(1, "long", "no"), row(2, "no", "long"), row(3, "so", "no")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options: Any = {"model": None, "criteria": "", "cache": None}
    found = calibrate(LONGER, data=[DataSpec(path=str(path))], **options)
    # Two right, one wrong, one tie.
    assert (found["pairs"], found["invalid"]) == (4, 0)
    assert found["agreement"][0] == 0.625
    assert found["longer_share"][0] == 1.0
    assert found["human_longer_share"][0] == pytest.approx(2 / 3)
    held_out = DataSpec(path=str(path), split="heldout", heldout_frac=0.5)
    assert 0 < calibrate(LONGER, data=[held_out], **options)["pairs"] < 4
