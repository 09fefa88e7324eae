"""The evaluate.Metric subclasses: hand numbers, and nothing written to the user's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.evaluation.metrics import ExactMatch, MeanScore, PairAccuracy, WinRate


def test_mean_score_leaves_invalid_scores_out():
    result = MeanScore().compute(predictions=[1.0, None, 0.0, 0.5])
    assert result["mean"] == pytest.approx(0.5)
    assert result["invalid"] == 1
    assert result["low"] < 0.5 < result["high"]


def test_mean_score_of_nothing_valid_is_none():
    result = MeanScore().compute(predictions=[None, None])
    assert result == {"mean": None, "low": None, "high": None, "invalid": 2}


def test_mean_score_takes_clusters():
    # One cluster says nothing about spread.
    result = MeanScore().compute(predictions=[1.0, 0.0], clusters=["p", "p"])
    assert (result["mean"], result["low"], result["high"]) == (0.5, None, None)


def test_exact_match_by_hand_and_with_a_pattern():
    answers, references = ["Paris", " rome ", "#### 5"], ["paris", "Rome", "5"]
    assert ExactMatch().compute(predictions=answers, references=references)[
        "exact_match"
    ] == pytest.approx(2 / 3)
    strict = ExactMatch().compute(predictions=answers, references=references, ignore_case=False)
    assert strict["exact_match"] == 0.0
    marked = ExactMatch().compute(predictions=answers, references=references, pattern=r"#### (\d+)")
    assert marked["exact_match"] == pytest.approx(1 / 3)


def test_win_rate_and_pair_accuracy_count_ties_half():
    a, b = [2.0, 1.0, 0.0, None, 5.0], [1.0, 1.0, 3.0, 0.0, 4.0]
    counts = {"wins": 2, "ties": 1, "losses": 1, "invalid": 1}
    for metric, name in ((WinRate(), "win_rate"), (PairAccuracy(), "pair_accuracy")):
        result = metric.compute(predictions=a, references=b)
        assert result[name] == pytest.approx(2.5 / 4)
        assert {key: result[key] for key in counts} == counts


def test_metrics_take_batches_and_can_be_used_again():
    metric = WinRate()
    metric.add_batch(predictions=[1.0, 1.0], references=[0.0, 0.0])
    metric.add(prediction=0.0, reference=1.0)
    assert metric.compute()["win_rate"] == pytest.approx(2 / 3)
    assert metric.compute(predictions=[0.0], references=[1.0])["win_rate"] == 0.0


def test_metrics_write_nothing_to_the_home_folder(tmp_path: Path):
    code = (
        "from align.evaluation.metrics import MeanScore, WinRate\n"
        "MeanScore().compute(predictions=[1.0, 0.0])\n"
        "WinRate().compute(predictions=[1.0], references=[0.0])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert not [path for path in tmp_path.rglob("*") if "metrics" in path.name or path.is_file()]
