"""The recipe schema: every key a recipe may hold, its default, its range. No torch here."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.recipe.parts import (
    BuildSpec,
    ClipSpec,
    Count,
    DataSpec,
    Fraction,
    ImportanceSpec,
    KlSpec,
    LoraSpec,
    OptimSpec,
    Positive,
    SamplingSpec,
    Spec,
    TokenizerSpec,
    ZeroSpec,
    refuse_answers,
)
from align.recipe.reward_schema import EnsembleReward, RewardSpec, ScalarReward


class StageSpec(Spec):
    """Hold what every stage has: who starts it and with how many processes."""

    ranks: Count = 1
    threads: Count | None = None
    """CPU threads of each rank; None divides the cores among the ranks of this node."""
    seed: int | None = None


def _no_dropout(lora: LoraSpec | None) -> None:
    if lora is not None and lora.dropout > 0.0:
        raise ValueError("lora.dropout would make the policy differ from its reference by chance")


def _distinct_names(rewards: list[RewardSpec]) -> None:
    names = [reward.name or reward.kind for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are called '{name}'; give each its own 'name'")


class TrainingStage(StageSpec):
    """Hold what every training stage shares."""

    init: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero: ZeroSpec = ZeroSpec()
    optim: OptimSpec = OptimSpec()
    lora: LoraSpec | None = None
    max_length: Count = 1024
    micro_tokens: Count = 8192
    """Token budget of one forward-backward pass on one rank."""
    gradient_checkpointing: bool = False
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints; 0 keeps none."""
    keep_checkpoints: Count = 2


class OfflineStage(TrainingStage):
    """Hold what sft, reward and dpo share."""

    data: list[DataSpec] = Field(min_length=1)
    heldout: list[DataSpec] = []
    batch_size: Count = 32
    """Rows (pairs) of one optimiser step over all ranks."""
    epochs: Positive = 1.0
    steps: Count | None = None
    """Optimiser steps; overrides ``epochs``."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    max_lost_frac: Fraction = 0.01

    @model_validator(mode="after")
    def _answers_for_sft(self) -> "OfflineStage":
        if not isinstance(self, SftStage):
            refuse_answers([*self.data, *self.heldout], "preference")
        return self


class BaseStage(StageSpec):
    """Bring in a model (``path``) or build and pretrain a small one (``build``)."""

    kind: Literal["base"]
    path: str | None = None
    build: BuildSpec | None = None
    tokenizer: TokenizerSpec = TokenizerSpec()
    data: list[DataSpec] = []
    steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 64
    max_length: Count = 1024
    micro_tokens: Count = 8192
    optim: OptimSpec = OptimSpec(learning_rate=1e-3)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_origin(self) -> "BaseStage":
        if (self.path is None) == (self.build is None):
            raise ValueError("give exactly one of 'path' and 'build'")
        if self.build is not None and (not self.data or not self.steps):
            raise ValueError("'build' needs 'data' and 'steps' to pretrain on")
        if self.path is not None and (self.data or self.steps):
            raise ValueError("'data' and 'steps' have no effect with 'path'; remove them")
        refuse_answers(self.data, "base")
        return self


class SftStage(OfflineStage):
    """Supervised fine-tuning on the assistant turns."""

    kind: Literal["sft"]


class RewardStage(OfflineStage):
    """Train a Bradley-Terry reward model (arXiv:1706.03741; centring arXiv:2312.09244)."""

    kind: Literal["reward"]
    center_coef: Annotated[float, Field(ge=0.0)] = 0.01
    use_margin: bool = False
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    norm_prompts: Annotated[int, Field(ge=0)] = 64
    """Rows of ``data`` whose chosen and rejected answers set the scorer's mean and std."""


class DpoStage(OfflineStage):
    """Direct preference optimisation (arXiv:2305.18290) and close relatives."""

    kind: Literal["dpo"]
    beta: Positive = 0.1
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _legal(self) -> "DpoStage":
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(f"'label_smoothing' has no effect with loss {self.loss}; remove it")
        _no_dropout(self.lora)
        return self


class OnlineStage(TrainingStage):
    """Hold what ppo and grpo share."""

    prompts: list[DataSpec] = Field(min_length=1)
    rewards: list[RewardSpec] = Field(min_length=1)
    sampling: SamplingSpec = SamplingSpec()
    steps: Count
    prompts_per_step: Count = 32
    minibatches: Count = 1
    update_epochs: Count = 1
    clip: ClipSpec = ClipSpec()
    importance: ImportanceSpec = ImportanceSpec()
    truncated_score: float | None = None
    """Score of an answer without a stop token; None keeps the reward's own."""
    mask_truncated: bool = False
    """Leave answers without a stop token out of the loss (DAPO, arXiv:2503.14476 section 3.4)."""
    max_lost_frac: Fraction = 0.01

    @model_validator(mode="after")
    def _legal(self) -> "OnlineStage":
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature is 0: every answer of a prompt is the same")
        if self.sampling.top_p < 1.0:
            raise ValueError("sampling.top_p < 1 samples from another distribution than is trained")
        if self.prompts_per_step % (self.minibatches * self.ranks):
            raise ValueError("prompts_per_step must be a multiple of minibatches x ranks")
        if self.max_length <= self.sampling.max_new_tokens:
            raise ValueError("max_length must leave room for a prompt before max_new_tokens")
        refuse_answers(self.prompts, "reinforcement")
        _no_dropout(self.lora)
        _distinct_names(self.rewards)
        return self


class CriticSpec(Spec):
    """Describe PPO's value network; ``init`` None starts it from the policy's weights."""

    init: str | None = None
    optim: OptimSpec = OptimSpec(learning_rate=1e-5, schedule="constant")
    clip: Positive = 0.2
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Rollout steps in which only the critic learns."""


class PpoStage(OnlineStage):
    """PPO with a learned critic (arXiv:1707.06347, arXiv:1909.08593)."""

    kind: Literal["ppo"]
    group_size: Count = 1
    kl: KlSpec = KlSpec(coef=0.05)
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    critic: CriticSpec = CriticSpec()
    whiten_rewards: bool = False
    update_epochs: Count = 2


class GrpoStage(OnlineStage):
    """Group-relative policy optimisation (arXiv:2402.03300) with Dr. GRPO and DAPO options."""

    kind: Literal["grpo"]
    group_size: Annotated[int, Field(ge=2)] = 8
    kl: KlSpec = KlSpec(coef=0.0, place="loss", estimator="k3")
    estimator: Literal["group_relative", "leave_one_out"] = "group_relative"
    scale: Literal["std", "none"] = "std"
    """``none`` is Dr. GRPO's advantage (arXiv:2503.20783)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """``token`` DAPO, ``sequence`` the first GRPO, ``constant`` Dr. GRPO (by max_new_tokens)."""
    dynamic_sampling: bool = False
    """Draw more prompts until every group of the step has unequal scores (DAPO section 3.2)."""
    max_draws: Count = 3

    @model_validator(mode="after")
    def _scale_has_effect(self) -> "GrpoStage":
        if self.estimator == "leave_one_out" and self.scale == "std":
            raise ValueError("'scale: std' has no effect with leave_one_out; write scale: none")
        return self


class EvaluateStage(StageSpec):
    """Compare checkpoints on held-out prompts."""

    kind: Literal["evaluate"]
    models: list[str] = Field(min_length=1)
    baseline: str
    reference: str | None = None
    """Policy the KL is measured against; None is the baseline."""
    prompts: list[DataSpec] = Field(min_length=1)
    scores: list[RewardSpec] = Field(min_length=1)
    """Each becomes a column of the table under its name (default: its kind)."""
    judge: list[RewardSpec] = Field(min_length=1)
    """The weighted sum decides each comparison; equal sums are ties."""
    samples: Count = 1
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Count = 1024
    reward_models: list[str] = []
    pairs: list[DataSpec] = []
    """Held-out pairs on which each reward model's accuracy is measured."""
    max_lost_frac: Fraction = 0.0
    """Share of the prompts, and of the pairs, that may be lost to ``max_length``."""
    expect: dict[str, tuple[float | None, float | None]] = {}
    """Bands such as ``models/dpo/kl: [0, 20]`` or ``differences/grpo-sft/exact_match: [0.1, null]``
    on summary.json; the report and the terminal say which hold."""

    @model_validator(mode="after")
    def _baseline_listed(self) -> "EvaluateStage":
        if self.baseline not in self.models:
            raise ValueError(f"baseline '{self.baseline}' is not among models {self.models}")
        if self.reward_models and not self.pairs:
            raise ValueError("'reward_models' needs 'pairs' to measure them on")
        refuse_answers([*self.prompts, *self.pairs], "evaluate")
        _distinct_names(self.scores)
        _distinct_names(self.judge)
        return self


AnyStage = Annotated[
    BaseStage | SftStage | RewardStage | DpoStage | PpoStage | GrpoStage | EvaluateStage,
    Field(discriminator="kind"),
]

PRODUCES = {
    "base": "policy", "sft": "policy", "dpo": "policy", "ppo": "policy", "grpo": "policy",
    "reward": "reward_model", "evaluate": "evaluation",
}  # fmt: skip
"""Artefact kind that each stage kind writes."""


class SinkSpec(Spec):
    """Choose where metrics.jsonl is mirrored to."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False


class Recipe(Spec):
    """Hold one recipe: its stages run in the order they are written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str = ""
    seed: int = 0
    sinks: SinkSpec = SinkSpec()
    stages: dict[str, AnyStage] = Field(min_length=1)

    def inputs(self, stage: str) -> dict[str, str]:
        """Give the references of a stage to others: dotted key -> stage name, path or hub id."""
        return references(self.stages[stage])


def references(spec: Any) -> dict[str, str]:
    """Find every reference to a model in a stage spec, in order of appearance.

    Returns:
        Dotted key (``init``, ``critic.init``, ``rewards.0.model``, ``models.1`` ...) to the name.
    """
    found: dict[str, str] = {}

    def add(key: str, value: str | None) -> None:
        if value is not None:
            found[key] = value

    def add_rewards(key: str, rewards: list[Any]) -> None:
        for i, reward in enumerate(rewards):
            if isinstance(reward, ScalarReward):
                add(f"{key}.{i}.model", reward.model)
            elif isinstance(reward, EnsembleReward):
                add_rewards(f"{key}.{i}.members", reward.members)

    if isinstance(spec, TrainingStage):
        add("init", spec.init)
    if isinstance(spec, PpoStage):
        add("critic.init", spec.critic.init)
    if isinstance(spec, OnlineStage):
        add_rewards("rewards", spec.rewards)
    if isinstance(spec, EvaluateStage):
        for key, names in (("models", spec.models), ("reward_models", spec.reward_models)):
            for i, name in enumerate(names):
                add(f"{key}.{i}", name)
        add("reference", spec.reference)
        add_rewards("scores", spec.scores)
        add_rewards("judge", spec.judge)
    return found
