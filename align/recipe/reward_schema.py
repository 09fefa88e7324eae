"""Schema of the rewards: one class per kind of reward_models."""

from typing import Annotated, Literal

from pydantic import Field

from align.recipe.parts import Count, Positive, Spec


class RewardBase(Spec):
    """Hold what every reward has."""

    weight: float = 1.0
    name: str | None = None


class ScalarReward(RewardBase):
    """Score with a trained reward model: a reward stage's name or an artefact's path."""

    kind: Literal["scalar"]
    model: str
    normalise: bool = True
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How the scores of a model with several heads become one."""
    kappa: Annotated[float, Field(ge=0.0)] = 1.0


class ProcessReward(RewardBase):
    """Score solutions step by step: a reward stage with ``supervision: steps``."""

    kind: Literal["process"]
    model: str
    aggregate: Literal["min", "last", "product"] = "min"


class ExactMatchReward(RewardBase):
    """Score 1 when the answer (or what ``pattern`` captures of it) equals the column's value."""

    kind: Literal["exact_match"]
    column: str = "answer"
    pattern: str | None = None
    ignore_case: bool = True


class RegexReward(RewardBase):
    """Score 1 when ``pattern`` is found in the answer."""

    kind: Literal["regex"]
    pattern: str


class FormatReward(RewardBase):
    """Score 1 when the whole answer has the form ``pattern``."""

    kind: Literal["format"]
    pattern: str


class LengthReward(RewardBase):
    """Score 1 up to ``target`` words, falling linearly to 0 at ``limit`` words."""

    kind: Literal["length"]
    target: Count
    limit: Count


class RepetitionReward(RewardBase):
    """Score the share of n-grams of the answer that are distinct."""

    kind: Literal["repetition"]
    ngram: Count = 3


class RefusalReward(RewardBase):
    """Score 1 when the answer declines exactly where the column's value is in ``declines``."""

    kind: Literal["refusal"]
    column: str = "label"
    declines: list[str] = Field(min_length=1)


class MathReward(RewardBase):
    """Score 1 when the final number (or LaTeX expression) equals the column's value."""

    kind: Literal["math"]
    column: str = "answer"
    latex: bool = False
    timeout_s: Positive = 5.0


class EnsembleReward(RewardBase):
    """Combine rewards that judge the same thing."""

    kind: Literal["ensemble"]
    members: list["RewardSpec"] = Field(min_length=2)
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    kappa: Annotated[float, Field(ge=0.0)] = 1.0


RewardSpec = Annotated[
    ScalarReward
    | ProcessReward
    | ExactMatchReward
    | RegexReward
    | FormatReward
    | LengthReward
    | RepetitionReward
    | RefusalReward
    | MathReward
    | EnsembleReward,
    Field(discriminator="kind"),
]


def distinct_names(rewards: list[RewardSpec]) -> None:
    """Raise ValueError where two rewards would write one column."""
    names = [reward.name or reward.kind for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are called '{name}'; give each its own 'name'")
