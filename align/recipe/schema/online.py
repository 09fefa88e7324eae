"""Schema of the online stages: ppo and grpo."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.algorithms import (
    ALGORITHMS,
    Algorithm,
    known_algorithm,
    known_estimator,
    known_objective,
    of_estimator,
    with_preset,
)
from align.recipe.schema.common import (
    BatchSize,
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
from align.recipe.schema.training import TrainingStage, refuse_unfit
from align.recipe.schema.tuning import refuse_dropout, refuse_pushed, refuse_served
from reward_models.identity import Aside
from reward_models.specs import RewardSpec

AlarmName = Literal["gold_slope", "proxy_gap", "length", "repetition", "one_reward", "disagreement"]


class GuardSpec(Spec):
    """Alarms of over-optimization, and which of them end the stage early."""

    stop_on: list[AlarmName] = ["gold_slope"]
    """Alarms that end the stage; with an empty list alarms are only logged."""
    window: Annotated[int, Field(ge=3)] = 4
    """Number of evaluations over which a slope is fitted."""
    patience: Count = 2
    """Number of consecutive evaluations with the same alarm before the stage ends."""


class WatchSpec(Spec):
    """Held-out evaluation of the policy during training; it does not affect the updates."""

    every: Count
    """Steps between evaluations; there is also one before the first and after the last step."""
    prompts: list[DataSpec] = Field(min_length=1)
    """Held-out prompts."""
    gold: list[RewardSpec] = Field(min_length=1)
    """Scorers that are not used in training; their weighted sum selects the best checkpoint."""
    max_contaminated_frac: Fraction = 0.05
    """Maximum fraction of ``prompts`` that may appear in the training prompts; more is an error."""
    samples: Count = 1
    """Responses per prompt."""
    keep: Literal["last", "best"] = "last"
    """Which weights are exported to ``model/``. The best by gold score are always kept in
    ``best/``, and are exported if the guard ends the stage."""
    guard: GuardSpec | None = None
    """Alarms of over-optimization; None for none."""

    @model_validator(mode="after")
    def _legal(self) -> "WatchSpec":
        refuse_answers(self.prompts, "reinforcement")
        distinct_names(self.gold)
        return self


def refuse_trained_gold(gold: list[RewardSpec], rewards: list[RewardSpec]) -> None:
    """Raise ValueError if a gold scorer is also a training reward: it could not detect hacking."""

    def identity(reward: RewardSpec) -> dict[str, object]:
        return reward.model_dump(exclude={"weight", "name"})

    trained = [identity(reward) for reward in rewards if reward.weight != 0.0]
    for reward in gold:
        if identity(reward) in trained:
            raise ValueError(
                f"watch.gold: '{reward.label}' is also a training reward, so the "
                "guard cannot detect over-optimization; give a scorer that is not trained on"
            )


class CriticSpec(Spec):
    """PPO's value network; with ``init: null`` it starts from the policy's weights."""

    init: Annotated[str | None, Ref("policy", "reward_model")] = None
    """Policy or reward model that the critic starts from; None for the policy's weights."""
    optim: OptimSpec = OptimSpec(learning_rate=1e-5, schedule="constant")
    """Optimizer and learning rate of the critic."""
    clip: Positive = 0.2
    """Distance from the old value to which an update of a value is clipped."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Rollout steps at the start in which only the critic is trained."""


class OnlineStage(TrainingStage):
    """Base of ppo and grpo."""

    module: ClassVar[str] = "align.stages.online"
    family: ClassVar = "policy"
    prompts: list[DataSpec] = Field(min_length=1)
    """Prompts that responses are sampled for."""
    rewards: list[RewardSpec] = Field(min_length=1)
    """Rewards of a response; their weighted sum is its score."""
    sampling: OnlineSampling = OnlineSampling()
    """How responses are sampled."""
    steps: Count
    """Number of rollout steps. Each samples responses, scores them and updates the policy."""
    prompts_per_step: BatchSize = 32
    """Prompts of each rollout step, over all ranks."""
    minibatches: Count = 1
    """Number of optimizer steps into which the responses of a rollout step are split."""
    update_epochs: Count = 1
    """Passes over the responses of a rollout step."""
    clip: ClipSpec = ClipSpec()
    """Clipping of the policy ratio."""
    importance: ImportanceSpec = ImportanceSpec()
    """Importance weights that correct for the difference between the sampler's log-probabilities
    and the trainer's."""
    truncated_score: float | None = None
    """Score of a response without a stop token; None keeps the reward's own score."""
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """How a response without a stop token is treated: ``terminal`` as if it ended there;
    ``bootstrap`` adds the critic's value of the rest (arXiv:1712.00378); ``mask`` excludes it from
    loss and group statistics (DAPO's overlong filtering)."""
    overlong: OverlongSpec | None = None
    """Penalty of responses close to the length limit."""
    max_lost_frac: Fraction = 0.01
    """Maximum fraction of prompts that may be dropped because of ``max_length``; more is an
    error."""
    watch: WatchSpec | None = None
    """Held-out evaluation during training, and the guard against over-optimization."""
    offload_idle: Annotated[bool, Aside()] = False
    """On a GPU, keep the reference policy and the reward models in CPU memory while they are not
    used, and the optimizer states while responses are sampled. Copying them takes time in each
    step."""
    if TYPE_CHECKING:  # Each stage has its own defaults, or a fixed value.
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
        """Return the algorithm whose estimator the stage uses."""
        return of_estimator(self.estimator)

    @model_validator(mode="after")
    def _legal(self) -> "OnlineStage":
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature is 0: all responses to a prompt are the same")
        if self.sampling.top_p < 1.0:
            raise ValueError("sampling.top_p < 1 samples from another distribution than the policy")
        if self.prompts_per_step % (self.minibatches * self.ranks):
            raise ValueError("prompts_per_step must be a multiple of minibatches x ranks")
        if self.max_length <= self.sampling.max_new_tokens:
            raise ValueError("max_length must leave room for a prompt before max_new_tokens")
        refuse_answers(self.prompts, "reinforcement")
        refuse_dropout(self.tuning)
        refuse_unfit(self, watched=False)
        refuse_served(self.tuning, self.sampling.engine)
        if self.sampling.push == "adapter":
            refuse_pushed(self.tuning, self.sampling.engine)
            if self.sampling.tensor_parallel > 1:
                raise ValueError(
                    "sampling.push: adapter needs tensor_parallel: 1; remove 'push', and all "
                    "weights are pushed"
                )
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
    """Responses to each prompt."""
    kl: KlSpec = KlSpec(coef=0.05)
    """KL penalty to the reference policy."""
    gamma: Fraction = 1.0
    """Discount factor of later rewards."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation (arXiv:1506.02438)."""
    critic: CriticSpec = CriticSpec()
    """The value network."""
    whiten_rewards: bool = False
    """Divide the rewards of a step by their standard deviation."""
    update_epochs: Count = 2
    """Passes over the responses of a rollout step."""

    @model_validator(mode="after")
    def _bootstrap_or_score(self) -> "PpoStage":
        if self.truncation == "bootstrap" and self.truncated_score is not None:
            raise ValueError(
                "truncation: bootstrap and 'truncated_score' contradict each other: a truncated "
                "response either continues or ends; give one of them"
            )
        return self


class GrpoStage(OnlineStage):
    """Policy optimization without a critic; ``algorithm`` selects a set of defaults."""

    critic: ClassVar[None] = None
    whiten_rewards: ClassVar[bool] = False

    kind: Literal["grpo"]
    algorithm: Annotated[str, AfterValidator(known_algorithm)] = "grpo"
    """Named set of defaults for the options of this stage (align/recipe/algorithms.py)."""
    group_size: Count = 8
    """Responses to each prompt."""
    kl: KlSpec = KlSpec(coef=0.0, place="loss", estimator="k3")
    """KL penalty to the reference policy."""
    estimator: Annotated[str, AfterValidator(known_estimator)] = "group_relative"
    """Baseline of the score: group mean, mean of the others, none, or the greedy response; or your
    own function, ``FILE.py:NAME`` (docs/own-code.md)."""
    scale: Literal["std", "batch", "none"] = "std"
    """Divide by the standard deviation of the group, of the batch, or by nothing (Dr. GRPO)."""
    objective: Annotated[str, AfterValidator(known_objective)] = "clip"
    """Clip the ratio of each token (``clip``), the ratio of each response (``gspo``), or the weight
    of each token (``cispo``); or your own function, ``FILE.py:NAME`` (docs/own-code.md)."""
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] = "token"
    """Mean over all tokens (DAPO); mean over tokens, then responses (original GRPO); sum over
    tokens, mean over responses (RLOO); the same divided by max_new_tokens (Dr. GRPO)."""
    dynamic_sampling: bool = False
    """Sample more prompts until every group of the step has unequal scores (DAPO section 3.2)."""
    max_draws: Count = 3
    """Maximum rounds of sampling of one step with ``dynamic_sampling``."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: object) -> Any:
        return with_preset(given)

    @model_validator(mode="after")
    def _estimator_fits(self) -> "GrpoStage":
        facts = self.algorithm_facts
        if self.group_size == 1 and facts.compares_group:
            raise ValueError(f"{self.estimator} compares responses: group_size must be 2 or more")
        if self.truncation == "bootstrap":
            raise ValueError("truncation: bootstrap needs PPO's critic; use terminal or mask")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> "GrpoStage":
        if self.objective == "gspo" and self.aggregation != "sequence":
            raise ValueError("gspo has one loss per response; write aggregation: sequence")
        if self.objective == "gspo" and self.clip.low > 0.1:
            raise ValueError(
                f"gspo's ratio is a mean over a response and never falls by {self.clip.low}; "
                "write clip: {low: 3.0e-4, high: 4.0e-4} or algorithm: gspo"
            )
        return self
