"""Schema of the reward stage: what a scorer is taught by, its heads, and what is measured."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.offline_schema import OfflineStage
from align.recipe.parts import Count, Positive, SamplingSpec

PAIRS_ONLY = ("center_coef", "use_margin", "label_smoothing", "tie_margin", "noise_folds")


class RewardStage(OfflineStage):
    """Train a reward model (arXiv:1706.03741; centring arXiv:2312.09244)."""

    new_head: ClassVar[str | None] = "reward"
    kind: Literal["reward"]
    supervision: Literal["pairs", "answers", "steps"] = "pairs"
    """``pairs`` by Bradley and Terry; ``answers`` with a label each (balanced cross-entropy);
    ``steps`` of a solution with a label each (process reward, arXiv:2305.20050)."""
    center_coef: Annotated[float, Field(ge=0.0)] = 0.01
    use_margin: bool = False
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    tie_margin: Positive | None = None
    """Score difference below which a tie is likely (Rao and Kupper 1967); needed where rows say
    ``tie: true``. Equal answers tie with probability tanh(tie_margin / 2)."""
    heads: Count = 1
    """Heads on the one backbone, each taught by its own bootstrap sample of the rows."""
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """What stands between the steps of a solution; a token that holds it ends a step."""
    noise_folds: Annotated[int, Field(ge=0)] = 0
    """Parts of the pairs of which each is judged by a scorer trained on the others, to find labels
    that are likely wrong (noise.jsonl); 0 leaves it out, else at least 2."""
    norm_prompts: Annotated[int, Field(ge=0)] = 64
    """Rows of ``data`` whose answers set the scorer's mean and std."""
    norm_sampling: SamplingSpec | None = None
    """Sample the answers that set mean and std from ``init`` instead of taking those of the data
    (arXiv:1909.08593 section 2)."""

    @model_validator(mode="after")
    def _has_effect(self) -> "RewardStage":
        if self.supervision != "pairs":
            self._refuse(PAIRS_ONLY, f"with supervision {self.supervision}")
        if self.supervision == "steps":
            # A process reward is a probability: it is not normalised.
            self._refuse(("heads", "norm_prompts", "norm_sampling"), "with supervision steps")
        else:
            self._refuse(("step_separator",), "without supervision: steps")
        if self.noise_folds == 1:
            raise ValueError("noise_folds: one part cannot be judged by the others; give 2 or more")
        if self.tie_margin is not None and (self.use_margin or self.label_smoothing):
            raise ValueError("'tie_margin' cannot be joined with use_margin or label_smoothing")
        if self.norm_sampling is not None and self.norm_prompts == 0:
            raise ValueError("'norm_sampling' has no effect with norm_prompts 0; remove it")
        return self

    def _refuse(self, names: tuple[str, ...], when: str) -> None:
        fields = type(self).model_fields
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        if changed:
            raise ValueError(f"{', '.join(changed)} has no effect {when}; remove it")
