"""Schema of the online stages: ppo and grpo."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.offline_schema import TrainingStage
from align.recipe.parts import (
    ClipSpec,
    Count,
    DataSpec,
    Fraction,
    ImportanceSpec,
    KlSpec,
    OptimSpec,
    Positive,
    SamplingSpec,
    Spec,
    refuse_answers,
)
from align.recipe.reward_schema import RewardSpec, distinct_names
from align.recipe.tuning_schema import refuse_dropout, refuse_served
from align.recipe.watch_schema import WatchSpec, refuse_trained_gold


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
    watch: WatchSpec | None = None
    """Evaluation on held-out prompts while training, and the guard against over-optimisation."""

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
        refuse_dropout(self.tuning)
        refuse_served(self.tuning, self.sampling.engine)
        distinct_names(self.rewards)
        if self.watch is not None and self.watch.guard is not None:
            refuse_trained_gold(self.watch.gold, self.rewards)
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
