"""A TRL reward function, unchanged, in a GRPO that learns from it."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
import alone
from engine_models import VOCAB, save_tiny, tiny_model
from online_parts import grpo_spec, policy_of, run_of, weights

from align.core.types import PromptRow
from align.online.loop import online_step
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from reward_models import build_reward

TRL_FUNCTION = """
def reward_len(completion_ids, **kwargs):
    return [-abs(3 - len(ids)) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def _world():
    with alone.world_of_one():
        yield


def test_a_trl_reward_function_trains_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TRL_FUNCTION)
    reward = build_reward({"kind": "python", "path": f"{tmp_path}/mine.py:reward_len"})
    folder = save_tiny(tiny_model(1, tied=True), tmp_path / "model")
    draw = random.Random(0)
    prompts = [PromptRow(tuple(draw.choices(range(2, VOCAB), k=3)), "", {}) for _ in range(8)]
    policy = policy_of(folder)
    before = weights(policy)
    engine = build_engine("hf", EngineOptions(folder, max_model_len=32, stop_token_ids=(1, 2, 3)))
    run = run_of(
        grpo_spec(group_size=4, kl={"coef": 0.0}),
        policy,
        prompts=prompts,
        rewards=[reward],
        engine=engine,
        stop_token_ids=(1, 2, 3),
        push=lambda version: None,
    )
    found, _ = online_step(run, 0)
    assert found["reward/invalid_frac"] == 0.0
    assert found["reward/reward_len"] < 0.0
    assert max(float((a - b).abs().max()) for a, b in zip(before, weights(policy), strict=True)) > 0
