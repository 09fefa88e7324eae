"""From labels to a trained model through the server: the demonstration of docs/labels.md."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.labels import snapshots
from benchmarks.labels_demo import ROOT, label_and_train, ranked, write_recipe
from tests.serve.tiny_model import WORDS, save_model

HELDOUT = 4
"""Pairs that nobody labels."""


@pytest.mark.slow
def test_a_button_trains_on_labels_given_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_LABELS", str(tmp_path / "labels"))
    # So far apart that the annotator makes no mistake; the last two are a tie.
    samples = [
        {"prompt": f"Say {word}.", "completion": text, "utility": utility}
        for word in WORDS
        for text, utility in ((f"{word} it is", 40.0), ("no", 40.0 * (word == WORDS[-1])))
    ]
    shown, kept = samples[2 * HELDOUT :], samples[: 2 * HELDOUT]
    lines = "".join(json.dumps(row) + "\n" for row in ranked(kept))
    (tmp_path / "heldout.jsonl").write_text(lines)
    reward = {
        **{"kind": "reward", "init": "sft", "data": [{"labels": "simulated"}]},
        **{"heldout": [{"path": "heldout.jsonl"}], "steps": 2, "batch_size": 4},
        **{"max_length": 96, "micro_tokens": 512, "norm_prompts": 4},
    }
    stages = {"sft": {"kind": "base", "path": str(save_model(tmp_path / "model"))}}
    write_recipe(tmp_path / "learned.yaml", {**stages, "reward": reward})
    pairs = [
        {"prompt": one["prompt"], "response_a": one["completion"], "response_b": two["completion"]}
        for one, two in zip(shown[::2], shown[1::2], strict=True)
    ]
    file = "".join(json.dumps(row) + "\n" for row in pairs).encode()
    known = {(str(row["prompt"]), str(row["completion"])): row["utility"] for row in shown}
    source = {"files": {"file": ("pairs.jsonl", file)}}
    found = label_and_train(tmp_path, source, known, count=len(pairs), seed=0)
    assert found.answers == {"a": len(pairs) - 1, "tie": 1}
    assert (found.accuracy.trials, found.models) == (HELDOUT, {})
    (folder,) = snapshots("simulated")
    rows = [json.loads(line) for line in (folder / "preference.jsonl").read_text().splitlines()]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in rows) == sorted(
        (row["prompt"], row["chosen"], row["rejected"]) for row in ranked(shown)
    )


@pytest.mark.long
def test_200_labels_make_a_reward_model_and_better_responses(tmp_path: Path):
    argv = [sys.executable, "-m", "benchmarks.labels_demo", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-2000:]
    lows = re.findall(r"[\d.]+ \[([\d.]+), [\d.]+\]", done.stdout)
    assert [float(low) > 0.5 for low in lows] == [True, True], done.stdout
