"""Stages ppo and grpo: assemble policy, critic, reference, engine and rewards, then loop."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from align.core import distributed
from align.core.errors import ArtefactError, DataError
from align.core.log import MetricsLog
from align.core.types import Example, PromptRow
from align.data.load import check_overlap, load_examples
from align.data.render.chat import ChatFormat
from align.losses.kl import AdaptiveKL, FixedKL
from align.models.heads import ValueModel, scorer_from
from align.models.loading import load_tokenizer
from align.models.logprobs import LogprobModel
from align.online import guard
from align.online.algorithms import build_algorithm
from align.online.loop import OnlineRun, train_online
from align.online.watch import Watch
from align.recipe.schema import OnlineStage, WatchSpec
from align.sampling.push import pushed_weights
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.best import BestWeights
from align.stages.contaminated import note_contamination
from align.stages.offline import (
    build_anchor,
    build_policy,
    fingerprints,
    replayed,
    save_trained_policy,
    start_of,
)
from align.stages.preflight import preflight_online
from align.stages.rollouts import Push, build_rewards, fitted, start_engine
from align.training.learner import Learner
from align.tuning.files import refuse_unmerged
from align.tuning.loading import load_tuned_policy
from align.tuning.reference import off_is_start
from reward_models.base import RewardFunction


def build_watch(
    run: OnlineRun,
    spec: WatchSpec,
    *,
    prompts: Sequence[PromptRow],
    gold: Sequence[RewardFunction],
    reference: nn.Module,
    best: BestWeights,
    metrics: MetricsLog,
) -> Watch:
    """Put together what evaluates an online run while it trains.

    Raises:
        DataError: there are fewer held-out prompts than ranks.
    """
    if len(prompts) < max(2, distributed.world_size()):
        raise DataError(
            f"watch.prompts: {len(prompts)} rows for {distributed.world_size()} ranks; expected at "
            "least one for each rank, and two for an interval"
        )
    return Watch(
        stage=run.spec,
        spec=spec,
        seed=run.seed,
        prompts=prompts,
        rewards=run.rewards,
        gold=gold,
        engine=run.engine,
        stop_token_ids=run.stop_token_ids,
        push=run.push,
        policy=run.policy,
        reference=reference,
        save=best.save,
        prune=best.prune,
        metrics=metrics,
    )


def finish_watch(watch: Watch, best: BestWeights) -> dict[str, Any]:
    """Keep the weights that were asked for; give the manifest's notes on it.

    Where the guard ended the stage these are the best ones, whatever ``keep`` says.
    """
    top, alarm = guard.best_step(watch.history), watch.stopped_by
    best.prune({top})
    restored = watch.spec.keep == "best" or alarm is not None
    if restored:
        best.restore(top)
    found: dict[str, Any] = {"best_step": top, "last_step": watch.history[-1].step}
    if restored:
        found["restored_step"] = top
    if alarm is not None:
        found |= {"stopped_by": "guard", "alarm": alarm.name, "reason": alarm.reason}
    return {"watch": found}


log = logging.getLogger(__name__)


def run(spec: OnlineStage, context: StageContext) -> StageResult:
    """Reinforce ``spec.init`` with the rewards of the recipe."""
    source = start_of(spec, context)
    chat = chat_format(source.model_dir)
    asked, held_out = asked_and_watched(spec, context)
    prompts = fitted(asked, spec, chat, context, what="prompts")
    engine = start_engine(spec, source.model_dir, chat, context)
    module = build_policy(spec, source.model_dir, seed=context.seed)
    if spec.tuning.new_at_start:
        with engine.awake():
            engine.load_weights(pushed_weights(module.model), version=0)
    reference = build_reference(spec, module, source.model_dir)
    rewards = build_rewards(spec.rewards, context, chat.tokenizer)
    preflight_online(
        spec,
        context,
        chat=chat,
        source=source,
        prompts=prompts,
        engine=engine,
        module=module,
        reference=reference,
        rewards=rewards,
    )
    updates = spec.steps * spec.minibatches * spec.update_epochs
    policy = Learner(
        module,
        optim=spec.optim,
        zero=spec.zero,
        dtype=spec.dtype,
        total_steps=updates,
        layers=spec.layers,
        anchor=build_anchor(spec, module, chat, context),
    )
    online = OnlineRun(
        spec=spec,
        algorithm=build_algorithm(spec),
        seed=context.seed,
        prompts=prompts,
        rewards=rewards,
        engine=engine,
        stop_token_ids=chat.stop_token_ids,
        push=Push(engine, policy, prompts[0].input_ids, dtype=spec.dtype),
        policy=policy,
        critic=build_critic(spec, source.model_dir, context, updates),
        reference=reference if spec.kl.coef > 0.0 else None,
        kl=build_kl(spec),
    )
    metrics = context.metrics(spec.steps)
    write = partial(save_trained_policy, spec, module, source=source)
    best = BestWeights(write, context.out)
    watch = begin_watch(
        online, held_out, chat, context, reference=reference, best=best, metrics=metrics
    )
    checkpoints = context.out / "checkpoints"
    final = train_online(online, metrics=metrics, checkpoints=checkpoints, watch=watch)
    metrics.close()
    engine.close()
    if watch is None or watch.spec.keep == "last":
        write(out=context.out)
    final |= {"engine/vllm": float(engine.name == "vllm")}
    watched = spec.watch.prompts if spec.watch is not None else []
    notes = {} if watch is None else finish_watch(watch, best)
    return StageResult(final, fingerprints(spec.prompts, watched, replayed(spec)), notes)


def begin_watch(
    online: OnlineRun,
    held_out: Sequence[Example],
    chat: ChatFormat,
    context: StageContext,
    *,
    reference: nn.Module | None,
    best: BestWeights,
    metrics: MetricsLog,
) -> Watch | None:
    """Put together the evaluation while training that the recipe asks for; None without one."""
    spec = online.spec
    if spec.watch is None:
        return None
    assert reference is not None
    return build_watch(
        online,
        spec.watch,
        prompts=fitted(held_out, spec, chat, context, what="watched prompts"),
        gold=build_rewards(spec.watch.gold, context, chat.tokenizer),
        reference=reference,
        best=best,
        metrics=metrics,
    )


def asked_and_watched(
    spec: OnlineStage, context: StageContext
) -> tuple[list[Example], list[Example]]:
    """Load the prompts to train on and those to watch; none of these may be trained on."""
    asked = load_examples(spec.prompts, kind="prompts", seed=context.seed)
    watched, max_frac = [], 0.0
    if spec.watch is not None:
        watched = load_examples(spec.watch.prompts, kind="prompts", seed=context.seed)
        check_overlap(asked, watched)
        max_frac = spec.watch.max_contaminated_frac
    note_contamination(context, asked, watched, max_frac=max_frac)
    return asked, watched


def build_reference(
    spec: OnlineStage, module: LogprobModel, model_dir: Path
) -> LogprobModel | None:
    """Give the policy of the start of this stage: with its adapter off, or a frozen copy."""
    if spec.kl.coef == 0.0 and spec.watch is None:
        return None
    if off_is_start(spec.tuning, model_dir):
        return module
    return LogprobModel(load_tuned_policy(model_dir, dtype=spec.dtype)).requires_grad_(False)


def build_critic(
    spec: OnlineStage, policy_dir: Path, context: StageContext, updates: int
) -> Learner | None:
    """Build PPO's value network from a reward model or the policy; its head starts at zero.

    All its weights are trained, whatever ``tuning`` says of the policy.
    """
    if spec.critic is None:
        return None
    folder = policy_dir
    if spec.critic.init is not None:
        kind = "reward_model" if _is_reward(spec.critic.init, context) else "policy"
        folder = context.artefact(spec.critic.init, kind).model_dir
    refuse_unmerged(folder, f"the critic of {context.name}")
    if load_tokenizer(folder).get_vocab() != load_tokenizer(policy_dir).get_vocab():
        raise ArtefactError(
            f"critic.init: {spec.critic.init} has another vocabulary than the policy, whose tokens "
            "it would judge; remove it, and the critic begins from the policy"
        )
    scorer = scorer_from(folder, dtype=spec.dtype)
    nn.init.zeros_(scorer.head.weight)
    return Learner(
        ValueModel(scorer.to(distributed.device())),
        optim=spec.critic.optim,
        zero=spec.zero,
        dtype=spec.dtype,
        total_steps=updates,
    )


def _is_reward(reference: str, context: StageContext) -> bool:
    from align.core.artefacts import read_manifest

    return read_manifest(context.folder_of(reference))["kind"] == "reward_model"


def build_kl(spec: OnlineStage) -> FixedKL | AdaptiveKL:
    """Give the KL coefficient's controller."""
    if spec.kl.target is None:
        return FixedKL(spec.kl.coef)
    return AdaptiveKL(spec.kl.coef, spec.kl.target, spec.kl.horizon)
