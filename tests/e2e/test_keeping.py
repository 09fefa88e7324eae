"""Stages with layers: and keep: as real processes: a killed one ends as one that was not."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

pytestmark = pytest.mark.slow
# No gain is of 10 nats: the first evaluation stays the best one, whatever the numbers are.
STOPPING = ["eval_every=2", "keep.early_stopping={patience: 3, min_delta: 10.0}"]


def overrides(stage: str, *settings: str) -> dict[str, list[str]]:
    return {"overrides": [f"stages.{stage}.{setting}" for setting in settings]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the recipe once."""
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run base, and an sft stage that stops early while its layers thaw, without interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    runs.finish(recipe, "base", run_dir)
    runs.finish(recipe, "sft", run_dir, **stopping_sft())
    return run_dir


def stopping_sft() -> dict[str, list[str]]:
    layers = ["layers.unfreeze.every_steps=4", "keep.dropout=0.1", "label_smoothing=0.1"]
    ewc = "keep.ewc={coef: 1.0e-4, data: [{world: sft, rows: 8, split: train}]}"
    return overrides("sft", *STOPPING, *layers, ewc)


def test_sft_stops_early_and_keeps_the_best_weights(whole: Path) -> None:
    said = runs.manifest(whole, "sft")
    assert said["early_stopping"] == {
        "metric": "eval/loss",
        "best_step": 2,
        "last_step": 8,
        "stopped": True,
    }
    seen = {line["step"]: line.get("eval/loss") for line in runs.numbers(whole, "sft")}
    assert max(seen) == 8
    assert said["metrics"]["eval/loss"] == seen[2] != seen[8]
    kept = whole / "sft" / "best" / "step-00000002" / "model" / "model.safetensors"
    assert kept.read_bytes() == runs.weights(whole, "sft")


def test_sft_killed_before_it_stops_ends_with_the_same_bytes(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "base", tmp_path / "base")
    code, _ = runs.interrupt(
        recipe, "sft", tmp_path, signal.SIGKILL, runs.half_of(6), **stopping_sft()
    )
    assert code == -signal.SIGKILL
    assert "resumed from" in runs.finish(recipe, "sft", tmp_path, **stopping_sft())
    assert runs.weights(tmp_path, "sft") == runs.weights(whole, "sft")
    assert runs.numbers(tmp_path, "sft") == runs.numbers(whole, "sft")
    notes = [runs.manifest(folder, "sft")["early_stopping"] for folder in (tmp_path, whole)]
    assert notes[0] == notes[1]


@pytest.mark.parametrize(
    ("stage", "metric"), [("dpo", "train/ewc"), ("ppo", "policy/ewc"), ("grpo", "policy/ewc")]
)
def test_layers_and_ewc_work_in_every_stage_of_a_policy(
    recipe: Path, whole: Path, tmp_path: Path, stage: str, metric: str
) -> None:
    shutil.copytree(whole / "base", tmp_path / "base")
    ewc = "keep.ewc={coef: 10.0, data: [{world: sft, rows: 4, split: train}]}"
    settings = ["tuning={method: full}", "steps=2", "layers={freeze_first: 1}", ewc]
    runs.finish(recipe, stage, tmp_path, **overrides(stage, *settings))
    before, after = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("base", stage)
    )
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ("layers.0." in name), name
    assert runs.numbers(tmp_path, stage)[-1][metric] > 0.0


def test_reward_model_stopped_early_is_the_best_one(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """The best weights are those of a stage that ends at the best step at a constant rate."""
    shutil.copytree(whole / "base", tmp_path / "a" / "base")
    shutil.copytree(whole / "base", tmp_path / "b" / "base")
    held = "heldout=[{world: preference, rows: 16, split: heldout}]"
    rate = ["optim.learning_rate=0.03", "optim.schedule=constant", "optim.warmup_frac=0"]
    common = [held, "eval_every=1", *rate]
    stop = ["steps=20", "keep.early_stopping.metric=eval/accuracy"]
    runs.finish(recipe, "reward", tmp_path / "a", **overrides("reward", *common, *stop))
    best = runs.manifest(tmp_path / "a", "reward")["early_stopping"]["best_step"]
    runs.finish(recipe, "reward", tmp_path / "b", **overrides("reward", *common, f"steps={best}"))
    assert runs.weights(tmp_path / "a", "reward") == runs.weights(tmp_path / "b", "reward")


MERGE = """
  merge:
    kind: merge
    base: base
    tuned: sft
    alphas: [0, 0.5, 1]
    prompts: [{world: prompts, rows: 8, split: heldout}]
    shifted: [{world: prompts, rows: 6, split: train}]
    scores: [{kind: length, target: 2, limit: 12}]
    tolerance: 2.0
    max_length: 128
    sampling: {max_new_tokens: 12, engine: hf, temperature: 0.0}
"""


def test_merge_writes_the_alpha_that_its_rule_chooses(whole: Path, tmp_path: Path) -> None:
    """Tolerance 2 lets every alpha in: the best on the shifted prompts, of equal ones the last."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(runs.RECIPE + MERGE, encoding="utf-8")
    for stage in ("base", "sft"):
        shutil.copytree(whole / stage, tmp_path / "run" / stage)
    two = ["stages.merge.ranks=2"]
    said = runs.finish(recipe, "merge", tmp_path / "run", ranks=2, overrides=two)
    manifest = runs.manifest(tmp_path / "run", "merge")
    curve = manifest["curve"]
    assert [point["alpha"] for point in curve] == [0.0, 0.5, 1.0]
    best = max(point["shifted"][0] for point in curve)
    expected = max(p["alpha"] for p in curve if p["shifted"][0] == best)
    assert manifest["alpha"] == manifest["metrics"]["merge/alpha"] == expected
    assert f"alpha {expected:g} written" in said
    a, b, found = (
        load_file(tmp_path / "run" / stage / "model" / "model.safetensors")
        for stage in ("base", "sft", "merge")
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (1 - expected) * a[name] + expected * b[name])
