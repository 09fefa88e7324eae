"""A block that is given in part keeps what its stage's default sets beside it."""

import re
from pathlib import Path
from typing import Any

import pytest

from align.recipe.algorithms import ALGORITHMS
from align.recipe.load import load_recipe, load_resolved
from align.recipe.schema import GrpoStage
from align.recipe.show import resolved_yaml

RECIPE = """\
name: toy
stages:
  base: {kind: base, build: {vocab_size: 128}, data: [{world: corpus}], steps: 1,
         optim: {schedule: linear}}
  ppo:
    kind: ppo
    init: base
    prompts: [{world: prompts}]
    rewards: [{kind: math}]
    steps: 4
    kl: {target: 2.0}
    critic: {optim: {learning_rate: 1.0e-3}}
  grpo:
    kind: grpo
    init: base
    prompts: [{world: prompts}]
    rewards: [{kind: math}]
    steps: 4
    kl: {coef: 0.1}
    tuning: {method: lora, rank: 4}
  evaluate:
    kind: evaluate
    models: [base]
    baseline: base
    prompts: [{world: prompts, rows: 2}]
    scores: [{kind: math}]
    judge: [{kind: math}]
    sampling: {max_new_tokens: 32}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write the recipe."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def stage(path: Path, name: str, *overrides: str) -> Any:
    return load_recipe(path, overrides).stages[name]


def test_evaluation_stays_greedy_where_only_the_length_is_given(path: Path):
    sampling = stage(path, "evaluate").sampling
    assert (sampling.max_new_tokens, sampling.temperature) == (32, 0.0)
    given = stage(path, "evaluate", "stages.evaluate.sampling={temperature: 0.5}").sampling
    assert (given.max_new_tokens, given.temperature) == (128, 0.5)


def test_blocks_of_every_depth_keep_the_stage_default(path: Path):
    assert (stage(path, "ppo").kl.coef, stage(path, "ppo").kl.target) == (0.05, 2.0)
    assert stage(path, "ppo").critic.optim.schedule == "constant"
    assert (stage(path, "base").optim.learning_rate, stage(path, "base").optim.schedule) == (
        1e-3,
        "linear",
    )
    kl = stage(path, "grpo").kl
    assert (kl.coef, kl.place, kl.estimator) == (0.1, "loss", "k3")
    assert stage(path, "grpo").tuning.rank == 4
    resolved = load_resolved(path)
    assert resolved.origins["stages.grpo.kl.place"] == "default"
    assert resolved.origins["stages.grpo.kl.coef"].endswith("r.yaml:19")


def test_algorithm_goes_before_the_stage_default(path: Path):
    kl = stage(path, "grpo", "stages.grpo.algorithm=rloo").kl
    assert (kl.coef, kl.place, kl.estimator) == (0.1, "reward", "k1")
    named = load_resolved(path, ["stages.grpo.algorithm=rloo"])
    assert named.origins["stages.grpo.kl.place"] == "algorithm: rloo"
    assert named.origins["stages.grpo.aggregation"] == "algorithm: rloo"
    assert named.origins["stages.grpo.kl.coef"].endswith("r.yaml:19")
    for block in ("null", "{penalty: 2.0}"):
        words = ["stages.grpo.algorithm=dapo", f"stages.grpo.overlong={block}"]
        overlong = stage(path, "grpo", *words).overlong
        assert overlong is None or (overlong.buffer_frac, overlong.penalty) == (0.2, 2.0)


def test_a_file_and_python_give_one_stage_for_every_algorithm(path: Path):
    for name, algorithm in ALGORITHMS.items():
        if not algorithm.needs_critic:
            made = stage(path, "grpo", f"stages.grpo.algorithm={name}")
            given = {
                "kind": "grpo",
                "init": "base",
                "prompts": [{"world": "prompts"}],
                "rewards": [{"kind": "math"}],
                "steps": 4,
                "kl": {"place": "loss", "estimator": "k3"} | algorithm.defaults.get("kl", {}),
                "tuning": {"method": "lora", "rank": 4},
                "optim": {"learning_rate": made.optim.learning_rate},
            }
            given["kl"]["coef"] = 0.1
            assert made == GrpoStage.model_validate(given | {"algorithm": name})


def test_show_explains_each_algorithm_and_stays_yaml(path: Path):
    for name, algorithm in ALGORITHMS.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}", algorithm.says), name
        assert ";" in algorithm.says, f"{name}: expected a formula and an edge case"
        words = [] if algorithm.needs_critic else [f"stages.grpo.algorithm={name}"]
        resolved = load_resolved(path, words)
        shown = resolved_yaml(resolved)
        told = " ".join(line.strip(" #") for line in shown.splitlines() if line.startswith("    #"))
        assert f"{name}: {algorithm.says}" in told
        (path.parent / "again.yaml").write_text(shown)
        assert load_recipe(path.parent / "again.yaml") == resolved.recipe
