"""Held-out rows that stand in the training texts stop every kind of training stage, or warn."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

ASKED = "which of the small red boats in the old harbour left first on the morning of day"
STAGES = {
    "sft": {"prompt": "p", "completion": "c"},
    "dpo": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "reward": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "grpo": {"prompt": "p"},
}


def write_rows(path: Path, prompts: list[str], columns: dict[str, str]) -> str:
    rows = [columns | {"prompt": prompt} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options(stage: str, folder: Path) -> list[str]:
    """Give data of which the second held-out row is the fifth training row with a word more."""
    train = [f"{ASKED} {i}: {'abcdefgh'[i] * 3}?" for i in range(8)]
    heldout = [f"say {w} of {w} and no more {w}, now that you know" for w in ("ox", "ant", "fox")]
    heldout.insert(1, f"well, {train[4]}")
    data = write_rows(folder / "train.jsonl", train, STAGES[stage])
    held = write_rows(folder / "held.jsonl", heldout, STAGES[stage])
    if stage == "grpo":
        watch = f"{{every: 2, prompts: [{{path: {held}}}], gold: [{{kind: repetition, ngram: 2}}]}}"
        return [f"stages.grpo.prompts=[{{path: {data}}}]", f"stages.grpo.watch={watch}"]
    return [
        f"stages.{stage}.data=[{{path: {data}}}]",
        f"stages.{stage}.heldout=[{{path: {held}}}]",
        f"stages.{stage}.steps=2",
    ]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write the recipe and run its base stage."""
    recipe = runs.write_recipe(tmp_path_factory.mktemp("recipe"))
    run_dir = tmp_path_factory.mktemp("run")
    runs.finish(recipe, "base", run_dir)
    return recipe, run_dir


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_contaminated_row_stops_the_stage_with_both_places(stage, started, tmp_path) -> None:
    recipe, run_dir = started
    code, said = runs.run(recipe, stage, run_dir, overrides=options(stage, tmp_path))
    assert code == 2, said
    assert "1 of 4 held-out prompts appear in the training data" in said
    assert f"{tmp_path}/held.jsonl:2 appears in {tmp_path}/train.jsonl:5" in said
    assert not (run_dir / stage / "metrics.jsonl").exists()


@pytest.mark.slow
def test_contamination_that_the_recipe_allows_is_noted(started, tmp_path) -> None:
    recipe, run_dir = started
    allowed = [*options("reward", tmp_path), "stages.reward.max_contaminated_frac=0.25"]
    said = runs.finish(recipe, "reward", run_dir, overrides=allowed)
    assert "warn     contamination" in said
    note = runs.manifest(run_dir, "reward")["contamination"]["heldout"]
    assert (note["checked"], note["contaminated"], note["frac"]) == (4, 1, 0.25)
    assert note["first"] == [[f"{tmp_path}/held.jsonl:2", f"{tmp_path}/train.jsonl:5"]]
