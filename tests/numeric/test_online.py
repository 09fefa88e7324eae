"""Annotations, scores and dynamic sampling of an online step, against slow arithmetic."""

import math
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import VOCAB
from online_parts import (
    LORA,
    STOP,
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

from align.core.distributed import derive_seed
from align.core.errors import TrainingError
from align.core.types import PromptRow
from align.online.algorithms import build_algorithm
from align.online.annotate import annotate, plan_by_prompt
from align.online.loop import sample, score, update
from align.online.minibatches import mini_batches
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.rollout import Experience
from reward_models import build_reward

LENGTHS = ((5, 3), (1, 9), (4, 4))


def test_annotations_equal_float64_one_answer_at_a_time(model_dir, other_dir) -> None:
    experience, critic = sampled(LENGTHS), critic_of(model_dir)
    found = annotate(
        experience,
        policy_of(model_dir),
        ppo_spec(),
        old=True,
        reference=reference_of(other_dir),
        critic=critic,
    )
    for name, expected in {
        "old_logprobs": naive_logprobs(1, experience),
        "ref_logprobs": naive_logprobs(2, experience),
        "values": naive_values(critic, experience),
    }.items():
        for row, naive in zip(at_answers(found.per_token[name], experience), expected, strict=True):
            assert row == pytest.approx(naive, abs=2e-5), name


def test_responses_that_are_not_trained_are_annotated_too(model_dir, other_dir) -> None:
    """The KL of the reward and of the metrics is over all responses, also those without a score."""
    experience = sampled(LENGTHS)
    left_out = scored(experience, [None, 1.0, 2.0, None, 0.0, 3.0])
    assert left_out.mask.any(1).tolist() == [False, True, True, False, True, True]
    policy, reference = policy_of(model_dir), reference_of(other_dir)
    whole, found = (
        annotate(x, policy, ppo_spec(), old=True, reference=reference, critic=None)
        for x in (experience, left_out)
    )
    for name in ("old_logprobs", "ref_logprobs"):
        assert torch.equal(found.per_token[name], whole.per_token[name]), name
        assert (found.per_token[name][experience.completion] < 0.0).all(), name


def test_annotations_do_not_depend_on_the_micro_batches(model_dir, other_dir) -> None:
    experience = sampled(LENGTHS)
    parts = (policy_of(model_dir), critic_of(model_dir), reference_of(other_dir))
    tensors = [
        annotate(
            experience,
            parts[0],
            ppo_spec(micro_tokens=size),
            old=True,
            reference=parts[2],
            critic=parts[1],
        ).per_token
        for size in (1, 20, 1000)
    ]
    for name in ("old_logprobs", "ref_logprobs", "values"):
        for found in tensors[1:]:
            keep = experience.completion
            torch.testing.assert_close(
                found[name][keep], tensors[0][name][keep], atol=1e-5, rtol=1e-5
            )


def test_value_at_a_token_does_not_see_it(model_dir) -> None:
    experience, critic = sampled(((6,),)), critic_of(model_dir)
    at = int(experience.lengths[0]) - 3
    changed = experience.input_ids.clone()
    changed[0, at] = (changed[0, at] + 1) % VOCAB
    other = replace(experience, input_ids=changed)

    def values(x: Experience) -> Tensor:
        spec = ppo_spec()
        return annotate(
            x, policy_of(model_dir), spec, old=False, reference=None, critic=critic
        ).per_token["values"][0]

    before, after = values(experience), values(other)
    assert torch.equal(before[: at + 1], after[: at + 1])
    assert (before[at + 1 :] - after[at + 1 :]).abs().min() > 1e-6


def perturb(module: torch.nn.Module) -> None:
    """Give every trainable weight noise, so that the adapter is no longer 0."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_reference_with_the_adapter_off_is_the_start_of_the_stage(model_dir) -> None:
    experience = sampled(LENGTHS)
    spec = grpo_spec(kl={"coef": 0.1, "place": "loss", "estimator": "k3"})
    policy = policy_of(model_dir, LORA)
    start = annotate(experience, policy, spec, old=True, reference=policy.module, critic=None)
    assert torch.equal(start.per_token["old_logprobs"], start.per_token["ref_logprobs"])
    perturb(policy.module)
    moved = annotate(experience, policy, spec, old=True, reference=policy.module, critic=None)
    frozen = annotate(
        experience, policy, spec, old=False, reference=reference_of(model_dir), critic=None
    )
    keep = experience.completion
    found = moved.per_token["ref_logprobs"][keep]
    assert torch.equal(found, frozen.per_token["ref_logprobs"][keep])
    assert (moved.per_token["old_logprobs"][keep] - found).abs().max() > 1e-2
    before = [p.detach().clone() for p in policy.module.parameters() if p.requires_grad]
    assert len(before) == 28  # A and B of seven matrices in two layers
    trained = build_algorithm(spec).estimate(scored(moved, [0.0, 1.0, 2.0, 1.0, 0.0, 3.0]), 0.1)
    update(run_of(spec, policy), trained, step=0, kl_coef=0.1)
    after = [p for p in policy.module.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("importance", ["none", "truncate", "mask"])
def test_old_logprobs_are_not_needed_for_one_step_of_grpo(model_dir, importance) -> None:
    spec = grpo_spec(importance={"mode": importance})
    assert not build_algorithm(spec).needs_old_logprobs
    assert build_algorithm(grpo_spec(update_epochs=2)).needs_old_logprobs
    assert build_algorithm(grpo_spec(minibatches=2)).needs_old_logprobs
    assert build_algorithm(ppo_spec(update_epochs=1, kl={"coef": 0.0})).needs_old_logprobs
    found = []
    for old in (False, True):
        policy = policy_of(model_dir)
        experience = scored(sampled(LENGTHS), [0.0, 1.0, 2.0, 1.0, 0.0, 3.0])
        experience = annotate(experience, policy, spec, old=old, reference=None, critic=None)
        experience = build_algorithm(spec).estimate(experience, 0.0)
        stats = update(run_of(spec, policy), experience, step=0, kl_coef=0.0)
        found.append((weights(policy), stats))
    for skipped, computed in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(skipped, computed, atol=1e-6, rtol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
    start = weights(policy_of(model_dir))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[0][0], start, strict=True))


def test_every_epoch_takes_each_answer_once_in_other_mini_batches() -> None:
    experience = sampled(((2, 3),) * 12)
    seeds = [None, 1, 2, 3]
    epochs = [mini_batches(experience, 3, num_prompts=12, seed=seed) for seed in seeds]
    for parts in epochs:
        assert [len(part) for part in parts] == [8, 8, 8]
        assert sorted(row for part in parts for row in part) == list(range(24))
        for part in parts:  # both answers to a prompt, side by side
            assert [row // 2 for row in part[::2]] == [row // 2 for row in part[1::2]]
    assert epochs[0] == [list(range(0, 8)), list(range(8, 16)), list(range(16, 24))]
    sets = [{frozenset(part) for part in parts} for parts in epochs]
    assert all(a.isdisjoint(b) for i, a in enumerate(sets) for b in sets[:i])
    # For a resumed run:
    assert mini_batches(experience, 3, num_prompts=12, seed=1) == epochs[1]
    # One mini-batch is the whole step in each epoch.
    assert mini_batches(experience, 1, num_prompts=12, seed=1) == [list(range(24))]


def test_every_rank_has_the_same_number_of_mini_batches() -> None:
    """A rank with fewer answers, or none, waits for no one and keeps no one waiting."""
    for prompts, sizes in ((5, [4, 4, 2, 0]), (1, [2, 0, 0, 0]), (0, [0, 0, 0, 0])):
        experience = sampled(((2, 3),) * prompts)
        parts = mini_batches(experience, 4, num_prompts=8, seed=None)
        assert [len(rows) for rows in parts] == sizes


def test_an_update_takes_the_mini_batches_of_each_epoch(model_dir) -> None:
    """Three epochs at once are those of three calls that play one epoch each, by hand."""
    spec = grpo_spec(minibatches=2, update_epochs=3, prompts_per_step=4)
    found = []
    for at_once in (True, False):
        policy = policy_of(model_dir)
        experience = scored(sampled(((2, 3), (4, 1), (3, 3), (1, 5))), [0.0, 1.0] * 4)
        experience = annotate(experience, policy, spec, old=True, reference=None, critic=None)
        experience = build_algorithm(spec).estimate(experience, 0.0)
        if at_once:
            update(run_of(spec, policy), experience, step=2, kl_coef=0.0)
        else:
            for epoch in range(3):
                shuffle = derive_seed(3, "minibatches", 2, epoch) if epoch else None
                for rows in mini_batches(experience, 2, num_prompts=4, seed=shuffle):
                    mask = experience.mask[rows]
                    counts = {"tokens": float(mask.sum()), "answers": float(mask.any(1).sum())}
                    micro = [
                        experience.micro(part, counts)
                        for part in plan_by_prompt(experience, rows, spec.micro_tokens)
                    ]
                    policy.step(micro, partial(build_algorithm(spec).policy_objective, kl_coef=0.0))
        found.append(weights(policy))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


SCORES = [0.0, 1.0, 5.0, None, 2.0, 4.0, None, 7.0]
GROUPS_OF_FOUR = ((3, 5, 2, 6), (4, 1, 7, 2))


def test_group_relative_leaves_answers_without_a_score_out(model_dir) -> None:
    """Hand numbers. Group 1: 0, 1, 5: mean 2, sample variance (4 + 1 + 9) / 2 = 7. Group 2: 2, 4,
    7: mean 13/3, variance ((7/3)^2 + (1/3)^2 + (8/3)^2) / 2 = 19/3.
    """
    spec = grpo_spec(group_size=4)
    experience = scored(sampled(GROUPS_OF_FOUR), SCORES)
    found = build_algorithm(spec).estimate(experience, 0.0)
    first, second = math.sqrt(7.0) + 1e-4, math.sqrt(19 / 3) + 1e-4
    expected = [-2 / first, -1 / first, 3 / first, 0]
    expected += [-7 / 3 / second, -1 / 3 / second, 0, 8 / 3 / second]
    for row, keep, value in zip(
        found.per_token["advantages"], experience.completion, expected, strict=True
    ):
        assert row[keep].tolist() == pytest.approx([value] * int(keep.sum()), abs=1e-6)
        assert (row[~keep] == 0).all()
    assert not experience.mask[[3, 6]].any()


def test_answers_without_a_score_do_not_change_the_update(model_dir) -> None:
    """Both denominators: tokens of the valid answers, and the valid answers."""
    for aggregation in ("token", "sequence", "constant"):
        spec = grpo_spec(group_size=2, aggregation=aggregation)
        found = []
        for lengths, scores in (
            (((3, 5, 4), (4, 1, 6)), [0.0, 1.0, None, 2.0, 0.0, None]),
            (((3, 5, 4), (4, 1, 6)), None),
        ):
            policy, experience = policy_of(model_dir), sampled(lengths)
            if scores is None:  # the same answers without the invalid ones
                rows = torch.tensor([0, 1, 3, 4])
                experience = Experience(
                    input_ids=experience.input_ids[rows],
                    lengths=experience.lengths[rows],
                    mask=experience.mask[rows],
                    completion=experience.completion[rows],
                    scores=experience.scores[rows],
                    truncated=experience.truncated[rows],
                    group_ids=experience.group_ids[rows],
                    per_token={k: v[rows] for k, v in experience.per_token.items()},
                )
                scores = [0.0, 1.0, 2.0, 0.0]
            experience = build_algorithm(spec).estimate(scored(experience, scores), 0.0)
            update(run_of(spec, policy), experience, step=0, kl_coef=0.0)
            found.append(weights(policy))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_step_without_any_score_stops_the_run(model_dir) -> None:
    spec, policy = grpo_spec(), policy_of(model_dir)
    experience = scored(sampled(((2, 3),)), [None, None])
    experience = build_algorithm(spec).estimate(experience, 0.0)
    with pytest.raises(TrainingError, match="no response of this step has a valid score"):
        update(run_of(spec, policy), experience, step=0, kl_coef=0.0)


def test_truncated_score_replaces_the_score_of_cut_answers_only() -> None:
    experience = sampled(((2, 3), (4, 5)), length=(1, 2))
    found = scored(experience, [0.5, 0.6, None, 0.8], truncated_score=-3.0)
    assert found.scores.tolist() == pytest.approx([0.5, -3.0, -3.0, 0.8])
    assert torch.equal(found.mask, experience.completion)
    kept = scored(experience, [0.5, 0.6, None, 0.8])
    assert kept.scores[:2].tolist() == pytest.approx([0.5, 0.6])
    assert kept.scores[2].isnan()
    # A length penalty is part of the score that is replaced.
    penalty = torch.tensor([-0.1, -0.2, -0.3, -0.4])
    both = scored(experience, [0.5, 0.6, None, 0.8], truncated_score=-3.0, penalty=penalty)
    assert both.scores.tolist() == pytest.approx([0.4, -3.0, -3.0, 0.4])


def test_mask_truncated_leaves_cut_answers_out_of_loss_and_group() -> None:
    spec = grpo_spec(group_size=3, scale="none", truncation="mask")
    experience = scored(sampled(((2, 3, 4),), length=(1,)), [1.0, 100.0, 4.0], mask_truncated=True)
    assert experience.mask.any(1).tolist() == [True, False, True]
    found = build_algorithm(spec).estimate(experience, 0.0).per_token["advantages"]
    # Mean of 1 and 4 is 2.5.
    assert [row.abs().max().item() for row in found] == pytest.approx([1.5, 0.0, 1.5])
    assert found[0].min().item() == pytest.approx(-1.5)


def live(experience: Experience, group_size: int) -> list[bool]:
    """Say of each group whether the scores of its trained answers differ."""
    trained = experience.mask.any(1)
    rows = range(0, len(trained), group_size)
    return [
        len({float(experience.scores[i]) for i in range(r, r + group_size) if trained[i]}) > 1
        for r in rows
    ]


@pytest.mark.parametrize(
    "rules", [{}, {"truncated_score": -1.0}, {"truncation": "mask"}], ids=lambda r: str(list(r))
)
def test_dynamic_sampling_fills_the_step_with_live_groups(model_dir, rules) -> None:
    draw = random.Random(1)
    prompts = [PromptRow(tuple(draw.choices(range(2, VOCAB), k=3)), "", {}) for _ in range(40)]
    engine = build_engine("hf", EngineOptions(model_dir, max_model_len=32, stop_token_ids=STOP))
    rewards = [build_reward({"kind": "regex", "pattern": "w[1-3]"})]
    changed = {"prompts_per_step": 8, "group_size": 3, "max_draws": 12, **rules}
    found = {}
    for dynamic in (False, True):
        spec = grpo_spec(dynamic_sampling=dynamic, **changed)
        run = run_of(
            spec,
            policy_of(model_dir),
            prompts=prompts,
            rewards=rewards,
            engine=engine,
            stop_token_ids=tuple(range(1, 24)),
        )
        experience, scores = score(run, sample(run, 0))
        assert len(experience.scores) == len(scores.total) == 24
        assert experience.group_ids.tolist() == [g for g in range(8) for _ in range(3)]
        found[dynamic] = live(experience, 3)
    assert not all(found[False])  # else there was nothing to fill
    assert all(found[True])
