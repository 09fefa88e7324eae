"""Schema of the rewards: one class per kind of reward_models."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.schema.common import Count, EndpointSpec, Positive, Spec


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's weights; the head computes in float32."""


class ProcessReward(RewardBase):
    """Score solutions step by step: a reward stage with ``supervision: steps``."""

    kind: Literal["process"]
    model: str
    aggregate: Literal["min", "last", "product"] = "min"
    dtype: Literal["float32", "bfloat16"] = "float32"


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


class RemoteReward(RewardBase):
    """Score on a server that ``align serve-reward`` started."""

    kind: Literal["remote"]
    url: str
    """Its address, such as http://127.0.0.1:8765."""
    deadline_s: Positive = 60.0
    """Of one request, retries included."""
    retries: Annotated[int, Field(ge=0)] = 4
    max_failures: Count = 3
    """Requests in a row without an answer after which the stage ends."""
    token_ids: bool = False
    """Send the sampled token ids instead of texts: policy and scorer share a tokenizer."""


class JudgeReward(RewardBase):
    """Let a language model behind an OpenAI-compatible API grade each answer."""

    kind: Literal["judge"]
    endpoint: EndpointSpec
    criteria: str = "Judge whether it helps: correct, on the question, clear."
    scale: tuple[int, int] = (1, 10)
    """Worst and best grade; the score is the grade's place between them, in [0, 1]."""
    reference: str | None = None
    """Column with a good answer that the judge is shown."""

    @model_validator(mode="after")
    def _scale_rises(self) -> "JudgeReward":
        if self.scale[0] >= self.scale[1]:
            raise ValueError("scale: the best grade must be above the worst")
        return self


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
    | RemoteReward
    | JudgeReward
    | EnsembleReward,
    Field(discriminator="kind"),
]


def distinct_names(rewards: list[RewardSpec]) -> None:
    """Raise ValueError where two rewards would write one column."""
    names = [reward.name or reward.kind for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are called '{name}'; give each its own 'name'")
