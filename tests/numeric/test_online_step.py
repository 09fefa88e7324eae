"""A whole online step: where it starts, what it says of itself, and PPO by hand in float64."""

import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB, tiny_model
from online_parts import (
    FULL,
    LORA,
    STOP,
    TEMPERATURE,
    at_answers,
    critic_of,
    grpo_spec,
    naive_logprobs,
    naive_values,
    policy_of,
    ppo_spec,
    reference_of,
    run_of,
    sampled,
    scored,
    weights,
)

from align.core.types import PromptRow
from align.losses.kl import AdaptiveKL
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import online_step, update
from align.online.scoring import Scores
from align.online.summary import summarize
from align.recipe.schema.tuning import TuningSpec
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.stages.online import build_run
from align.stages.rollouts import Push
from align.training.learner import learning_rate
from reward_models import build_reward

LENGTHS = ((5, 3), (1, 9), (4, 4))


def first_step(
    model_dir: Path, spec: Any, tuning: TuningSpec = FULL, **parts: Any
) -> dict[str, float]:
    draw = random.Random(1)
    prompts = [PromptRow(tuple(draw.choices(range(2, VOCAB), k=k)), "", {}) for k in (3, 5, 2, 7)]
    engine = build_engine("hf", EngineOptions(model_dir, max_model_len=32, stop_token_ids=STOP))
    policy = policy_of(model_dir, tuning)
    run = run_of(
        spec,
        policy,
        prompts=prompts,
        rewards=[build_reward({"kind": "regex", "pattern": "w[1-3]"})],
        engine=engine,
        push=Push(engine, policy, prompts[0].input_ids),
        critic=critic_of(model_dir) if spec.kind == "ppo" else None,
        **({"reference": policy.module if tuning is LORA else reference_of(model_dir)} | parts),
    )
    return online_step(run, 0)[0]


@pytest.mark.parametrize("kind", ["grpo", "grpo_lora", "ppo"])
def test_first_online_step_starts_at_the_reference(model_dir, kind) -> None:
    kl = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    if kind == "ppo":
        spec: Any = ppo_spec(update_epochs=1, kl={"coef": 0.1})
    else:
        spec = grpo_spec(group_size=4, kl=kl)
    found = first_step(model_dir, spec, LORA if kind == "grpo_lora" else FULL)
    for name in ("kl/reference", "kl/reference_per_answer", "kl/reference_k3"):
        assert found[name] == pytest.approx(0.0, abs=1e-6), name
    assert found["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert found["policy/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["policy/clip_frac"] == 0.0
    assert found["sampler/logprob_gap"] == pytest.approx(0.0, abs=1e-5)
    assert found["kl/sampler"] == pytest.approx(0.0, abs=1e-5)


def test_the_adaptive_kl_follows_the_kl_of_a_response(model_dir, other_dir) -> None:
    """The target lies between the KL of a token and of a response: the coefficient must rise."""
    spec = grpo_spec(group_size=2, kl={"coef": 0.1, "place": "loss", "estimator": "k3"})
    found = first_step(model_dir, spec, reference=reference_of(other_dir))
    token, answer = found["kl/reference"], found["kl/reference_per_answer"]
    assert 0.0 < token < answer
    for target in (math.sqrt(token * answer), answer / 1.1):
        controller = AdaptiveKL(0.1, target=target, horizon=100.0)
        first_step(model_dir, spec, reference=reference_of(other_dir), kl=controller)
        # Four prompts with two responses each: 8 of 100.
        error = min(answer / target - 1.0, 0.2)
        assert controller.coef == pytest.approx(0.1 * (1.0 + error * 0.08), rel=1e-6)


@pytest.mark.parametrize(("step", "moves"), [(0, False), (1, False), (2, True)])
def test_only_the_critic_moves_while_it_warms_up(model_dir, step, moves) -> None:
    spec = ppo_spec(kl={"coef": 0.0}, critic={"warmup_steps": 2})
    policy, critic = policy_of(model_dir), critic_of(model_dir)
    before = [weights(policy), weights(critic)]
    experience = scored(sampled(LENGTHS), [0.0, 1.0, 2.0, 1.0, 0.0, 3.0])
    experience = annotate(experience, policy, spec, old=True, reference=None, critic=critic)
    experience = build_algorithm(spec).estimate(experience, 0.0)
    update(run_of(spec, policy, critic=critic), experience, step=step, kl_coef=0.0)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(old, weights(learner), strict=True))
        for old, learner in zip(before, (policy, critic), strict=True)
    ]
    assert moved == [moves, True]


def test_the_critic_warms_up_before_the_policys_schedule_begins(model_dir) -> None:
    spec = ppo_spec(
        steps=10,
        minibatches=2,
        update_epochs=3,
        optim={"learning_rate": 1.0, "schedule": "linear", "warmup_frac": 0.0},
        critic={"warmup_steps": 4},
    )
    parts: Any = SimpleNamespace(
        module=LogprobModel(load_policy(model_dir, dtype="float32")),
        chat=SimpleNamespace(stop_token_ids=STOP),
        prompts=[PromptRow((3, 4), "", {})],
        rewards=[],
        engine=None,
        source=SimpleNamespace(model_dir=model_dir),
        reference=None,
    )
    context: Any = SimpleNamespace(seed=1, name="ppo")
    run = build_run(spec, context, parts)
    # 6 steps of 2 x 3 updates remain to the policy, 10 to the critic: both end at rate 0.
    assert run.critic is not None
    assert (run.policy.total_steps, run.critic.total_steps) == (36, 60)
    assert learning_rate(spec.optim, 35, run.policy.total_steps) == pytest.approx(1 / 36)


def test_summary_has_the_explained_variance_by_its_definition(model_dir) -> None:
    experience = scored(sampled(LENGTHS), [0.0, None, 2.0, 1.0, 0.0, 3.0])
    shape = experience.input_ids.shape
    torch.manual_seed(3)
    returns = torch.randn(shape)
    values = 0.6 * returns + 0.5 * torch.randn(shape)
    experience = experience.with_tokens(returns=returns, values=values)
    found = summarize(experience, Scores([], {}), ppo_spec())
    kept = [x.double()[experience.mask].numpy() for x in (values, returns)]
    expected = 1.0 - np.var(kept[1] - kept[0]) / np.var(kept[1])
    assert found["value/explained_variance"] == pytest.approx(expected, abs=1e-5)
    assert found["reward/mean"] == pytest.approx(6.0 / 5)
    assert found["reward/invalid_frac"] == pytest.approx(1 / 6)
    assert found["length/mean"] == pytest.approx(26 / 6)


def naive_ppo(
    old: list[list[float]], ref: list[list[float]], values: list[list[float]], scores: list[float]
) -> tuple[list[list[float]], list[list[float]]]:
    """Write PPO's advantages and returns out: kl 0.3, gamma 0.9, lambda 0.8, whitened."""
    advantages, returns = [], []
    for l_old, l_ref, v, score in zip(old, ref, values, scores, strict=True):
        rewards = [-0.3 * (a - b) for a, b in zip(l_old, l_ref, strict=True)]
        rewards[-1] += score
        row, following, next_value = [], 0.0, 0.0
        for t in reversed(range(len(v))):
            following = rewards[t] + 0.9 * next_value - v[t] + 0.9 * 0.8 * following
            next_value = v[t]
            row.insert(0, following)
        advantages.append(row)
        returns.append([a + b for a, b in zip(row, v, strict=True)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    return [[(a - mean) / std for a in row] for row in advantages], returns


def test_whole_ppo_step_equals_float64_by_hand(model_dir, other_dir) -> None:
    spec = ppo_spec(
        kl={"coef": 0.3}, gamma=0.9, lam=0.8, update_epochs=1, importance={"mode": "none"}
    )
    policy, critic = policy_of(model_dir), critic_of(model_dir)
    experience = scored(sampled(((5,), (3,))), [1.5, -0.5])
    found = annotate(
        experience, policy, spec, old=True, reference=reference_of(other_dir), critic=critic
    )
    found = build_algorithm(spec).estimate(found, 0.3)
    values = naive_values(critic, experience)
    advantages, returns = naive_ppo(
        naive_logprobs(1, experience), naive_logprobs(2, experience), values, [1.5, -0.5]
    )
    for name, expected in (("advantages", advantages), ("returns", returns)):
        rows = at_answers(found.per_token[name], experience)
        for row, naive in zip(rows, expected, strict=True):
            assert row == pytest.approx(naive, abs=1e-4), name
    stats = update(run_of(spec, policy, critic=critic), found, step=0, kl_coef=0.3)
    # The ratio is 1 and whitened advantages have mean 0; the critic's loss is half the mean square.
    rows = zip(values, returns, strict=True)
    errors = [(v - r) ** 2 for vs, rs in rows for v, r in zip(vs, rs, strict=True)]
    assert stats["policy/loss"] == pytest.approx(0.0, abs=1e-5)
    assert stats["value/loss"] == pytest.approx(0.5 * sum(errors) / len(errors), rel=1e-4)
    assert stats["policy/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_ppo_policy_gradient_equals_float64_by_hand(model_dir, other_dir) -> None:
    """At ratio 1 the gradient is that of -mean(A log p): one textbook AdamW step of it."""
    spec = ppo_spec(
        kl={"coef": 0.3}, gamma=0.9, lam=0.8, update_epochs=1, importance={"mode": "none"}
    )
    policy, critic = policy_of(model_dir), critic_of(model_dir)
    experience = scored(sampled(((5,), (3,))), [1.5, -0.5])
    found = annotate(
        experience, policy, spec, old=True, reference=reference_of(other_dir), critic=critic
    )
    found = build_algorithm(spec).estimate(found, 0.3)
    advantages, _ = naive_ppo(
        naive_logprobs(1, experience),
        naive_logprobs(2, experience),
        naive_values(critic, experience),
        [1.5, -0.5],
    )
    model = tiny_model(1, tied=True).double()
    total = 0.0
    for prompt, answer, row in zip(
        experience.prompts, experience.completions, advantages, strict=True
    ):
        ids = [*prompt.input_ids, *answer.token_ids]
        logprobs = (model(torch.tensor([ids])).logits[0] / TEMPERATURE).log_softmax(-1)
        for k, a in enumerate(row):
            at = len(prompt.input_ids) + k
            total = total - a * logprobs[at - 1, ids[at]] / 8
    names = [n for n, _ in model.named_parameters()]
    gradients = torch.autograd.grad(total, list(model.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    stats = update(run_of(spec, policy, critic=critic), found, step=0, kl_coef=0.3)
    assert stats["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    moved = dict(policy.module.model.named_parameters())
    before = dict(model.named_parameters())
    for name, g in zip(names, gradients, strict=True):
        g = g * min(1.0, 1.0 / norm)
        # After one step Adam's moments, corrected, are the gradient and its square.
        expected = before[name].detach() - 1e-3 * g / (g.abs() + 1e-4)
        torch.testing.assert_close(moved[name].detach().double(), expected, atol=2e-5, rtol=0.0)
