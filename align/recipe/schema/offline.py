"""Schema of the stage base classes, the model imports (base, encoder) and the offline stages."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.schema.common import (
    BuildSpec,
    Count,
    DataSpec,
    Fraction,
    OptimSpec,
    Positive,
    Ref,
    SamplingSpec,
    Spec,
    TokenizerSpec,
    ZeroSpec,
    refuse_answers,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.tuning import (
    FullTuning,
    TuningSpec,
    refuse_checkpointing,
    refuse_dropout,
    refuse_head,
    refuse_last,
)


class UnfreezeSpec(Spec):
    """Gradual unfreezing: start with the top layer, then unfreeze the next one below it."""

    every_steps: Count
    """Optimizer steps between two layers."""


class LayersSpec(Spec):
    """Frozen layers, gradual unfreezing and layer-wise learning rates (arXiv:1801.06146).

    Layers are the decoder's blocks, counted from 0 at the bottom. Everything above them (final
    norm, head, an adapter outside of the blocks) belongs to the top layer. The embeddings, and a
    head tied to them, are below layer 0.
    """

    freeze_first: Annotated[int, Field(ge=0)] = 0
    """Number of lowest layers that are never trained."""
    freeze_embeddings: bool = False
    unfreeze: UnfreezeSpec | None = None
    rate_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Ratio of a layer's learning rate to that of the layer above it."""

    @model_validator(mode="after")
    def _has_effect(self) -> "LayersSpec":
        if self == LayersSpec.model_construct():
            raise ValueError("the block changes nothing; give one of its keys, or remove it")
        return self


def refuse_outside(layers: LayersSpec | None, tuning: TuningSpec) -> None:
    """Raise ValueError if no trained weight is affected by the ``layers`` block."""
    if layers is None:
        return
    if not tuning.inside_layers:
        raise ValueError(
            f"'layers' has no effect with tuning.method {tuning.method}, which trains nothing "
            "inside a layer; remove it, or choose a method such as lora"
        )
    if layers.freeze_embeddings and tuning.method != "full":
        raise ValueError(
            f"'layers.freeze_embeddings' has no effect with tuning.method {tuning.method}, which "
            "leaves the embeddings as they are; remove it"
        )


Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class EarlyStoppingSpec(Spec):
    """Early stopping on a held-out metric; the best weights are kept."""

    metric: str = "eval/loss"
    """Lower is better for a loss, a KL, a calibration error and the reward of bad responses;
    higher is better for everything else."""
    patience: Count = 3
    """Number of consecutive evaluations without improvement before the stage ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest improvement that counts, in the metric's unit."""


class EwcSpec(Spec):
    """Elastic weight consolidation: a penalty on changing weights that an old task needs.

    Reference: arXiv:1612.00796 eq. 3.
    """

    coef: Positive
    """Lambda. The Fisher information is scaled to mean 1, so 1 is like an L2 penalty of 1/2."""
    data: list[DataSpec] = Field(min_length=1)
    """Supervised rows of the old task; each costs one backward pass before the first step."""
    cap: Annotated[float, Field(gt=1.0)] = 10.0
    """Largest Fisher information of a weight, in units of the mean."""


class AugmentSpec(Spec):
    """Augmentation of user turns, different in each epoch; responses are never changed."""

    word_dropout: Rate = 0.0
    """Probability of dropping each word of a user turn; at least one word remains."""
    templates: list[str] = []
    """Templates around a user turn, each with ``{text}`` once; one is drawn for each row."""


class KeepSpec(Spec):
    """Regularization against forgetting and over-fitting; all off by default."""

    dropout: Rate = 0.0
    early_stopping: EarlyStoppingSpec | None = None
    ewc: EwcSpec | None = None
    augment: AugmentSpec | None = None


class StageSpec(Spec):
    """Base of every stage: what it produces, and how its processes are started."""

    produces: ClassVar[str]
    """Kind of the artifact that it writes."""
    module: ClassVar[str]
    """Module of ``align.stages`` whose ``prepare(spec, context)`` prepares the stage."""
    if TYPE_CHECKING:  # Each class has its own literal.
        kind: str
    ranks: Count = 1
    threads: Count | None = None
    """CPU threads per rank; None divides the cores among the ranks of this node."""
    seed: int | None = None


class TrainingStage(StageSpec):
    """Base of every training stage."""

    produces: ClassVar[str] = "policy"
    family: ClassVar[Literal["supervised", "policy"]]
    """Supervised learning, or optimization of a policy relative to its reference. The learning
    rates that are known to work depend on the family."""
    heldout_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that it measures on held-out rows during training."""
    new_head: ClassVar[str | None] = None
    """The stage's kind if a new head replaces the model's language head."""
    init: Annotated[str, Ref("policy")]
    dtype: Dtype = "float32"
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
    """Expected ranges of this stage's metrics, such as ``kl/reference: [0, 5]``, for the report."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0 for no checkpoints."""
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _tuning_fits(self) -> "TrainingStage":
        if self.new_head:
            refuse_last(self.tuning, self.new_head)
        else:
            refuse_head(self.tuning, "policy")
        refuse_outside(self.layers, self.tuning)
        if self.gradient_checkpointing:
            refuse_checkpointing(self.tuning)
        return self


def refuse_unfit(stage: TrainingStage, *, watched: bool) -> None:
    """Raise ValueError for a setting of ``keep`` that is invalid or has no effect in a stage.

    Args:
        stage: the stage.
        watched: True if the stage evaluates held-out rows during training.
    """
    keep = stage.keep
    if stage.family == "policy" and keep.dropout > 0.0:
        raise ValueError("keep.dropout would make the policy differ from its reference by chance")
    if keep.early_stopping is not None:
        _refuse_stopping(keep.early_stopping, stage, watched=watched)
    if keep.ewc is not None:
        _refuse_ewc(keep.ewc, stage)
    if keep.augment is not None:
        _refuse_augment(keep.augment, stage.kind)


def _refuse_stopping(stopping: EarlyStoppingSpec, stage: TrainingStage, *, watched: bool) -> None:
    if not stage.heldout_metrics:
        raise ValueError(
            "keep.early_stopping needs held-out rows; to stop an online stage early, use 'watch' "
            "with 'guard'"
        )
    if stopping.metric not in stage.heldout_metrics:
        raise ValueError(
            f"keep.early_stopping.metric: found '{stopping.metric}'; a {stage.kind} stage measures "
            + ", ".join(stage.heldout_metrics)
        )
    if not watched:
        raise ValueError("keep.early_stopping needs 'heldout' rows and 'eval_every' of 1 or more")


def _refuse_ewc(ewc: EwcSpec, stage: TrainingStage) -> None:
    if stage.new_head:
        raise ValueError(
            "keep.ewc protects the language head; "
            f"a {stage.kind} stage replaces it by another head; remove it"
        )
    if stage.tuning.method != "full":
        raise ValueError(
            f"keep.ewc regularizes the weights of the model, which {stage.tuning.method} tuning "
            "does not change; use full tuning, or remove it"
        )
    refuse_answers(ewc.data, "ewc")


def _refuse_augment(augment: AugmentSpec, kind: str) -> None:
    if kind != "sft":
        raise ValueError(
            f"keep.augment is for sft stages; a {kind} stage uses its rows unchanged; remove it"
        )
    if augment == AugmentSpec():
        raise ValueError("keep.augment changes nothing; give word_dropout or templates")
    for template in augment.templates:
        if template.count("{text}") != 1:
            raise ValueError(f"keep.augment.templates: {template!r} must contain {{text}} once")


class OfflineStage(TrainingStage):
    """Base of sft, classify, reward, dpo and kto."""

    data: list[DataSpec] = Field(min_length=1)
    heldout: list[DataSpec] = []
    mix_cap: Count | None = None
    """Mix several datasets in proportion to their rows, with at most this many counted of each
    (examples-proportional mixing with a limit, arXiv:1910.10683 section 3.5.2)."""
    batch_size: Count = 32
    """Rows (pairs) per optimizer step over all ranks."""
    epochs: Positive = 1.0
    steps: Count | None = None
    """Optimizer steps; overrides ``epochs``."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    max_lost_frac: Fraction = 0.01
    max_contaminated_frac: Fraction = 0.05
    """Fraction of the held-out prompts that may appear in the training texts."""

    @model_validator(mode="after")
    def _answers_for_sft(self) -> "OfflineStage":
        if not isinstance(self, SftStage):
            refuse_answers([*self.data, *self.heldout], "preference")
        refuse_unfit(self, watched=bool(self.heldout) and self.eval_every > 0)
        if self.mix_cap is not None and len(self.data) < 2:
            raise ValueError("'mix_cap' has no effect on a single dataset; remove it")
        if self.mix_cap is not None and any(spec.weight != 1.0 for spec in self.data):
            raise ValueError("'mix_cap' sets the weights of the mixture; remove 'weight' or it")
        return self


class BaseStage(StageSpec):
    """Import a model (``path``), or build and pretrain a small one (``build``)."""

    produces: ClassVar[str] = "policy"
    module: ClassVar[str] = "base_model"
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
    dtype: Dtype = "float32"

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

    module: ClassVar[str] = "sft"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss",)
    kind: Literal["sft"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of each target spread evenly over the vocabulary (arXiv:1512.00567 section 7)."""


class DpoStage(OfflineStage):
    """Direct preference optimization (arXiv:2305.18290) and related losses."""

    module: ClassVar[str] = "dpo"
    family: ClassVar = "policy"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy", "eval/margin", "eval/chosen_logprob")
    kind: Literal["dpo"]
    beta: Positive = 0.1
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "simpo", "orpo"] = "sigmoid"
    """``sigmoid_norm``, ``ipo``, ``simpo`` and ``orpo`` compare means per token, the others sums;
    ``simpo`` and ``orpo`` need no reference."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    gamma: Annotated[float, Field(ge=0.0)] | None = None
    """Margin of simpo between chosen and rejected (arXiv:2405.14734); None is beta / 2."""
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
    """Learn from single responses labeled good or bad (KTO, arXiv:2402.01306)."""

    module: ClassVar[str] = "kto"
    family: ClassVar = "policy"
    heldout_metrics: ClassVar = ("eval/loss", "eval/kl", "eval/good_reward", "eval/bad_reward")
    kind: Literal["kto"]
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Responses per optimizer step over all ranks; their mean is the loss's reference point."""

    @model_validator(mode="after")
    def _legal(self) -> "KtoStage":
        refuse_dropout(self.tuning)
        return self


class RewardStage(OfflineStage):
    """Train a reward model (arXiv:1706.03741; centering: arXiv:2312.09244)."""

    produces: ClassVar[str] = "reward_model"
    module: ClassVar[str] = "reward.stage"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "reward"
    kind: Literal["reward"]
    init: Annotated[str, Ref("policy", "encoder")]
    supervision: Literal["pairs", "answers", "steps"] = "pairs"
    """``pairs``: Bradley-Terry; ``answers``: labeled responses (balanced cross-entropy);
    ``steps``: labeled steps of a solution (process reward model, arXiv:2305.20050)."""
    center_coef: Annotated[float, Field(ge=0.0)] = 0.01
    use_margin: bool = False
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
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
    """Number of rows of ``data`` whose responses set the mean and std of the scores."""
    norm_sampling: SamplingSpec | None = None
    """Normalize on responses sampled from ``init`` instead of those of the data
    (arXiv:1909.08593 section 2)."""

    @model_validator(mode="after")
    def _has_effect(self) -> "RewardStage":
        if self.supervision != "pairs":
            only = ("center_coef", "use_margin", "label_smoothing", "tie_margin", "noise_folds")
            self._refuse(only, f"with supervision {self.supervision}")
        if self.supervision == "steps":
            # A process reward is a probability: it is not normalized.
            self._refuse(("heads", "norm_prompts", "norm_sampling"), "with supervision steps")
        else:
            self._refuse(("step_separator",), "without supervision: steps")
        if self.noise_folds == 1:
            raise ValueError("noise_folds: one fold has no others to train on; give 2 or more")
        if self.tie_margin is not None and (self.use_margin or self.label_smoothing):
            raise ValueError("'tie_margin' cannot be combined with use_margin or label_smoothing")
        if self.norm_sampling is not None and self.norm_prompts == 0:
            raise ValueError("'norm_sampling' has no effect with norm_prompts 0; remove it")
        return self

    def _refuse(self, names: tuple[str, ...], when: str) -> None:
        fields = type(self).model_fields
        changed = [name for name in names if getattr(self, name) != fields[name].default]
        if changed:
            raise ValueError(f"{', '.join(changed)} has no effect {when}; remove it")


class EncoderStage(StageSpec):
    """Import an encoder such as BERT for classify and reward stages; it cannot generate."""

    produces: ClassVar[str] = "encoder"
    module: ClassVar[str] = "encoder"
    kind: Literal["encoder"]
    path: str
    """Folder or hub id of a transformers model."""


class ClassifyStage(OfflineStage):
    """Train a text classifier: a new head on a decoder or an encoder."""

    produces: ClassVar[str] = "classifier"
    module: ClassVar[str] = "classify"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "classify"
    kind: Literal["classify"]
    init: Annotated[str, Ref("policy", "encoder")]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of each target spread evenly over the classes (arXiv:1512.00567 section 7)."""
