"""Schema of the online stages: ppo and grpo."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.algorithms import (
    ALGORITHMS,
    Algorithm,
    known_algorithm,
    known_estimator,
    of_estimator,
    with_preset,
)
from align.recipe.schema.common import (
    ClipSpec,
    Count,
    DataSpec,
    Fraction,
    ImportanceSpec,
    KlSpec,
    OnlineSampling,
    OptimSpec,
    OverlongSpec,
    Positive,
    Ref,
    Spec,
    distinct_names,
    refuse_answers,
)
from align.recipe.schema.offline import TrainingStage, refuse_unfit
from align.recipe.schema.tuning import refuse_dropout, refuse_pushed, refuse_served
from reward_models.specs import RewardSpec

AlarmName = Literal["gold_slope", "proxy_gap", "length", "repetition", "one_reward", "disagreement"]


class GuardSpec(Spec):
    """Say which alarms of over-optimisation end the stage early."""

    stop_on: list[AlarmName] = ["gold_slope"]
    """An empty list only warns."""
    window: Annotated[int, Field(ge=3)] = 4
    """Evaluations that a slope is taken over."""
    patience: Count = 2
    """Evaluations in a row that must raise the same alarm before the stage ends."""


class WatchSpec(Spec):
    """Evaluate the policy on held-out prompts while it trains; training itself is not touched."""

    every: Count
    """Steps between evaluations; the first is before the first step, the last after the last."""
    prompts: list[DataSpec] = Field(min_length=1)
    gold: list[RewardSpec] = Field(min_length=1)
    """Scorers that training never sees; the best checkpoint is the best by their weighted sum."""
    max_contaminated_frac: Fraction = 0.05
    """Share of ``prompts`` whose words may stand in the training prompts."""
    samples: Count = 1
    """Answers per prompt."""
    keep: Literal["last", "best"] = "last"
    """Which weights become ``model/``: the best by gold always stay under ``best/``, and become it
    where the guard ends the stage."""
    guard: GuardSpec | None = None

    @model_validator(mode="after")
    def _legal(self) -> "WatchSpec":
        refuse_answers(self.prompts, "reinforcement")
        distinct_names(self.gold)
        return self


def refuse_trained_gold(gold: list[RewardSpec], rewards: list[RewardSpec]) -> None:
    """Raise ValueError where a gold scorer is one that is trained on: it could not fall behind."""

    def judged_by(reward: RewardSpec) -> dict[str, object]:
        return reward.model_dump(exclude={"weight", "name"})

    trained = [judged_by(reward) for reward in rewards if reward.weight != 0.0]
    for reward in gold:
        if judged_by(reward) in trained:
            raise ValueError(
                f"watch.gold: '{reward.name or reward.kind}' is also a training reward, so the "
                "guard would see nothing; give a scorer that training never sees"
            )


class CriticSpec(Spec):
    """Describe PPO's value network; ``init`` None starts it from the policy's weights."""

    init: Annotated[str | None, Ref("policy", "reward_model")] = None
    optim: OptimSpec = OptimSpec(learning_rate=1e-5, schedule="constant")
    clip: Positive = 0.2
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Rollout steps in which only the critic learns."""


class OnlineStage(TrainingStage):
    """Hold what ppo and grpo share."""

    module: ClassVar[str] = "online"
    family: ClassVar = "policy"
    prompts: list[DataSpec] = Field(min_length=1)
    rewards: list[RewardSpec] = Field(min_length=1)
    sampling: OnlineSampling = OnlineSampling()
    steps: Count
    prompts_per_step: Count = 32
    minibatches: Count = 1
    update_epochs: Count = 1
    clip: ClipSpec = ClipSpec()
    importance: ImportanceSpec = ImportanceSpec()
    truncated_score: float | None = None
    """Score of an answer without a stop token; None keeps the reward's own."""
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """What an answer without a stop token is: ``terminal`` ends there like any other; ``bootstrap``
    goes on, worth what PPO's critic says (arXiv:1712.00378); ``mask`` stays out of loss and group
    (DAPO's overlong filtering)."""
    overlong: OverlongSpec | None = None
    max_lost_frac: Fraction = 0.01
    watch: WatchSpec | None = None
    """Evaluation on held-out prompts while training, and the guard against over-optimisation."""
    if TYPE_CHECKING:  # each stage has its own defaults, or a fixed value
        kind: Literal["ppo", "grpo"]
        kl: KlSpec
        group_size: int
        estimator: str
        scale: str
        objective: str
        aggregation: str
        dynamic_sampling: bool
        max_draws: int
        critic: CriticSpec | None
        whiten_rewards: bool

    @property
    def algorithm_facts(self) -> Algorithm:
        """Return what the stage's estimator needs."""
        return of_estimator(self.estimator)

    @model_validator(mode="after")
    def _legal(self) -> "OnlineStage":
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature is 0: every answer of a prompt is the same")
        if self.sampling.top_p < 1.0:
            raise ValueError("sampling.top_p < 1 samples from another distribution than is trained")
        if self.prompts_per_step % (self.minibatches * self.ranks):
            raise ValueError("prompts_per_step must be a multiple of minibatches x ranks")
        if self.truncation == "mask" and self.truncated_score is not None:
            raise ValueError("'truncated_score' has no effect with truncation: mask; remove it")
        if self.max_length <= self.sampling.max_new_tokens:
            raise ValueError("max_length must leave room for a prompt before max_new_tokens")
        refuse_answers(self.prompts, "reinforcement")
        refuse_dropout(self.tuning)
        refuse_unfit(self, watched=False)
        refuse_served(self.tuning, self.sampling.engine)
        if self.sampling.push == "adapter":
            refuse_pushed(self.tuning, self.sampling.engine)
        distinct_names(self.rewards)
        if self.watch is not None and self.watch.guard is not None:
            refuse_trained_gold(self.watch.gold, self.rewards)
        return self


class PpoStage(OnlineStage):
    """PPO with a learned critic (arXiv:1707.06347, arXiv:1909.08593)."""

    estimator: ClassVar[str] = ALGORITHMS["ppo"].estimator
    scale: ClassVar[str] = ALGORITHMS["ppo"].scale
    objective: ClassVar[str] = ALGORITHMS["ppo"].objective
    aggregation: ClassVar[str] = ALGORITHMS["ppo"].aggregation
    dynamic_sampling: ClassVar[bool] = False
    max_draws: ClassVar[int] = 1

    kind: Literal["ppo"]
    group_size: Count = 1
    kl: KlSpec = KlSpec(coef=0.05)
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    critic: CriticSpec = CriticSpec()
    whiten_rewards: bool = False
    update_epochs: Count = 2

    @model_validator(mode="after")
    def _bootstrap_or_score(self) -> "PpoStage":
        if self.truncation == "bootstrap" and self.truncated_score is not None:
            raise ValueError(
                "truncation: bootstrap says that a cut answer goes on, 'truncated_score' that it "
                "ends; give one of them"
            )
        return self


class GrpoStage(OnlineStage):
    """Policy optimisation without a critic: the options that tell its algorithms apart."""

    critic: ClassVar[None] = None
    whiten_rewards: ClassVar[bool] = False

    kind: Literal["grpo"]
    algorithm: Annotated[str, AfterValidator(known_algorithm)] = "grpo"
    """Named set of defaults for the options of this stage (align/recipe/algorithms.py)."""
    group_size: Count = 8
    kl: KlSpec = KlSpec(coef=0.0, place="loss", estimator="k3")
    estimator: Annotated[str, AfterValidator(known_estimator)] = "group_relative"
    """Score against the group's mean, the mean of the others, nothing, or the greedy answer's."""
    scale: Literal["std", "batch", "none"] = "std"
    """Divide by the group's standard deviation, the whole batch's, or nothing (Dr. GRPO)."""
    objective: Literal["clip", "gspo", "cispo"] = "clip"
    """Clip the ratio of each token, the ratio of each answer, or the weight of each token."""
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = "token"
    """Mean over tokens (DAPO); over tokens, then answers (the first GRPO); sum over tokens, mean
    over answers (RLOO); that by max_new_tokens (Dr. GRPO)."""
    dynamic_sampling: bool = False
    """Draw more prompts until every group of the step has unequal scores (DAPO section 3.2)."""
    max_draws: Count = 3

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return with_preset(given)

    @model_validator(mode="after")
    def _estimator_fits(self) -> "GrpoStage":
        facts = self.algorithm_facts
        if self.scale not in facts.scales:
            raise ValueError(
                f"'scale: {self.scale}' has no effect with {self.estimator}; write "
                f"scale: {' or '.join(facts.scales)}"
            )
        if self.group_size == 1 and facts.compares_group:
            raise ValueError(f"{self.estimator} compares answers: group_size must be 2 or more")
        if self.dynamic_sampling and not facts.compares_group:
            raise ValueError(f"'dynamic_sampling' has no effect with {self.estimator}; remove it")
        if self.truncation == "bootstrap":
            raise ValueError("truncation: bootstrap needs PPO's critic; use terminal or mask")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> "GrpoStage":
        if self.objective != "clip" and self.clip.dual is not None:
            raise ValueError(f"'clip.dual' has no effect with objective {self.objective}")
        if self.objective == "gspo" and self.aggregation != "sequence":
            raise ValueError("gspo has one loss per answer; write aggregation: sequence")
        if self.objective == "gspo" and self.clip.low > 0.1:
            raise ValueError(
                f"gspo's ratio is a mean over an answer and never falls by {self.clip.low}; "
                "write clip: {low: 3.0e-4, high: 4.0e-4} or algorithm: gspo"
            )
        return self
