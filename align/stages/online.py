"""Stages ppo and grpo: assemble policy, critic, reference, engine and rewards, then loop."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from align.core import distributed
from align.core.artifacts import Artifact, read_manifest
from align.core.errors import ArtifactError, DataError
from align.core.log import MetricsLog
from align.core.types import PromptRow
from align.data.load import check_overlap, fingerprints
from align.data.render.chat import ChatFormat
from align.data.store.source import Loaded, load_rows
from align.losses.kl import AdaptiveKL, FixedKL
from align.models.heads import ValueModel, scorer_from
from align.models.idle import keep_on_cpu, models_in
from align.models.loading import load_tokenizer
from align.models.logprobs import LogprobModel
from align.online import guard
from align.online.algorithms import build_algorithm
from align.online.loop import OnlineRun, train_online
from align.online.watch import Watch
from align.preflight.contamination import contamination_checks
from align.preflight.disk import disk_checks
from align.preflight.offline import start_checks
from align.preflight.rewards import reward_checks
from align.preflight.sampling import Probe
from align.preflight.tokens import prompt_checks
from align.recipe.schema import OnlineStage, WatchSpec
from align.sampling.engine import RolloutEngine
from align.sampling.push import push, pushed_weights
from align.stages.base import Prepared, StageContext, StageResult, chat_format
from align.stages.best import BestWeights
from align.stages.offline import (
    build_anchor,
    build_policy,
    load_init,
    replayed,
)
from align.stages.preflight import answer_views
from align.stages.rollouts import Push, build_rewards, check_saved, fitted, start_engine
from align.stages.saving import save_trained_policy
from align.training.deepspeed import deepspeed_config
from align.training.learner import Learner
from align.tuning.files import refuse_unmerged, unmerged_adapter
from align.tuning.loading import load_tuned_policy
from align.tuning.reference import off_is_start
from reward_models.base import RewardFunction


def _build_watch(
    run: OnlineRun,
    spec: WatchSpec,
    *,
    prompts: Sequence[PromptRow],
    gold: Sequence[RewardFunction],
    reference: nn.Module,
    best: BestWeights,
    metrics: MetricsLog,
) -> Watch:
    """Return the training monitor: held-out evaluation during online training.

    Raises:
        DataError: there are fewer held-out prompts than ranks.
    """
    # The guard's intervals need two prompts, and a rank without one could not sample.
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
        awake=run.awake,
        stop_token_ids=run.stop_token_ids,
        push=run.push,
        policy=run.policy,
        reference=reference,
        save=best.save,
        prune=best.prune,
        metrics=metrics,
    )


def _finish_watch(watch: Watch, best: BestWeights) -> dict[str, Any]:
    """Restore the weights selected by ``keep`` and return the manifest's notes.

    If the guard ended the stage, these are always the best weights.
    """
    top, alarm = guard.best_step(watch.history), watch.stopped_by
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


def prepare(spec: OnlineStage, context: StageContext) -> Prepared:
    """Load the prompts; build policy, reference policy, engine and rewards."""
    # Data first: faulty prompts are reported before a model or an engine is loaded.
    source = load_init(spec, context)
    chat = chat_format(source.model_dir)
    training, heldout = _load_prompts(spec, context, chat)
    limit = 0.0 if spec.watch is None else spec.watch.max_contaminated_frac
    checks, notes = contamination_checks(
        context.recipe, training.examples, heldout.examples, max_frac=limit
    )
    prompts = fitted(training, spec, chat, context=context, what="prompts")
    # The engine starts before the policy is built: vLLM claims its share of the memory at start.
    started = start_engine(spec, source.model_dir, chat, context=context)
    engine = context.resources.enter_context(closing(started))
    module = build_policy(spec, source.model_dir, seed=context.seed)
    # The adapter's first weights are random, so the engine cannot read them from disk.
    if spec.tuning.new_at_start:
        with engine.awake():
            push(engine, pushed_weights(module.model), version=0)
    reference = build_reference(spec, module, source.model_dir)
    rewards = build_rewards(spec.rewards, context, chat.tokenizer, zero=spec.zero)
    if spec.offload_idle:
        own = [] if reference in (None, module) else [reference]
        offload_idle({"reference": own} | {r.name: models_in(r) for r in rewards})
    probe = Probe(
        spec,
        engine=engine,
        module=module,
        reference=reference,
        prompts=prompts,
        stop_token_ids=chat.stop_token_ids,
        seed=context.seed,
    )
    parts = Parts(source, chat, prompts, heldout, engine, module, reference, rewards)
    return Prepared(
        train=partial(train, spec, context, parts),
        checks=[
            *checks,
            *disk_checks(spec, module, context.run_dir / context.name),
            *prompt_checks(chat, prompts, model_dir=source.model_dir),
            *start_checks(spec, module.model, source),
            *probe.checks(),
            *reward_checks(
                "reward", spec.rewards, rewards, prompts=prompts, answers=probe.own_answers
            ),
        ],
        views=lambda: answer_views(probe, chat),
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of an online stage, which are checked before training.

    Attributes:
        source: what ``init`` names. chat: its renderer.
        prompts: to train on. heldout: to evaluate on while training.
        engine: the sampler. module: the policy. rewards: of the training.
        reference: the initial policy; None if no KL is needed.
    """

    source: Artifact
    chat: ChatFormat
    prompts: Sequence[PromptRow]
    heldout: Loaded
    engine: RolloutEngine
    module: LogprobModel
    reference: LogprobModel | None
    rewards: Sequence[RewardFunction]


def train(spec: OnlineStage, context: StageContext, parts: Parts) -> StageResult:
    """Train the policy on the rewards, and save it before the engine is closed."""
    online = build_run(spec, context, parts)
    metrics = context.metrics(spec.steps)
    write = partial(save_trained_policy, spec, parts.module, source_dir=parts.source.model_dir)
    best = BestWeights(write, context.out)
    watch = _begin_watch(online, context, parts, best=best, metrics=metrics)
    checkpoints = context.out / "checkpoints"
    # Training; a resumed stage continues from its newest checkpoint.
    final = train_online(online, metrics=metrics, checkpoints=checkpoints, watch=watch)
    metrics.close()
    # Saving; otherwise _finish_watch restores the best weights.
    if watch is None or watch.spec.keep == "last":
        write(out=context.out)
        check_saved(
            online.policy, parts.prompts[0].input_ids, model_dir=context.out / "model", spec=spec
        )
    final |= {"engine/vllm": float(parts.engine.name == "vllm")}
    watched = spec.watch.prompts if spec.watch is not None else []
    notes = {} if watch is None else _finish_watch(watch, best)
    # Once the stage is finished, nothing can resume at an earlier best.
    tidy = partial(best.keep_only, {notes["watch"]["best_step"]}) if notes else None
    return StageResult(final, fingerprints(spec.prompts, watched, replayed(spec)), notes, tidy)


def offload_idle(models: Mapping[str, Sequence[nn.Module]]) -> None:
    """Keep models in CPU memory while they are not used, and log which ones stay."""
    for name, found in models.items():
        for model in found:
            moved = keep_on_cpu(model)
            log.info(
                "offload_idle: %s %s",
                name,
                "is in CPU memory while it is not used"
                if moved
                else "stays where it is: on the CPU, or divided among the ranks",
            )


def build_run(spec: OnlineStage, context: StageContext, parts: Parts) -> OnlineRun:
    """Return the online loop's parts: policy and critic under their learners, and the KL."""
    algorithm = build_algorithm(spec)
    if spec.offload_idle and distributed.device().type != "cpu":
        log.info("offload_idle: optimizer states are in CPU memory while responses are sampled")
    updates = spec.minibatches * spec.update_epochs  # of one step
    # The policy's schedule excludes the warm-up steps that train only the critic.
    policy_steps = max(1, spec.steps - algorithm.critic_warmup_steps)
    policy = Learner(
        parts.module,
        optim=spec.optim,
        zero=spec.zero,
        dtype=spec.dtype,
        total_steps=policy_steps * updates,
        layers=spec.layers,
        anchor=build_anchor(spec, parts.module, parts.chat, context=context),
    )
    return OnlineRun(
        spec=spec,
        algorithm=algorithm,
        seed=context.seed,
        prompts=parts.prompts,
        rewards=parts.rewards,
        engine=parts.engine,
        stop_token_ids=parts.chat.stop_token_ids,
        push=Push(parts.engine, policy, parts.prompts[0].input_ids),
        policy=policy,
        critic=build_critic(
            spec, parts.source.model_dir, context=context, updates=spec.steps * updates
        ),
        reference=parts.reference if spec.kl.coef > 0.0 else None,
        kl=_build_kl(spec),
    )


def _begin_watch(
    online: OnlineRun,
    context: StageContext,
    parts: Parts,
    *,
    best: BestWeights,
    metrics: MetricsLog,
) -> Watch | None:
    """Return the training monitor of the recipe, or None if it has none."""
    spec = online.spec
    if spec.watch is None:
        return None
    # A watch always measures the KL, so build_reference has made one also without a penalty.
    assert parts.reference is not None
    gold = build_rewards(spec.watch.gold, context, parts.chat.tokenizer, zero=spec.zero)
    if spec.offload_idle:
        offload_idle({f"watch.gold {reward.name}": models_in(reward) for reward in gold})
    return _build_watch(
        online,
        spec.watch,
        prompts=without_copies(
            fitted(parts.heldout, spec, parts.chat, context=context, what="watched prompts")
        ),
        gold=gold,
        reference=parts.reference,
        best=best,
        metrics=metrics,
    )


def without_copies(prompts: Sequence[PromptRow]) -> list[PromptRow]:
    """Return the prompts without repeated ones, whose copies would make intervals too narrow."""
    first: dict[tuple[tuple[int, ...], str], PromptRow] = {}
    for row in prompts:
        first.setdefault((tuple(row.input_ids), repr(row.columns)), row)
    kept = list(first.values())
    if len(kept) < len(prompts):
        log.warning(
            "watch.prompts: %d of %d rows repeat another one and are left out",
            len(prompts) - len(kept),
            len(prompts),
        )
    return kept


def _load_prompts(
    spec: OnlineStage, context: StageContext, chat: ChatFormat
) -> tuple[Loaded, Loaded]:
    """Return training and held-out prompts that do not overlap."""
    load = partial(load_rows, kind="prompts", seed=context.seed, render=chat.prompt_row)
    training = load(spec.prompts)
    if spec.watch is None:
        return training, Loaded([])
    heldout = load(spec.watch.prompts)
    check_overlap(training.sharing_prompts(heldout.examples), heldout.examples)
    return training, heldout


def build_reference(
    spec: OnlineStage, module: LogprobModel, model_dir: Path
) -> LogprobModel | None:
    """Return the initial policy: the policy with its adapter off, or a frozen copy.

    Under ZeRO-3 the copy is sharded over the ranks, unless it has an adapter.
    """
    if spec.kl.coef == 0.0 and spec.watch is None:
        return None
    # Switching the adapter off gives the initial policy without a second copy.
    if off_is_start(spec.tuning, model_dir):
        return module
    is_sharded = spec.zero.stage == 3 and unmerged_adapter(model_dir) is None
    shards = deepspeed_config(spec.zero, spec.optim, dtype=spec.dtype) if is_sharded else None
    model = load_tuned_policy(model_dir, dtype=spec.dtype, shards=shards)
    return LogprobModel(model).requires_grad_(False)


def build_critic(
    spec: OnlineStage, policy_dir: Path, *, context: StageContext, updates: int
) -> Learner | None:
    """Return PPO's critic, built from a reward model or the policy; its head starts at zero.

    All its weights are trained, regardless of the policy's ``tuning``. Under ZeRO-3 it is loaded in
    shards.
    """
    if spec.critic is None:
        return None
    folder = policy_dir
    if spec.critic.init is not None:
        kind = "reward_model" if _is_reward(spec.critic.init, context) else "policy"
        folder = context.artifact(spec.critic.init, kind).model_dir
    refuse_unmerged(folder, f"the critic of {context.name}")
    if load_tokenizer(folder).get_vocab() != load_tokenizer(policy_dir).get_vocab():
        raise ArtifactError(
            f"critic.init: {spec.critic.init} has another vocabulary than the policy, whose tokens "
            "it must score. Remove critic.init to start the critic from the policy"
        )
    sharded = spec.zero.stage == 3
    shards = deepspeed_config(spec.zero, spec.critic.optim, dtype=spec.dtype) if sharded else None
    scorer = scorer_from(folder, dtype=spec.dtype, shards=shards)
    if spec.gradient_checkpointing:
        scorer.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    # V = 0 at the start: advantages then begin as plain returns instead of noise.
    nn.init.zeros_(scorer.head.weight)
    return Learner(
        ValueModel(scorer.to(distributed.device())),
        optim=spec.critic.optim,
        zero=spec.zero,
        dtype=spec.dtype,
        total_steps=updates,
    )


def _is_reward(reference: str, context: StageContext) -> bool:
    return read_manifest(context.folder_of(reference))["kind"] == "reward_model"


def _build_kl(spec: OnlineStage) -> FixedKL | AdaptiveKL:
    """Return the controller of the KL coefficient."""
    if spec.kl.target is None:
        return FixedKL(spec.kl.coef)
    return AdaptiveKL(spec.kl.coef, spec.kl.target, spec.kl.horizon)
