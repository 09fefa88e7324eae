"""Schema of the merge stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.offline_schema import StageSpec
from align.recipe.parts import Count, DataSpec, Fraction, SamplingSpec, refuse_answers
from align.recipe.reward_schema import RewardSpec, distinct_names

MergeMethod = Literal["linear", "ties", "dare_ties", "dare_linear", "slerp"]


class MergeStage(StageSpec):
    """Interpolate between a model and what was fine-tuned from it (WiSE-FT, arXiv:2109.01903).

    With several alphas each is scored on prompts like those of the fine-tuning and on shifted
    ones; a single alpha is merged as it is.
    """

    kind: Literal["merge"]
    base: str
    tuned: str
    others: list[str] = []
    """More models that were fine-tuned from ``base``, merged with ``tuned`` by ties and dare."""
    method: MergeMethod = "linear"
    """All but linear need mergekit: pip install 'align-suite[merge]'."""
    density: Fraction | None = None
    """Share of each task vector that ties and dare keep; None is 0.5."""
    alphas: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Shares of the fine-tuned weights: 0 is ``base``, 1 is ``tuned``; with ties and dare what the
    merged task vector is multiplied by."""
    prompts: list[DataSpec] = []
    """Held-out prompts like those that were trained on."""
    shifted: list[DataSpec] = []
    """Held-out prompts of another kind: what the base could do and should still do."""
    scores: list[RewardSpec] = []
    """Their weighted sum is the score of an answer."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.01
    """Chosen is the best alpha on ``shifted`` among those that score on ``prompts`` at most this
    much (in the unit of the score) below alpha 1; of equal ones the largest."""
    samples: Count = 1
    sampling: SamplingSpec = SamplingSpec(temperature=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the engine while scoring; the file keeps that of ``tuned``."""
    max_length: Count = 1024
    max_lost_frac: Fraction = 0.0

    @model_validator(mode="after")
    def _legal(self) -> "MergeStage":
        judged = {"prompts": self.prompts, "shifted": self.shifted, "scores": self.scores}
        if self.method in ("linear", "slerp") and (self.others or self.density is not None):
            raise ValueError(f"'others' and 'density' have no effect with method {self.method}")
        if len(set(self.alphas)) != len(self.alphas):
            raise ValueError(f"alphas {self.alphas} holds one twice")
        if len(self.alphas) == 1:
            given = [key for key, value in judged.items() if value]
            if given:
                raise ValueError(f"a single alpha is not scored; remove {', '.join(given)}")
            return self
        missing = [key for key, value in judged.items() if not value]
        if missing:
            raise ValueError(f"several alphas are scored to choose one; give {', '.join(missing)}")
        if 1.0 not in self.alphas:
            raise ValueError("alphas must hold 1.0, against which 'tolerance' is measured")
        refuse_answers([*self.prompts, *self.shifted], "merge")
        distinct_names(self.scores)
        return self
