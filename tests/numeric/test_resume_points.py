"""A run that dies after any optimizer step, between two mini-batches too, resumes to the bytes.

A checkpoint is written after whole rollout steps. What a dead process had in memory is gone here as
there: each attempt builds engine, policy, critic and controller anew.
"""

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB
from online_parts import STOP, critic_of, grpo_spec, policy_of, ppo_spec, reference_of, run_of

from align.core.log import MetricsLog
from align.core.types import PromptRow
from align.losses.kl import AdaptiveKL
from align.online.loop import OnlineRun, train_online
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.stages.rollouts import Push
from align.training.learner import Learner
from reward_models import build_reward

SPECS: dict[str, Any] = {
    "ppo": ppo_spec(
        steps=2,
        minibatches=2,
        update_epochs=1,
        checkpoint_every=1,
        kl={"coef": 0.1, "target": 0.5, "horizon": 20},
    ),
    "grpo": grpo_spec(steps=3, minibatches=2, checkpoint_every=2),
}
# Optimizer steps: 2 rollouts of 2 mini-batches of policy and critic; 3 of 2 of the policy. PPO is
# killed in its second rollout, where a checkpoint is there, and at the end of its first.
CALLS = {"ppo": range(4, 2 * 2 * 2 + 1), "grpo": range(1, 3 * 2 + 1)}


class Killed(BaseException):
    """Stand for a signal that no code can catch: nothing of align catches a BaseException."""


def new_run(model_dir: Path, name: str) -> OnlineRun:
    draw = random.Random(1)
    prompts = [PromptRow(tuple(draw.choices(range(2, VOCAB), k=k)), "", {}) for k in (3, 5, 2, 7)]
    engine = build_engine("hf", EngineOptions(model_dir, max_model_len=32, stop_token_ids=STOP))
    spec, policy = SPECS[name], policy_of(model_dir)
    parts: dict[str, Any] = {}
    if name == "ppo":
        parts = {"critic": critic_of(model_dir), "kl": AdaptiveKL(0.1, target=0.5, horizon=20)}
        parts["reference"] = reference_of(model_dir)
    return run_of(
        spec,
        policy,
        prompts=prompts,
        engine=engine,
        rewards=[build_reward({"kind": "regex", "pattern": "w4"})],
        push=Push(engine, policy, prompts[0].input_ids),
        **parts,
    )


def attempt(model_dir: Path, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Train to the end from whatever is in ``folder``; give every weight."""
    run = new_run(model_dir, name)
    metrics = MetricsLog(folder, total_steps=run.spec.steps)
    train_online(run, metrics=metrics, checkpoints=folder / "checkpoints")
    metrics.close()
    learners = {"policy": run.policy} | ({"critic": run.critic} if run.critic else {})
    found = {
        f"{part}.{n}": p.detach().clone()
        for part, learner in learners.items()
        for n, p in learner.module.named_parameters()
    }
    return found | {"kl": torch.tensor(run.kl.coef)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_run_killed_after_any_optimizer_step_ends_with_the_same_bytes(
    model_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = attempt(model_dir, name, tmp_path / "whole")
    step, left = Learner.step, [0]

    def counted(self: Learner, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = step(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return found

    monkeypatch.setattr(Learner, "step", counted)
    for calls in CALLS[name]:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        left[0] = calls
        with pytest.raises(Killed):
            attempt(model_dir, name, folder)
        resumed = attempt(model_dir, name, folder)
        assert resumed.keys() == whole.keys()
        for key, expected in whole.items():
            assert torch.equal(resumed[key], expected), f"killed after {calls}: {key}"
