"""Joining several evaluations of one run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from align.core.expectations import band_text
from align.pipeline.running import _finish
from align.pipeline.summary import summarize
from align.recipe.load import load_recipe, write_resolved
from align.report.results import expectation_lines


def test_summary_keeps_the_reward_models_of_every_evaluation(tmp_path: Path) -> None:
    found = {
        "first": {
            "tasks": {"heldout": {"models": {"base": {"n": 1}}}},
            "reward_models": {"a": 1, "both": 2},
            "expectations": [{"key": "x"}],
        },
        "second": {
            "tasks": {"heldout": {"models": {"base": {"n": 2}}}},
            "reward_models": {"b": 3, "both": 4},
            "expectations": [{"key": "y"}],
        },
    }
    for name in ("base", "first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"metrics": {}, "seconds": 1.0}))
    alarm = {"step": 5, "name": "dead_groups", "reason": "all are equal", "remedy": "use others"}
    (tmp_path / "first" / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    for name, own in found.items():
        (tmp_path / name / "summary.json").write_text(json.dumps(own))
    summary = summarize(tmp_path, done=["base", "first", "second"])
    assert summary["reward_models"] == {"a": 1, "first/both": 2, "b": 3, "both": 4}
    assert summary["expectations"] == [{"key": "x"}, {"key": "y"}]
    assert summary["tasks"] == found["second"]["tasks"]
    assert summary["earlier"] == {"first": {"tasks": found["first"]["tasks"]}}
    assert summary["seconds"] == 3.0
    assert summary["stages"]["first"]["alarms"] == [alarm]
    assert "alarms" not in summary["stages"]["second"]


def test_the_summary_of_some_stages_leaves_the_others_out(tmp_path: Path) -> None:
    for name in ("base", "later"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"metrics": {}, "seconds": 1.0}))
    summary = summarize(tmp_path, done=["base"])
    assert list(summary["stages"]) == ["base"]
    assert "tasks" not in summary


def test_expectations_of_training_stages_count_like_those_of_evaluations(tmp_path: Path) -> None:
    expect = {
        "kl/reference": [0, 5],
        "train/loss": [None, 1.0],
        "reward/mean": [0.5, None],
        "reward/meen": [0.5, None],
    }
    metrics = {"kl/reference": 5.5, "train/loss": 1.0, "reward/mean": 0.4}
    manifest = {"metrics": metrics, "seconds": 1.0, "spec": {"expect": expect}}
    own = {"tasks": {"heldout": {}}, "expectations": [{"key": "x", "holds": True}]}
    for name in ("grpo", "evaluate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    # The evaluation has judged its own ranges.
    (tmp_path / "evaluate" / "summary.json").write_text(json.dumps(own))
    summary = summarize(tmp_path, done=["grpo", "evaluate"])
    found = {entry["key"]: entry["holds"] for entry in summary["expectations"]}
    assert found == {
        "grpo: kl/reference": False,
        "grpo: train/loss": True,
        "grpo: reward/mean": False,
        "grpo: reward/meen": False,
        "x": True,
    }
    assert "problem" in summary["expectations"][3]
    assert "earlier" not in summary
    lines = [str(line) for line in expectation_lines(summary)]
    assert lines[0] == "FAILED: 3 of 5 expectations do not hold"
    assert "  grpo: reward/mean = 0.4, expected at least 0.5" in lines


def test_a_run_without_evaluation_ends_with_the_code_of_its_expectations(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n"
        "  base: {kind: base, build: {}, steps: 1, data: [{world: corpus, rows: 9}]}\n"
        "  sft: {kind: sft, init: base, data: [{world: sft, rows: 9}]}\n"
    )
    recipe = load_recipe(path)
    terminal: Any = SimpleNamespace(line=lambda text: None, summary=lambda *args, **kwargs: None)
    folder = tmp_path / "runs" / "sft"
    folder.mkdir(parents=True)
    write_resolved(recipe, folder / "recipe.yaml")
    manifest = {"kind": "policy", "stage_kind": "sft", "metrics": {"train/loss": 0.5}}
    for bounds, code in (([0, 1], 0), ([2, 3], 1)):
        known = manifest | {"seconds": 1.0, "spec": {"expect": {"train/loss": bounds}}}
        (folder / "manifest.json").write_text(json.dumps(known))
        # The stage base is not done: a run that was stopped early counts too.
        assert _finish(recipe, folder.parent, terminal) == code


def test_a_range_is_told_in_words():
    ranges = ((0.1, None), (None, 15.0), (0, 0.25), (None, None))
    told = [band_text(band) for band in ranges]
    assert told == ["at least 0.1", "at most 15", "0 to 0.25", "any number"]
