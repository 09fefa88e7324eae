"""Schema of what every stage has, of the base stage and of the offline stages."""

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
    """Begin with the top layer and thaw the next one below it every so often."""

    every_steps: Count
    """Optimiser steps between two thaws."""


class LayersSpec(Spec):
    """Freeze layers, thaw them from the top, train lower ones more slowly (arXiv:1801.06146).

    Layers are the decoder's blocks, counted from 0 at the bottom. What stands above them (final
    norm, head, an adapter outside of the blocks) counts with the top layer; the embeddings, and
    with them a tied head, lie below layer 0.
    """

    freeze_first: Annotated[int, Field(ge=0)] = 0
    """Lowest layers that never train."""
    freeze_embeddings: bool = False
    unfreeze: UnfreezeSpec | None = None
    rate_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of a layer as a share of that of the layer above it."""

    @model_validator(mode="after")
    def _has_effect(self) -> "LayersSpec":
        if self == LayersSpec.model_construct():
            raise ValueError("the block changes nothing; give one of its keys, or remove it")
        return self


def refuse_outside(layers: LayersSpec | None, tuning: TuningSpec) -> None:
    """Raise ValueError where nothing that trains belongs to what the block speaks of."""
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
    """End the stage when a held-out number no longer gets better; the best weights are kept."""

    metric: str = "eval/loss"
    """A loss, a KL, a calibration error and the reward of bad answers are better when lower,
    everything else when higher."""
    patience: Count = 3
    """Evaluations in a row without a gain, after which the stage ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest gain that counts, in the metric's unit."""


class EwcSpec(Spec):
    """Pull weights that an old task needs back to where they were (arXiv:1612.00796 eq. 3)."""

    coef: Positive
    """Lambda. The Fisher information is scaled to mean 1, so 1 is a plain L2 pull of 1/2."""
    data: list[DataSpec] = Field(min_length=1)
    """Supervised rows of the old task; each costs one backward pass before the first step."""
    cap: Annotated[float, Field(gt=1.0)] = 10.0
    """Largest Fisher information of a weight, in units of the mean."""


class AugmentSpec(Spec):
    """Reword what the user says, anew in each epoch; answers are never touched."""

    word_dropout: Rate = 0.0
    """Chance of each word of a user turn to be left out; one word always stays."""
    templates: list[str] = []
    """Frames around a user turn, each with ``{text}`` once; one is drawn for each row."""


class KeepSpec(Spec):
    """Gather what keeps a model from forgetting and from over-fitting; all off by default."""

    dropout: Rate = 0.0
    early_stopping: EarlyStoppingSpec | None = None
    ewc: EwcSpec | None = None
    augment: AugmentSpec | None = None


class StageSpec(Spec):
    """Base of every stage: what its kind is to the others, and how its processes are started."""

    produces: ClassVar[str]
    """Kind of the artifact that it writes."""
    module: ClassVar[str]
    """Module of ``align.stages`` whose ``prepare(spec, context)`` makes the stage ready."""
    if TYPE_CHECKING:  # each class has its own
        kind: str
    ranks: Count = 1
    threads: Count | None = None
    """CPU threads of each rank; None divides the cores among the ranks of this node."""
    seed: int | None = None


class TrainingStage(StageSpec):
    """Hold what every training stage shares."""

    produces: ClassVar[str] = "policy"
    family: ClassVar[Literal["supervised", "policy"]]
    """It learns right answers, or a policy that is held against its reference. The family sets
    the learning rates that are known to work."""
    heldout_metrics: ClassVar[tuple[str, ...]] = ()
    """Numbers that it measures on held-out rows while it trains."""
    new_head: ClassVar[str | None] = None
    """The stage's kind where its model loses the language head for a new one."""
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
        refuse_outside(self.layers, self.tuning)
        if self.gradient_checkpointing:
            refuse_checkpointing(self.tuning)
        return self


def refuse_unfit(stage: TrainingStage, *, watched: bool) -> None:
    """Raise ValueError for a setting of ``keep`` that has no effect, or a wrong one, in a stage.

    Args:
        stage: the stage. watched: it looks at held-out rows while it trains.
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
            "keep.early_stopping watches held-out rows; an online stage is watched and stopped by "
            "'watch' with 'guard'"
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
            "keep.ewc protects what a language model says; "
            f"a {stage.kind} stage gives it up for a score"
        )
    if stage.tuning.method != "full":
        raise ValueError(
            f"keep.ewc pulls the weights of the model back, which {stage.tuning.method} tuning "
            "leaves as they are; use full tuning, or remove it"
        )
    refuse_answers(ewc.data, "ewc")


def _refuse_augment(augment: AugmentSpec, kind: str) -> None:
    if kind != "sft":
        raise ValueError(
            f"keep.augment rewords the rows of an sft stage anew in each epoch; a {kind} stage "
            "takes its rows as they stand; remove it"
        )
    if augment == AugmentSpec():
        raise ValueError("keep.augment changes nothing; give word_dropout or templates")
    for template in augment.templates:
        if template.count("{text}") != 1:
            raise ValueError(f"keep.augment.templates: {template!r} must hold {{text}} once")


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
        refuse_unfit(self, watched=bool(self.heldout) and self.eval_every > 0)
        if self.mix_cap is not None and len(self.data) < 2:
            raise ValueError("'mix_cap' has no effect on one data set; remove it")
        if self.mix_cap is not None and any(spec.weight != 1.0 for spec in self.data):
            raise ValueError("'mix_cap' sets the weights of the mixture; remove 'weight' or it")
        return self


class BaseStage(StageSpec):
    """Bring in a model (``path``) or build and pretrain a small one (``build``)."""

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
    """Share of each target spread evenly over the vocabulary (arXiv:1512.00567 section 7)."""


class DpoStage(OfflineStage):
    """Direct preference optimisation (arXiv:2305.18290) and close relatives."""

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

    module: ClassVar[str] = "kto"
    family: ClassVar = "policy"
    heldout_metrics: ClassVar = ("eval/loss", "eval/kl", "eval/good_reward", "eval/bad_reward")
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


class RewardStage(OfflineStage):
    """Train a reward model (arXiv:1706.03741; centring arXiv:2312.09244)."""

    produces: ClassVar[str] = "reward_model"
    module: ClassVar[str] = "reward.stage"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "reward"
    kind: Literal["reward"]
    init: Annotated[str, Ref("policy", "encoder")]
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
            only = ("center_coef", "use_margin", "label_smoothing", "tie_margin", "noise_folds")
            self._refuse(only, f"with supervision {self.supervision}")
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


class EncoderStage(StageSpec):
    """Bring in an encoder such as BERT, which cannot generate: for classify and reward stages."""

    produces: ClassVar[str] = "encoder"
    module: ClassVar[str] = "encoder"
    kind: Literal["encoder"]
    path: str
    """Folder or hub id in the format of transformers."""


class ClassifyStage(OfflineStage):
    """Sort texts into classes with a new head on a decoder or an encoder."""

    produces: ClassVar[str] = "classifier"
    module: ClassVar[str] = "classify"
    family: ClassVar = "supervised"
    heldout_metrics: ClassVar = ("eval/loss", "eval/accuracy")
    new_head: ClassVar[str | None] = "classify"
    kind: Literal["classify"]
    init: Annotated[str, Ref("policy", "encoder")]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target spread evenly over the classes (arXiv:1512.00567 section 7)."""
