"""Schema of the model imports (base, encoder) and of the offline training stages."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.algorithms import is_function, known_loss, known_own_loss
from align.recipe.schema.common import (
    BatchSize,
    BuildSpec,
    Count,
    DataSpec,
    Fraction,
    OptimSpec,
    ParallelSpec,
    Positive,
    Ref,
    SamplingSpec,
    TokenizerSpec,
    refuse_answers,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.formats import Kind
from align.recipe.schema.training import StageSpec, TrainingStage, refuse_unfit
from align.recipe.schema.tuning import LoreftTuning, refuse_dropout
from reward_models.identity import Added, Formerly


class OfflineStage(TrainingStage):
    """Base of sft, classify, reward, dpo and kto."""

    rows: ClassVar[Kind]
    """Kind of the rows of ``data`` and ``heldout``."""
    data: list[DataSpec] = Field(min_length=1)
    """Training rows."""
    heldout: list[DataSpec] = []
    """Rows that are evaluated during training and never trained on."""
    mix_cap: Count | None = None
    """Mix several datasets in proportion to their size, counting at most this many rows of each
    (examples-proportional mixing with a limit, arXiv:1910.10683 section 3.5.2)."""
    batch_size: BatchSize = 32
    """Rows (pairs) per optimizer step over all ranks."""
    epochs: Positive = 1.0
    """Passes over the training rows."""
    steps: Count | None = None
    """Optimizer steps; overrides ``epochs``."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations of ``heldout``; 0 for the start and the end only."""
    max_lost_frac: Fraction = 0.01
    """Maximum fraction of rows that may be dropped, for example because of ``max_length``; more is
    an error."""
    max_contaminated_frac: Fraction = 0.05
    """Maximum fraction of held-out prompts that may appear in the training texts; more is an
    error."""
    loss: Annotated[str | None, AfterValidator(known_own_loss), Added("0.2")] = None
    """Your own function, ``FILE.py:NAME``, in place of the stage's loss (docs/own-code.md)."""

    @property
    def own_loss(self) -> str | None:
        """Return the user's function that is the loss, None if it is one of the suite."""
        return self.loss if self.loss is not None and is_function(self.loss) else None

    @model_validator(mode="after")
    def _answers_for_sft(self) -> "OfflineStage":
        if not isinstance(self, SftStage):
            refuse_answers([*self.data, *self.heldout], "preference")
        refuse_unfit(self, watched=bool(self.heldout) and self.eval_every > 0)
        if self.mix_cap is not None and any(spec.weight != 1.0 for spec in self.data):
            raise ValueError("'mix_cap' sets the weights of the mixture; remove 'weight' or it")
        return self


class BaseStage(StageSpec):
    """Import a model (``path``), or build and pretrain a small one (``build``)."""

    produces: ClassVar[str] = "policy"
    module: ClassVar[str] = "align.stages.base_model"
    imports_model: ClassVar[bool] = True
    rows: ClassVar[Kind] = "corpus"
    """Kind of the rows of ``data``."""
    kind: Literal["base"]
    path: str | None = None
    """Folder or hub id of a transformers model."""
    build: BuildSpec | None = None
    """Size of a small model to pretrain."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """Special tokens and chat template that the saved tokenizer lacks."""
    data: list[DataSpec] = []
    """Texts for the pretraining of ``build``."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of the pretraining."""
    batch_size: BatchSize = 64
    """Rows per optimizer step."""
    max_length: Count = 1024
    """Maximum tokens of a row."""
    micro_tokens: Count = 8192
    """Maximum tokens of one forward-backward pass."""
    optim: OptimSpec = OptimSpec(learning_rate=1e-3)
    """Optimizer and learning rate of the pretraining."""
    dtype: Annotated[Dtype | None, Formerly("float32")] = None
    """Data type of the weights; None keeps that of an imported model (float32 if it is not
    bfloat16), and builds models in float32."""

    @model_validator(mode="after")
    def _one_origin(self) -> "BaseStage":
        if (self.path is None) == (self.build is None):
            raise ValueError("give exactly one of 'path' and 'build'")
        if self.build is not None and (not self.data or not self.steps):
            raise ValueError("'build' needs 'data' and 'steps' to pretrain on")
        refuse_answers(self.data, "base")
        return self


class EncoderStage(StageSpec):
    """Import an encoder such as BERT for classify and reward stages; it cannot generate."""

    produces: ClassVar[str] = "encoder"
    module: ClassVar[str] = "align.stages.encoder"
    imports_model: ClassVar[bool] = True
    kind: Literal["encoder"]
    path: str
    """Folder or hub id of a transformers model."""


class LongRowStage(OfflineStage):
    """Base of sft and dpo, whose rows several ranks can share."""

    parallel: Annotated[ParallelSpec, Added("0.2")] = ParallelSpec()
    """Parallelism beyond that of data and ZeRO."""

    @property
    def sequence_ranks(self) -> int:
        """Return the number of ranks that share the tokens of a row."""
        return self.parallel.sequence

    @model_validator(mode="after")
    def _can_share(self) -> "LongRowStage":
        if self.parallel.sequence > 1:
            if self.tuning.virtual or isinstance(self.tuning, LoreftTuning):
                raise ValueError(
                    f"parallel.sequence: {self.tuning.method} tuning needs whole rows on each "
                    "rank; use full or lora, or remove it"
                )
            if self.keep.dropout > 0.0 or self.keep.ewc is not None:
                raise ValueError(
                    "parallel.sequence does not combine with keep.dropout or keep.ewc; remove one"
                )
        return self


class SftStage(LongRowStage):
    """Supervised fine-tuning on the assistant turns."""

    module: ClassVar[str] = "align.stages.sft"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss",)
    rows: ClassVar[Kind] = "sft"
    kind: Literal["sft"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of each target spread evenly over the vocabulary (arXiv:1512.00567 section 7)."""


class DpoStage(LongRowStage):
    """Direct preference optimization (arXiv:2305.18290) and related losses."""

    module: ClassVar[str] = "align.stages.dpo"
    family: ClassVar = "policy"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy", "eval/margin", "eval/chosen_logprob")
    rows: ClassVar[Kind] = "preference"
    kind: Literal["dpo"]
    beta: Positive = 0.1
    """Factor of the log-ratios in the loss; a larger value keeps the policy closer to the
    reference."""
    loss: Annotated[str, AfterValidator(known_loss)] = "sigmoid"  # pyright: ignore[reportIncompatibleVariableOverride]
    """``sigmoid``, ``hinge`` and ``robust`` compare sums; ``sigmoid_norm``, ``ipo``, ``simpo`` and
    ``orpo`` means per token, the last two without a reference; or a function ``FILE.py:NAME`` of
    yours on sums (docs/own-code.md)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed probability that a pair's label is wrong."""
    gamma: Annotated[float, Field(ge=0.0)] | None = None
    """Target margin of simpo between chosen and rejected (arXiv:2405.14734); None means beta /
    2."""
    nll_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the chosen response's negative log-likelihood per token (arXiv:2404.19733)."""
    ld_alpha: Fraction | None = None
    """Weight of the tokens by which the longer response exceeds the shorter (arXiv:2409.06411)."""

    @property
    def reference_free(self) -> bool:
        """Return whether the loss needs no reference policy."""
        return self.loss in ("simpo", "orpo")

    @property
    def on_means(self) -> bool:
        """Return whether the loss compares means per token instead of sums."""
        return self.loss in ("sigmoid_norm", "ipo", "simpo", "orpo")

    @model_validator(mode="after")
    def _legal(self) -> "DpoStage":
        refuse_dropout(self.tuning)
        return self


class KtoStage(OfflineStage):
    """Learn from single responses labeled good or bad (KTO, arXiv:2402.01306)."""

    module: ClassVar[str] = "align.stages.kto"
    family: ClassVar = "policy"
    heldout_metrics: ClassVar = ("eval/loss", "eval/kl", "eval/good_reward", "eval/bad_reward")
    rows: ClassVar[Kind] = "unpaired"
    kind: Literal["kto"]
    beta: Positive = 0.1
    """Factor of the log-ratios in the loss; a larger value keeps the policy closer to the
    reference."""
    desirable_weight: Positive = 1.0
    """Weight of the loss on good responses."""
    undesirable_weight: Positive = 1.0
    """Weight of the loss on bad responses."""
    batch_size: Annotated[int, Field(ge=2, le=2**20)] = 32
    """Responses per optimizer step over all ranks; their mean is the loss's reference point."""

    @model_validator(mode="after")
    def _legal(self) -> "KtoStage":
        refuse_dropout(self.tuning)
        return self


class RewardStage(OfflineStage):
    """Train a reward model (arXiv:1706.03741; centering: arXiv:2312.09244)."""

    produces: ClassVar[str] = "reward_model"
    module: ClassVar[str] = "align.stages.reward.stage"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "reward"
    kind: Literal["reward"]
    init: Annotated[str, Ref("policy", "encoder")]
    """Policy or encoder to which the new head is added."""
    supervision: Literal["pairs", "answers", "steps"] = "pairs"
    """``pairs``: Bradley-Terry; ``answers``: labeled responses (balanced cross-entropy);
    ``steps``: labeled steps of a solution (process reward model, arXiv:2305.20050)."""
    center_coef: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the penalty that keeps scores near 0; 0 turns it off."""
    use_margin: bool = False
    """Require the rows' ``margin`` between the two scores (arXiv:2307.09288 eq. 2)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed probability that a pair's label is wrong."""
    tie_margin: Positive | None = None
    """Score difference below which a tie is likely (Rao and Kupper 1967); needed for rows with
    ``tie: true``. Equal scores tie with probability tanh(tie_margin / 2)."""
    heads: Count = 1
    """Number of heads on one backbone, each trained on its own bootstrap sample of the rows."""
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """Text between the steps of a solution; a token that contains it ends a step."""
    noise_folds: Annotated[int, Field(ge=0)] = 0
    """Cross-validation folds for finding labels that are likely wrong (noise.jsonl): each fold is
    scored by a model trained on the others. 0 for none, otherwise at least 2."""
    norm_prompts: Annotated[int, Field(ge=0)] = 64
    """Number of rows of ``data`` whose responses set the mean and standard deviation that scores
    are normalized with."""
    norm_sampling: SamplingSpec | None = None
    """Normalize on responses sampled from ``init`` instead of those of the data
    (arXiv:1909.08593 section 2)."""

    @property
    def rows(self) -> Kind:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Kind of the rows of ``data`` and ``heldout``."""
        kinds: dict[str, Kind] = {"pairs": "preference", "answers": "unpaired", "steps": "steps"}
        return kinds[self.supervision]

    @model_validator(mode="after")
    def _legal(self) -> "RewardStage":
        if self.noise_folds == 1:
            raise ValueError("noise_folds: one fold has no others to train on; give 2 or more")
        if self.tie_margin is not None and (self.use_margin or self.label_smoothing):
            raise ValueError("'tie_margin' cannot be combined with use_margin or label_smoothing")
        return self


class ClassifyStage(OfflineStage):
    """Train a text classifier: a new head on a decoder or an encoder."""

    produces: ClassVar[str] = "classifier"
    module: ClassVar[str] = "align.stages.classify"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "classify"
    rows: ClassVar[Kind] = "classes"
    kind: Literal["classify"]
    init: Annotated[str, Ref("policy", "encoder")]
    """Policy or encoder to which the new head is added."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of each target spread evenly over the classes (arXiv:1512.00567 section 7)."""
