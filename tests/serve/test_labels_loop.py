"""From labels to a reward model: a simulated annotator labels, the model ranks new pairs."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest

from align.core.artifacts import read_manifest
from align.data.labels import write_snapshot
from align.pipeline.planning import plan
from align.recipe.load import load_recipe
from align.serve.labels import MIGRATIONS
from align.serve.labels.export import export
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.quality import Rate
from align.serve.labels.tables import Project, create_project
from align.serve.labels.tasks import Answer, next_task, record_answer
from align.serve.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
import stage_runs as runs

UTILITIES = {"gladly": 2.0, "sure": 1.0, "well": 0.0, "hm": -1.0, "ugh": -2.0}
"""Utility of a response by its first word; the annotator prefers by Bradley-Terry (1952)."""
LABELS, HELDOUT, STEPS = 160, 60, 40


def pairs(count: int, *, seed: int) -> list[tuple[str, str, str]]:
    """Return prompts with two responses of different utility."""
    dice = random.Random(seed)
    both = list(itertools.permutations(UTILITIES, 2))
    words = ("pig", "fox", "cup", "red", "fig")
    return [
        (f"say {dice.choice(words)} {seed} {i}", f"{a}, the answer is {w}.", f"{b}, it is {w}.")
        for i in range(count)
        for (a, b), w in [(dice.choice(both), dice.choice(words))]
    ]


def utility(response: object) -> float:
    return UTILITIES[str(response).partition(",")[0]]


def label_all(runs_folder: Path) -> Path:
    """Label pairs as the simulated annotator does, and export the labels."""
    store = Store(runs_folder / ".serve")
    store.migrate("labels", MIGRATIONS)
    dice = random.Random(1)
    with store.write() as db:
        project = create_project(db, Project("simulated"))
        add_items(db, project, [Candidate(p, (a, b)) for p, a, b in pairs(LABELS, seed=1)])
        while (task := next_task(db, project, "simulated")) is not None:
            gap = utility(task.responses[0]) - utility(task.responses[1])
            left = dice.random() < 1 / (1 + math.exp(-gap))
            answer = Answer("left" if left else "right")
            record_answer(db, project, "simulated", task=task.id, answer=answer)
        return export(db, project)


def test_a_reward_model_trained_on_labels_ranks_held_out_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ALIGN_LABELS", str(tmp_path / "labels"))
    snapshot = label_all(tmp_path / "runs")
    heldout = tmp_path / "heldout.jsonl"
    ranked = [(p, *sorted((a, b), key=utility)) for p, a, b in pairs(HELDOUT, seed=2)]
    lines = [json.dumps({"prompt": p, "chosen": good, "rejected": bad}) for p, bad, good in ranked]
    heldout.write_text("\n".join(lines) + "\n")
    recipe = runs.write_recipe(tmp_path)
    text = recipe.read_text().partition("  reward:\n")[0] + (
        "  reward:\n    kind: reward\n    init: base\n    data: [{labels: simulated}]\n"
        f"    heldout: [{{path: {heldout}}}]\n    steps: {STEPS}\n    batch_size: 16\n"
        "    micro_tokens: 2048\n    norm_prompts: 8\n    optim: {learning_rate: 3.0e-3}\n"
    )
    recipe.write_text(text)
    run_dir = tmp_path / "runs" / "tiny"
    for stage in ("base", "reward"):
        runs.finish(recipe, stage, run_dir)
    manifest = read_manifest(run_dir / "reward")
    # The manifest names the snapshot that was read, with its hash and rows.
    file = snapshot / "preference.jsonl"
    listed = json.loads((snapshot / "snapshot.json").read_text())["files"]["preference.jsonl"]
    recorded = {entry["path"]: entry for entry in manifest["data"]}[str(file)]
    assert (recorded["sha256"], recorded["rows"]) == (listed["sha256"], LABELS)
    assert manifest["identity"]["files"][str(file)]["sha256"] == listed["sha256"]
    # Better than chance: the whole interval is above one half.
    accuracy = manifest["metrics"]["eval/accuracy"]
    found = Rate(round(accuracy * HELDOUT), HELDOUT)
    assert found.interval()[0] > 0.5, found
    # A newer snapshot is another input.
    assert reward_status(recipe, run_dir)[0] == "done"
    newer = write_snapshot("simulated", {"preference.jsonl": [json.loads(lines[0])]}, {})
    expected = ("changed", f"{newer / 'preference.jsonl'} is new")
    assert reward_status(recipe, run_dir) == expected


def reward_status(recipe: Path, run_dir: Path) -> tuple[str, str]:
    (stage,) = [s for s in plan(load_recipe(recipe), run_dir) if s.name == "reward"]
    return stage.status, stage.reason
