"""Shared parts of the sampling stages: engine, prompts, weight pushes and rewards."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.core import distributed
from align.core.errors import ArtifactError, RecipeError, TrainingError
from align.core.types import PromptRow
from align.data.load import load_examples
from align.data.render.chat import ChatFormat
from align.data.store.rows import StoredRows, with_columns
from align.data.store.source import Loaded, fit_loaded
from align.models.heads import shared_scorer
from align.models.loading import num_positions
from align.models.logprobs import LogprobModel
from align.preflight.memory import sampling_bytes
from align.recipe.schema import (
    EvaluateStage,
    MergeStage,
    OnlineStage,
    OptimSpec,
    SamplingSpec,
    SelfInstructStage,
    TaskSpec,
    TrainingStage,
    ZeroSpec,
)
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions, RolloutEngine
from align.sampling.push import (
    Proof,
    check_answers,
    measured_rounding,
    probe_logprobs,
    probe_of,
    push,
    pushed_weights,
)
from align.sampling.rounding import ENGINE_LIMIT, excess
from align.stages.base import StageContext
from align.stages.offline import read_back
from align.stages.tools.plan import Sizes, learned_rewards
from align.training.deepspeed import deepspeed_config
from align.training.learner import Learner
from align.tuning.files import unmerged_adapter
from align.tuning.loading import attach_adapter, load_tuned_policy
from align.tuning.merging import has_adapter, merges
from reward_models import build_reward
from reward_models.base import RewardFunction
from reward_models.judge import JudgeError
from reward_models.learned import loading_with
from reward_models.remote import RemoteRewardError
from reward_models.scalar import RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def engine_options(
    spec: TrainingStage | EvaluateStage | MergeStage | SelfInstructStage,
    sampling: SamplingSpec,
    model_dir: Path,
    *,
    chat: ChatFormat,
    seed: int,
) -> EngineOptions:
    """Return the options of an engine that samples from the model in ``model_dir`` as it is."""
    return EngineOptions(
        model_dir,
        dtype=spec.dtype,
        max_model_len=spec.max_length,
        seed=seed,
        memory_frac=sampling.memory_frac,
        cache_gib=sampling.cache_gib,
        stop_token_ids=chat.stop_token_ids,
        tensor_parallel=sampling.tensor_parallel,
        max_num_seqs=sampling.max_num_seqs,
        cache_dtype=sampling.cache_dtype,
    )


def start_engine(
    spec: OnlineStage | EvaluateStage | MergeStage | SelfInstructStage,
    model_dir: Path,
    chat: ChatFormat,
    *,
    context: StageContext,
) -> RolloutEngine:
    """Start the rollout engine of the recipe with the weights in ``model_dir``."""
    options = engine_options(spec, spec.sampling, model_dir, chat=chat, seed=context.seed)
    if isinstance(spec, OnlineStage):
        options = replace(
            options,
            held_bytes=held_while_sampling(spec, context),
            tuning=spec.tuning,
            push=spec.sampling.push,
            always_pushed=True,
        )
    return build_engine(spec.sampling.engine, options)


def held_while_sampling(spec: OnlineStage, context: StageContext) -> float:
    """Return the bytes that the stage will hold on a GPU beside its engine, as predicted."""
    if spec.sampling.memory_frac is not None or distributed.device().type == "cpu":
        return 0.0  # nothing is computed from it
    sizes = Sizes(context.recipe, context.run_dir)
    rewards = learned_rewards(spec, sizes)
    ranks = distributed.world_size()
    return sampling_bytes(spec, sizes.of(spec), rewards=rewards, ranks=ranks)


def prompt_rows(
    spec: TaskSpec | MergeStage, chat: ChatFormat, context: StageContext
) -> list[PromptRow]:
    """Return the tokenized prompts; those without room for a full response are dropped."""
    loaded = Loaded(load_examples(spec.prompts, kind="prompts", seed=context.seed))
    return list(fitted(loaded, spec, chat, context=context, what="prompts"))


def fitted(
    loaded: Loaded,
    spec: OnlineStage | TaskSpec | MergeStage,
    chat: ChatFormat,
    *,
    context: StageContext,
    what: str,
) -> Sequence[PromptRow]:
    """Return the tokenized prompts that fit, and record the others in the ledger.

    A prompt and its response must fit into ``max_length`` and into the model's positions. All rows
    have the same columns; None is the value of a column that a row lacks. Otherwise the columns
    that a reward gets would depend on which rows are in its batch.
    """
    # Room for a whole response is kept free, so that truncation means max_new_tokens only.
    # Tokenizers are loaded from the model's folder, so the configuration is beside them.
    positions = num_positions(chat.tokenizer.name_or_path)
    longest = min(spec.max_length, positions or spec.max_length)
    kept, _ = fit_loaded(
        loaded,
        render=chat.prompt_row,
        max_length=longest - spec.sampling.max_new_tokens,
        max_lost_frac=spec.max_lost_frac,
        what=f"{context.name}: {what}",
        ledger=context.ledger,
    )
    if isinstance(kept, StoredRows):
        return kept.with_same_columns()
    names = sorted({name for row in kept for name in row.columns})
    return [with_columns(row, names) for row in kept]


class Push:
    """Pushes the policy's weights into the engine and verifies that the engine uses them."""

    def __init__(self, engine: RolloutEngine, policy: Learner, probe: Sequence[int]) -> None:
        self.engine, self.policy, self.probe = engine, policy, probe_of(probe)
        self._rounding: torch.Tensor | None = None
        self._proof: Proof | None = None

    def __call__(self, version: int) -> None:
        """Push the weights as ``version``; the engine starts with version 0, the initial policy."""
        # The engine already has version 0; it is verified all the same.
        if version != self.engine.version:
            policy, alone = self.policy.module.model, self.engine.takes_adapter
            pushed = pushed_weights(policy, adapter_alone=alone)
            self._note(push(self.engine, pushed, version=version))
        # A push that changes nothing visible to checksums would still show here, as other outputs.
        logprobs = self.policy.infer([self.probe], probe_logprobs)[0]
        # Measured once: rounding depends on the model and its dtype, hardly on the weights of a
        # step.
        rounding = self._rounding
        if rounding is None:
            measured = self.policy.infer(
                [self.probe],
                lambda model, ids: measured_rounding(
                    model, ids, logprobs, cache_dtype=self.engine.cache_dtype
                ),
            )
            rounding = self._rounding = measured[0]
        check_answers(self.engine, self.probe, logprobs=logprobs, rounding=rounding)

    def _note(self, proof: Proof) -> None:
        """Log which tensors the checksums cover, once and whenever that changes."""
        if proof == self._proof:
            return
        self._proof = proof
        log.info("push: %d tensors in the engine verified by checksum", proof.same)
        if proof.unplaced:
            log.warning(
                "push: %d tensors have another layout in the engine, so no checksum covers them "
                "(%s ...); they are verified by log-probabilities only",
                *(len(proof.unplaced), proof.unplaced[0]),
            )


def check_saved(
    policy: Learner, prompt: Sequence[int], *, model_dir: Path, spec: OnlineStage
) -> None:
    """Check that a merged policy equals the one in memory, up to rounding.

    With qlora it differs on purpose: the update is applied to weights that were never quantized.
    It is not checked if it does not fit in memory. Every rank must call this.

    Raises:
        TrainingError: the log-probabilities of a prompt differ by more than rounding.
    """
    trained, probe = policy.module.model, probe_of(prompt)
    if not (has_adapter(trained) and merges(trained)) or spec.tuning.method == "qlora":
        return
    logprobs = policy.infer([probe], probe_logprobs)[0]
    # Read back from disk, as the next stage will.
    loaded = read_back(
        partial(load_tuned_policy, model_dir, dtype=spec.dtype), what="its difference to the policy"
    )
    if loaded is None:
        return
    saved = LogprobModel(loaded).eval()
    found = probe_logprobs(saved, probe)
    gap = found - logprobs
    times = excess(gap, measured_rounding(saved, probe, found))
    if times > ENGINE_LIMIT:
        raise TrainingError(
            f"{model_dir}: the merged weights differ from the trained model: "
            f"log-probabilities of {len(gap)} tokens are {float(gap.abs().mean()):.3g} nats apart "
            f"on average, {times:.3g} times the effect of rounding, expected at most "
            f"{ENGINE_LIMIT:g} times. The adapter is in adapter/: merge it in float32 "
            "(dtype: float32)"
        )


def build_rewards(
    specs: list[Any],
    context: StageContext,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    zero: ZeroSpec | None = None,
) -> list[RewardFunction]:
    """Return the rewards, with stage names resolved to the folders of their reward models.

    Args:
        specs: rewards of the recipe. context: context of the stage.
        tokenizer: tokenizer of the scored policy; None if rewards get text without token ids.
        zero: of a stage whose ranks call each reward equally often. At stage 3, its reward models
            are sharded over the ranks.

    Raises:
        TrainingError: a reward server or a judge cannot be used.
        RecipeError: a reward is invalid, or custom code cannot be loaded.
        ArtifactError: a process reward model has another vocabulary than the policy.
    """
    plain = [_resolved(s.model_dump(), context) for s in specs]
    try:
        with loading_with(RewardModel.load if zero is None else partial(_load, zero=zero)):
            rewards = [build_reward(p) for p in plain]
    # A server that cannot be reached is not a mistake in the recipe.
    except (RemoteRewardError, JudgeError) as error:
        raise TrainingError(str(error)) from error
    except ValueError as error:
        raise RecipeError(f"{context.name}: {error}") from error
    for reward, p in zip(rewards, plain, strict=True):
        _complete(reward, p, tokenizer)
    return rewards


def _load(folder: Path, dtype: torch.dtype, *, zero: ZeroSpec) -> RewardModel:
    """Load a reward model, at ZeRO-3 into shards; one with an unmerged adapter is whole."""
    if zero.stage < 3 or unmerged_adapter(folder) is not None:
        return RewardModel.load(folder, dtype)
    kind = str(dtype).removeprefix("torch.")
    # Nothing of an optimizer is used: the model is never trained.
    return shared_scorer(folder, dtype, shards=deepspeed_config(zero, OptimSpec(), dtype=kind))


def _complete(
    reward: Any, plain: dict[str, Any], tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """Add unmerged adapters to reward models and set the tokenizer of the ids they receive."""
    if plain["kind"] in ("scalar", "process"):
        attach_adapter(reward.model, plain["model"])
        try:
            if tokenizer is not None:
                reward.meet(tokenizer)
        except ValueError as error:
            raise ArtifactError(str(error)) from error
    if plain["kind"] == "ensemble":
        for member, inner in zip(reward.members, plain["members"], strict=True):
            _complete(member, inner, tokenizer)


def _resolved(plain: dict[str, Any], context: StageContext) -> dict[str, Any]:
    if plain["kind"] in ("scalar", "process"):
        found = context.artifact(plain["model"], "reward_model", with_adapter=True)
        plain["model"] = str(found.model_dir)
    if plain["kind"] == "ensemble":
        plain["members"] = [_resolved(m, context) for m in plain["members"]]
    return plain
