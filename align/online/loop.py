"""The training loop of the online methods: sample, score, annotate, estimate, update."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from align.core import distributed
from align.core.checkpoints import (
    CheckpointTimer,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from align.core.distributed import derive_seed, stops_between_steps
from align.core.errors import TrainingError
from align.core.log import MetricsLog
from align.core.types import Completion, PromptRow
from align.data.sampler import batch_indices
from align.losses.kl import AdaptiveKL, FixedKL
from align.online.algorithms import OnlineAlgorithm
from align.online.annotate import annotate, plan_by_prompt
from align.online.minibatches import mini_batches
from align.online.scoring import (
    Scores,
    apply_scores,
    disagreement,
    length_penalty,
    score_answers,
    step_rewards,
)
from align.online.summary import summarize
from align.online.watch import Watch
from align.recipe.schema import OnlineStage
from align.sampling.engine import RolloutEngine
from align.sampling.rollout import Experience, gather_experience, sample_groups
from align.training.diagnosis import Diagnosis
from align.training.learner import Learner
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)


@dataclass(slots=True)
class OnlineRun:
    """Parts of one online stage.

    Attributes:
        algorithm: advantages and objectives of the recipe.
        push: pushes the policy's current weights into the engine under a version number.
        reference: the frozen initial policy; the learner's own module if its adapter is to be
            switched off; None if no KL is needed.
        draws: batches of prompts that dynamic sampling has drawn so far.
    """

    spec: OnlineStage
    algorithm: OnlineAlgorithm
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
    draws: int = 0

    @property
    def engines(self) -> dict[str, Any]:
        """DeepSpeed engines in a checkpoint, by name."""
        found = {"policy": self.policy.engine}
        return found if self.critic is None else {**found, "critic": self.critic.engine}

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Wake the rollout engine, which has the accelerator's memory inside the block."""
        with ExitStack() as stack:
            for learner in (self.policy, self.critic):
                if learner is not None and self.spec.offload_idle:
                    stack.enter_context(learner.optimizer_on_cpu())
            stack.enter_context(self.engine.awake())
            yield


@stops_between_steps
def train_online(
    run: OnlineRun, *, metrics: MetricsLog, checkpoints: Path, watch: Watch | None = None
) -> dict[str, float]:
    """Run all steps from the newest verified checkpoint and return the last step's metrics.

    With ``watch`` the policy is evaluated between steps, and the guard may end the run early.
    """
    spec, start = run.spec, 0
    last: dict[str, float] = {}
    diagnosis = Diagnosis(spec, total_steps=spec.steps, num_trained=run.policy.num_trained)
    # Resume, or evaluate the initial policy.
    found = newest_checkpoint(checkpoints)
    if found is not None:
        start, state = load_checkpoint(found, run.engines)
        run.kl.load_state_dict(state["kl"])
        run.policy.steps, run.draws = state["policy_steps"], state.get("draws", 0)
        diagnosis.load_state_dict(state["diagnosis"])
        if run.critic is not None:
            run.critic.steps = state["critic_steps"]
        if watch is not None:
            watch.load_state_dict(state["watch"])
        last = distributed.broadcast_object(metrics.rewind(start))  # rank 0 alone has the log
        log.info("resumed from %s", found)
    elif watch is not None:
        metrics.log(0, watch.look(0))
    log.info("training: %d steps", spec.steps - start)
    timer = CheckpointTimer(spec.checkpoint_every)

    def save(done: int) -> None:
        state = _state(run, diagnosis, watch)
        save_checkpoint(
            checkpoints, done, engines=run.engines, state=state, keep=spec.keep_checkpoints
        )

    for step in range(start, spec.steps):
        if watch is not None and watch.stopped_by is not None:
            break
        last, sample = online_step(run, step)
        if watch is not None and watch.due(step + 1):
            last |= watch.look(step + 1)
        metrics.log(step + 1, last, sample=sample)
        diagnosis.report(step + 1, last, metrics)
        timer.after(step + 1, last=spec.steps, save=save)
    diagnosis.finish()
    return last


def _state(run: OnlineRun, diagnosis: Diagnosis, watch: Watch | None) -> dict[str, Any]:
    """Return what a checkpoint holds beside the engines.

    Prompts and seeds are functions of the step and the draws, so only counters and controllers are
    state.
    """
    state: dict[str, Any] = {"kl": run.kl.state_dict(), "policy_steps": run.policy.steps}
    state |= {"draws": run.draws}
    state |= {"diagnosis": diagnosis.state_dict()}
    state |= {"critic_steps": run.critic.steps} if run.critic is not None else {}
    state |= {"watch": watch.state_dict()} if watch is not None else {}
    return state


@contextmanager
def measured(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the duration of the block to ``seconds`` as the metric ``time/<phase>_s``."""
    began = time.monotonic()
    yield
    seconds[f"time/{phase}_s"] = time.monotonic() - began


def online_step(run: OnlineRun, step: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run one online step and return its metrics and its first sample."""
    seconds, kl_coef = {}, run.kl.coef
    timer = partial(measured, seconds)
    with timer("step"):
        with run.awake():
            # The version is the step, so a completion names the weights that sampled it.
            with timer("push"):
                run.push(step)
            with timer("rollout"):
                samples = sample(run, step)
        with timer("score"):
            experience, scores = score(run, samples)
        with timer("update"):
            experience = annotate(
                experience,
                run.policy,
                run.spec,
                old=run.algorithm.needs_old_logprobs,
                reference=run.reference,
                critic=run.critic,
            )
            experience = run.algorithm.estimate(experience, kl_coef)  # advantages, returns
            stats = update(run, experience, step=step, kl_coef=kl_coef)
    # Metrics, then the KL controller, which acts on the next step.
    found = summarize(experience, scores, run.spec) | disagreement(run.rewards) | stats
    if "kl/reference_per_answer" in found:
        run.kl.update(found["kl/reference_per_answer"], int(found["answers/num"]))
    found |= {**seconds, **samples.counts}
    found |= {"kl/coef": kl_coef, "tokens/per_s": found["tokens/sampled"] / found["time/step_s"]}
    # The first sample of the batch, whatever its score: a chosen one would flatter the run.
    first = {
        "prompt": experience.prompts[0].prompt,
        "completion": experience.completions[0].text,
        "score": scores.total[0],
    }
    return found, first


Groups = list[tuple[PromptRow, list[Completion]]]
"""Prompts, each with its sampled responses."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Sampled responses to this rank's prompts of a step.

    Attributes:
        groups: prompts and their sampled responses.
        greedy: the same prompts and the most likely response to each; None if not needed.
        positions: numbers of these prompts in the step's batch over all ranks.
        counts: of dynamic sampling, over all ranks: prompts drawn, and those with unequal scores.
    """

    groups: Groups
    greedy: Groups | None
    positions: Sequence[int]
    counts: Mapping[str, float] = field(default_factory=dict)


def sample(run: OnlineRun, step: int) -> Samples:
    """Sample responses to this rank's part of the step's prompts.

    With ``dynamic_sampling``, prompts are drawn until enough groups have unequal scores; if there
    are too few, groups with equal scores fill the batch. The groups are selected over all ranks, so
    the result does not depend on the number of ranks.
    """
    spec = run.spec
    draws = spec.max_draws if spec.dynamic_sampling else 1
    # Each rank takes every n-th prompt, so that a mini-batch, which is some consecutive prompts of
    # the batch, has as many on every rank. The recipe guarantees that they divide evenly.
    mine = slice(distributed.rank(), spec.prompts_per_step, distributed.world_size())
    kept: Groups = []
    live: Groups = []
    spare: Groups = []
    for _ in range(draws):
        # Numbered across steps, so that each draw continues the shuffled order of the prompts and
        # none is passed over.
        number = run.draws if spec.dynamic_sampling else step
        run.draws += spec.dynamic_sampling
        kept = _draw(run, number, mine)
        if not spec.dynamic_sampling:
            break
        # Dynamic sampling: every rank sees the groups of all ranks, in the order of the batch.
        judged = [(pair, _has_signal(run, *pair)) for pair in kept]
        parts = distributed.gather_objects(judged)
        for pair, has_signal in chain.from_iterable(zip(*parts, strict=True)):
            (live if has_signal else spare).append(pair)
        if len(live) >= spec.prompts_per_step:
            break
    # Every rank takes its part of the same list: live groups first, then spare ones.
    counts: dict[str, float] = {}
    if spec.dynamic_sampling:
        kept = (live + spare)[mine]
        counts = {"prompts/drawn": len(live) + len(spare), "prompts/live": len(live)}
    greedy = _greedy(run, [prompt for prompt, _ in kept]) if run.algorithm.needs_greedy else None
    return Samples(kept, greedy, range(spec.prompts_per_step)[mine], counts)


def _draw(run: OnlineRun, number: int, mine: slice) -> Groups:
    """Return this rank's prompts of a draw, each with its sampled responses."""
    spec = run.spec
    indices = batch_indices(
        len(run.prompts),
        spec.prompts_per_step,
        seed=derive_seed(run.seed, "prompts"),
        step=number,
    )
    rows = [run.prompts[i] for i in indices[mine]]
    groups = sample_groups(
        run.engine,
        rows,
        n=spec.group_size,
        step=number,
        seed=run.seed,
        sampling=spec.sampling,
        stop_token_ids=run.stop_token_ids,
        positions=range(spec.prompts_per_step)[mine],
    )
    return list(zip(rows, groups, strict=True))


def _greedy(run: OnlineRun, prompts: Sequence[PromptRow]) -> Groups:
    """Return the most likely response to each prompt."""
    found = run.engine.generate(
        [row.input_ids for row in prompts],
        n=1,
        max_new_tokens=run.spec.sampling.max_new_tokens,
        temperature=0.0,
        stop_token_ids=run.stop_token_ids,
    )
    return list(zip(prompts, found, strict=True))


def score(run: OnlineRun, samples: Samples) -> tuple[Experience, Scores]:
    """Return the scored responses of a step, with the scores of the greedy responses.

    Responses whose greedy counterpart has no score are not trained.
    """
    greedy = None
    if samples.greedy is not None:
        # Scored first: what a reward keeps of its last call must be of the sampled responses.
        greedy = _scored(run, samples.greedy, positions=samples.positions)[0].scores  # (P,)
    experience, scores = _scored(run, samples.groups, positions=samples.positions)
    if greedy is None:
        return experience, scores
    # One greedy score per prompt, repeated for each of its responses.
    greedy = greedy.repeat_interleave(run.spec.group_size)  # (B,)
    # A response without a baseline has no advantage, so it is not trained.
    mask = experience.mask & ~greedy.isnan().unsqueeze(1)
    return replace(experience, greedy_scores=greedy, mask=mask), scores


def _scored(
    run: OnlineRun, pairs: Groups, *, positions: Sequence[int]
) -> tuple[Experience, Scores]:
    experience = gather_experience(
        [p for p, _ in pairs], [g for _, g in pairs], group_numbers=positions
    )
    scores = score_answers(experience.prompts, experience.completions, run.rewards)
    experience = apply_scores(
        experience,
        scores,
        truncated_score=run.spec.truncated_score,
        mask_truncated=run.spec.truncation == "mask",
        penalty=length_penalty(experience, run.spec),
    )
    # Process rewards were computed by the call above and are read from the rewards.
    steps = step_rewards(experience, run.rewards)
    return (experience if steps is None else experience.with_tokens(step_rewards=steps)), scores


def _has_signal(run: OnlineRun, prompt: PromptRow, group: list[Completion]) -> bool:
    """Return whether the rewards of a group differ, before the length penalty.

    Reference: arXiv:2503.14476 eq. 11: neither all nor none of the responses may be correct.
    """
    experience = gather_experience([prompt], [group])
    scores = score_answers(experience.prompts, experience.completions, run.rewards)
    is_masked = run.spec.truncation == "mask"
    experience = apply_scores(experience, scores, truncated_score=None, mask_truncated=is_masked)
    return len(set(experience.scores[experience.mask.any(1)].tolist())) > 1


def update(
    run: OnlineRun, experience: Experience, *, step: int, kl_coef: float
) -> dict[str, float]:
    """Run ``update_epochs`` x ``minibatches`` optimizer steps on the experience.

    A mini-batch without a trainable response is skipped, which is decided before the first update.

    Returns:
        The mean of each statistic over the optimizer steps, and the clipped fraction of the last.

    Raises:
        TrainingError: no response of the step can be trained.
    """
    spec, algorithm = run.spec, run.algorithm
    totals: dict[str, float] = {}
    # Fix the micro-batches of all epochs before the first update.
    parts = [
        rows
        for epoch in range(spec.update_epochs)
        for rows in mini_batches(
            experience,
            spec.minibatches,
            num_prompts=spec.prompts_per_step,
            seed=derive_seed(run.seed, "minibatches", step, epoch) if epoch else None,
        )
    ]
    plans = [_micro_batches(experience, rows, spec.micro_tokens) for rows in parts]
    plans = [plan for plan in plans if plan is not None]
    if not plans:
        raise TrainingError(
            "no response of this step has a valid score to train on; expected at least one. Check "
            "samples.jsonl and the rewards' invalid counts"
        )
    # One optimizer step per mini-batch, the policy first, then the critic.
    found: dict[str, float] = {}
    for micro in plans:
        found = {}
        if step >= algorithm.critic_warmup_steps:
            objective = partial(algorithm.policy_objective, kl_coef=kl_coef)
            found |= _named(run.policy.step(micro, objective), "policy")
        if run.critic is not None:
            assert algorithm.critic_objective is not None
            found |= _named(run.critic.step(micro, algorithm.critic_objective), "value")
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value / len(plans)
    if "policy/clip_frac" in found:
        totals["policy/clip_frac_last"] = found["policy/clip_frac"]
    return totals


def _micro_batches(experience: Experience, rows: list[int], micro_tokens: int) -> list[Any] | None:
    """Return the micro-batches of a mini-batch, or None if no rank has a trainable token in it."""
    mask = experience.mask[rows]
    # Denominators over all ranks: losses are sums that each rank divides by the same counts.
    counts = distributed.global_sums(
        {"tokens": float(mask.sum()), "answers": float(mask.any(1).sum())}
    )
    if counts["tokens"] == 0.0:
        return None
    plan = plan_by_prompt(experience, rows, micro_tokens)
    return [experience.micro(micro, counts) for micro in plan]


def _named(stats: dict[str, float], group: str) -> dict[str, float]:
    moved = {
        "sampler_kl": "kl/sampler",
        "sampler_gap": "sampler/logprob_gap",
        "importance_weight": "sampler/importance_weight",
        "importance_bounded": "sampler/bounded_frac",
    }
    return {moved.get(k, f"{group}/{k}"): v for k, v in stats.items()}
