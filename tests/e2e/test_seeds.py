"""benchmarks.seeds: runs of a recipe over seeds, which an interrupted call continues."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import seeds

RECIPE = """
name: over_seeds
stages:
  base:
    kind: base
    build: {vocab_size: 300, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16}
    tokenizer: {chat_template: plain}
    data: [{world: corpus, rows: 40, split: train}]
    steps: 1
    batch_size: 4
  evaluate:
    kind: evaluate
    models: [base]
    baseline: base
    prompts: [{world: prompts, rows: 2, split: heldout}]
    sampling: {engine: hf, max_new_tokens: 2, temperature: 0.0}
    scores: [{kind: repetition}]
    judge: [{kind: repetition}]
    expect: {models/base/repetition: [2.0, null]}
"""


@pytest.mark.slow
def test_a_call_continues_a_run_and_counts_the_time_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = tmp_path / "chain.yaml", tmp_path / "runs"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path)
    call = ["seeds", str(recipe), "--seeds", "5", "--modes", "native", "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", call)
    seeds.main()
    kept = tmp_path / "seeds-over_seeds.jsonl"  # named after the recipe: many files are chain.yaml
    (line,) = map(json.loads, kept.read_text().splitlines())
    # No response scores above 1, so the expectation fails: exit code 1, and the line says so.
    assert line["exit"] == 1
    assert line["expectations"]["models/base/repetition"][1] is False
    times = json.loads((runs / "native" / "seed5" / "over_seeds" / "timings.json").read_text())
    assert line["minutes"] == pytest.approx(sum(times.values()) / 60, abs=0.051)
    assert list(line["stages"]) == ["base", "evaluate"]

    # A call that ended before it kept the line: nothing is run again.
    kept.unlink()
    models = sorted((runs / "native").rglob("manifest.json"))
    written = [path.stat().st_mtime_ns for path in models]
    seeds.main()
    assert [path.stat().st_mtime_ns for path in models] == written
    (again,) = map(json.loads, kept.read_text().splitlines())
    assert again == line
