"""docs/own-code.md: its examples are written to files, named in a recipe, and run."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from align.data.load import load_examples
from align.online.algorithms import find_estimator
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec
from align.stages.dpo import Sides, pair_losses
from reward_models import build_reward

PAGE = (Path(__file__).parents[2] / "docs" / "own-code.md").read_text(encoding="utf-8")
BASE = "name: page\nstages: {base: {kind: base, path: .}}"
NEEDED = {
    "grpo": {"init": "base", "prompts": [{"path": "p.jsonl"}], "steps": 1},
    "dpo": {"init": "base"},
    "sft": {"init": "base"},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for text in blocks("python"):
        name = re.match(r"# (\w+\.py)", text)
        assert name, text
        (tmp_path / name[1]).write_text(text)
    return tmp_path


def test_the_recipes_of_the_page_are_valid_with_its_files(folder: Path):
    recipe = yaml.safe_load(BASE)
    pieces = [
        yaml.safe_load(line) for text in blocks("yaml") for line in re.split(r"\n(?=\w)", text)
    ]
    rewards = [piece["rewards"] for piece in pieces if "rewards" in piece]
    (data,) = [piece["data"] for piece in pieces if "data" in piece]
    (stages,) = [piece["stages"] for piece in pieces if "stages" in piece]
    recipe["stages"] |= {name: stage | NEEDED[name] for name, stage in stages.items()}
    recipe["stages"]["grpo"]["rewards"] = rewards[0]
    recipe["stages"]["dpo"]["data"] = recipe["stages"]["sft"]["data"] = data
    assert len(rewards) >= 3
    for number, one in enumerate(rewards[1:]):
        recipe["stages"][f"grpo{number}"] = recipe["stages"]["grpo"] | {"rewards": one}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    spec = load_recipe(folder / "recipe.yaml").stages["grpo"]
    assert spec.estimator == f"{folder}/losses.py:best_of_group"


def test_the_judge_prefers_the_shorter_response(folder: Path):
    judge = build_reward({"kind": "python", "path": f"{folder}/my_judge.py:prefer"})
    found = judge(prompts=["?"] * 3, completions=["a", "bb", "c"], others=["aa", "b", "d"])
    assert found == [1.0, 0.0, 0.5]


def test_the_reward_and_the_map_do_what_the_page_says(folder: Path):
    reward = build_reward({"kind": "python", "path": f"{folder}/my_reward.py:score"})
    found = reward(prompts=["?", "?"], completions=["It is 4", "It is 5"], answer=["4", "4"])
    assert found == [1.0, 0.0]
    (folder / "rows.jsonl").write_text(
        '{"customer_text": "a", "agent_text": "b"}\n{"customer_text": "c", "agent_text": ""}\n'
    )
    spec = DataSpec(path=f"{folder}/rows.jsonl", map=f"{folder}/my.py:to_messages")
    (example,) = load_examples([spec], kind="sft", seed=0)
    assert example.completion[-1]["content"] == "b"


def test_the_advantage_and_the_losses_do_what_the_page_says(folder: Path):
    best = find_estimator(f"{folder}/losses.py:best_of_group")
    scores, groups = torch.tensor([1.0, 3.0, 3.0, 2.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    assert best(scores=scores, group_ids=groups).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    recipe = yaml.safe_load(BASE)
    dpo = {"kind": "dpo", "init": "base", "data": [{"path": "p"}], "loss": "losses.py:squared"}
    recipe["stages"]["dpo"] = dpo
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    spec = load_recipe(folder / "r.yaml").stages["dpo"]
    sums, none = torch.tensor([-3.0, -5.0]), torch.zeros(2)
    # beta 0.1: (1 - 0.1 * 2)^2.
    found = pair_losses(spec, Sides(sums, sums, none, none)).loss
    assert found.tolist() == pytest.approx([0.64])
