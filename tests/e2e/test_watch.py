"""Evaluation while training leaves the training as it is, and the guard ends a stage in order."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

from align.core.artifacts import read_artifact

WATCH = (
    "stages.{stage}.watch={{every: 2, samples: 2, prompts: [{{world: prompts, rows: 12, "
    "split: heldout}}], gold: [{{kind: repetition, ngram: 2}}], {more}}}"
)


def options(stage: str, more: str = "keep: last") -> list[str]:
    return [f"stages.{stage}.steps=6", WATCH.format(stage=stage, more=more)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the recipe once."""
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def base(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the base stage once."""
    run_dir = tmp_path_factory.mktemp("base")
    runs.finish(recipe, "base", run_dir)
    return run_dir


@pytest.fixture(scope="module")
def watched(recipe: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a watched ppo without interruption."""
    run_dir = begin(base, tmp_path_factory.mktemp("watched"))
    runs.finish(recipe, "ppo", run_dir, overrides=options("ppo"))
    return run_dir


def begin(base: Path, folder: Path) -> Path:
    shutil.copytree(base / "base", folder / "base")
    return folder


def evaluations(run_dir: Path, stage: str) -> list[dict]:
    text = (run_dir / stage / "evaluations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def unwatched(rows: list[dict]) -> list[dict]:
    """Leave out what the evaluations have logged."""
    kept = [
        {k: v for k, v in row.items() if not k.startswith(("eval/", "change/"))} for row in rows
    ]
    return [row for row in kept if row["step"] > 0]


def test_watched_ppo_trains_to_the_same_bytes_as_one_left_alone(
    recipe, base, watched, tmp_path
) -> None:
    alone = begin(base, tmp_path)
    runs.finish(recipe, "ppo", alone, overrides=["stages.ppo.steps=6"])
    assert runs.weights(watched, "ppo") == runs.weights(alone, "ppo")
    assert unwatched(runs.numbers(watched, "ppo")) == runs.numbers(alone, "ppo")
    found = evaluations(watched, "ppo")
    assert [row["step"] for row in found] == [0, 2, 4, 6]
    assert len(found[0]["answers"]) == 12 * 2
    # Before the first step the policy is the reference, token by token.
    assert abs(found[0]["kl"]) < 1e-5
    assert found[-1]["kl"] != 0.0


def test_best_checkpoint_is_that_of_the_highest_gold_score(watched) -> None:
    golds = {
        row["step"]: row["eval/gold"] for row in runs.numbers(watched, "ppo") if "eval/gold" in row
    }
    best = max(golds, key=lambda step: (golds[step], -step))
    assert runs.manifest(watched, "ppo")["watch"] == {"best_step": best, "last_step": 6}
    assert [p.name for p in (watched / "ppo" / "best").iterdir()] == [f"step-{best:08d}"]
    assert read_artifact(watched / "ppo", "policy")


def test_watched_ppo_killed_in_the_middle_ends_with_the_same_bytes(
    recipe, base, watched, tmp_path
) -> None:
    run_dir = begin(base, tmp_path)
    at = runs.half_of(3)
    code, _ = runs.interrupt(recipe, "ppo", run_dir, signal.SIGKILL, at, overrides=options("ppo"))
    assert code == -signal.SIGKILL
    runs.finish(recipe, "ppo", run_dir, overrides=options("ppo"))
    assert runs.weights(run_dir, "ppo") == runs.weights(watched, "ppo")
    assert runs.numbers(run_dir, "ppo") == runs.numbers(watched, "ppo")
    assert evaluations(run_dir, "ppo") == evaluations(watched, "ppo")
    assert runs.manifest(run_dir, "ppo")["watch"] == runs.manifest(watched, "ppo")["watch"]


def test_guard_ends_the_stage_and_restores_the_best_weights(recipe, base, tmp_path) -> None:
    # Training pays for length, gold for brevity: the gold score must fall.
    run_dir = begin(base, tmp_path)
    gold = "gold: [{kind: length, target: 1, limit: 12}], "
    guard = "guard: {window: 3, patience: 1}"
    watch = (
        "stages.grpo.watch={every: 2, samples: 4, prompts: [{world: prompts, rows: 24, "
        "split: heldout}], " + gold + guard + "}"
    )
    said = runs.finish(
        recipe,
        "grpo",
        run_dir,
        overrides=[
            "stages.grpo.steps=40",
            watch,
            "stages.grpo.optim.learning_rate=0.01",
            "stages.grpo.kl.coef=0.0",
            "stages.grpo.group_size=8",
            "stages.grpo.rewards=[{kind: regex, pattern: '^.{30}'}]",
        ],
    )
    notes = runs.manifest(run_dir, "grpo")["watch"]
    assert notes["stopped_by"] == "guard", said[-3000:]
    assert notes["alarm"] == "gold_slope"
    assert notes["restored_step"] == notes["best_step"] < notes["last_step"] < 40
    best = run_dir / "grpo" / "best" / f"step-{notes['best_step']:08d}" / "model"
    assert (best / "model.safetensors").read_bytes() == runs.weights(run_dir, "grpo")
    if notes["best_step"] == 0:
        assert runs.weights(run_dir, "grpo") == runs.weights(run_dir, "base")
    assert (run_dir / "grpo" / "adapter" / "adapter_model.safetensors").is_file()
