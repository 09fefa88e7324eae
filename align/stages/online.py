"""Stages ppo and grpo: assemble policy, critic, reference, engine and rewards, then loop."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.core import distributed
from align.core.errors import ArtefactError, TrainingError
from align.core.log import MetricsLog
from align.core.types import Example, PromptRow
from align.data.chat import ChatFormat
from align.data.load import check_overlap, fit_rows, load_examples
from align.losses.kl import AdaptiveKL, FixedKL
from align.models.heads import ValueModel, scorer_from
from align.models.loading import load_tokenizer
from align.models.logprobs import LogprobModel
from align.online.algorithms import ALGORITHMS
from align.online.engine import RolloutEngine, build_engine
from align.online.loop import OnlineRun, train_online
from align.online.watch import Watch
from align.online.weights import check_push, pushed_weights
from align.recipe.schema import (
    EvaluateStage,
    MergeStage,
    OnlineStage,
    PpoStage,
    SelfInstructStage,
)
from align.recipe.tuning_schema import UNMERGED
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.best import BestWeights
from align.stages.contaminated import note_contamination
from align.stages.keeping import build_anchor, replayed
from align.stages.preflight import preflight_online
from align.stages.training import build_policy, fingerprints, save_trained_policy, start_of
from align.stages.watching import build_watch, finish_watch
from align.training.learner import Learner
from align.tuning.files import refuse_unmerged
from align.tuning.loading import load_tuned_policy, made_whole
from align.tuning.reference import off_is_start
from reward_models import build_reward
from reward_models.base import RewardFunction
from reward_models.judge import JudgeError
from reward_models.remote import RemoteRewardError

log = logging.getLogger(__name__)
NEW_AT_START = (*UNMERGED, "qlora")
"""Methods whose policy is not what ``init`` holds before the first step, or not to the engine."""


def run(spec: OnlineStage, context: StageContext) -> StageResult:
    """Reinforce ``spec.init`` with the rewards of the recipe."""
    source = start_of(spec, context)
    chat = chat_format(source.model_dir)
    asked, held_out = asked_and_watched(spec, context)
    prompts = _fitted(asked, spec, chat, context, what="prompts")
    engine = start_engine(spec, source.model_dir, chat, context)
    module = build_policy(spec, source.model_dir, seed=context.seed)
    if spec.tuning.method in NEW_AT_START:
        with engine.awake():
            engine.load_weights(pushed_weights(module.model), version=0)
    reference = build_reference(spec, module, source.model_dir)
    rewards = build_rewards(spec.rewards, context, chat.tokenizer)
    preflight_online(
        spec, context, chat=chat, source=source, prompts=prompts, engine=engine, module=module,
        reference=reference, rewards=rewards,
    )  # fmt: skip
    updates = spec.steps * spec.minibatches * spec.update_epochs
    policy = Learner(
        module, optim=spec.optim, zero=spec.zero, dtype=spec.dtype, total_steps=updates,
        layers=spec.layers,
        anchor=build_anchor(spec, module, chat, context),
    )  # fmt: skip
    online = OnlineRun(
        spec=spec,
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
        prompts=_fitted(held_out, spec, chat, context, what="watched prompts"),
        gold=build_rewards(spec.watch.gold, context, chat.tokenizer),
        reference=reference,
        best=best,
        metrics=metrics,
    )


def start_engine(
    spec: OnlineStage | EvaluateStage | MergeStage | SelfInstructStage,
    model_dir: Path,
    chat: ChatFormat,
    context: StageContext,
) -> RolloutEngine:
    """Start the sampler that the recipe asks for, with the weights in ``model_dir``."""
    return build_engine(
        spec.sampling.engine,
        model_dir,
        dtype=spec.dtype,
        max_model_len=spec.max_length,
        seed=context.seed,
        memory_frac=spec.sampling.memory_frac,
        cache_gib=spec.sampling.cache_gib,
        stop_token_ids=chat.stop_token_ids,
        tuning=spec.tuning if isinstance(spec, OnlineStage) else None,
        push=spec.sampling.push if isinstance(spec, OnlineStage) else "merged",
    )


def prompt_rows(spec: Any, chat: ChatFormat, context: StageContext) -> list[PromptRow]:
    """Render the prompts; those too long to be answered in full are lost, counted and bounded."""
    examples = load_examples(spec.prompts, kind="prompts", seed=context.seed)
    return _fitted(examples, spec, chat, context, what="prompts")


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


def _fitted(
    examples: Sequence[Example], spec: Any, chat: ChatFormat, context: StageContext, *, what: str
) -> list[PromptRow]:
    rows = [chat.prompt_row(e) for e in examples]
    kept, _ = fit_rows(
        rows,
        max_length=spec.max_length - spec.sampling.max_new_tokens,
        max_lost_frac=spec.max_lost_frac,
        what=f"{context.name}: {what}",
        ledger=context.ledger,
    )
    return kept


class Push:
    """Bring the policy's weights into the engine and make sure that it answers with them."""

    def __init__(self, engine: Any, policy: Learner, probe: tuple[int, ...], *, dtype: Any) -> None:
        self.engine, self.policy, self.probe, self.dtype = engine, policy, probe, dtype

    def __call__(self, version: int) -> None:
        """Push under ``version``; the engine starts with version 0, the policy of the start."""
        if version != self.engine.version:
            policy, alone = self.policy.module.model, self.engine.takes_adapter
            pushed = pushed_weights(policy, adapter_alone=alone)
            self.engine.load_weights(pushed, version=version)
        ids = torch.tensor([self.probe], device=distributed.device())
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        found = self.policy.infer([(ids, positions)], lambda m, x: m(*x).logprobs)[0]
        check_push(self.engine, self.probe, found[0, 1:].tolist(), dtype=self.dtype)


def build_rewards(
    specs: list[Any], context: StageContext, tokenizer: Any = None
) -> list[RewardFunction]:
    """Build rewards with stage names resolved to the folders of their reward models.

    Args:
        specs: as the recipe has them. context: the stage's surroundings.
        tokenizer: of the policy whose answers are scored; None where no token ids are given.

    Raises:
        TrainingError: a reward server or a judge cannot be used.
        ArtefactError: a process reward has another vocabulary than the policy.
    """
    plain = [_resolved(s.model_dump(), context) for s in specs]
    try:
        rewards = [build_reward(p) for p in plain]
    except (RemoteRewardError, JudgeError) as error:
        raise TrainingError(str(error)) from error
    for reward, p in zip(rewards, plain, strict=True):
        _complete(reward, p, tokenizer)
    return rewards


def _complete(reward: Any, plain: dict[str, Any], tokenizer: Any) -> None:
    """Make the scorers whole whose adapters are not merged; tell them whose ids they will get."""
    if plain["kind"] in ("scalar", "process"):
        made_whole(reward.model, plain["model"])
        try:
            if tokenizer is not None:
                reward.meet(tokenizer)
        except ValueError as error:
            raise ArtefactError(str(error)) from error
    if plain["kind"] == "ensemble":
        for member, inner in zip(reward.members, plain["members"], strict=True):
            _complete(member, inner, tokenizer)


def _resolved(plain: dict[str, Any], context: StageContext) -> dict[str, Any]:
    if plain["kind"] in ("scalar", "process"):
        found = context.artefact(plain["model"], "reward_model", with_adapter=True)
        plain["model"] = str(found.model_dir)
    if plain["kind"] == "ensemble":
        plain["members"] = [_resolved(m, context) for m in plain["members"]]
    return plain


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
    if not ALGORITHMS[spec.kind].critic:
        return None
    assert isinstance(spec, PpoStage)
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

    named = reference in context.recipe.stages
    path = context.run_dir / reference if named else Path(reference)
    return read_manifest(path)["kind"] == "reward_model"


def build_kl(spec: OnlineStage) -> FixedKL | AdaptiveKL:
    """Give the KL coefficient's controller."""
    if spec.kl.target is None:
        return FixedKL(spec.kl.coef)
    return AdaptiveKL(spec.kl.coef, spec.kl.target, spec.kl.horizon)
