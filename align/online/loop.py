"""The online loop of PPO and GRPO: sample, score, annotate, estimate, update."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from align.core import distributed
from align.core.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from align.core.distributed import stop_requested
from align.core.errors import Preempted, TrainingError
from align.core.log import MetricsLog
from align.core.types import Completion, PromptRow
from align.data.sampler import batch_indices
from align.losses.kl import AdaptiveKL, FixedKL
from align.online.algorithms import ALGORITHMS
from align.online.annotate import annotate, local_plan
from align.online.objective import critic_objective, policy_objective
from align.online.scoring import (
    Scores,
    apply_scores,
    disagreement,
    length_penalty,
    score_answers,
    step_rewards,
)
from align.online.summary import summarise
from align.online.watch import Watch
from align.recipe.schema import GrpoStage, OnlineStage, PpoStage
from align.sampling.engine import RolloutEngine
from align.sampling.experience import Experience, gather_experience
from align.sampling.rollout import sample_groups
from align.training.learner import Learner
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)


@dataclass(slots=True)
class OnlineRun:
    """Hold the parts of one online stage.

    Attributes:
        push: brings the policy's present weights into the engine under a version number.
        reference: the frozen policy of the start of this stage; the learner's own module when its
            adapter is to be switched off; None when no KL is asked for.
    """

    spec: OnlineStage
    seed: int
    prompts: Sequence[PromptRow]
    rewards: Sequence[RewardFunction]
    engine: RolloutEngine
    stop_token_ids: tuple[int, ...]
    push: Callable[[int], None]
    policy: Learner
    critic: Learner | None
    reference: nn.Module | None
    kl: FixedKL | AdaptiveKL

    @property
    def engines(self) -> dict[str, Any]:
        """Give what a checkpoint holds, by name."""
        found = {"policy": self.policy.engine}
        return found if self.critic is None else {**found, "critic": self.critic.engine}


def train_online(
    run: OnlineRun, *, metrics: MetricsLog, checkpoints: Path, watch: Watch | None = None
) -> dict[str, float]:
    """Run all steps, resuming from the newest verified checkpoint; give the last step's metrics.

    With ``watch`` the policy is evaluated in between, and its guard may end the run early.
    """
    spec, start = run.spec, 0
    last: dict[str, float] = {}
    found = newest_checkpoint(checkpoints)
    if found is not None:
        start, state = load_checkpoint(found, run.engines)
        run.kl.load_state_dict(state["kl"])
        run.policy.steps = state["policy_steps"]
        if run.critic is not None:
            run.critic.steps = state["critic_steps"]
        if watch is not None:
            watch.load_state_dict(state["watch"])
        last = metrics.rewind(start)
        log.info("resumed from %s", found)
    elif watch is not None:
        metrics.log(0, watch.look(0))
    for step in range(start, spec.steps):
        if watch is not None and watch.stopped_by is not None:
            break
        last, sample = online_step(run, step)
        if watch is not None and watch.due(step + 1):
            last |= watch.look(step + 1)
        metrics.log(step + 1, last, sample=sample)
        stop = stop_requested()
        if stop or (spec.checkpoint_every and (step + 1) % spec.checkpoint_every == 0):
            state = {"kl": run.kl.state_dict(), "policy_steps": run.policy.steps}
            state |= {"critic_steps": run.critic.steps} if run.critic is not None else {}
            state |= {"watch": watch.state_dict()} if watch is not None else {}
            save_checkpoint(checkpoints, step + 1, run.engines, state, keep=spec.keep_checkpoints)
        if stop and step + 1 < spec.steps:
            raise Preempted(f"stopped on a signal after step {step + 1}; run again to go on")
    return last


def online_step(run: OnlineRun, step: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Take one step; give its metrics and one sampled answer to look at."""
    spec, began = run.spec, time.monotonic()
    with run.engine.awake():
        run.push(step)
        pushed = time.monotonic()
        experience, scores = rollout(run, step)
    sampled = time.monotonic()
    algorithm = ALGORITHMS[spec.kind]
    experience = annotate(
        experience,
        run.policy,
        spec,
        old=needs_old_logprobs(spec),
        reference=run.reference,
        critic=run.critic,
    )
    kl_coef = run.kl.coef
    experience = algorithm.estimate(experience, spec, kl_coef)
    stats = update(run, experience, step, kl_coef)
    done = time.monotonic()
    found = summarise(experience, scores, spec) | disagreement(run.rewards) | stats
    if "kl/reference_per_answer" in found:
        run.kl.update(found["kl/reference_per_answer"], int(found["answers/num"]))
    found |= {
        "kl/coef": kl_coef,
        "time/push_s": pushed - began,
        "time/rollout_s": sampled - pushed,
        "time/update_s": done - sampled,
        "tokens/per_s": found["tokens/sampled"] / (done - began),
    }
    best = {
        "prompt": experience.prompts[0].prompt,
        "completion": experience.completions[0].text,
        "score": scores.total[0],
    }
    return found, best


def needs_old_logprobs(spec: OnlineStage) -> bool:
    """Say whether the old policy differs from the current one in some update, or KL needs it.

    With one optimiser step per rollout the old policy IS the current one, and dropout is off.
    """
    several = spec.minibatches * spec.update_epochs > 1
    return several or spec.kl.coef > 0.0 or isinstance(spec, PpoStage)


def rollout(run: OnlineRun, step: int) -> tuple[Experience, Scores]:
    """Sample and score this rank's part of the step's prompts."""
    spec = run.spec
    dynamic = spec if isinstance(spec, GrpoStage) and spec.dynamic_sampling else None
    draws = dynamic.max_draws if dynamic else 1
    wanted = spec.prompts_per_step // distributed.world_size()
    first = distributed.rank() * wanted
    kept: list[tuple[PromptRow, list[Completion]]] = []
    spare: list[tuple[PromptRow, list[Completion]]] = []
    for draw in range(draws):
        number = step * draws + draw
        indices = batch_indices(
            len(run.prompts),
            spec.prompts_per_step,
            seed=distributed.derive_seed(run.seed, "prompts"),
            step=number,
        )
        mine = [run.prompts[i] for i in indices[first : first + wanted]]
        groups = sample_groups(
            run.engine,
            mine,
            n=spec.group_size,
            step=number,
            seed=run.seed,
            sampling=spec.sampling,
            stop_token_ids=run.stop_token_ids,
            first_position=first,
        )
        pairs = list(zip(mine, groups, strict=True))
        if not dynamic:
            kept = pairs
            break
        live = [_has_signal(run, p, g) for p, g in pairs]
        kept += [pair for pair, alive in zip(pairs, live, strict=True) if alive]
        spare += [pair for pair, alive in zip(pairs, live, strict=True) if not alive]
        if len(kept) >= wanted:
            break
    kept = (kept + spare)[:wanted]
    experience, scores = _scored(run, kept, first_group=first)
    if isinstance(spec, GrpoStage) and spec.estimator == "greedy":
        experience = _with_greedy_scores(run, experience)
    return experience, scores


def _with_greedy_scores(run: OnlineRun, experience: Experience) -> Experience:
    """Score the most likely answer to each prompt; without that score nothing is trained."""
    rows = range(0, len(experience.prompts), run.spec.group_size)
    prompts = [experience.prompts[i] for i in rows]
    greedy = run.engine.generate(
        [row.input_ids for row in prompts],
        n=1,
        max_new_tokens=run.spec.sampling.max_new_tokens,
        temperature=0.0,
        stop_token_ids=run.stop_token_ids,
    )
    pairs = list(zip(prompts, greedy, strict=True))
    scores = _scored(run, pairs, first_group=0)[0].scores
    scores = scores.repeat_interleave(run.spec.group_size)
    mask = experience.mask & ~scores.isnan().unsqueeze(1)
    return replace(experience, greedy_scores=scores, mask=mask)


def _scored(
    run: OnlineRun, pairs: Sequence[tuple[PromptRow, list[Completion]]], *, first_group: int
) -> tuple[Experience, Scores]:
    experience = gather_experience(
        [p for p, _ in pairs], [g for _, g in pairs], first_group=first_group
    )
    scores = score_answers(experience.prompts, experience.completions, run.rewards)
    experience = apply_scores(
        experience,
        scores,
        truncated_score=run.spec.truncated_score,
        mask_truncated=run.spec.truncation == "mask",
        penalty=length_penalty(experience, run.spec),
    )
    steps = step_rewards(experience, run.rewards)
    return (experience if steps is None else experience.with_tokens(step_rewards=steps)), scores


def _has_signal(run: OnlineRun, prompt: PromptRow, group: list[Completion]) -> bool:
    """Say whether the scores that will be trained on differ, so that not all advantages are 0."""
    experience, _ = _scored(run, [(prompt, group)], first_group=0)
    return len(set(experience.scores[experience.mask.any(1)].tolist())) > 1


def update(run: OnlineRun, experience: Experience, step: int, kl_coef: float) -> dict[str, float]:
    """Take ``update_epochs`` x ``minibatches`` optimiser steps on the experience.

    Mini-batches are cut along prompts, in order; which prompts stand where is already random.

    Returns:
        The mean of each statistic over the optimiser steps.
    """
    spec = run.spec
    train_policy = not (isinstance(spec, PpoStage) and step < spec.critic.warmup_steps)
    answers = len(experience.lengths)
    size = math.ceil(answers / spec.minibatches)
    totals: dict[str, float] = {}
    num = spec.update_epochs * spec.minibatches
    for _ in range(spec.update_epochs):
        for start in range(0, answers, size):
            rows = list(range(start, min(start + size, answers)))
            micro = _micro_batches(experience, rows, spec.micro_tokens)
            found: dict[str, float] = {}
            if train_policy:
                objective = partial(policy_objective, spec, kl_coef)
                found |= _named(run.policy.step(micro, objective), "policy")
            if run.critic is not None:
                assert isinstance(spec, PpoStage)
                objective = partial(critic_objective, spec)
                found |= _named(run.critic.step(micro, objective), "value")
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value / num
    return totals


def _micro_batches(experience: Experience, rows: list[int], micro_tokens: int) -> list[Any]:
    mask = experience.mask[rows]
    counts = distributed.global_sums(
        {"tokens": float(mask.sum()), "answers": float(mask.any(1).sum())}
    )
    if counts["tokens"] == 0.0:
        raise TrainingError(
            "no answer of this mini-batch has a valid score to train on; expected at least one. "
            "Look at samples.jsonl and at the rewards' invalid counts"
        )
    plan = local_plan(experience, rows, micro_tokens)
    return [experience.micro(micro, counts) for micro in plan]


def _named(stats: dict[str, float], group: str) -> dict[str, float]:
    moved = {
        "sampler_kl": "kl/sampler",
        "sampler_gap": "sampler/logprob_gap",
        "importance_weight": "sampler/importance_weight",
        "importance_bounded": "sampler/bounded_frac",
    }
    return {moved.get(k, f"{group}/{k}"): v for k, v in stats.items()}
