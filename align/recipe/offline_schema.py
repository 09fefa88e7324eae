"""Schema of what every stage has, of the base stage and of the offline stages."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.keep_schema import KeepSpec, refuse_unfit
from align.recipe.layers_schema import LayersSpec, refuse_outside
from align.recipe.parts import (
    BuildSpec,
    Count,
    DataSpec,
    Fraction,
    OptimSpec,
    Positive,
    Spec,
    TokenizerSpec,
    ZeroSpec,
    refuse_answers,
)
from align.recipe.tuning_schema import (
    FullTuning,
    TuningSpec,
    refuse_checkpointing,
    refuse_dropout,
    refuse_head,
    refuse_last,
)


class StageSpec(Spec):
    """Hold what every stage has: who starts it and with how many processes."""

    ranks: Count = 1
    threads: Count | None = None
    """CPU threads of each rank; None divides the cores among the ranks of this node."""
    seed: int | None = None


class TrainingStage(StageSpec):
    """Hold what every training stage shares."""

    new_head: ClassVar[str | None] = None
    """The stage's kind where its model loses the language head for a new one."""
    init: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero: ZeroSpec = ZeroSpec()
    optim: OptimSpec = OptimSpec()
    tuning: TuningSpec = FullTuning()
    layers: LayersSpec | None = None
    keep: KeepSpec = KeepSpec()
    max_length: Count = 1024
    micro_tokens: Count = 8192
    """Token budget of one forward-backward pass on one rank."""
    gradient_checkpointing: bool = False
    expect: dict[str, tuple[float | None, float | None]] = {}
    """Bands of this stage's metrics, such as ``kl/reference: [0, 5]``: drawn in the report."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints; 0 keeps none."""
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _tuning_fits(self) -> "TrainingStage":
        if self.new_head:
            refuse_last(self.tuning, self.new_head)
        else:
            refuse_head(self.tuning, "policy")
        refuse_outside(self.layers, self.tuning.method)
        if self.gradient_checkpointing:
            refuse_checkpointing(self.tuning)
        return self


class OfflineStage(TrainingStage):
    """Hold what sft, classify, reward, dpo and kto share."""

    data: list[DataSpec] = Field(min_length=1)
    heldout: list[DataSpec] = []
    mix_cap: Count | None = None
    """Mix several data sets in proportion to their rows, none counting for more than this many
    (examples-proportional mixing with a limit, arXiv:1910.10683 section 3.5.2)."""
    batch_size: Count = 32
    """Rows (pairs) of one optimiser step over all ranks."""
    epochs: Positive = 1.0
    steps: Count | None = None
    """Optimiser steps; overrides ``epochs``."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    max_lost_frac: Fraction = 0.01
    max_contaminated_frac: Fraction = 0.05
    """Share of the held-out prompts whose words may stand in the training texts."""

    @model_validator(mode="after")
    def _answers_for_sft(self) -> "OfflineStage":
        if not isinstance(self, SftStage):
            refuse_answers([*self.data, *self.heldout], "preference")
        kinds = {SftStage: "sft", KtoStage: "kto"}
        kind = self.new_head or kinds.get(type(self), "dpo")
        watched = bool(self.heldout) and self.eval_every > 0
        refuse_unfit(self.keep, kind, method=self.tuning.method, watched=watched)
        if self.mix_cap is not None and len(self.data) < 2:
            raise ValueError("'mix_cap' has no effect on one data set; remove it")
        if self.mix_cap is not None and any(spec.weight != 1.0 for spec in self.data):
            raise ValueError("'mix_cap' sets the weights of the mixture; remove 'weight' or it")
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
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target spread evenly over the vocabulary (arXiv:1512.00567 section 7)."""


class DpoStage(OfflineStage):
    """Direct preference optimisation (arXiv:2305.18290) and close relatives."""

    kind: Literal["dpo"]
    beta: Positive = 0.1
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "simpo", "orpo"] = "sigmoid"
    """``sigmoid_norm``, ``ipo``, ``simpo`` and ``orpo`` compare means per token, the others sums;
    ``simpo`` and ``orpo`` need no reference."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    gamma: Annotated[float, Field(ge=0.0)] | None = None
    """simpo's margin between chosen and rejected (arXiv:2405.14734); None is beta / 2."""
    nll_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the chosen answer's negative log-likelihood per token (arXiv:2404.19733)."""
    ld_alpha: Fraction | None = None
    """Weight of the tokens by which the longer answer exceeds the shorter (arXiv:2409.06411)."""

    @property
    def reference_free(self) -> bool:
        """Say whether the loss does without a reference."""
        return self.loss in ("simpo", "orpo")

    @property
    def on_means(self) -> bool:
        """Say whether the loss compares means per token instead of sums."""
        return self.loss in ("sigmoid_norm", "ipo", "simpo", "orpo")

    @model_validator(mode="after")
    def _legal(self) -> "DpoStage":
        without_effect = {
            "label_smoothing": bool(self.label_smoothing) and self.loss in ("hinge", "ipo", "orpo"),
            "gamma": self.gamma is not None and self.loss != "simpo",
            "nll_coef": self.nll_coef > 0.0 and self.loss == "orpo",
            "ld_alpha": self.ld_alpha is not None and self.on_means,
        }
        for key, wrong in without_effect.items():
            if wrong:
                raise ValueError(f"'{key}' has no effect with loss {self.loss}; remove it")
        refuse_dropout(self.tuning)
        return self


class KtoStage(OfflineStage):
    """Learn from single answers judged good or bad (KTO, arXiv:2402.01306)."""

    kind: Literal["kto"]
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Answers of one optimiser step over all ranks; their mean sets the loss's reference point."""

    @model_validator(mode="after")
    def _legal(self) -> "KtoStage":
        refuse_dropout(self.tuning)
        return self
