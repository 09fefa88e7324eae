"""``align eval`` on shipped tasks of every kind, of a real small model, judged by a scorer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: small
stages:
  base:
    kind: base
    path: ${ALIGN_REAL_DATA}/models/stories260K-hd32
    tokenizer: {pad_token: <unk>, chat_template: plain}
  sft:
    kind: sft
    init: base
    data: [{path: "${ALIGN_REAL_DATA}/data/preference/persona_yes_no.jsonl", split: train,
            answers: both, rows: 64}]
    steps: 6
    batch_size: 16
    max_length: 256
    optim: {learning_rate: 1.0e-3}
  reward:
    kind: reward
    init: base
    data: [{path: "${ALIGN_REAL_DATA}/data/preference/persona_yes_no.jsonl", split: train,
            rows: 16}]
    steps: 2
    batch_size: 8
    norm_prompts: 8
    max_length: 256
"""
OWN = """\
name: own
prompts: [{path: "./asked.jsonl"}]
grader: [{kind: length, name: brief, target: 1, limit: 40}]
metrics: [length, repeats, stop_rate, kl, perplexity]
sampling: {max_new_tokens: 24, temperature: 1.0}
samples: 2
max_length: 128
answers: [{path: "./told.jsonl"}]
"""


def align(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", *words],
        cwd=ROOT,
        timeout=1200,
        text=True,
        check=False,
        env=stage_runs.environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.real
@pytest.mark.slow
def test_shipped_and_own_tasks_give_every_metric_with_interval_and_verdict(
    real_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "own.yaml").write_text(OWN)
    asked = [{"prompt": f"Tell me about {word}."} for word in ("a dog", "the sun", "my boat")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    told = [row | {"completion": " Once upon a time, there was a little girl."} for row in asked]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    align("run", str(tmp_path / "small.yaml"), "--runs", str(tmp_path))
    shipped = "gsm8k,multiple_choice,traits,over_refusal,instructions"
    said = align(
        "eval",
        "small/base",
        "small/sft",
        "--tasks",
        f"{shipped},{tmp_path}/own.yaml",
        "--judge",
        "small/reward",
        "--limit",
        "4",
        "--engine",
        "hf",
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path / "answer"),
        "--detect",
        "0.2",
    )
    tasks = json.loads((tmp_path / "answer" / "evaluate" / "summary.json").read_text())["tasks"]
    metrics = {
        "gsm8k": ["math", "win_rate", "length", "repeats", "stop_rate"],
        "multiple_choice": ["right_choice", "gives_a_letter", "length", "stop_rate"],
        "traits": ["trait", "yes_or_no", "win_rate", "length", "stop_rate"],
        "over_refusal": ["right_refusal", "length", "repeats", "stop_rate"],
        "instructions": [
            "win_rate",
            "length_controlled_win_rate",
            "length",
            "repeats",
            "stop_rate",
        ],
        "own": ["length", "repeats", "stop_rate", "kl", "perplexity"],
    }
    assert {name: block["metrics"] for name, block in tasks.items()} == metrics
    for name, names in metrics.items():
        for metric in names:
            value, low, high = tasks[name]["models"]["sft"][metric]
            assert value is None or low is None or low <= value <= high, (name, metric)
    # The policy of the start is its own reference, and a story model knows stories.
    assert tasks["own"]["models"]["base"]["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert tasks["own"]["models"]["base"]["perplexity"][0] < 20
    # A model of stories solves nothing.
    assert tasks["gsm8k"]["models"]["base"]["math"][0] == 0.0
    assert "gsm8k: 4 prompts, 95 % intervals; * differs significantly from base" in said
    assert "prompts to detect a difference of 0.2 in" in said
