"""Schema of the evaluate stage."""

from typing import Literal

from pydantic import Field, model_validator

from align.recipe.offline_schema import StageSpec
from align.recipe.parts import Count, DataSpec, Fraction, SamplingSpec, refuse_answers
from align.recipe.reward_schema import RewardSpec, distinct_names


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
    """Held-out pairs on which each reward model's card is measured."""
    sets: list[DataSpec] = []
    """Rows ``{prompt, chosen: [..], rejected: [..]}`` (RewardBench 2) for best-of-4 accuracy."""
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
        if self.sets and not self.reward_models:
            raise ValueError("'sets' has no effect without 'reward_models'; remove it")
        refuse_answers([*self.prompts, *self.pairs, *self.sets], "evaluate")
        distinct_names(self.scores)
        distinct_names(self.judge)
        return self
