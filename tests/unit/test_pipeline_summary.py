"""Joining several evaluations of one run."""

import json
from pathlib import Path

from align.pipeline.summary import summarize


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
