"""A block that is given in part keeps what its stage's default sets beside it."""

from pathlib import Path
from typing import Any

import pytest

from align.recipe.load import load_recipe, load_resolved

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
