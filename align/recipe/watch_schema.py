"""Schema of what watches an online stage: evaluation on held-out prompts, and the guard."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.parts import Count, DataSpec, Fraction, Spec, refuse_answers
from align.recipe.reward_schema import RewardSpec, distinct_names

AlarmName = Literal[
    "gold_slope", "proxy_gap", "length", "repetition", "one_reward", "disagreement"
]  # fmt: skip


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
