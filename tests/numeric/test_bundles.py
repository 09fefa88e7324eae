"""The online algorithms as bundles: what each sets, and its advantages against slow arithmetic."""

import math
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB, tiny_model
from online_parts import (
    COMMON,
    STOP,
    at_answers,
    critic_of,
    grpo_spec,
    naive_values,
    policy_of,
    ppo_spec,
    reference_of,
    run_of,
    sampled,
    scored,
)

from align.core.errors import TrainingError
from align.core.types import PromptRow
from align.online.advantages import overlong_penalty
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate
from align.online.loop import online_step, sample, score
from align.online.scoring import length_penalty
from align.recipe.algorithms import ALGORITHMS, Algorithm
from align.recipe.load import load_resolved
from align.recipe.rules import idle_options
from align.recipe.schema import GrpoStage
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.rollout import Experience, gather_experience
from align.stages.rollouts import Push
from reward_models import build_reward

LENGTHS = ((5, 3, 2), (1, 9, 4))
SCORES = [0.0, 1.0, 5.0, 2.0, 2.0, 7.0]
KL = 0.3
WITHOUT_CRITIC = [name for name, algorithm in ALGORITHMS.items() if not algorithm.needs_critic]


def known(scores: list[float | None], lengths=LENGTHS) -> Experience:
    """Give answers with scores and with log-probabilities under two policies, all made up."""
    experience = scored(sampled(lengths), scores)
    torch.manual_seed(6)
    old, ref = -3 * torch.rand(2, *experience.input_ids.shape)
    return experience.with_tokens(old_logprobs=old, ref_logprobs=ref)


def k1_of(experience: Experience) -> list[list[float]]:
    tokens = experience.per_token
    return at_answers((tokens["old_logprobs"] - tokens["ref_logprobs"]).double(), experience)


def advantages(experience: Experience, **options: Any) -> list[list[float]]:
    spec = grpo_spec(group_size=3, **options)
    found = build_algorithm(spec).estimate(experience, spec.kl.coef).per_token["advantages"]
    assert (found[~experience.mask] == 0.0).all()
    return at_answers(found, experience)


def per_answer(values: list[float], experience: Experience) -> list[list[float]]:
    counts = experience.completion.sum(1).tolist()
    return [[v] * n for v, n in zip(values, counts, strict=True)]


def assert_rows(found: list[list[float]], expected: list[list[float]], **bounds: float) -> None:
    for row, naive in zip(found, expected, strict=True):
        assert row == pytest.approx(naive, **({"abs": 1e-6} | bounds))


def centered(scores: list[float]) -> list[float]:
    groups = (scores[:3], scores[3:])
    return [s - statistics.fmean(g) for g in groups for s in g]


def test_dr_grpo_only_centers():
    experience = known(SCORES)
    expected = per_answer(centered(SCORES), experience)
    assert_rows(advantages(experience, algorithm="dr_grpo"), expected)


def test_rloo_takes_the_kl_off_the_score_and_compares_with_the_others():
    experience = known(SCORES)
    found = advantages(experience, algorithm="rloo", kl={"coef": KL})
    scores = [s - KL * math.fsum(k) for s, k in zip(SCORES, k1_of(experience), strict=True)]
    groups = (scores[:3], scores[3:])
    expected = [s - (math.fsum(g) - s) / 2 for g in groups for s in g]
    assert_rows(found, per_answer(expected, experience))


def test_reinforce_pp_whitens_rewards_to_go_over_the_batch():
    experience = known(SCORES)
    found = advantages(experience, algorithm="reinforce++", kl={"coef": KL})
    to_go = []
    for s, kl in zip(SCORES, k1_of(experience), strict=True):
        rewards = [-KL * k for k in kl]
        rewards[-1] += s
        to_go.append([math.fsum(rewards[t:]) for t in range(len(rewards))])
    flat = [x for row in to_go for x in row]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    assert_rows(found, [[(x - mean) / std for x in row] for row in to_go])


def test_whitened_rewards_keep_their_mean():
    # Rewards of five tokens: 0, 1 and 0, 0, 3. Mean 0.8, mean square 2, variance 2 - 0.64 = 1.36.
    def whitened(reward: float) -> float:
        return (reward - 0.8) / 1.36**0.5 + 0.8

    spec = ppo_spec(whiten_rewards=True, gamma=1.0, lam=1.0, kl={"coef": 0.0})
    experience = scored(sampled(((2, 3),)), [1.0, 3.0])
    experience = experience.with_tokens(values=torch.zeros(experience.input_ids.shape))
    found = build_algorithm(spec).estimate(experience, 0.0).per_token["returns"]
    first, second = at_answers(found, experience)
    assert first == pytest.approx([whitened(0) + whitened(1), whitened(1)])
    assert second == pytest.approx(
        [2 * whitened(0) + whitened(3), whitened(0) + whitened(3), whitened(3)]
    )


def test_reinforce_pp_baseline_divides_by_the_batch_and_a_dead_group_stays_exactly_zero():
    scores = [0.95, 0.95, 0.95, 2.0, 2.0, 7.0]
    experience = known(scores)
    found = advantages(experience, algorithm="reinforce++-baseline")
    deviations = centered([0.0, 0.0, 0.0, 2.0, 2.0, 7.0])
    std = statistics.pstdev(deviations)
    assert_rows(found, per_answer([d / std for d in deviations], experience))
    assert {a for row in found[:3] for a in row} == {0.0}
    alike = known([0.95] * 6)
    found = advantages(alike, algorithm="reinforce++-baseline")
    assert {a for row in found for a in row} == {0.0}


def test_remax_compares_with_the_greedy_answer_and_leaves_out_a_prompt_without_one():
    experience = known(SCORES)
    greedy = torch.tensor([0.5] * 3 + [float("nan")] * 3)
    mask = experience.mask & ~greedy.isnan().unsqueeze(1)
    experience = replace(experience, greedy_scores=greedy, mask=mask)
    found = advantages(experience, algorithm="remax", kl={"coef": KL})
    kl = [math.fsum(k) for k in k1_of(experience)]
    expected = [SCORES[i] - KL * kl[i] - 0.5 for i in range(3)] + [0.0] * 3
    assert_rows(found, per_answer(expected, experience))


def test_grpo_of_a_group_with_one_valid_answer_is_exactly_zero():
    experience = known([3.0, None, None, 1.0, 2.0, None])
    for options in ({}, {"scale": "none"}, {"scale": "batch"}, {"algorithm": "rloo"}):
        found = advantages(experience, **({"kl": {"coef": 0.0}} | options))
        assert {a for row in found[:3] for a in row} == {0.0}
        assert found[3][0] < 0.0 < found[4][0]


@pytest.mark.parametrize("name", ["max_rl", "no_such_module:max_rl", "align.online.loop:max_rl"])
def test_an_unknown_estimator_is_an_error_and_never_group_relative(monkeypatch, name):
    """Also where its line is there and its function is not."""
    monkeypatch.setitem(ALGORITHMS, "max_rl", Algorithm(name))
    spec = grpo_spec(group_size=3, algorithm="max_rl")
    with pytest.raises(TrainingError, match="estimator '?" + name):
        build_algorithm(spec)


def test_an_estimator_that_takes_what_no_step_has_is_an_error(monkeypatch):
    # token_mean(x, mask, num_tokens): no step has an x.
    name = "align.losses.reduce:token_mean"
    monkeypatch.setitem(ALGORITHMS, "mean", Algorithm(name))
    with pytest.raises(TrainingError, match="takes x, mask, num_tokens; expected some of scores"):
        build_algorithm(grpo_spec(algorithm="mean"))


@given(st.integers(1, 60), st.floats(0.05, 1.0))
def test_overlong_penalty_equals_the_definition(limit, share):
    buffer = share * limit
    lengths = torch.arange(1, limit + 3)
    found = overlong_penalty(lengths, limit=limit, buffer=buffer).tolist()
    for n, value in zip(lengths.tolist(), found, strict=True):
        if n <= limit - buffer:
            expected = 0.0
        elif n <= limit:
            expected = ((limit - buffer) - n) / buffer
        else:
            expected = -1.0
        assert value == pytest.approx(expected, abs=1e-4)


def test_overlong_penalty_equals_trl():
    rewards = pytest.importorskip("trl.rewards", reason="TRL is the oracle of this test")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=5)
    lengths = [1, 15, 16, 19, 20]
    found = overlong_penalty(torch.tensor(lengths), limit=20, buffer=5)
    assert found.tolist() == pytest.approx(theirs([[0] * n for n in lengths]))


def test_dapo_takes_the_overlong_penalty_off_the_score():
    # max_new_tokens 6, buffer 0.5 of it: answers of 3, 4, 5, 6 tokens lose 0, 1/3, 2/3, 1 twice.
    spec = grpo_spec(algorithm="dapo", overlong={"buffer_frac": 0.5, "penalty": 2.0})
    experience = sampled(((3, 4), (5, 6)))
    penalty = length_penalty(experience, spec)
    found = scored(experience, [1.0, 1.0, None, 1.0], penalty=penalty).scores.tolist()
    assert found[:2] == pytest.approx([1.0, 1 / 3])
    assert math.isnan(found[2])
    assert found[3] == pytest.approx(-1.0)
    assert length_penalty(experience, grpo_spec()) is None


def test_ppo_bootstraps_what_was_cut_with_the_critics_own_value(model_dir) -> None:
    """V behind a cut answer is V at the next token of the same answer one token longer."""
    longer = sampled(((5,), (4,), (7,)), length=(0, 2))
    shorter = [
        replace(c, token_ids=c.token_ids[:-1], logprobs=c.logprobs[:-1]) for c in longer.completions
    ]
    experience = gather_experience(longer.prompts, [[c] for c in shorter])
    critic, policy = critic_of(model_dir), policy_of(model_dir)
    for micro_tokens in (1, 1000):
        spec = ppo_spec(truncation="bootstrap", micro_tokens=micro_tokens, kl={"coef": 0.0})
        found = annotate(
            scored(experience, [1.0] * 3), policy, spec, old=True, reference=None, critic=critic
        )
        expected = [row[-1] for row in naive_values(critic, longer)]
        assert found.bootstrap is not None
        assert found.bootstrap.tolist() == pytest.approx([expected[0], 0.0, expected[2]], abs=2e-5)
        values = at_answers(found.per_token["values"], found)
        returns = at_answers(build_algorithm(spec).estimate(found, 0.0).per_token["returns"], found)
        # A cut answer has not ended: what follows is worth V, and there is no score. One that
        # stopped has its score 1, and nothing follows.
        for row, v, end in zip(returns, values, (expected[0], 1.0, expected[2]), strict=True):
            # gamma 1, lambda 0.95
            assert row[-1] == pytest.approx(end, abs=2e-5)
            delta = v[-1] - v[-2]
            assert row[-2] == pytest.approx(v[-2] + delta + 0.95 * (end - v[-1]), abs=2e-5)


def online_run(model_dir: Path, spec: Any, reward: dict[str, Any]) -> Any:
    draw = random.Random(1)
    prompts = [PromptRow(tuple(draw.choices(range(2, VOCAB), k=k)), "", {}) for k in (3, 5, 2, 7)]
    engine = build_engine("hf", EngineOptions(model_dir, max_model_len=32, stop_token_ids=STOP))
    policy = policy_of(model_dir)
    return run_of(
        spec,
        policy,
        prompts=prompts,
        rewards=[build_reward(reward)],
        engine=engine,
        push=Push(engine, policy, prompts[0].input_ids),
        reference=reference_of(model_dir),
    )


def test_greedy_scores_are_those_of_the_most_likely_answers(model_dir) -> None:
    spec = grpo_spec(algorithm="remax", group_size=2)
    run = online_run(model_dir, spec, {"kind": "regex", "pattern": "w[1-3]"})

    # A score of its own for each response: the sum of its token ids.
    def reward(*, completion_ids, **_):
        return [float(sum(i for i in ids if i not in STOP)) for ids in completion_ids]

    reward.name, reward.weight = "sum", 1.0
    run.rewards = [reward]
    experience, _ = score(run, sample(run, 0))
    model, expected = tiny_model(1, tied=True).double(), []
    for prompt in experience.prompts[::2]:
        ids: list[int] = list(prompt.input_ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in STOP:
                break
        said = [i for i in ids[len(prompt.input_ids) :] if i not in STOP]
        expected += [float(sum(said))] * 2
    assert len(set(expected)) > 1
    assert experience.greedy_scores is not None
    assert experience.greedy_scores.tolist() == expected


def test_disagreement_is_that_of_the_sampled_answers_and_not_of_the_greedy_ones(model_dir) -> None:
    run = online_run(
        model_dir,
        grpo_spec(algorithm="remax", group_size=2),
        {"kind": "regex", "pattern": "w[1-3]"},
    )

    def reward(*, completion_ids, **_):
        reward.disagreement = float(len(completion_ids))  # as an ensemble sets it at each call
        return [float(sum(ids)) for ids in completion_ids]

    reward.name, reward.weight = "sum", 1.0
    run.rewards = [reward]
    found, _ = online_step(run, 0)
    assert found["reward/disagreement"] == 4 * 2  # prompts_per_step x group_size; greedy: 4


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_every_bundle_takes_an_online_step(model_dir, name: str) -> None:
    spec = grpo_spec(algorithm=name, group_size=2, minibatches=2, update_epochs=2)
    run = online_run(model_dir, spec, {"kind": "regex", "pattern": "w4"})
    before = [p.detach().clone() for p in run.policy.module.parameters()]
    found, _ = online_step(run, 0)
    assert math.isfinite(found["policy/loss"])
    assert found["policy/grad_norm"] > 0.0
    assert 0.0 <= found["sampler/bounded_frac"] <= 1.0
    moved = zip(run.policy.module.parameters(), before, strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def stage(**options: Any) -> GrpoStage:
    return GrpoStage(kind="grpo", **(COMMON | options))


def test_preset_lies_under_the_recipe_and_one_level_down():
    spec = stage(algorithm="dapo", clip={"high": 0.4})
    assert (spec.clip.low, spec.clip.high, spec.dynamic_sampling) == (0.2, 0.4, True)
    assert stage(algorithm="dapo", overlong=None).overlong is None
    rloo = stage(algorithm="rloo", kl={"coef": 0.2})
    assert (rloo.kl.coef, rloo.kl.place, rloo.kl.estimator) == (0.2, "reward", "k1")
    for name in WITHOUT_CRITIC:
        spec = stage(algorithm=name)
        assert GrpoStage(**spec.model_dump()) == spec


def test_show_names_the_algorithm_that_a_value_comes_from(tmp_path: Path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(
        "name: a\nstages:\n  base: {kind: base, path: ./x}\n  rl:\n    kind: grpo\n    init: base\n"
        "    algorithm: dapo\n    prompts: [{world: prompts, rows: 9}]\n    steps: 1\n"
        "    rewards: [{kind: regex, pattern: x}]\n    minibatches: 2\n    clip: {low: 0.1}\n"
    )
    origins = load_resolved(recipe).origins
    assert origins["stages.rl.clip.high"] == "algorithm: dapo"
    assert origins["stages.rl.clip.low"].startswith(str(recipe))
    assert origins["stages.rl.scale"] == "default"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, "group_size must be 2"),
        ({"truncation": "bootstrap"}, "critic"),
        ({"objective": "gspo"}, "aggregation: sequence"),
        ({"objective": "gspo", "aggregation": "sequence"}, "never falls by 0.2"),
        ({"kl": {"coef": 0.1, "place": "loss", "estimator": "k2", "corrected": True}}, "corrected"),
        ({"kl": {"coef": 0.1, "place": "reward", "estimator": "k2"}}, "k2 in the reward"),
        ({"kl": {"coef": 0.1, "place": "reward", "estimator": "k3"}}, "k3 in the reward"),
        ({"kl": {"coef": 0.1, "place": "loss", "estimator": "k1"}}, "zero expected gradient"),
        ({"algorithm": "grop"}, "dr_grpo"),
    ],
)
def test_options_without_sense_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        stage(**options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"estimator": "leave_one_out"}, "scale"),
        ({"algorithm": "rloo", "scale": "batch"}, "scale"),
        ({"algorithm": "remax", "dynamic_sampling": True}, "dynamic_sampling"),
        ({"truncation": "mask", "truncated_score": 0.0}, "truncated_score"),
        ({"algorithm": "cispo", "minibatches": 2, "clip": {"dual": 3.0}}, "clip.dual"),
    ],
)
def test_options_without_effect_are_refused(options, key):
    ((found, reason),) = idle_options(stage(**options))
    assert found == key
    assert "no effect" in reason


def test_ppo_refuses_two_opinions_of_a_cut_answer():
    with pytest.raises(ValidationError, match="contradict each other"):
        ppo_spec(truncation="bootstrap", truncated_score=-1.0)
